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

planes as (
    select * from {{ ref('stg_planes') }}
)

select
    flights.flight_date,
    flights.tail_number,
    planes.manufacturer,
    planes.model,
    planes.seat_count::integer as seat_count,
    count(*)::integer as departure_count,
    sum(flights.distance_miles)::integer as distance_miles,
    coalesce(sum(flights.air_time_minutes), 0)::integer as air_time_minutes,
    (sum(flights.distance_miles) * planes.seat_count)::bigint as seat_miles,
    flights.load_id
from flights
inner join days on flights.flight_date = days.load_day
left join planes on flights.tail_number = planes.tail_number
where flights.tail_number is not null and not flights.is_cancelled
group by
    flights.flight_date,
    flights.tail_number,
    planes.manufacturer,
    planes.model,
    planes.seat_count,
    flights.load_id
