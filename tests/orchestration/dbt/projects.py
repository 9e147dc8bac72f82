"""Real dbt projects to test against, what can go wrong in them, and dbt's own command line as the judge.

Every project is made of files in a folder, reads `flows/warehouse/profiles.yml`, needs no network and
runs in a second or two. The environment is that of `orchestration.warehouse.environment()`; another
`WAREHOUSE_SCHEMA` in it keeps two runs in one database apart.
"""

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg

from orchestration.settings import ROOT
from tests.orchestration.dbt import versions
from tests.parts import Query

PROFILE = (ROOT / "flows" / "warehouse" / "profiles.yml").read_text()

# In these projects a generic test has the key `arguments`, which not every version of dbt requires.
_FLAGS = "flags: {send_anonymous_usage_stats: false, require_generic_test_arguments_property: true}\n"


# --- a project with every kind of node ---------------------------------------------------------

FUNCTIONS = int(versions.minor() >= (1, 11))
"""How many functions `every_kind` has: functions exist since dbt 1.11."""

OUTCOMES: Mapping[tuple[str, str], int] = {
    ("exposure", "no-op"): 1,
    **({("function", "success"): FUNCTIONS} if FUNCTIONS else {}),
    ("model", "success"): 18 + FUNCTIONS,
    ("operation", "success"): 4,
    ("saved_query", "no-op"): 1,
    ("seed", "success"): 2,
    ("snapshot", "success"): 2,
    ("test", "pass"): 16,
    ("test", "warn"): 2,
    ("unit_test", "pass"): 2,
}
"""Nodes by kind and status in a clean `dbt build` of `every_kind`."""

NODES = sum(OUTCOMES.values())
"""Number of nodes in the results of a clean `dbt build` of `every_kind`, with hooks."""

_EVERY_KIND = {
    "dbt_project.yml": f"""
name: shop
version: "1.0"
config-version: 2
profile: warehouse
{_FLAGS}
on-run-start:
  - "{{{{ make_visits() }}}}"
  - "select 1 as started"
on-run-end:
  - "{{{{ count_results(results) }}}}"
  - "select 1 as ended"
""",
    # --- seeds
    "seeds/customers.csv": """
id,name,country,tier
1,Ada,GB,gold
2,Blaise,FR,silver
3,Carl,DE,gold
4,Emmy,DE,silver
""",
    "seeds/orders.csv": """
id,customer_id,amount,ordered_on,status
1,1,10,2024-02-01,paid
2,1,20,2024-05-01,paid
3,2,5,2025-02-01,open
4,3,40,2025-03-01,paid
5,4,8,2025-04-01,paid
""",
    "seeds/seeds.yml": """
version: 2
seeds:
  - name: customers
    description: "{{ doc('people') }}"
    config:
      column_types: {id: integer, name: text, country: text, tier: text}
    columns:
      - name: id
        data_tests: [unique]
  - name: orders
    config:
      column_types: {id: integer, customer_id: integer, amount: integer, ordered_on: date}
""",
    # --- the source; its table is made by the first on-run-start hook
    "models/sources.yml": """
version: 2
sources:
  - name: raw
    schema: "{{ target.schema }}"
    tables:
      - name: visits
        description: Made by the on-run-start hook `make_visits`.
        config:
          loaded_at_field: loaded_at
          freshness:
            warn_after: {count: 1, period: day}
            error_after: {count: 2, period: day}
        columns:
          - name: id
            data_tests: [not_null]
""",
    "macros/make_visits.sql": """
{% macro make_visits() %}
create schema if not exists {{ target.schema }};
create table if not exists {{ target.schema }}.visits (id integer, customer_id integer, loaded_at timestamptz);
truncate {{ target.schema }}.visits;
insert into {{ target.schema }}.visits
select n, 1 + n % 4, now() from generate_series(1, 8) as n
{% endmacro %}
""",
    "macros/count_results.sql": """
{% macro count_results(results) %}
select {{ results | length }} as counted
{% endmacro %}
""",
    "macros/cents.sql": """
{% macro cents(column) %}({{ column }} * 100){% endmacro %}
""",
    "macros/greet.sql": """
{% macro greet() %}
{% do run_query("select 1 as greeted") %}
{% endmacro %}
""",
    "functions/doubled.sql": "select amount * 2",
    "functions/functions.yml": """
functions:
  - name: doubled
    description: Twice as much.
    arguments: [{name: amount, data_type: integer}]
    returns: {data_type: integer}
""",
    # --- models
    "models/clean_customers.sql": "select id, name, country, tier from {{ ref('customers') }}",
    "models/clean_orders.sql": """
{{ config(event_time='ordered_on') }}
select id, customer_id, amount, ordered_on, status from {{ ref('orders') }}
""",
    "models/clean_visits.sql": "select id, customer_id from {{ source('raw', 'visits') }}",
    "models/paid.sql": """
{{ config(materialized='ephemeral') }}
select id, customer_id, amount, ordered_on from {{ ref('clean_orders') }} where status = 'paid'
""",
    "models/germans.sql": """
{{ config(materialized='ephemeral') }}
select id, name from {{ ref('clean_customers') }} where country = 'DE'
""",
    "models/german_names.sql": "{{ config(materialized='table') }}\nselect name from {{ ref('germans') }}",
    "models/paid_orders.sql": """
{{ config(materialized='table', pre_hook='select 1 as before', post_hook='analyze {{ this }}') }}
select id, customer_id, amount, {{ cents('amount') }} as cents, ordered_on from {{ ref('paid') }}
""",
    "models/customer_totals.sql": """
{{ config(materialized='table') }}
select customers.id, customers.name, coalesce(sum(orders.amount), 0)::integer as total
from {{ ref('clean_customers') }} as customers
left join {{ ref('paid_orders') }} as orders on orders.customer_id = customers.id
group by customers.id, customers.name
""",
    "models/countries.sql": """
{{ config(materialized='table', group='finance', access='private') }}
select country, count(*)::integer as customers from {{ ref('clean_customers') }} group by country
""",
    "models/large_countries.sql": """
{{ config(group='finance') }}
select country, customers from {{ ref('countries') }} where customers > 1
""",
    "models/revenue_by_day.sql": """
{{ config(materialized='materialized_view') }}
select ordered_on, sum(amount) as revenue from {{ ref('paid_orders') }} group by ordered_on
""",
    "models/order_log.sql": """
{{ config(materialized='incremental', unique_key='id', incremental_strategy='delete+insert') }}
select id, amount from {{ ref('paid_orders') }}
{% if is_incremental() %}where id >= (select max(id) from {{ this }}){% endif %}
""",
    "models/order_book.sql": """
{{ config(materialized='incremental', unique_key='id', incremental_strategy='merge') }}
select id, status from {{ ref('clean_orders') }}
""",
    "models/order_list.sql": """
{{ config(materialized='incremental', incremental_strategy='append') }}
select id from {{ ref('clean_orders') }}
{% if is_incremental() %}where id > (select max(id) from {{ this }}){% endif %}
""",
    # A batch is a year, as there is one for each period since the first.
    "models/yearly_orders.sql": """
{{ config(
    materialized='incremental', incremental_strategy='microbatch', unique_key='id',
    event_time='ordered_on', begin='2024-01-01', batch_size='year', lookback=3
) }}
select id, amount, ordered_on from {{ ref('clean_orders') }}
""",
    "models/tier_names_v1.sql": "{{ config(materialized='table') }}\nselect distinct tier from {{ ref('customers') }}",
    "models/tier_names_v2.sql": """
{{ config(materialized='table') }}
select distinct tier, upper(tier) as title from {{ ref('customers') }}
""",
    "models/tier_titles.sql": """
select latest.tier, latest.title
from {{ ref('tier_names') }} as latest
inner join {{ ref('tier_names', v=1) }} as first on first.tier = latest.tier
""",
    "models/doubled_amounts.sql": """
{{ config(materialized='table') }}
select id, {{ function('doubled') }}(amount) as amount from {{ ref('paid_orders') }}
""",
    "models/days.sql": """
{{ config(materialized='table') }}
select day::date as day from generate_series(date '2024-01-01', date '2024-01-31', interval '1 day') as day
""",
    "models/visits_by_customer.sql": """
select customer_id, count(*) as visits from {{ ref('clean_visits') }} group by customer_id
""",
    "models/retired.sql": "{{ config(enabled=false) }}\nselect 1 as id",
    "models/docs.md": """
{% docs people %}
People who buy.
{% enddocs %}
""",
    "models/models.yml": """
version: 2
groups:
  - name: finance
    owner: {name: Finance}
models:
  - name: clean_customers
    description: "{{ doc('people') }}"
    columns:
      - name: id
        data_tests: [not_null, unique]
      - name: tier
        data_tests:
          - accepted_values:
              arguments: {values: [gold, silver]}
      - name: country
        data_tests:
          - accepted_values:
              name: only_germans
              arguments: {values: [DE]}
              config: {severity: warn}
  - name: clean_orders
    columns:
      - name: customer_id
        data_tests:
          - relationships:
              arguments: {to: ref('clean_customers'), field: id}
      - name: amount
        data_tests:
          - positive
          - not_null: {config: {where: "status = 'paid'"}}
  - name: paid
    columns:
      - name: id
        data_tests: [unique]
  - name: paid_orders
    columns:
      - name: id
        data_tests:
          - not_null: {config: {store_failures: true}}
  - name: customer_totals
    config:
      contract: {enforced: true}
    columns:
      - {name: id, data_type: integer, constraints: [{type: not_null}, {type: primary_key}]}
      - {name: name, data_type: text}
      - {name: total, data_type: integer, data_tests: [positive]}
  - name: order_log
    columns:
      - name: id
        data_tests: [unique]
  - name: tier_names
    latest_version: 2
    columns:
      - name: tier
        data_tests: [unique]
    versions: [{v: 1}, {v: 2}]
  - name: days
    time_spine: {standard_granularity_column: day}
    columns:
      - {name: day, granularity: day}
""",
    "models/unit_tests.yml": """
version: 2
unit_tests:
  - name: unpaid_is_zero
    model: customer_totals
    given:
      - input: ref('clean_customers')
        rows: [{id: 1, name: Ada}, {id: 2, name: Blaise}]
      - input: ref('paid_orders')
        rows: [{customer_id: 1, amount: 3}, {customer_id: 1, amount: 4}]
    expect:
      rows: [{id: 1, name: Ada, total: 7}, {id: 2, name: Blaise, total: 0}]
  - name: visits_are_counted
    model: visits_by_customer
    given:
      - input: ref('clean_visits')
        format: csv
        fixture: three_visits
    expect:
      rows: [{customer_id: 1, visits: 2}, {customer_id: 2, visits: 1}]
""",
    "tests/fixtures/three_visits.csv": "id,customer_id\n1,1\n2,1\n3,2\n",
    "models/metrics.yml": """
version: 2
semantic_models:
  - name: order_facts
    model: ref('paid_orders')
    defaults: {agg_time_dimension: ordered_on}
    entities: [{name: order, type: primary, expr: id}]
    dimensions: [{name: ordered_on, type: time, type_params: {time_granularity: day}}]
    measures: [{name: amount_sum, agg: sum, expr: amount}]
metrics:
  - {name: revenue, label: Revenue, type: simple, type_params: {measure: amount_sum}}
saved_queries:
  - name: daily_revenue
    query_params: {metrics: [revenue], group_by: ["TimeDimension('order__ordered_on', 'day')"]}
""",
    "models/exposures.yml": """
version: 2
exposures:
  - name: board_report
    type: dashboard
    owner: {name: Board, email: board@example.com}
    depends_on: ["ref('customer_totals')", "source('raw', 'visits')"]
""",
    # --- snapshots, analyses and tests
    "snapshots/customer_history.sql": """
{% snapshot customer_history %}
{{ config(unique_key='id', strategy='check', check_cols=['name', 'tier']) }}
select id, name, tier from {{ ref('clean_customers') }}
{% endsnapshot %}
""",
    "snapshots/snapshots.yml": """
version: 2
snapshots:
  - name: order_history
    relation: ref('orders')
    config: {unique_key: id, strategy: check, check_cols: [status]}
    columns:
      - name: id
        data_tests: [not_null]
""",
    "analyses/best_customers.sql": "select name from {{ ref('customer_totals') }} order by total desc limit 3",
    "tests/generic/positive.sql": """
{% test positive(model, column_name) %}
select {{ column_name }} from {{ model }} where {{ column_name }} < 0
{% endtest %}
""",
    "tests/totals_add_up.sql": """
select 1 as different
where (select sum(total) from {{ ref('customer_totals') }}) <> (select sum(amount) from {{ ref('paid_orders') }})
""",
    "tests/open_orders.sql": """
{{ config(severity='warn') }}
select id from {{ ref('clean_orders') }} where status = 'open'
""",
}


def every_kind(folder: Path) -> Path:
    """Write a project with every resource type that dbt has on Postgres; its folder.

    A clean `dbt build` succeeds with the outcomes of `OUTCOMES`: two data tests warn on purpose. The
    source's table is made by the first on-run-start hook. `greet` is a macro for `run-operation`, the
    model `retired` is disabled, the analysis is compiled only.
    """
    _write(folder, _EVERY_KIND)
    if not FUNCTIONS:
        without_functions(folder)
    return folder


def without_functions(folder: Path) -> None:
    """Take the function out of `every_kind`, and the model that calls the function."""
    shutil.rmtree(folder / "functions")
    (folder / "models" / "doubled_amounts.sql").unlink()


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, content in {"profiles.yml": PROFILE, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.lstrip("\n"))
    return folder


# --- faults ------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """An edit of `every_kind` that makes one node fail."""

    file: str
    old: str
    new: str
    node: str
    """The unique id of the node that fails."""
    status: str
    """dbt's status of the failed node."""

    def inject(self, folder: Path) -> None:
        """Edit the project in a folder."""
        replace(folder, self.file, self.old, self.new)


FAULTS: dict[str, Fault] = {
    # The database refuses a table; dbt skips the models that read the table.
    "model": Fault(
        "models/countries.sql", "select country,", "select country, continent,", "model.shop.countries", "error"
    ),
    # dbt raises before it has SQL to send.
    "macro": Fault(
        "models/german_names.sql", "select name", "select {{ named() }}", "model.shop.german_names", "error"
    ),
    # One batch of several divides by zero.
    "batch": Fault(
        "models/yearly_orders.sql", "select id, amount", "select id, amount / (amount - 40) as amount",
        "model.shop.yearly_orders", "partial success",
    ),
    # A data test finds rows: the model that reads the tested one is skipped.
    "data test": Fault(
        "models/tier_names_v2.sql", "select distinct", "select",
        "test.shop.unique_tier_names_v2_tier.b94bf5a789", "fail",
    ),
    # A test that finds more rows than the log shows.
    "singular test": Fault(
        "tests/totals_add_up.sql",
        "select 1 as different\nwhere", "select generate_series(1, 12) as different\nwhere 1 +",
        "test.shop.totals_add_up", "fail",
    ),
    # dbt runs a unit test before its model, which is skipped.
    "unit test": Fault(
        "models/unit_tests.yml", "visits: 2", "visits: 3",
        "unit_test.shop.visits_by_customer.visits_are_counted", "fail",
    ),
    "snapshot": Fault(
        "snapshots/customer_history.sql", "select id,", "select id, colour,", "snapshot.shop.customer_history", "error"
    ),
    # A hook is not selected, and fails after all nodes are done.
    "hook": Fault(
        "dbt_project.yml", "select 1 as ended", "select ended", "operation.shop.shop-on-run-end-1", "error"
    ),
}  # fmt: skip
"""Faults by the kind of the failing node. They do not hide each other: one build has all of them."""

if FUNCTIONS:
    FAULTS["function"] = Fault("functions/doubled.sql", "amount * 2", "colour * 2", "function.shop.doubled", "error")


def replace(folder: Path, file: str, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a project's file."""
    content = (folder / file).read_text()
    assert old in content, f"{file} has no {old!r}"
    (folder / file).write_text(content.replace(old, new, 1))


# --- a project of three models -------------------------------------------------------------------


def small(folder: Path) -> Path:
    """Write a project of three models: a table, a view of the table, and an independent view; return its folder."""
    return _write(
        folder,
        {
            "dbt_project.yml": _project_file("small"),
            "models/one.sql": "{{ config(materialized='table') }}\nselect 1 as id",
            "models/two.sql": "select * from {{ ref('one') }}",
            "models/three.sql": "select 3 as id",
        },
    )


# --- a project for many commands -----------------------------------------------------------------


def _profile(schema: str) -> str:
    return PROFILE.replace("{{ env_var('WAREHOUSE_SCHEMA', 'analytics') }}", schema)


_TINY = {
    "dbt_project.yml": """
name: tiny
version: "1.0"
profile: warehouse
flags: {send_anonymous_usage_stats: false}
on-run-start: "select {{ var('started', 1) }} as started"
on-run-end: "select 1 as ended"
""",
    "profiles.yml": PROFILE + "    other:" + _profile("other").partition("    dev:")[2],
    "seeds/rates.csv": "id\n1\n2\n",
    "models/one.sql": "{{ config(materialized='table') }}\nselect id from {{ ref('rates') }}\n",
    "models/two.sql": "select id from {{ ref('one') }}\n",
    "models/three.sql": "{{ config(tags=['hourly']) }}\nselect {{ var('third', 3) }} as id\n",
    "models/models.yml": """
version: 2
models:
  - name: one
    columns: [{name: id, data_tests: [unique, {not_null: {name: ids_are_known, config: {severity: warn}}}]}]
sources:
  - name: server
    schema: pg_catalog
    tables:
      - name: databases
        identifier: pg_database
        config:
          loaded_at_field: now()
          freshness: {error_after: {count: 2, period: day}}
""",
    "snapshots/history.yml": """
snapshots:
  - {name: history, relation: ref('rates'), config: {unique_key: id, strategy: check, check_cols: all}}
""",
}


def tiny(folder: Path) -> Path:
    """Write a project with a few nodes, hooks, a source and a second target; return its folder.

    The target `other` builds into the schema `other`, the profile in the folder `elsewhere` into `elsewhere`.
    """
    return _write(folder, _TINY | {"elsewhere/profiles.yml": _profile("elsewhere")})


# --- projects of a given size ------------------------------------------------------------------

_WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel", "inlet", "juniper", "kelp", "lagoon")


_REJECTS: dict[str, object] = {"arguments": {"values": [-1]}}
_TESTS: Mapping[str, list[object]] = {
    "none": [],
    "not_null": ["not_null"],
    "unique": ["unique"],
    "both": ["not_null", "unique"],
    "failing": [{"accepted_values": _REJECTS}],
    "warning": [{"accepted_values": _REJECTS | {"config": {"severity": "warn"}}}],
}


def _name(number: int) -> str:
    return f"{_WORDS[number % len(_WORDS)]}_{number}"


def _project_file(name: str) -> str:
    return f'name: {name}\nversion: "1.0"\nconfig-version: 2\nprofile: warehouse\n{_FLAGS}'


def _model(materialized: str, number: int, parents: list[str]) -> str:
    """Return a model of three rows. It has subqueries, because Postgres plans joins of views of joins slowly."""
    terms = [str(number), *(f"(select max(value) from {{{{ ref('{parent}') }}}})" for parent in parents)]
    value = " + ".join(terms)
    options = ", unique_key='id'" if materialized == "incremental" else ""
    return (
        f"{{{{ config(materialized='{materialized}'{options}) }}}}\n"
        f"select id, (({value}) % 100 + id)::integer as value\n"
        "from generate_series(1, 3) as id\n"
    )


def random_dag(folder: Path, rng: random.Random, nodes: int) -> Path:
    """Write a project with a random graph, random tests and random failures; return its folder.

    A node is a view, table, ephemeral or incremental model, with up to three parents. Of a hundred models sixty have
    generic tests, of which five fail and ten warn. Three models select a missing column, and three divide by zero; a
    view divides when it is read. The graph is wide, because dbt skips the nodes behind a failure. The same `rng` gives
    the same files.

    Args:
        folder: the folder to write to.
        rng: the source of all random decisions.
        nodes: the number of models, without their tests.
    """
    files = {"dbt_project.yml": _project_file("random")}
    names: list[str] = []
    # The scans that a model unfolds into: views of views of views grow without bound.
    scans: dict[str, int] = {}
    properties: list[dict[str, object]] = []
    for number in range(nodes):
        name = _name(number)
        parents = rng.sample(names, min(len(names), rng.choice((0, 1, 1, 2, 2, 3))))
        unfolded = sum(scans[parent] for parent in parents)
        materialized = rng.choice(("view", "view", "table", "table", "ephemeral", "incremental"))
        if unfolded > 8:
            materialized = rng.choice(("table", "incremental"))
        scans[name] = max(unfolded, 1) if materialized in ("view", "ephemeral") else 1
        fault = rng.random()
        sql = _model(materialized, number, parents)
        if fault < 0.03:
            sql = sql.replace("select id,", "select id, missing,")
        elif fault < 0.06:
            sql = sql.replace("% 100 + id)", "/ (id - 2))")
        files[f"models/{name}.sql"] = sql
        names.append(name)
        (test,) = rng.choices(list(_TESTS), weights=[40, 15, 15, 15, 5, 10])
        properties.append({"name": name, "columns": [{"name": "id", "data_tests": _TESTS[test]}]})
    files["models/models.yml"] = json.dumps({"version": 2, "models": properties}, indent=2)
    return _write(folder, files)


def fast(folder: Path, nodes: int) -> Path:
    """Write the project of the benchmarks, a wide graph with little data and no failure; return its folder.

    A third of the nodes are models, in layers of views and tables in turn. A model reads up to four models of the layer
    above. Each model has a not_null and a unique test.

    Args:
        folder: the folder to write to.
        nodes: the number of nodes that a `dbt build` runs, with tests; 3 or more.
    """
    models = nodes // 3
    width = max(4, round(models**0.5))
    rng = random.Random(nodes)  # noqa: S311 - the same project each time
    files = {"dbt_project.yml": _project_file("fast")}
    properties = []
    for number in range(models):
        layer, position = divmod(number, width)
        above = [_name(other) for other in range((layer - 1) * width, layer * width)] if layer else []
        parents = rng.sample(above, min(len(above), 1 + position % 4))
        files[f"models/{_name(number)}.sql"] = _model("table" if layer % 2 else "view", number, parents)
        # The remainder of the division by three becomes further tests.
        more = [{"name": "value", "data_tests": ["not_null"]}] if number < nodes % 3 else []
        properties.append(
            {"name": _name(number), "columns": [{"name": "id", "data_tests": ["not_null", "unique"]}, *more]}
        )
    files["models/models.yml"] = json.dumps({"version": 2, "models": properties}, indent=2)
    return _write(folder, files)


_HELD = "{# held #}"


def hold(folder: Path, model: str, seconds: float) -> None:
    """Make a model that is not ephemeral take that long; 0 removes the delay.

    The delay is a hook in the model's transaction, because creating a view does not run the view's SQL.
    """
    (file,) = (folder / "models").rglob(f"{model}.sql")
    lines = [line for line in file.read_text().splitlines(keepends=True) if _HELD not in line]
    if seconds:
        lines.insert(0, f'{_HELD}{{{{ config(pre_hook="select pg_sleep({seconds})") }}}}\n')
    file.write_text("".join(lines))


# --- dbt's command line and what it leaves -------------------------------------------------------


def command_line(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str],
    target: Path | None = None,
    dbt: Sequence[str] = (),
) -> tuple[int, dict[str, str]]:
    """Run dbt's command line on a project.

    Args:
        folder: the project.
        arguments: the command and its options: `"build", "--select", "one"`.
        environment: variables in addition to those of this process.
        target: the folder for dbt's artifacts, with an earlier parse. Without it dbt parses the whole project, and
            the artifacts are deleted.
        dbt: the command.

    Returns:
        The exit status, and the statuses by unique id: from run_results.json, or from sources.json for `source
        freshness`; empty if dbt wrote neither.
    """
    with tempfile.TemporaryDirectory(prefix="target-") as temporary:
        artifacts: str | Path = target or temporary
        places = [
            "--project-dir",
            folder,
            "--profiles-dir",
            folder,
            "--target-path",
            artifacts,
            "--log-path",
            temporary,
        ]
        ended = subprocess.run(
            [*(dbt or [str(versions.tested().parent / "dbt")]), *arguments, *map(str, places)],
            env=os.environ | dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        for name in ("run_results.json", "sources.json"):
            if Path(artifacts, name).exists():
                results = json.loads(Path(artifacts, name).read_text())["results"]
                return ended.returncode, {result["unique_id"]: result["status"] for result in results}
    return ended.returncode, {}


def tables(query: Query) -> dict[str, list[tuple[object, ...]]]:
    """Return the sorted rows of each table, view and materialized view outside of Postgres' own schemas.

    Columns with the time of a run are left out: those of snapshots, and the source's `loaded_at`.
    """
    relations = query(
        "select format('%%I.%%I', nspname, relname), "
        "  coalesce(string_agg(quote_ident(attname), ', ' order by attnum) filter (where attname <> all(%s)), 'null') "
        "from pg_class join pg_namespace on pg_namespace.oid = relnamespace "
        "join pg_attribute on attrelid = pg_class.oid and attnum > 0 and not attisdropped "
        "where relkind in ('r', 'v', 'm', 'p') and nspname !~ '^pg_' and nspname <> 'information_schema' "
        "group by 1 order by 1",
        ["dbt_valid_from", "dbt_valid_to", "dbt_updated_at", "dbt_scd_id", "loaded_at"],
    )

    def rows(name: str, columns: str) -> list[tuple[object, ...]]:
        try:
            return sorted(query(f"select {columns} from {name}"), key=repr)
        except psycopg.Error as error:  # the query of a view may fail
            return [(type(error).__name__,)]

    return {name: rows(name, columns) for name, columns in relations}
