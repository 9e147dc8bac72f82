with flights as (
    select * from {{ ref('int_flights') }}
),

by_condition as (
    select
        origin_airport_code as airport_code,
        weather_condition,
        count(*)::integer as flight_count,
        avg(is_cancelled::integer)::numeric(5, 4) as cancelled_share,
        avg(departed_on_time::integer)::numeric(5, 4) as departed_on_time_share,
        avg(departure_delay_minutes)::numeric(7, 2) as mean_departure_delay_minutes
    from flights
    group by origin_airport_code, weather_condition
),

fair as (
    select * from by_condition
    where weather_condition = 'fair'
)

select
    by_condition.airport_code,
    by_condition.weather_condition,
    by_condition.flight_count,
    by_condition.cancelled_share,
    by_condition.departed_on_time_share,
    by_condition.mean_departure_delay_minutes,
    (by_condition.mean_departure_delay_minutes - fair.mean_departure_delay_minutes)::numeric(7, 2)
        as added_departure_delay_minutes
from by_condition
left join fair on by_condition.airport_code = fair.airport_code
