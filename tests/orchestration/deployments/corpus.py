"""Files of deployments that people write, small and many, for :mod:`test_differential`."""

# ruff: noqa: E501 - lines of YAML

import re
from collections.abc import Iterable

FLOWS = '''
import datetime as dt
import enum
import ipaddress
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Set, Tuple, Union

from prefect import flow
from pydantic import (
    UUID4, AnyUrl, AwareDatetime, BaseModel, Field, FutureDate, HttpUrl, IPvAnyAddress, Json, NaiveDatetime, PastDate, PostgresDsn,
    field_validator,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    n: int = 1
    when: dt.datetime | None = None


class Config(BaseModel):
    name: str
    inner: Inner = Inner()
    many: list[Inner] = []


@flow
def etl(source: str = "crm", day: int = 1, rate: float = 0.5, on: bool = True, extra: Any = None):
    """Loads a day."""


@flow
def empty(): ...


@flow(name="Named flow", description="Says so.", version="7")
def named(x: int = 1): ...


@flow
def times(at: dt.datetime | None = None, day: dt.date | None = None, clock: dt.time | None = None,
          span: dt.timedelta | None = None): ...


@flow
def kinds(colour: Colour = Colour.RED, either: Union[int, str, None] = None, which: Literal["a", "b"] = "a",
          config: Config | None = None, ids: List[uuid.UUID] = [], tags: Set[str] = set(), pair: Tuple[int, str] = (1, ""),
          path: Path = Path("."), money: Decimal = Decimal(1), url: Optional[AnyUrl] = None,
          table: Dict[str, int] = {}, n: int = Field(default=1, ge=0, le=10)): ...


class Even(BaseModel):
    n: int
    label: str = ""

    @field_validator("n")
    @classmethod
    def _is_even(cls, n: int) -> int:
        if n % 2:
            raise ValueError("must be even")
        return n


@flow
def strict(network: ipaddress.IPv4Interface | None = None, address: IPvAnyAddress | None = None,
           aware: AwareDatetime | None = None, naive: NaiveDatetime | None = None, past: PastDate | None = None,
           future: FutureDate | None = None, web: HttpUrl | None = None, text: Json | None = None,
           database: PostgresDsn | None = None, ident: UUID4 | None = None, even: Even | None = None,
           evens: List[Even] = [], either: Union[Even, Inner, None] = None): ...


@flow(validate_parameters=False)
def unchecked(aware: AwareDatetime | None = None): ...


@flow
def required(a: int, b: str = "x"): ...


class Team:
    @flow
    @staticmethod
    def work(x: int = 1): ...

    @flow
    def method(self, x: int = 1): ...

    class Inner:
        @flow
        @staticmethod
        def deep(y: str = "y"): ...
'''

PACKAGE = "from prefect import flow\n\n@flow\ndef daily(x: int = 1): ...\n"

LATE = """
from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

@flow
def late(config: Config | None = None): ...

class Config(BaseModel):
    n: int
"""
"""A flow whose types are defined below it."""

ENVIRONMENT = {
    "A_TEXT": "text",
    "A_NUMBER": "3",
    "A_TRUTH": "false",
    "NOTHING": "",
    "A_WORD": "off",
    "SECONDS": "120",
    "A_LIST": "[a, b]",
    "A_CRON": "5 4 * * *",
    "NESTED": "{{ $A_TEXT }}",
    "NESTED_BARE": "{{ A_TEXT }}",
}

VARIABLES = {
    "text": "from a variable",
    "number": 7,
    "truth": False,
    "list": ["x", "y"],
    "mapping": {"a": {"b": [1, 2]}},
    "nothing": None,
    "nested": "{{ $A_TEXT }}",
    "other": ["{{ prefect.variables.text }}"],
    "cron": "7 8 * * *",
    "filled": {"a": "{{ $A_TEXT }}", "b": ["x {{ A_NUMBER }}", {"c": "{{ $NESTED }}"}], "n": 1},
    "parameters": {"source": "{{ $A_TEXT }}", "day": 3},
    "schedules": [{"cron": "{{ $A_CRON }}", "timezone": "UTC"}],
    "schedule": {"cron": "0 3 * * *", "parameters": {"day": 4}},
    "pool": {"name": "{{ $THE_POOL }}", "job_variables": {"cpu": 2}},
    "job_variables": {"cpu": 3, "env": {"A": "{{ $A_TEXT }}"}},
    "entrypoint": "flow.py:{{ $MODULE }}",
}
"""Variables of the server, whose names begin with the test's prefix."""


def one(more: str = "", entrypoint: str = "flow.py:etl", name: str = "d", pool: str = "{name: POOL}") -> str:
    """Return a file with one deployment that also has these lines."""
    lines = "".join(f"    {line}\n" for line in more.splitlines())
    return f"deployments:\n  - name: {name}\n    entrypoint: {entrypoint}\n    work_pool: {pool}\n{lines}"


CORPUS: dict[str, str] = {
    "plain": one(),
    "described": one("description: What it does\nversion: '3'\ntags: [b, a, b]"),
    "flow in a class": one(entrypoint="flow.py:Team.work"),
    "flow in a class in a class": one(entrypoint="flow.py:Team.Inner.deep"),
    "method": one(entrypoint="flow.py:Team.method"),
    "named flow": one(entrypoint="flow.py:named"),
    "types below the flow": one("parameters: {config: {n: 3}}", "late.py:late"),
    "wrong value of a type below the flow": one("parameters: {config: {n: x}}", "late.py:late"),
    "flow without parameters": one(entrypoint="flow.py:empty"),
    "module with a dot": one(entrypoint="pack.jobs.daily"),
    "module with a colon": one(entrypoint="pack.jobs:daily"),
    "script by dot": one(entrypoint="./flow.py:etl"),
    "script with a space": one(entrypoint="'my flows/a b.py:daily'"),
    "script in a package": one(entrypoint="pack/jobs.py:daily"),
    "name with spaces": one(name="'my daily job'"),
    "name in unicode": one(name="täglich ☀"),
    "name ends with .py": one(name="load.py"),
    "name with a slash": one(name="a/b"),
    "name with a percent sign": one(name="'a%b'"),
    "name with an ampersand": one(name="'a&b'"),
    "name of a number": one(name="5"),
    "name is blank": one(name="' '"),
    "name from the environment": one(name="'{{ $A_TEXT }}-x'"),
    "entrypoint from the environment": one(entrypoint="'flow.py:{{ $MODULE }}'"),
    "lines of a description": one("description: |\n  one\n  two"),
    # merge keys
    "anchors and merges": """
definitions:
  pools:
    small: &small
      name: POOL
      work_queue_name: default
      job_variables: {image: a}
    large: &large
      <<: *small
      job_variables: {image: b, cpu: 4}
  x: &one {source: a, day: 1}
  y: &two {day: 2, rate: 0.25}
  a: &a {cron: "0 1 * * *", timezone: UTC}
  b: &b {<<: *a, timezone: Europe/Berlin}
  c: &c {<<: *b, slug: c}
  tiny: &tiny {name: POOL, job_variables: {cpu: 1}}
  grown:
    <<: &middle
      <<: *tiny
      job_variables: {cpu: 2}
    work_queue_name: urgent
  listed: {<<: [*tiny, &other {<<: *tiny, work_queue_name: urgent}]}
  unused: "{{ $NO_SUCH_THING }}"
x-pools: &urgent {name: POOL, work_queue_name: urgent}
.common: &common {tags: [x], description: "{{ $A_TEXT }}"}
_schedules:
  daily: &daily {cron: "0 1 * * *", timezone: UTC}
x-unused: {description: "{{ $NO_SUCH_THING }}", cron: "{{ prefect.variables.VAR_absent }}"}
pull: []
deployments:
  - {name: alias, entrypoint: "flow.py:etl", work_pool: *small}
  - {name: alias of a merge, entrypoint: "flow.py:etl", work_pool: *large}
  - {name: merge of an alias, entrypoint: "flow.py:etl", work_pool: {<<: *large, work_queue_name: urgent}}
  - &base {name: anchor, entrypoint: "flow.py:etl", work_pool: *large, tags: [x]}
  - {<<: *base, name: name after a merge, tags: [y]}
  - {name: name before a merge, <<: *base}
  - {name: list of merges, entrypoint: "flow.py:etl", work_pool: {name: POOL}, parameters: {<<: [*one, *two], 'on': false}}
  - {name: two merges, entrypoint: "flow.py:etl", work_pool: {name: POOL}, parameters: {<<: *two, <<: *one}}
  - {name: used twice, entrypoint: "flow.py:etl", work_pool: {name: POOL}, schedules: [*c, {<<: *c, slug: d}, *b]}
  - {name: anchor on a merged mapping, entrypoint: "flow.py:etl", work_pool: *middle}
  - {name: anchor in a list of merges, entrypoint: "flow.py:etl", work_pool: {<<: *other, job_variables: {cpu: 3}}}
  - {<<: &merged {name: merged deployment, entrypoint: "flow.py:etl", work_pool: *other}, name: anchor on a merge}
  - *merged
  - {<<: *common, name: under other keys, entrypoint: "flow.py:etl", work_pool: *urgent, schedules: [*daily]}
  - {name: pull left to nobody, entrypoint: "flow.py:etl", work_pool: *urgent, pull: null}
""",
    "anchors under a key of any name": "pools: &urgent {name: POOL}\n" + one(pool="*urgent"),
    # environment
    "text from the environment": one(
        "description: 'for {{ $A_TEXT }}, {{$A_NUMBER}}'\nversion: '{{ $A_NUMBER }}'\n"
        "tags: ['{{ $A_TEXT }}', x]\nparameters: {source: '{{ $A_TEXT }}', extra: {deep: ['{{ $A_NUMBER }}']}}"
    ),
    "variable without a dollar": one(
        "description: '{{ A_TEXT }}'\nparameters: {source: '{{ A_TEXT }}-{{ A_NUMBER }}'}"
    ),
    "empty variable of the environment": one("description: '{{ $NOTHING }}'\nparameters: {source: '{{ $NOTHING }}'}"),
    "unset variable of the environment": one("parameters: {source: 'x{{ $NO_SUCH_THING }}'}"),
    "nested variable of the environment": one("parameters: {source: '{{ $NESTED }}'}"),
    "nested variable without a dollar": one("parameters: {source: 'x {{ $NESTED_BARE }}'}"),
    "nested variable without a dollar in a schedule": one(
        "schedules: [{cron: '0 1 * * *', parameters: {source: '{{ $NESTED_BARE }}'}}]"
    ),
    "nested variable of the environment in a trigger": one(
        "triggers: [{expect: [a], parameters: {extra: '{{ $NESTED }}'}}]"
    ),
    "number from the environment": one("parameters: {day: '{{ $A_NUMBER }}'}"),
    "truth from the environment": one("paused: '{{ $A_TRUTH }}'"),
    "limit from the environment": one("concurrency_limit: '{{ $A_NUMBER }}'"),
    "limit in a mapping from the environment": one(
        "concurrency_limit: {limit: '{{ $A_NUMBER }}', collision_strategy: ENQUEUE}"
    ),
    "enforcement from the environment": one("enforce_parameter_schema: '{{ $A_TRUTH }}'"),
    "truth in words from the environment": one(
        "schedules: [{cron: '0 1 * * *', active: '{{ $A_WORD }}', day_or: '{{ $A_WORD }}'}]"
    ),
    "grace period from the environment": one(
        "concurrency_limit: {limit: 2, collision_strategy: ENQUEUE, grace_period_seconds: '{{ $SECONDS }}'}"
    ),
    "length of time from the environment": one(
        "triggers: [{posture: Proactive, expect: [a], within: 'PT{{ $SECONDS }}S',"
        " threshold: '{{ $A_NUMBER }}', schedule_after: 'PT{{ $SECONDS }}S'}]"
    ),
    "seconds of a trigger from the environment": one(
        "triggers: [{posture: Proactive, expect: [a], within: '{{ $SECONDS }}'}]"
    ),
    "seconds after an event from the environment": one("triggers: [{expect: [a], schedule_after: '{{ $SECONDS }}'}]"),
    "word for a truth from the environment": one("paused: '{{ $A_TEXT }}'"),
    "word for a number from the environment": one("concurrency_limit: '{{ $A_TEXT }}'"),
    "tags from the environment": one("tags: '{{ $A_TEXT }}'"),
    "tags as text": one("tags: abc"),
    "tags of numbers": one("tags: [1, 2.5, '']"),
    "tags of truths": one("tags: [true]"),
    "schedule from the environment": one(
        "schedules: [{cron: '{{ $A_CRON }}', timezone: UTC, active: '{{ $A_TRUTH }}', day_or: '{{ $A_TRUTH }}', slug: '{{ $A_TEXT }}'}]"
    ),
    "interval from the environment": one("schedules: [{interval: '{{ $A_NUMBER }}'}]"),
    "schedule's parameters from the environment": one(
        "schedules: [{cron: '0 1 * * *', parameters: {source: '{{ $A_TEXT }}'}}]"
    ),
    "pool from the environment": one(
        pool="{name: '{{ $THE_POOL }}', work_queue_name: '{{ $QUEUE }}', job_variables: {image: '{{ $A_TEXT }}'}}",
        more="pull: []",
    ),
    # variables and blocks
    "parameter from a variable": one("parameters: {source: '{{ prefect.variables.VAR_text }}'}"),
    "typed parameters from variables": one(
        "parameters: {day: '{{ prefect.variables.VAR_number }}', 'on': '{{ prefect.variables.VAR_truth }}',"
        " extra: '{{ prefect.variables.VAR_mapping }}', source: 'a {{prefect.variables.VAR_number}} b'}"
    ),
    "tags and description from variables": one(
        "description: 'Loads {{ prefect.variables.VAR_text }}'\ntags: ['{{ prefect.variables.VAR_text }}']"
    ),
    "tags are a variable": one("tags: '{{ prefect.variables.VAR_list }}'"),
    "list in text from a variable": one("description: 'of {{ prefect.variables.VAR_list }}'"),
    "version from a number": one("version: '{{ prefect.variables.VAR_number }}'"),
    "variable of nothing": one("parameters: {source: 'x{{ prefect.variables.VAR_nothing }}'}"),
    "variable that is absent": one("parameters: {source: 'x{{ prefect.variables.VAR_absent }}'}"),
    "variable with a placeholder": one("parameters: {source: '{{ prefect.variables.VAR_nested }}'}"),
    "variable with placeholders": one(
        "parameters: {extra: '{{ prefect.variables.VAR_filled }}'}\n"
        "schedules: [{cron: '0 1 * * *', parameters: {extra: ['{{ prefect.variables.VAR_filled }}']}}]\n"
        "triggers: [{expect: ['{{ $NESTED }}'], parameters: {extra: ['{{ prefect.variables.VAR_parameters }}']}}]",
        pool="{name: POOL, job_variables: {env: '{{ prefect.variables.VAR_filled }}'}}",
    ),
    "variable with a placeholder of another": one("parameters: {extra: '{{ prefect.variables.VAR_other }}'}"),
    "entrypoint from a variable": one(entrypoint="'{{ prefect.variables.VAR_entrypoint }}'"),
    "active by a variable": one("schedules: [{cron: '0 1 * * *', active: '{{ prefect.variables.VAR_truth }}'}]"),
    "paused by a variable": one("paused: '{{ prefect.variables.VAR_truth }}'"),
    "enforcement by a variable": one("enforce_parameter_schema: '{{ prefect.variables.VAR_truth }}'"),
    "parameters are a variable": one("parameters: '{{ prefect.variables.VAR_parameters }}'"),
    "schedules are a variable": one("schedules: '{{ prefect.variables.VAR_schedules }}'"),
    "schedule is a variable": one("schedules: [{cron: '0 1 * * *'}, '{{ prefect.variables.VAR_schedule }}']"),
    "parameters of a schedule are a variable": one(
        "schedules: [{cron: '0 1 * * *', parameters: '{{ prefect.variables.VAR_parameters }}'}]"
    ),
    "pool is a variable": one(pool="'{{ prefect.variables.VAR_pool }}'"),
    "job variables are a variable": one(
        pool="{name: POOL, job_variables: '{{ prefect.variables.VAR_job_variables }}'}"
    ),
    "pull is a variable": one("pull: '{{ prefect.variables.VAR_list }}'"),
    "limit of the file from a variable": one()
    + "concurrency_limits: [{name: x, limit: '{{ prefect.variables.VAR_number }}'}]\n",
    "unknown key from a variable": one("colour: '{{ prefect.variables.VAR_text }}'"),
    "cron from a variable": one("schedules: [{cron: '{{ prefect.variables.VAR_cron }}', timezone: UTC}]"),
    "job variables from variables": one(
        pool="{name: POOL, job_variables: {cpu: '{{ prefect.variables.VAR_number }}', env: {A: '{{ prefect.variables.VAR_text }}'}}}"
    ),
    "trigger enabled by a variable": one("triggers: [{expect: [a.b], enabled: '{{ prefect.variables.VAR_truth }}'}]"),
    "limit from a variable": one("concurrency_limit: '{{ prefect.variables.VAR_number }}'"),
    "parameter from a block": one("parameters: {source: '{{ prefect.blocks.secret.VAR-token }}'}"),
    "parameter that refers to a block": one(
        "parameters: {extra: {$ref: {block_document_id: 5c7a1f9e-0000-4000-8000-000000000000}}}"
    ),
    "output of a build step": one(
        pool="{name: POOL, job_variables: {image: '{{ build_image.image }}'}}", more="pull: []"
    ),
    "output of a step in text": one("description: 'at {{ build.tag }}'"),
    "context of a run": one("parameters: {source: '{{ ctx.flow_run.name }}', extra: ['a {{ ctx.flow_run.name }}']}"),
    "context of a run in a list": one(
        "parameters: {extra: ['{{ ctx.flow_run.name }}', ['a {{ ctx.flow_run.id }}', {b: '{{ ctx.flow.name }}'}]]}",
        pool="{name: POOL, job_variables: {env: ['{{ ctx.flow_run.name }}', {a: 'x {{ ctx.flow_run.name }}'}]}}",
    ),
    "context of a run in a description": one(
        "description: 'of {{ ctx.flow_run.name }}'\ntags: ['{{ ctx.flow_run.name }}']"
    ),
    "context of a run in a schedule": one("schedules: [{cron: '0 1 * * *', slug: 'x {{ ctx.flow_run.name }}'}]"),
    "context of a run in a schedule's parameters": one(
        "schedules: [{cron: '0 1 * * *', parameters: {extra: [1, 'a {{ ctx.flow_run.name }}']}}]"
    ),
    "context of a run in an old schedule": one("schedule: {cron: '0 1 * * *', timezone: '{{ ctx.flow_run.name }}'}"),
    "context of a run in a trigger": one("triggers: [{expect: [a.b], description: 'x {{ ctx.flow_run.name }}'}]"),
    "context of a run in a trigger's parameters": one(
        "triggers: [{expect: [a.b], parameters: {extra: ['{{ ctx.flow_run.name }}']}}]"
    ),
    "braces that are no placeholder": one("parameters: {source: '{{ a | b }} {% x %} {{}}'}"),
    # schedules
    "no schedule": one("schedule: {}"),
    "no schedule at all": one("schedule: null\nschedules: null"),
    "old schedule": one("schedule: {cron: '0 6 * * *', timezone: America/New_York}"),
    "old interval": one("schedule: {interval: 600, anchor_date: '2024-01-01T00:00:00', timezone: UTC}"),
    "both kinds of schedules": one("schedule: {cron: '0 6 * * *'}\nschedules: [{cron: '0 7 * * *'}]"),
    "empty old schedule beside schedules": one("schedule: {}\nschedules: [{cron: '0 7 * * *'}]"),
    "empty schedule in a list": one("schedules: [{}]"),
    "many schedules": one(
        "schedules:\n- {cron: '0 6 * * *', day_or: false, active: false}\n- {interval: PT90M, timezone: Asia/Kolkata}\n"
        "- {rrule: 'FREQ=DAILY;BYHOUR=3', timezone: Europe/Berlin, slug: r}\n- {interval: 3600, anchor_date: '2024-01-01T06:00:00+05:30'}\n"
        "- {cron: '@daily', parameters: {day: 4}}"
    ),
    "date without quotes as an anchor": one("schedules: [{interval: 3600, anchor_date: 2024-01-01}]"),
    "moment without quotes as an anchor": one("schedules: [{interval: 3600, anchor_date: 2024-01-01T05:00:00+02:00}]"),
    "anchor without a zone": one(
        "schedules: [{interval: 86400, anchor_date: '2024-01-01T06:00', timezone: America/New_York}]"
    ),
    "nested schedule": one("schedules: [{schedule: {cron: '0 6 * * *'}, active: true}]"),
    "schedule twice": one("schedules: [{cron: '0 6 * * *'}, {cron: '0 6 * * *'}]"),
    "slug with spaces": one("schedules: [{cron: '0 6 * * *', slug: 'At Six!'}]"),
    "fraction of a second": one("schedules: [{interval: 0.5}]"),
    "interval in words": one("schedules: [{interval: '1 day'}]"),
    "interval on a clock": one("schedules: [{interval: 01:30:00}]"),
    "schedule of a time zone alone": one("schedules: [{timezone: UTC}]"),
    "schedules that are a mapping": one("schedules: {cron: '0 6 * * *'}"),
    "schedule twice, once with its time zone": one(
        "schedules: [{cron: '0 6 * * *'}, {cron: '0 6 * * *', timezone: UTC}]"
    ),
    "schedule twice, once of which is on": one("schedules: [{cron: '0 6 * * *'}, {cron: '0 6 * * *', active: true}]"),
    "schedule twice, once off": one("schedules: [{cron: '0 6 * * *'}, {cron: '0 6 * * *', active: false}]"),
    "schedule that replaces another": one("schedules: [{cron: '0 6 * * *', slug: six, replaces: morning}]"),
    "schedule of a text": one("schedules: ['0 6 * * *']"),
    "schedule's wrong parameter": one(
        "parameters: {day: 1}\nschedules:\n- {cron: '0 6 * * *'}\n- {cron: '0 7 * * *', parameters: {day: x}}"
    ),
    "rule until a moment": one("schedules: [{rrule: 'FREQ=DAILY;UNTIL=20990101T000000'}]"),
    "rule until a moment in UTC": one("schedules: [{rrule: 'FREQ=DAILY;UNTIL=20990101T000000Z'}]"),
    # limits
    "limit": one("concurrency_limit: 2"),
    "limit with a strategy": one(
        "concurrency_limit: {limit: 2, collision_strategy: CANCEL_NEW, grace_period_seconds: 90}"
    ),
    "limit without a strategy": one("concurrency_limit: {limit: 2}"),
    "no limit": one("concurrency_limit: null"),
    "limit of a truth": one("concurrency_limit: true"),
    "strategy and no limit": one("concurrency_limit: {collision_strategy: CANCEL_NEW, grace_period_seconds: 60}"),
    "limit of a text": one("concurrency_limit: '2'"),
    "pool of a text": one(pool="POOL"),
    "limit of a fraction": one("concurrency_limit: 2.5"),
    "limit below one": one("concurrency_limit: 0"),
    "strategy in lower case": one("concurrency_limit: {limit: 2, collision_strategy: enqueue}"),
    # triggers
    "trigger": one(
        "triggers: [{expect: [orders.landed], match: {prefect.resource.id: 'warehouse.*'}, parameters: {day: 4}}]"
    ),
    "trigger that is off": one("triggers: [{expect: [orders.landed], enabled: false}]"),
    "trigger from the environment": one(
        "triggers: [{expect: ['{{ $A_TEXT }}.x'], enabled: '{{ $A_TRUTH }}', name: '{{ $A_TEXT }}'}]"
    ),
    "trigger with an event's template": one(
        "triggers: [{expect: [a.b], parameters: {source: '{{ event.name }}', extra: {__prefect_kind: jinja, template: '{{ event.id }}'}}}]"
    ),
    "trigger with an event's template in a list": one(
        "triggers: [{expect: [a.b], parameters: {extra: ['{{ event.name }}', ['x {{ event.id }}']]}}]"
    ),
    "trigger with a template elsewhere": one(
        "triggers: [{expect: [a.b], match_related: {prefect.resource.name: '{{ event.name }}'}}]"
    ),
    "trigger of labels of any name": one(
        "triggers: [{expect: [b, a], match: {expect: text, after: x, triggers: y}, match_related: {for_each: me, id: z}}]"
    ),
    "several triggers": one(
        "triggers:\n- {type: event, expect: [a.b], posture: Proactive, within: 60, threshold: 2}\n"
        "- {type: compound, require: all, within: 3600, triggers: [{type: event, expect: [a]}, {type: event, expect: [b]}]}\n"
        "- {type: sequence, within: 60, triggers: [{type: event, expect: [a]}, {type: event, expect: [b]}]}\n"
        "- {expect: [z], job_variables: {cpu: 2}, schedule_after: 60, name: last, description: Tells}"
    ),
    "trigger of a metric": one("triggers: [{type: metric, metric: {name: successes, operator: '<', threshold: 0.5}}]"),
    "trigger on runs": one(
        "triggers: [{type: event, expect: [prefect.flow-run.Completed], match_related: {prefect.resource.name: up,"
        " prefect.resource.role: flow}, for_each: [prefect.resource.id], after: [x, y]}]"
    ),
    "trigger of nothing": one("triggers: [{enabled: false}]"),  # of everything, once it is on
    "trigger with wrong job variables": one("triggers: [{expect: [a.b], name: landed, job_variables: {cpu: many}}]"),
    "trigger of everything": one("triggers: [{}]"),
    "trigger of everything inside of one": one(
        "triggers: [{type: compound, require: any, within: 60, triggers: [{type: event}, {type: event, expect: [b]}]}]"
    ),
    # No resource of the server: each event of a run would start a run.
    "trigger of a resource": one(
        "triggers: [{match: {prefect.resource.id: 'warehouse.*'}}, {match_related: {prefect.resource.role: carrier}}]"
    ),
    "trigger that waits for anything": one("triggers: [{posture: Proactive, within: 3600}]"),
    "trigger with a misspelt key": one("triggers: [{expect: [a.b], match_realted: {prefect.resource.role: flow}}]"),
    "trigger with a misspelt key inside": one(
        "triggers: [{type: sequence, within: 60, triggers: [{type: event, expect: [a]}, {type: event, expect: [b], afetr: [c]}]}]"
    ),
    "no triggers": one("triggers: []"),
    "trigger on in words": one("triggers: [{expect: [a.b], enabled: 'off'}]"),
    # parameters
    "moments": one(
        "parameters: {at: 2024-01-01T05:00:00Z, day: 2024-01-01, clock: '06:30', span: PT1H}\n", "flow.py:times"
    ),
    "naive moments": one(
        "parameters: {at: '2024-01-01T05:00:00', day: '2024-01-01', clock: '06:30:00', span: '01:30:00'}",
        "flow.py:times",
    ),
    "number of seconds as a span": one("parameters: {span: 90}", "flow.py:times"),
    "date that is none": one("parameters: {day: 2024-13-45}", "flow.py:times"),
    "moments without quotes": one("parameters: {at: 2024-01-01 05:00:00.5, day: 2024-01-01}", "flow.py:times"),
    "moment with an offset": one("parameters: {at: 2024-01-01T05:00:00.25+02:00}", "flow.py:times"),
    "time of day without quotes": one("parameters: {clock: 06:30:00}", "flow.py:times"),
    "kinds": one(
        "parameters: {colour: blue, either: x, which: b, ids: [5c7a1f9e-0000-4000-8000-000000000000], tags: [a, b],"
        " pair: [1, x], path: /tmp/x, money: 1.25, url: 'http://x.y/z', table: {a: 1}, n: 3}",
        "flow.py:kinds",
    ),
    "nested model": one(
        "parameters: {config: {name: x, inner: {n: 2, when: 2024-01-01T00:00:00Z}, many: [{n: 1}, {}]}}",
        "flow.py:kinds",
    ),
    "strict types": one(
        "parameters: {network: 10.0.0.1/24, address: '::1', aware: 2024-01-01T05:00:00Z, naive: '2024-01-01T05:00:00', past: 2013-01-01,"
        " web: 'https://x.y', text: '{}', database: 'postgresql://x', ident: 5c7a1f9e-0000-4000-8000-000000000000, even: {n: 2},"
        " evens: [{n: 4}], either: {n: 3}}",
        "flow.py:strict",
    ),
    "network with 99 bits": one("parameters: {network: 10.0.0.1/99}", "flow.py:strict"),
    "address that is none": one("parameters: {address: nope}", "flow.py:strict"),
    "naive moment for an aware one": one("parameters: {aware: '2024-01-01T00:00:00'}", "flow.py:strict"),
    "aware moment for a naive one": one("parameters: {naive: '2024-01-01T00:00:00Z'}", "flow.py:strict"),
    "future for a past date": one("parameters: {past: 2099-01-01}", "flow.py:strict"),
    "past for a future date": one(
        "schedules: [{cron: '0 6 * * *', parameters: {future: 2013-01-01}}]", "flow.py:strict"
    ),
    "another scheme": one("parameters: {web: 'ftp://x.y/z'}", "flow.py:strict"),
    "text that is no json": one("parameters: {text: '{no'}", "flow.py:strict"),
    "another database": one("parameters: {database: 'http://x'}", "flow.py:strict"),
    "another version of an id": one("parameters: {ident: 5c7a1f9e-0000-1000-8000-000000000000}", "flow.py:strict"),
    "value that a validator refuses": one("parameters: {evens: [{n: 2}, {n: 3}]}", "flow.py:strict"),
    "wrong type, not enforced": one(
        "parameters: {aware: '2024-01-01T00:00:00'}\nenforce_parameter_schema: false", "flow.py:strict"
    ),
    "flow that checks nothing": one("parameters: {aware: '2024-01-01T00:00:00'}", "flow.py:unchecked"),
    "wrong enum": one("parameters: {colour: green}", "flow.py:kinds"),
    "out of range": one("parameters: {n: 11}", "flow.py:kinds"),
    "infinite": one("parameters: {rate: .inf}"),
    "not a number": one("parameters: {extra: .nan}"),
    "large number": one("parameters: {day: 9007199254740993, extra: 12345678901234567890, rate: 1.0e+300}"),
    "large fractions": one(
        "parameters: {rate: 1.0e+23, extra: [1.0e+16, {a: 1.0e+300, b: -1.0e+22}]}\n"
        "schedules: [{cron: '0 1 * * *', parameters: {rate: 1.0e+23}}]\n"
        "triggers: [{expect: [a], parameters: {rate: 1.0e+23}}]",
        pool="{name: POOL, job_variables: {env: {a: 1.0e+23}}}",
    ),
    "schedules with 1 and true": one(
        "schedules: [{cron: '0 1 * * *', parameters: {extra: 1}}, {cron: '0 1 * * *', parameters: {extra: true}}]"
    ),
    "very large number": one("parameters: {extra: 1" + "0" * 400 + "}"),
    "huge number": one("parameters: {extra: 1" + "0" * 5000 + "}"),
    "huge hexadecimal number": one("parameters: {extra: 0x" + "f" * 5000 + "}"),
    "huge key": one("parameters:\n  extra:\n    ? 0x" + "f" * 5000 + "\n    : 1"),
    "huge tag": one("tags: [0b" + "1" * 20_000 + "]"),
    "deep parameter": one("parameters: {extra: " + "[" * 96 + "]" * 96 + "}"),
    "deeper parameter": one("parameters: {extra: " + "[" * 300 + "]" * 300 + "}"),
    "deeper parameter of a schedule": one(
        "schedules: [{cron: '0 6 * * *', parameters: {extra: " + "{a: " * 300 + "1" + "}" * 300 + "}}]"
    ),
    "deeper parameter of a trigger": one(
        "triggers: [{expect: [a], parameters: {extra: " + "[" * 300 + "]" * 300 + "}}]"
    ),
    "deeper job variables": one(pool="{name: POOL, job_variables: {env: " + "[" * 300 + "]" * 300 + "}}"),
    "numbers in other bases": one("parameters: {day: 0x10, extra: [010, 0b11, 1_000, 190:20:30]}"),
    "keys that are no text": one("parameters: {extra: {1: a, on: b, null: c, 1.5: d, 0x10: e}}"),
    "keys of numbers": one("parameters: {extra: {1: a, 2: b}}"),
    "keys of truths": one("parameters: {extra: {on: b}}"),
    "keys in other bases": one("parameters: {extra: {0x10: b}}"),
    "key that is a date": one("parameters: {extra: {2024-01-01: b}}"),
    "no value of a parameter": one("parameters: {source: , extra: ~}"),
    "no parameters": one("parameters:"),
    "text that no encoding has": one('parameters: {extra: "\\ud800"}'),
    "text with a nothing in it": one('parameters: {extra: "a\\0b"}'),
    "bytes": one("parameters: {extra: !!binary aGVsbG8=}"),
    "set": one("parameters: {extra: !!set {a, b}}"),
    "pairs": one("parameters: {extra: !!omap [a: 1]}"),
    "unknown tag": one("parameters: {extra: !thing 1}"),
    "an integer as text": one("parameters: {day: '5'}"),
    "a whole fraction as an integer": one("parameters: {day: 5.0}"),
    "required and not there": one(entrypoint="flow.py:required"),
    "required and not there, scheduled": one("schedules: [{cron: '0 6 * * *'}]", "flow.py:required"),
    "unknown parameter": one("parameters: {sorce: x}"),
    "unknown parameter, not enforced": one("parameters: {sorce: x}\nenforce_parameter_schema: false"),
    "parameter that the server fills in": one(
        "parameters: {source: {__prefect_kind: workspace_variable, variable_name: VAR_text}}"
    ),
    "parameter of json": one("parameters: {day: {__prefect_kind: json, value: '4'}}"),
    "parameter of a template": one("parameters: {source: {__prefect_kind: jinja, template: '{{ 1 + 1 }}'}}"),
    # others
    "pull of its own": one("pull:\n- prefect.deployments.steps.git_clone: {repository: 'https://x.y/z', branch: main}"),
    "pull of the file": "pull:\n- prefect.deployments.steps.set_working_directory: {directory: '/x/{{ $A_TEXT }}'}\n"
    "- prefect.deployments.steps.set_working_directory: {directory: '{{ prefect.variables.VAR_text }}'}\n"
    "- prefect.deployments.steps.git_clone: {repository: 'https://x.y/z', id: c}\n"
    "- prefect.deployments.steps.run_shell_script: {script: 'ls {{ c.directory }}', directory: '{{ c.directory }}'}\n"
    + one(name="of the file")
    + one("pull: null", name="left to the file").removeprefix("deployments:\n")
    + one("pull: []", name="nothing").removeprefix("deployments:\n"),
    "pull as a mapping": "pull: {prefect.deployments.steps.set_working_directory: {directory: /x}}\n" + one(),
    "pull of an empty mapping": one("pull: {}"),
    "image and no pull": one(pool="{name: POOL, job_variables: {image: x}}"),
    "job variables": one(
        pool="{name: POOL, work_queue_name: urgent, job_variables: {cpu: 2, env: {A: b}, other: null}}"
    ),
    "wrong job variables": one(pool="{name: POOL, job_variables: {cpu: many}}"),
    "no job variables": one(pool="{name: POOL, job_variables: null}"),
    "paused": one("paused: true"),
    "paused in words": one("paused: 'yes'"),
    "flow's name": one("flow_name: etl"),
    "another flow's name": one("flow_name: other"),
    "kind of version": one("version_type: prefect:simple\nversion: '1'"),
    "kind of version that is none": one("version_type: git\nversion: '1'"),
    "version of a number": one("version: 1"),
    "date as a description": one("description: 2024-01-01"),
    "service levels": one("sla: []"),
    "unknown key": one("colour: red"),
    "no deployments": "deployments: []\n",
    "empty file": "",
    "nothing but a comment": "# nothing\n",
    "prefect init": "prefect-version: 3.8.0\nbuild: null\npush: null\npull: null\ndeployments:\n- name: d\n  version: null\n  tags: []\n"
    "  description: null\n  schedule: {}\n  concurrency_limit: null\n  flow_name: null\n  entrypoint: flow.py:etl\n  parameters: {}\n"
    "  work_pool: {name: POOL, work_queue_name: null, job_variables: {}}\n",
    "a deployment without a name": "deployments:\n- {name: null, entrypoint: 'flow.py:etl', work_pool: {name: POOL}}\n",
    "anchor that holds itself": "definitions: &a {<<: *a}\n" + one(),
    "sequence that holds itself": "definitions: &a [*a]\n" + one(),
    "merge of text": "definitions: {<<: text}\n" + one(),
    "very deep": "definitions: " + "[" * 3000 + "]" * 3000 + "\n" + one(),
    "include of nothing": "include: ['']\n" + one(),
}


REFUSED: dict[str, str] = {
    "anchors under a key of any name": ":2: unknown key pools. Did you mean work_pools? To hold anchors, name it x-pools",
    "name ends with .py": ":3: name ends with .py, which `prefect deploy` removes",
    "name with a slash": ":3: name has a slash, which separates flow and deployment in FLOW/NAME",
    "name with a percent sign": ":3: name has %",
    "name with an ampersand": ":3: name has &",
    "name of a number": ":3: name should be a valid string, not 5",
    "name is blank": ":3: name is blank",
    "unset variable of the environment": ":6: {{ $NO_SUCH_THING }} is not set in the environment",
    "nested variable of the environment in a trigger": ":6: {{ $A_TEXT }} is in the value of another variable",
    "number from the environment": ":6: deployment d: parameter day: '3' is not of type 'integer'. Remove the quotes. Instead of the environment",
    "seconds of a trigger from the environment": ":6: event.within: Input should be a valid timedelta",
    "seconds after an event from the environment": ":6: event.schedule_after: Input should be a valid timedelta",
    "word for a truth from the environment": ":6: paused should be a valid boolean, not 'text'",
    "word for a number from the environment": ":6: limit should be a valid integer, not 'text'",
    "tags from the environment": ":6: tags should be a valid list",
    "tags as text": ":6: tags should be a valid list",
    "tags of truths": ":6: tags.0 should be a valid string",
    "parameter from a block": ":6: {{ prefect.blocks.secret.VAR-token }} would write the block's content",
    "output of a build step": ":5: {{ build_image.image }} has no value",
    "output of a step in text": ":6: {{ build.tag }} has no value",
    "nested variable without a dollar": ":6: {{ A_TEXT }} is in the value of another variable",
    "nested variable without a dollar in a schedule": ":6: {{ A_TEXT }} is in the value of another variable",
    "context of a run in a schedule": ":6: {{ ctx.flow_run.name }} would be dropped here",
    "context of a run in a schedule's parameters": ":6: {{ ctx.flow_run.name }} would be dropped here",
    "context of a run in an old schedule": ":6: {{ ctx.flow_run.name }} would be dropped here",
    "context of a run in a trigger": ":6: {{ ctx.flow_run.name }} would be dropped here",
    "both kinds of schedules": ":6: deployment d has schedule and schedules",
    "empty schedule in a list": ":6: deployment d: a schedule has none of cron, interval, rrule",
    "nested schedule": ":6: unknown key schedule",
    "schedule twice": ":6: deployment d has this schedule twice",
    "schedule twice, once with its time zone": ":6: deployment d has this schedule twice",
    "schedule twice, once of which is on": ":6: deployment d has this schedule twice",
    "schedule of a text": ":6: schedules.0 should be a mapping of cron, interval, rrule,",
    "schedule's wrong parameter": ":9: deployment d: parameter day: 'x' is not of type 'integer'",
    "rule until a moment in UTC": ':6: deployment d: rrule "FREQ=DAILY;UNTIL=20990101T000000Z" does not parse (UNTIL and',
    "pool of a text": ":5: work_pool should be a mapping of name, work_queue_name, job_variables",
    "trigger of nothing": ":6: deployment d: trigger d__automation_1 names no event",
    "trigger of everything": ":6: deployment d: trigger d__automation_1 names no event",
    "trigger of everything inside of one": ":6: deployment d: trigger d__automation_1 names no event",
    "trigger with a misspelt key": ":6: unknown key match_realted. Did you mean match_related?",
    "trigger with a misspelt key inside": ":6: unknown key afetr. Did you mean after?",
    "kind of version that is none": ":6: version_type should be 'prefect:simple',",
    "schedule of a time zone alone": ":6: deployment d: a schedule has none of",
    "schedules that are a mapping": ":6: schedules should be a valid list",
    "limit of a truth": ":6: limit should be a valid integer",
    "limit of a fraction": ":6: concurrency_limit should be",
    "limit below one": ":6: limit should be greater than or equal to 1",
    "strategy in lower case": ":6: collision_strategy should be",
    "trigger with a template elsewhere": ":6: {{ event.name }} has no value",
    "trigger of a metric": ":6: trigger.type: Input should be 'event'",
    "network with 99 bits": ":6: deployment d: parameter network: Input is not a valid IPv4 interface. Correct the value",
    "address that is none": ":6: deployment d: parameter address: value is not a valid IPv4 or IPv6 address",
    "naive moment for an aware one": ":6: deployment d: parameter aware: Input should have timezone info",
    "aware moment for a naive one": ":6: deployment d: parameter naive: Input should not have timezone info",
    "future for a past date": ":6: deployment d: parameter past: Date should be in the past",
    "past for a future date": ":6: deployment d: parameter future: Date should be in the future",
    "another scheme": ":6: deployment d: parameter web: URL scheme should be 'http' or 'https'",
    "text that is no json": ":6: deployment d: parameter text: Invalid JSON",
    "another database": ":6: deployment d: parameter database: URL scheme should be",
    "another version of an id": ":6: deployment d: parameter ident: UUID version 4 expected",
    "value that a validator refuses": ":6: deployment d: parameter evens[1].n: must be even. Correct the value",
    "wrong value of a type below the flow": ":6: deployment d: parameter config.n: 'x' is not of type 'integer'",
    "wrong enum": ":6: deployment d: parameter colour: 'green' is not one of",
    "number of seconds as a span": ":6: deployment d: parameter span: 90 is not of type 'string'",
    "infinite": ":6: .inf is a number that JSON does not have",
    "not a number": ":6: .nan is a number that JSON does not have",
    "huge number": ":6: invalid value 1000000000000000000000000000000000000000... (Exceeds the limit",
    "huge hexadecimal number": ":6: invalid value 0xffffffffffffffffffffffffffffffffffffff... (Exceeds the limit",
    "huge key": ":8: invalid value 0xffffffffffffffffffffffffffffffffffffff... (Exceeds the limit",
    "huge tag": ":6: invalid value 0b11111111111111111111111111111111111111... (Exceeds the limit",
    "deeper parameter": ":6: more than 100 levels of lists and mappings. Use fewer levels",
    "deeper parameter of a schedule": ":6: more than 100 levels",
    "deeper parameter of a trigger": ":6: more than 100 levels",
    "deeper job variables": ":5: more than 100 levels",
    "date that is none": ":6: invalid value 2024-13-45 (month must be in 1..12)",
    "keys that are no text": ":6: key on is not text",
    "keys of truths": ":6: key on is not text",
    "key that is a date": ":6: key 2024-01-01 is not text",
    "no value of a parameter": ":6: deployment d: parameter source: None is not of type 'string'",
    "text that no encoding has": ":6:28: invalid YAML: found invalid Unicode character",
    "text with a nothing in it": ":6: 'a\\x00b' has a character that no server can store",
    "bytes": ":6: a value that JSON does not have",
    "set": ":6: a value of type tag:yaml.org,2002:set",
    "pairs": ":6: a value of type tag:yaml.org,2002:omap",
    "unknown tag": ":6:25: invalid YAML: could not determine a constructor",
    "an integer as text": ":6: deployment d: parameter day: '5' is not of type 'integer'",
    "required and not there, scheduled": ":3: deployment d: parameter a: the flow requires it",
    "unknown parameter": ":6: deployment d: parameter sorce: the flow has no such parameter",
    "parameter that the server fills in": ":6: deployment d: parameter source has a __prefect_kind",
    "parameter of json": ":6: deployment d: parameter day has a __prefect_kind",
    "parameter of a template": ":6: deployment d: parameter source has a __prefect_kind",
    "image and no pull": ":3: deployment d has its own image and no `pull`, which must say where",
    "another flow's name": ":6: the flow of flow.py:etl is called etl",
    "version of a number": ":6: version should be a valid string",
    "service levels": ":6: unknown key sla",
    "pull is a variable": ":6: pull should be a valid list",
    "limit of the file from a variable": ":6: limit should be a valid integer",
    "unknown key from a variable": ":6: unknown key colour",
    "unknown key": ":6: unknown key colour",
    "a deployment without a name": ":3: name should be a valid string",
    "sequence that holds itself": ":2: an anchor contains itself",
    "merge of text": ":2:19: invalid YAML: expected a mapping",
    "very deep": ": lists or mappings are nested too deep",
    "include of nothing": ":2: include has an empty pattern",
}
"""Cases that a sync refuses before it asks the server, each with the line and the start of the message."""

REFUSED_BY_PLAN: dict[str, str] = {
    "version from a number": ":6: version should be a valid string, not 7",
    "variable with a placeholder of another": ":6: {{ prefect.variables.text }} is in the value of {{ prefect.variables.",
    "variable that is absent": " is a variable that neither the files nor the server have",
    "trigger with wrong job variables": ":3: deployment etl/d: the work pool POOL takes no such job variable 'cpu'",
    "wrong job variables": ":3: deployment etl/d: the work pool POOL takes no such job variable 'cpu'",
}
"""Cases that a sync refuses after it has read the server and before it changes anything, each with the message."""

BEYOND = {
    "truth from the environment",
    "limit from the environment",
    "limit in a mapping from the environment",
    "enforcement from the environment",
    "interval from the environment",
    "grace period from the environment",
    "paused by a variable",
    "enforcement by a variable",
    "parameters are a variable",
    "schedules are a variable",
    "schedule is a variable",
    "parameters of a schedule are a variable",
    "pool is a variable",
    "job variables are a variable",
    "limit without a strategy",
    "limit from a variable",
    "no parameters",
    "no job variables",
    "nothing but a comment",
    "empty file",
    "no deployments",
    "parameter that refers to a block",
    "anchor that holds itself",
    "date as a description",
}
"""Cases that a sync accepts, while `prefect deploy` fails or writes a block's secrets into the deployment."""


NEEDED = ("name: d\n", "work_pool: {name: POOL}\n")
"""Lines of a case that are there only because a deployment needs them."""


def combine(names: Iterable[str], every: int = 1) -> tuple[str, list[str]]:
    """Return one file with all cases about a single deployment, and the files of the other cases.

    Cases that set different keys of one flow's deployment share a deployment: each costs both commands many requests.

    Args:
        names: the cases.
        every: take each deployment, each second one, and so on, and as many of the other files.
    """
    shared: list[tuple[list[str], dict[str, str]]] = []
    others = []
    for name in names:
        if not CORPUS[name].startswith("deployments:\n  - "):
            others.append(CORPUS[name])
            continue
        case = _lines_by_key(CORPUS[name].removeprefix("deployments:\n  - "))
        for cases, lines in shared:
            if all(lines[key] == case[key] or {lines[key], case[key]} & {*NEEDED} for key in lines.keys() & case):
                cases.append(name)
                lines |= {key: text for key, text in case.items() if text not in NEEDED}
                break
        else:
            shared.append(([name], case))
    entries = []
    for number, (cases, lines) in enumerate(shared):
        entry = "    ".join(lines.values()).replace("name: d\n", f"name: d{number}\n", 1)
        entries.append(f"  # {'; '.join(cases)}\n  - {entry}")
    return "deployments:\n" + "".join(entries[::every]), others[::every]


def _lines_by_key(entry: str) -> dict[str, str]:
    """Return the lines of an entry of `deployments`, those of `schedule` and `schedules` together."""
    found: dict[str, str] = {}
    for text in re.split(r"^    (?=\w)", entry, flags=re.MULTILINE):
        key = text.partition(":")[0].replace("schedules", "schedule")
        found[key] = f"{found[key]}    {text}" if key in found else text
    return found
