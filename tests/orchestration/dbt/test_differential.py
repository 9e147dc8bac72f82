"""Each command of `DbtProject` has the same outcome, schemas, nodes and statuses as the `dbt` command.

Both run in forks of one process that has imported dbt (`forked`).
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.errors import DbtError
from tests.orchestration.dbt import forked, versions
from tests.orchestration.dbt.conftest import DATABASE, Tiny
from tests.orchestration.dbt.projects import replace
from tests.parts import new_database, rows_of

Edit = Callable[[Path], Any]


def _write(file: str, content: str) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)

    return edit


def _replace(file: str, old: str, new: str) -> Edit:
    return lambda folder: replace(folder, file, old, new)


BROKEN = _replace("models/one.sql", "select id", "select nothing")
UNKNOWN = _replace("models/one.sql", "select id", "select nullif(id, 2) as id")
CONTINUED = _replace("models/one.sql", "'table'", "'table', on_error='continue'")
NOT_COMPILED = _write("models/four.sql", "{{ exceptions.raise_compiler_error('no') if execute }}")
CHANGED = _replace("models/three.sql", "as id", "as number")


def _hook(old: str, new: str) -> Edit:
    return _replace("dbt_project.yml", old, new)


SELECTORS = """
selectors:
  - {name: hourly, default: false, definition: {method: tag, value: hourly}}
  - {name: changed, definition: {method: state, value: modified}}
"""
NAMED = _write("selectors.yml", SELECTORS)
FUNCTIONS = """
functions:
  - name: doubled
    arguments: [{name: amount, data_type: integer}]
    returns: {data_type: integer}
    overloads:
      - {defined_in: doubled_text, arguments: [{name: amount, data_type: text}], returns: {data_type: text}}
"""
WRONG_OVERLOAD = (
    _write("functions/doubled.sql", "select amount * 2"),
    _write("functions/doubled_text.sql", "select amount * 2"),
    _write("functions/functions.yml", FUNCTIONS),
)
CATALOG = """
{% macro get_catalog(schema, schemas) %}{{ exceptions.raise_compiler_error("no catalog today") }}{% endmacro %}
{% macro get_catalog_relations(schema, relations) %}{{ get_catalog(schema, []) }}{% endmacro %}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command for `dbt` and for `DbtProject`, with its expected outcome."""

    line: str
    """dbt's arguments."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the method of the same name; by default `flags` with all arguments after the command."""
    edits: tuple[Edit, ...] = ()
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of `DbtProject`."""
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exit: int = 0
    """dbt's exit status, which proves that the case is what its name promises."""
    kept: bool = False
    """Whether `defer_to` compares later runs with this one."""
    after: str = ""
    """dbt's arguments of an earlier command, which both ways run."""
    before: tuple[Edit, ...] = ()
    """Edits before the earlier command."""
    since: tuple[int, int] = (1, 0)
    """The first minor version of dbt with this behaviour."""

    @property
    def profile(self) -> str:
        """The profile or target for which the project's parse does not hold; empty if the parse holds."""
        return next(
            (name for name in ("ELSEWHERE", "other") if name in f"{self.line} {self.made} {self.environment}"), ""
        )


CASES = {
    # Builds of the whole project, and each way to leave out nodes. dbt itself parses the spellings of an option.
    "whole": Case("build", kept=True),
    "select": Case("build --select +one", {"select": "+one"}),
    "exclude": Case("build --exclude two", {"exclude": "two"}),
    "selector": Case("build --selector hourly", edits=(NAMED,)),
    "default selector": Case(
        "build", edits=(_write("selectors.yml", SELECTORS.replace("false", "true", 1)),)
    ),
    "resource-type": Case("build --resource-type seed --resource-type model"),
    "without unit tests": Case("build --exclude-resource-type unit_test", kept=True),
    "by environment": Case("build", environment={"DBT_EXCLUDE_RESOURCE_TYPES": "snapshot"}),
    "empty": Case("build --empty"),
    "sample": Case("build", environment={"DBT_SAMPLE": "3 days"}),
    "state by selector": Case("build --selector changed --state STATE", edits=(NAMED, CHANGED)),
    "state of nothing": Case("build --select state:modified --state STATE"),
    "defer": Case("run --select two --defer --state STATE --favor-state", after="build"),
    # Selections of no node.
    "an empty selection": Case("build --select ", {"select": ""}),
    "nothing, which is an error": Case("build --select four --warn-error", exit=2),
    # Failures. `test_nodes` compares failing nodes of every kind.
    "warning, which is an error": Case("build --warn-error", edits=(UNKNOWN,), exit=1),
    "model, and on with what reads it": Case("build", edits=(CONTINUED, BROKEN), exit=1),
    "function in part": Case(
        "build -s resource_type:function",
        edits=WRONG_OVERLOAD, exit=1, since=(1, 12),
    ),
    # dbt may start another independent node before it stops, also with one thread.
    "fail-fast": Case("build --fail-fast --threads 1 --select one+", edits=(BROKEN,), exit=1),
    "hook before": Case("build", edits=(_hook("as started", "as started from nowhere"),), exit=1),
    "hook that raises": Case(
        "run", edits=(_hook("var('started', 1)", "exceptions.raise_compiler_error('stop')"),), exit=2
    ),
    "no threads": Case("run -s three --threads 0", {"select": "three", "threads": 0}, exit=2),
    # The other commands.
    "snapshot": Case("snapshot", after="seed"),
    "test of nothing built": Case("test", exit=1),
    "run of vars": Case('run -s three --vars {"third":1e+16}', {"select": "three", "vars": {"third": 1e16}}),
    "compile error": Case("compile", edits=(NOT_COMPILED,), exit=2),
    "docs": Case("docs generate"),
    "catalog": Case("docs generate", edits=(_write("macros/catalog.sql", CATALOG),), exit=1),
    # Selections of the other commands.
    "seed --select=": Case("seed --select=rates"),
    "test -s": Case("test -s one", after="build"),
    "compile --exclude=": Case("compile --exclude=two"),
    "freshness --select": Case("source freshness --select source:absent"),
    # Options of the log.
    "log": Case("run -s three --log-path logs --log-level debug --use-colors"),
    "freshness log": Case("source freshness --no-use-colors --log-level warn"),
    # Retries.
    "retry with threads": Case(
        "retry --threads 2", {"threads": 2}, after="build --full-refresh --target other --exclude history three",
        before=(BROKEN,), edits=(_replace("models/one.sql", "select nothing", "select id"),),
    ),
    # Targets and profiles.
    "target": Case(
        "run -s three --target other --full-refresh --threads 2",
        {"select": "three", "full_refresh": True, "threads": 2}, made={"target": "other"},
    ),
    "profiles by option": Case(
        "run -s three --profiles-dir ELSEWHERE", {"select": "three"}, made={"profiles_dir": "ELSEWHERE"},
        environment={"DBT_PROFILES_DIR": "/nowhere"},
    ),
    "profiles by another": Case("run -s three", environment={"DBT_ENGINE_PROFILES_DIR": "ELSEWHERE"}),
    # dbt 1.12 reads the file.
    "profiles by .env": Case("run -s three", edits=(_write(".env", "DBT_PROFILES_DIR=elsewhere\n"),)),
    "environment before .env": Case(
        "run -s three", edits=(_write(".env", "DBT_PROFILES_DIR=/nowhere\nDBT_TARGET=other\n"),),
        environment={"DBT_PROFILES_DIR": "ELSEWHERE", "DBT_TARGET": "dev"},
    ),
    "profiles nowhere": Case("run -s three", environment={"DBT_PROFILES_DIR": "/nowhere"}, exit=2),
}  # fmt: skip

MAKE_TEST = (
    "whole", "select", "default selector", "without unit tests", "hook before", "run of vars", "catalog",
    "environment before .env", "profiles nowhere",
)  # fmt: skip
"""The cases of `make test`: of each kind one or two."""

METHODS = {"source freshness": "source_freshness", "docs generate": "docs"}
"""Methods of `DbtProject` by dbt's command, where the names differ."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a command in one way."""

    failed: int
    """dbt's exit status, or whether `DbtProject` raised."""
    nodes: dict[str, str]
    relations: list[tuple[str, str]]


Parses = dict[tuple[str, str], bytes]
"""Parses of earlier cases, by profile and folder name: a parse takes longer than most commands."""


class Ways:
    """Runs a command in two ways, each in a copy of the project.

    Args:
        tiny: the project with the target folder of a whole build, and the forks.
        work: an empty folder.
        url: the URL of the database.
        parses: parses of earlier cases.
    """

    def __init__(self, tiny: Tiny, work: Path, url: str, parses: Parses) -> None:
        self._tiny, self._url, self._parses = tiny, url, parses
        self._kept = work / "kept"
        self._places = {"STATE": str(tiny.folder / "target"), "ELSEWHERE": str(tiny.folder / "elsewhere")}
        self.folders = [Path(shutil.copytree(tiny.folder, work / name)) for name in ("dbt", "here")]
        shutil.copyfile(tiny.dbts_parse, self.folders[0] / "target" / forked.PARSE)

    def reuse_parses(self, profile: str) -> None:
        """Give each folder the parse of an earlier case with the profile."""
        for folder in self.folders:
            if parse := self._parses.get((profile, folder.name)):
                (folder / "target" / forked.PARSE).write_bytes(parse)

    def keep_parses(self, profile: str) -> None:
        """Keep each folder's parse for later cases with the profile."""
        for folder in self.folders:
            self._parses[profile, folder.name] = (folder / "target" / forked.PARSE).read_bytes()

    def placed(self, text: Any) -> Any:
        """Return an argument with the path of the folder that it names."""
        return self._places.get(text, text) if isinstance(text, str) else text

    def relations(self) -> list[tuple[str, str]]:
        """Return all relations of the schemas that dbt created, and drop these schemas."""
        own = "nspname !~ '^pg_' and nspname not in ('information_schema', 'public')"
        found = rows_of(
            self._url,
            f"select nspname, relname from pg_class join pg_namespace n on n.oid = relnamespace where {own}"
            " and relkind in ('r', 'v') order by 1, 2",
        )
        for (schema,) in rows_of(self._url, f"select nspname from pg_namespace where {own}"):
            rows_of(self._url, f'drop schema "{schema}" cascade')
        return [(schema, name) for schema, name in found]

    def by_dbt(self, case: Case) -> tuple[int, dict[str, str]]:
        """Run the `dbt` command; return its exit status, and the statuses that it wrote."""
        target = self.folders[0] / "target"
        files = [target / "run_results.json", target / "sources.json"]
        before = [file.stat().st_mtime_ns if file.exists() else 0 for file in files]
        arguments = ["dbt", *map(self.placed, case.line.split(" "))]
        status = forked.ask(str(self._tiny.socket), arguments, warehouse.environment(), str(self.folders[0]))
        for file, changed in zip(files, before, strict=True):
            if file.exists() and file.stat().st_mtime_ns != changed:
                results = json.loads(file.read_text())["results"]
                return status, {result["unique_id"]: result["status"] for result in results}
        return status, {}

    def by_project(self, case: Case) -> tuple[int, dict[str, str]]:
        """Run `DbtProject`; return 1 if it raised, and the statuses that it returned."""
        words = case.line.split(" ")
        command = " ".join(words[:2]) if words[0] in ("source", "docs") else words[0]
        options = case.options or {"flags": [self.placed(part) for part in words[len(command.split()) :]]}
        made = {name: self.placed(value) for name, value in case.made.items()}
        project = DbtProject(
            self.folders[1],
            environment=warehouse.environment,
            artifacts=str(self._kept),
            python=self._tiny.python,
            retries=0,
            **made,
        )
        try:
            result, failed = getattr(project, METHODS.get(command, command))(**options), 0
        except DbtError as error:
            result, failed = error.result, 1
        nodes = {node.id: node.status for node in result.nodes} if result else {}
        if command == "source freshness":  # dbt's file has only sources, no hooks
            nodes = {node: status for node, status in nodes.items() if not node.startswith("operation.")}
        return failed, nodes

    def kept(self) -> bool:
        """Return whether artifacts hold a run to compare with."""
        return bool(list(self._kept.glob("tiny/latest-*.json")))

    def forget(self) -> None:
        """Forget the run to compare with."""
        for file in self._kept.glob("tiny/latest-*.json"):
            file.unlink()


@pytest.fixture(scope="module")
def ways(tiny: Tiny, postgres: str) -> Iterator[Callable[[Path], Ways]]:
    """Yield a function that makes `Ways` in a folder."""
    parses: Parses = {}
    with new_database(postgres, DATABASE) as url:
        yield lambda folder: Ways(tiny, folder, url, parses)


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[name], id=name, marks=() if name in MAKE_TEST else pytest.mark.further) for name in CASES],
)
def test_command_ends_like_dbts_command(
    case: Case, ways: Callable[[Path], Ways], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if versions.minor() < case.since:
        pytest.skip(f"dbt {'.'.join(map(str, case.since))} brought it")
    both = ways(tmp_path)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, both.placed(value))
    if case.profile:
        both.reuse_parses(case.profile)

    outcomes = []
    for folder, run in zip(both.folders, (both.by_dbt, both.by_project), strict=True):
        for edit in case.before:
            edit(folder)
        if case.after:
            run(Case(case.after))
            both.forget()
        for edit in case.edits:
            edit(folder)
        outcomes.append(Outcome(*run(case), both.relations()))
    if case.profile:
        both.keep_parses(case.profile)
    expected, found = outcomes
    assert expected.failed == case.exit
    # dbt writes no results of a command that it gives up.
    nodes = {} if case.exit == 2 else found.nodes
    assert Outcome(bool(found.failed), nodes, found.relations) == dataclasses.replace(expected, failed=bool(case.exit))
    assert both.kept() == case.kept
