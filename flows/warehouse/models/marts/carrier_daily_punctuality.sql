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

airlines as (
    select * from {{ ref('stg_airlines') }}
)

select
    flights.flight_date,
    flights.carrier_code,
    airlines.carrier_name,
    count(*)::integer as flight_count,
    (count(*) filter (where flights.is_cancelled))::integer as cancelled_count,
    (count(*) filter (where flights.is_diverted))::integer as diverted_count,
    avg(flights.departed_on_time::integer)::numeric(5, 4) as departed_on_time_share,
    avg(flights.arrived_on_time::integer)::numeric(5, 4) as arrived_on_time_share,
    avg(flights.departure_delay_minutes)::numeric(7, 2) as mean_departure_delay_minutes,
    avg(flights.arrival_delay_minutes)::numeric(7, 2) as mean_arrival_delay_minutes,
    flights.load_id
from flights
inner join days on flights.flight_date = days.load_day
left join airlines on flights.carrier_code = airlines.carrier_code
group by flights.flight_date, flights.carrier_code, airlines.carrier_name, flights.load_id
