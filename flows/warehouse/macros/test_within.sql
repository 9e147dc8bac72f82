{# Test that values that are not null lie between two bounds, both included. #}
{% test within(model, column_name, lowest, highest) %}
    select {{ column_name }}
    from {{ model }}
    where {{ column_name }} < {{ lowest }} or {{ column_name }} > {{ highest }}
{% endtest %}
