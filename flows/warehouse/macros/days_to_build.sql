{#
  The days that an incremental model must build: on a first build all that are loaded, later those
  whose load is not the one that {{ this }} was built from. A day that was loaded late, loaded
  again, or left out because a run died is found by itself, whatever its date.

  The model needs the columns flight_date and load_id.
#}
{% macro days_to_build() %}
    select loads.load_day
    from {{ ref('stg_loads') }} as loads
    {% if is_incremental() %}
        where not exists (
            select 1
            from {{ this }} as built
            where built.flight_date = loads.load_day and built.load_id = loads.load_id
        )
    {% endif %}
{% endmacro %}
