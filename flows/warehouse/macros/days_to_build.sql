{#
  Select the days that an incremental model must build: on the first build all loaded days, later
  those whose load_id differs from the one that {{ this }} was built from. This includes days that
  were loaded late, loaded again, or not built because a run was killed, whatever their date.

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
