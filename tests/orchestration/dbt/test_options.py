"""Options on dbt's command line, files that read the connection, and the sample of a failing test's rows."""

import datetime
import decimal
import enum
import json
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import strategies

from orchestration.dbt import DbtProject
from orchestration.dbt.child import parse_check, sample
from orchestration.dbt.options import combined_arguments, command_line_arguments
from orchestration.errors import DbtError
from tests.parts import examples

_JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    max_leaves=8,
)


@hypothesis.settings(max_examples=examples(0.5))
@hypothesis.given(variables=strategies.dictionaries(strategies.text(), _JSON, min_size=1))
@hypothesis.example(variables={"large": 1e16, "small": 1e-7, "day": "2024-01-01", "no": "no", "octal": "010"})
def test_vars_reach_dbt_unchanged(variables: Mapping[str, Any]) -> None:
    """dbt reads vars as YAML, in which JSON's `1e+16` is a string."""
    option, text = command_line_arguments({"vars": variables})
    assert option == "--vars"
    found = yaml.safe_load(text)
    assert found == variables
    assert json.dumps(found, sort_keys=True) == json.dumps(variables, sort_keys=True)


def test_flags_as_a_string_are_refused_with_the_correct_list(tmp_path: Path) -> None:
    """As a sequence, each letter of the string would be an option."""
    with pytest.raises(
        DbtError, match=r"flags is a string, '--fail-fast -s a'. Give a list, like \['--fail-fast', '-s'"
    ):
        DbtProject(tmp_path).build(flags="--fail-fast -s a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": ["a", "b+"]}, "select is not a string, but ['a', 'b+']. Separate selections by spaces: 'a b+'."),
        ({"exclude": 5}, "exclude is not a string, but 5. Separate selections by spaces: '5'."),
        ({"flags": ["--threads", 4]}, "flags has 4, which is not a string. Give '4'."),
        ({"flags": ["--target-path=mine"]}, "flags has --target-path, but each command has a separate target folder."),
        ({"flags": [Path("target")]}, f"flags has {Path('target')!r}, which is not a string. Give 'target'."),
    ],
)
def test_options_of_another_type_are_refused_with_the_cure(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DbtError, match=re.escape(message)):
        DbtProject(tmp_path).build(**options)


def test_flags_may_be_read_once() -> None:
    flags: Any = iter(["--fail-fast"])
    assert command_line_arguments({"flags": flags}) == ["--fail-fast"]


@pytest.mark.parametrize(
    ("earlier", "arguments", "expected"),
    [
        ("--full-refresh --target prod", "--threads 2", "--full-refresh --target prod --threads 2"),
        ("--select a b --exclude c --threads 4", "--select d", "--exclude c --threads 4 --select d"),
        ("-s a --empty", "--select d", "--empty --select d"),
        ("--models=a --exclude=b", "-s d", "--exclude=b -s d"),
        ("--select a", "", "--select a"),
    ],
)  # fmt: skip
def test_options_of_a_retry_are_added_to_those_of_the_command(earlier: str, arguments: str, expected: str) -> None:
    assert combined_arguments(earlier.split(), arguments.split()) == expected.split()


class _Colour(enum.Enum):
    RED = 1


_ITSELF: dict[str, Any] = {}
_ITSELF["inside"] = _ITSELF

NO_JSON: dict[str, tuple[Any, str]] = {
    "vars.day": ({"day": datetime.date(2024, 1, 1)}, "a date"),
    "vars.at": ({"at": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)}, "a datetime"),
    "vars.window.days[1]": ({"window": {"days": [1, datetime.timedelta(1)]}}, "a timedelta"),
    "vars.price": ({"price": decimal.Decimal(1)}, "a Decimal"),
    "vars.share": ({"share": math.nan}, "the number nan"),
    "vars.folder": ({"folder": Path("/tmp")}, "a PosixPath"),  # noqa: S108 - not used
    "vars.names": ({"names": {"a"}}, "a set"),
    "vars.raw": ({"raw": b"a"}, "a bytes"),
    "vars.colour": ({"colour": _Colour.RED}, "a _Colour"),
    "vars.by_year": ({"by_year": {2024: 1}}, "a dictionary with the key 2024, which is not a string"),
    "vars.inside": (_ITSELF, "a value that contains itself"),
    "vars.text": ({"text": "\ud800"}, "a string with half a character (a lone surrogate)"),
}


@pytest.mark.parametrize("name", NO_JSON)
def test_vars_that_json_lacks_are_refused_by_name(name: str, tmp_path: Path) -> None:
    variables, what = NO_JSON[name]
    with pytest.raises(DbtError) as raised:
        DbtProject(tmp_path).build(vars=variables)
    assert str(raised.value).startswith(f"{name} is not JSON: it is {what}. ")
    with pytest.raises(DbtError, match="vars is not a mapping"):
        DbtProject(tmp_path).build(vars='{"a": 1}')  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [*(f"models/who{suffix}" for suffix in (".sql", ".yml", ".md", ".py", ".sql.j2", ".md.jinja", ".sql.jinja2")),
     "functions/who.js"],
)  # fmt: skip
def test_file_that_reads_the_connection_is_found(name: str, tmp_path: Path) -> None:
    """In each kind of file whose Jinja dbt renders. A parse for another host does not hold for such a project."""
    project = types.SimpleNamespace(project_root=str(tmp_path), all_source_paths=["models", "functions"])
    for file, text in (("dbt_project.yml", "name: who"), ("models/other.sql", "{{ target.schema }}"), (name, "1")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert not parse_check.reads_connection(project)
    (tmp_path / name).write_text("{{ target.host }}")
    assert parse_check.reads_connection(project)


@pytest.mark.parametrize(
    ("text", "reads"),
    [
        ("{{ config(meta={'owner': {'team': 'x'}}, grants={'select': [target.user]}) }}", True),
        ("{{ config(post_hook='}} {{ target.user }}') }}", True),
        ("{% set hosts = {'a': {'b': 1}} %}{{ target['host'] }}", True),
        ("{{ config(alias='}}') }} merge into a as target using b on target.id = b.id", False),
        ("{# {{ target.host }} #} select {{ target.schema }}", False),
        ("{{ 'not closed }} {{ target.host }}", True),
    ],
)
def test_jinja_that_reads_the_connection_is_found_to_its_end(text: str, reads: bool, tmp_path: Path) -> None:
    """A dictionary or a string may hold the characters that end a block."""
    project = types.SimpleNamespace(project_root=str(tmp_path), all_source_paths=["models"])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "one.sql").write_text(text)
    (tmp_path / "dbt_project.yml").write_text("name: one")
    assert parse_check.reads_connection(project) == reads


_VALUES = strategies.none() | strategies.integers() | strategies.floats() | strategies.text() | strategies.binary()


@hypothesis.settings(max_examples=examples(1))
@hypothesis.given(
    columns=strategies.lists(strategies.text(min_size=1, max_size=80), min_size=1, max_size=300),
    value=_VALUES | strategies.sampled_from(["x" * 10**6, "€" * 10**6, b"x" * 10**6, 10**4_000, "a \ud800"]),
    number=strategies.integers(min_value=1, max_value=100),
)
def test_sample_of_failing_rows_is_bounded_in_bytes(columns: list[str], value: Any, number: int) -> None:
    names, rows = sample.bounded_rows(columns, [[value] * len(columns)] * number)
    size = len(json.dumps(names, ensure_ascii=False).encode("utf-8", "replace"))
    size += sum(len(str(cell).encode("utf-8", "replace")) for row in rows for cell in row)
    assert size < 1.5 * sample.SAMPLE_BYTES
    assert all(len(row) == len(names) for row in rows)
    if len(columns) == 1:
        assert rows, "one column always fits"
