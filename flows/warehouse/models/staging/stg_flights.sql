with source as (
    select * from {{ source('raw', 'flights') }}
)

select
    flight_date,
    carrier as carrier_code,
    flight as flight_number,
    tailnum as tail_number,
    origin as origin_airport_code,
    dest as destination_airport_code,
    -- The source has the hour in UTC, so the local time is right on both days on which the clocks change.
    time_hour as scheduled_hour,
    time_hour at time zone 'America/New_York' + make_interval(mins => minute) as scheduled_departure_at,
    dep_delay as departure_delay_minutes,
    arr_delay as arrival_delay_minutes,
    air_time as air_time_minutes,
    distance as distance_miles,
    dep_time is null as is_cancelled,
    dep_time is not null and arr_delay is null as is_diverted
from source
