{# Test that the column flight_count adds up to the flights of all loaded days. #}
{% test every_flight_is_counted(model) %}
    select
        counted.flight_count as counted,
        loaded.flight_count as loaded
    from (select coalesce(sum(flight_count), 0) as flight_count from {{ model }}) as counted
    cross join (
        select coalesce(sum(flight_count), 0) as flight_count from {{ ref('stg_loads') }}
    ) as loaded
    where counted.flight_count <> loaded.flight_count
{% endtest %}
