{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='flight_date',
        on_schema_change='append_new_columns',
    )
}}

with days as (
    {{ days_to_build() }}
),

flights as (
    select * from {{ ref('int_flights') }}
),

airports as (
    select * from {{ ref('stg_airports') }}
)

select
    flights.flight_date,
    flights.origin_airport_code as airport_code,
    airports.airport_name,
    count(*)::integer as flight_count,
    (count(*) filter (where flights.is_cancelled))::integer as cancelled_count,
    (count(*) filter (where flights.departure_delay_minutes >= 15))::integer as delayed_count,
    avg(flights.departure_delay_minutes)::numeric(7, 2) as mean_departure_delay_minutes,
    (percentile_cont(0.9) within group (order by flights.departure_delay_minutes))::numeric(7, 2)
        as p90_departure_delay_minutes,
    max(flights.departure_delay_minutes)::integer as longest_departure_delay_minutes,
    flights.load_id
from flights
inner join days on flights.flight_date = days.load_day
left join airports on flights.origin_airport_code = airports.airport_code
group by flights.flight_date, flights.origin_airport_code, airports.airport_name, flights.load_id
