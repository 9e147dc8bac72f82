with source as (
    select * from {{ source('raw', 'planes') }}
)

select
    tailnum as tail_number,
    year as built_year,
    manufacturer,
    model,
    engines as engine_count,
    seats as seat_count
from source
