with flights as (
    select * from {{ ref('int_flights') }}
),

airports as (
    select * from {{ ref('stg_airports') }}
)

select
    flights.origin_airport_code,
    flights.destination_airport_code,
    airports.airport_name as destination_airport_name,
    max(flights.distance_miles)::integer as distance_miles,
    count(distinct flights.carrier_code)::integer as carrier_count,
    count(*)::integer as flight_count,
    avg(flights.is_cancelled::integer)::numeric(5, 4) as cancelled_share,
    avg(flights.arrived_on_time::integer)::numeric(5, 4) as arrived_on_time_share,
    avg(flights.arrival_delay_minutes)::numeric(7, 2) as mean_arrival_delay_minutes,
    avg(flights.air_time_minutes)::numeric(7, 2) as mean_air_time_minutes
from flights
-- Four destinations (in Puerto Rico and the Virgin Islands) are not in the list of airports.
left join airports on flights.destination_airport_code = airports.airport_code
group by
    flights.origin_airport_code,
    flights.destination_airport_code,
    airports.airport_name
