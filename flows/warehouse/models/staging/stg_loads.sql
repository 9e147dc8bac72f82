with source as (
    select * from {{ source('raw', 'loads') }}
)

select
    day as load_day,
    load_id,
    flights as flight_count,
    weather as observation_count,
    loaded_at
from source
