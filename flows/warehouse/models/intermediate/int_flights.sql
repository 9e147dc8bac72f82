{{
    config(
        materialized='incremental',
        incremental_strategy='delete+insert',
        unique_key='flight_date',
        on_schema_change='append_new_columns',
        indexes=[{'columns': ['flight_date']}],
    )
}}

with days as (
    {{ days_to_build() }}
),

loads as (
    select * from {{ ref('stg_loads') }}
),

flights as (
    select * from {{ ref('stg_flights') }}
),

weather as (
    select * from {{ ref('stg_weather') }}
)

select
    flights.*,
    weather.precipitation_inches,
    weather.visibility_miles,
    weather.wind_speed_mph,
    loads.load_id,
    -- The US Department of Transportation's definition: on time is less than 15 minutes late.
    coalesce(flights.departure_delay_minutes < 15, false) as departed_on_time,
    coalesce(flights.arrival_delay_minutes < 15, false) as arrived_on_time,
    flights.scheduled_departure_at
    + make_interval(mins => flights.departure_delay_minutes) as departed_at,
    case
        when weather.observed_hour is null then 'unknown'
        when weather.visibility_miles < 3 and weather.precipitation_inches > 0 then 'storm'
        when weather.visibility_miles < 3 then 'fog'
        when weather.precipitation_inches > 0 then 'rain or snow'
        when weather.wind_speed_mph >= 20 then 'wind'
        else 'fair'
    end as weather_condition
from flights
inner join days on flights.flight_date = days.load_day
inner join loads on flights.flight_date = loads.load_day
left join weather
    on
        flights.origin_airport_code = weather.airport_code
        and flights.scheduled_hour = weather.observed_hour
