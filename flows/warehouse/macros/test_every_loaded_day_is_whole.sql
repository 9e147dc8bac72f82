{# Test that the model has as many rows of each loaded day as the load counted. #}
{% test every_loaded_day_is_whole(model) %}
    select
        loads.load_day,
        loads.flight_count,
        count(model.flight_date) as row_count
    from {{ ref('stg_loads') }} as loads
    left join {{ model }} as model on loads.load_day = model.flight_date
    group by loads.load_day, loads.flight_count
    having count(model.flight_date) <> loads.flight_count
{% endtest %}
