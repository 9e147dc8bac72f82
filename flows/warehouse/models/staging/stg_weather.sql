with source as (
    select * from {{ source('raw', 'weather') }}
)

select
    origin as airport_code,
    weather_date as observation_date,
    time_hour as observed_hour,
    temp as temperature_fahrenheit,
    wind_speed as wind_speed_mph,
    wind_gust as wind_gust_mph,
    precip as precipitation_inches,
    visib as visibility_miles
from source
