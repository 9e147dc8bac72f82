"""Flows are imported as Prefect imports them, and parameters are checked as the server checks them."""

import asyncio
import functools
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.client.schemas.actions import DeploymentCreate
from prefect.exceptions import ParameterTypeError
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import ValidationError, validate

from orchestration.deployments import flows, parameters
from orchestration.errors import DeploymentsError
from tests.orchestration.deployments import corpus
from tests.parts import client_of, examples

ETL = '''
from datetime import date
from typing import Literal, Optional, Union

import helpers
from prefect import flow
from pydantic import BaseModel

print("being imported")


class Size(BaseModel):
    rows: int
    unit: Literal["kB", "MB"] = "kB"
    parent: Optional["Size"] = None


@flow(name=helpers.NAME)
def load(day: date, size: Size | None = None, sizes: list[Size] = [], label: Union[int, str, None] = None, n: int = 1):
    """Load a day.

    Args:
        day: which one
    """
    import helpers


@flow
def nothing():
    pass


class Team:
    @flow
    @staticmethod
    def work(x: int): ...


def plain(): ...
'''


def team(folder: Path, name: str) -> Path:
    """Make a folder with a flow file and a module next to it."""
    folder.mkdir(parents=True)
    (folder / "helpers.py").write_text(f"NAME = {name!r}\n")
    (folder / "etl.py").write_text(ETL)
    return folder


def refused(entrypoint: str, directory: Path) -> str:
    with pytest.raises(DeploymentsError) as caught:
        flows.load(entrypoint, directory)
    return str(caught.value)


def test_loaded_flow_is_what_prefect_deploys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    team(tmp_path / "etl", "loads")
    modules, path, cwd = set(sys.modules), list(sys.path), Path.cwd()
    loaded = flows.load("etl/etl.py:load", tmp_path)
    assert (loaded.name, loaded.description) == ("loads", "Load a day.\n\nArgs:\n    day: which one")
    assert loaded.schema["properties"]["day"]["description"] == "which one"
    assert flows.load("etl/etl.py:nothing", tmp_path).description is None
    assert flows.load("etl/etl.py:Team.work", tmp_path).name == "work"
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", "being imported\n"), "imported once for all flows; stdout is left to --json"
    assert (sys.path, Path.cwd()) == (path, cwd)
    assert not {"etl", "helpers"} & set(sys.modules)
    assert not [name for name in set(sys.modules) - modules if "loader" in name]


def test_schema_is_the_one_of_the_prefect_client(tmp_path: Path) -> None:
    from prefect import flow

    @flow
    def nothing() -> None: ...

    (tmp_path / "f.py").write_text("from prefect import flow\n@flow\ndef nothing() -> None: ...\n")
    sent = DeploymentCreate(
        name="x",
        flow_id=uuid4(),
        parameter_openapi_schema=parameter_schema(nothing).model_dump(exclude_unset=True),
    ).model_dump(mode="json")
    assert flows.load("f.py:nothing", tmp_path).schema == sent["parameter_openapi_schema"]


def test_modules_of_two_folders_stay_apart(tmp_path: Path) -> None:
    team(tmp_path / "a", "of-a")
    team(tmp_path / "b", "of-b")
    assert flows.load("a/etl.py:load", tmp_path).name == "of-a"
    assert flows.load("b/etl.py:load", tmp_path).name == "of-b"
    assert flows.load("etl.py:load", tmp_path / "b").name == "of-b"


@pytest.mark.parametrize("package", ["pack", "flows"])  # flows is also the package of this project's examples
@pytest.mark.parametrize("entrypoint", ["{}.jobs:daily", "{}.jobs.daily", "{}/jobs.py:daily"])
def test_packages_of_two_projects_stay_apart(tmp_path: Path, entrypoint: str, package: str) -> None:
    entrypoint = entrypoint.format(package)
    for name in "ab":
        (tmp_path / name / package).mkdir(parents=True)
        (tmp_path / name / package / "names.py").write_text(f"NAME = {name!r}\n")
        (tmp_path / name / package / "jobs.py").write_text(
            f"from {package}.names import NAME\nfrom prefect import flow\n@flow(name=NAME)\ndef daily(): ...\n"
        )
    assert [flows.load(entrypoint, tmp_path / name).name for name in "ab"] == ["a", "b"]


def test_imported_package_is_not_imported_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow of this project imports the package that imports the flow. A second copy would have other exceptions."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").touch()
    (tmp_path / "ours" / "late.py").write_text("class Error(Exception): ...\n")
    (tmp_path / "f.py").write_text("import ours.late\nfrom prefect import flow\n@flow\ndef f(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("ours")
    try:
        flows.load("f.py:f", tmp_path)
        assert "ours.late" in sys.modules
    finally:
        for name in ("ours", "ours.late"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("line", ["from orchestration.rates import RATE", "from orchestration import rates"])
def test_folder_with_the_name_of_an_imported_package_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "orchestration").mkdir()
    (tmp_path / "orchestration" / "rates.py").write_text("RATE = 2\n")
    (tmp_path / "f.py").write_text(f"{line}\nfrom prefect import flow\n@flow\ndef f(): ...\n")
    (tmp_path / "orchestration" / "jobs.py").write_text("from prefect import flow\n@flow\ndef f(): ...\n")
    for entrypoint, needed in {"f.py:f": "f.py", "orchestration.jobs:f": "orchestration.jobs"}.items():
        says = f"importing {needed} needs the folder orchestration next to it, but this command has imported another"
        assert says in refused(entrypoint, tmp_path)
    assert refused("f.py:f", tmp_path).endswith("Rename the folder")


LOADS_AT_IMPORT = """
import os
from prefect import flow
from prefect.variables import Variable

REGION = Variable.get(os.environ["REGION_VARIABLE"]).upper()


@flow
def load(region: str = REGION): ...
"""


def test_flow_that_reads_the_server_when_imported_is_loaded(
    tmp_path: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"region_{uuid4().hex[:8]}"
    monkeypatch.setenv("REGION_VARIABLE", name)
    (tmp_path / "f.py").write_text(LOADS_AT_IMPORT)
    with client_of(prefect_server) as api:
        api.post("/variables/", json={"name": name, "value": "eu"}).raise_for_status()

    async def load() -> flows.Flow:
        return flows.load("f.py:load", tmp_path)

    assert asyncio.run(load()).schema["properties"]["region"]["default"] == "EU"


BROKEN = {
    "once.py": (
        "import json\nimport prometheus_client\nprometheus_client.Counter('imports', '')\njson.loads('{')\n",
        "at once.py:4",
    ),
    "syntax.py": ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax (syntax.py:2)"),
    "raises.py": (
        "import json\ndef g():\n    json.loads('{')\ng()\n",
        "importing raises.py raises JSONDecodeError: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1) at raises.py:3",
    ),
    "deep.py": ("import raises\n", "at raises.py:3"),
    "lacks.py": ("import nosuchthing\n", "ModuleNotFoundError: No module named 'nosuchthing' at lacks.py:1. Install"),
    "exits.py": ("import sys\nsys.exit(3)\n", "it ends the process when imported (SystemExit: 3 at exits.py:2)"),
    "empty.py": ("", "empty.py has no f. It has no flow"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_file_that_fails_to_import_is_explained(tmp_path: Path, name: str) -> None:
    for file, (text, _) in BROKEN.items():
        (tmp_path / file).write_text(text)
    message = refused(f"{name}:f", tmp_path)
    assert BROKEN[name][1] in message
    assert message.startswith(f"entrypoint {name}:f: ")
    assert "\n" not in message
    assert not {"raises", "deep", "exits"} & set(sys.modules)


def test_interrupt_during_an_import_is_raised(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("raise KeyboardInterrupt\n")
    cwd = Path.cwd()
    with pytest.raises(KeyboardInterrupt):
        flows.load("f.py:f", tmp_path)
    assert Path.cwd() == cwd


@pytest.mark.parametrize(
    ("entrypoint", "says"),
    [
        ("etl/elt.py:load", "there is no file etl/elt.py in {}. Did you mean etl/etl.py?"),
        ("etl/etl.py:laod", "etl/etl.py has no laod. Did you mean load?"),
        ("etl/etl.py:zzz", "etl/etl.py has no zzz. Its flows are load, nothing"),
        ("etl/etl.py:plain", "plain of etl/etl.py is not a flow. Decorate it with @flow. Its flows are load, nothing"),
        ("etl/etl.py:Team.wrok", "etl/etl.py has no Team.wrok"),
        ("etl/etl.py", "names no flow. Write path/to/file.py:function"),
        ("etl", "names no flow. Write path/to/file.py:function"),
        ("nosuch.jobs:daily", "there is no module nosuch in {} or installed"),
        ("etl.nosuch:daily", "there is no module etl.nosuch in {} or installed"),
    ],
)
def test_wrong_entrypoint_is_refused_with_the_cure(tmp_path: Path, entrypoint: str, says: str) -> None:
    team(tmp_path / "etl", "loads")
    assert says.format(tmp_path) in refused(entrypoint, tmp_path)


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> flows.Flow:
    """Return the flow `load` in ETL."""
    return flows.load("etl.py:load", team(tmp_path_factory.mktemp("schema") / "etl", "loads"))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"day": "2013-01-01", "size": None, "label": None},
        {"size": {"rows": 1, "unit": "MB", "parent": {"rows": 2}}, "sizes": [{"rows": 3}], "label": "x"},
        {"day": {"__prefect_kind": "jinja", "template": "{{ now }}"}, "n": {"__prefect_kind": "workspace_variable"}},
        {"size": {"rows": {"__prefect_kind": "json", "value": "1"}}, "label": {"__prefect_kind": "jinja"}},
    ],
)
def test_valid_parameters_are_accepted(flow: flows.Flow, values: dict[str, Any]) -> None:
    assert parameters.find_problems(values, flow, complete=False) == []


def test_date_of_yaml_is_accepted_as_text(flow: flows.Flow) -> None:
    from datetime import date

    assert parameters.find_problems({"day": date(2013, 1, 1)}, flow, complete=True) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dya": 1}, "parameter dya: the flow has no such parameter. Did you mean day?"),
        (
            {"q": 1},
            "parameter q: the flow has no such parameter. Remove it: its parameters are day, size, sizes, label, n",
        ),
        ({"n": "x"}, "parameter n: 'x' is not of type 'integer'"),
        ({"n": None}, "parameter n: None is not of type 'integer'"),
        ({"day": "soon"}, "parameter day: 'soon' is not a 'date'"),
        ({"size": "big"}, "parameter size: 'big' is not of type 'object'"),
        ({"size": {"rows": "x"}}, "parameter size.rows: 'x' is not of type 'integer'"),
        ({"size": {"rows": 1, "unit": "GB"}}, "parameter size.unit: 'GB' is not one of ['kB', 'MB']"),
        ({"size": {"rows": 1, "parent": {"rows": "y"}}}, "parameter size.parent.rows: 'y' is not of type 'integer'"),
        ({"sizes": [{"rows": 1}, {"rows": []}]}, "parameter sizes[1].rows: [] is not of type 'integer'"),
        ({"label": 1.5}, "parameter label: 1.5 is none of integer, string"),
    ],
)
def test_invalid_parameter_is_explained(flow: flows.Flow, values: dict[str, Any], problem: str) -> None:
    assert parameters.find_problems(values, flow, complete=False) == [problem]


def test_required_parameter_is_demanded_only_of_scheduled_runs(flow: flows.Flow) -> None:
    required = "parameter day: the flow requires it. Give it a value, or a default in the flow"
    assert parameters.find_problems({"n": 2}, flow, complete=True) == [required]
    assert parameters.find_problems({"day": "2013-01-01", "size": {}}, flow, complete=True) == [
        "parameter size: 'rows' is a required property"
    ]
    assert parameters.find_problems({"size": {}}, flow, complete=False) == []


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, flows.Flow]]:
    """Return a folder with flows of many types of parameters, and the flows."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "flow.py").write_text(corpus.FLOWS)
    return folder, {name: flows.load(f"flow.py:{name}", folder) for name in ("etl", "times", "kinds", "strict")}


WORDS = st.sampled_from(
    [
        "2024-01-01",
        "2024-01-01T05:00",
        "2024-01-01T05:00:00Z",
        "2024-01-01 05:00:00.5+02:00",
        "2024-13-01",
        "2024-01-01T25:00",
        "06:30",
        "06:30:00",
        "6:30",
        "24:00",
        "06:30Z",
        "PT1H",
        "P1D",
        "1 day",
        "01:30:00",
        "-PT1H",
        "90",
        "1e3",
        "1700000000",
        "soon",
        "",
        "red",
        "a",
        "inf",
        "1.25",
        "http://x.y/z",
        "x.y",
        "http://exa mple.com/a b",
        "5c7a1f9e-0000-4000-8000-000000000000",
        "5c7a1f9e000040008000000000000000",
        "5c7a1f9e-0000-1000-8000-000000000000",
        "2099-01-01",
        "2099-01-01T00:00:00",
        "ftp://x.y/z",
        "postgresql://x/y",
        "10.0.0.1",
        "10.0.0.1/24",
        "10.0.0.1/99",
        "::1",
        "{no",
        "[1]",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "inner", "many", "n", "when"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=examples(3), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parameter_is_accepted_as_server_and_flow_accept_it(
    typed: tuple[Path, dict[str, flows.Flow]], monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    folder, loaded = typed
    monkeypatch.chdir(folder)
    name = data.draw(st.sampled_from(sorted(loaded)))
    parameter = data.draw(st.sampled_from(sorted(loaded[name].schema["properties"])))
    given_value = {parameter: data.draw(WORDS | VALUES)}
    problems = parameters.find_problems(given_value, loaded[name], complete=True)
    assert bool(problems) == _is_refused(given_value, _flow(str(folder), name), loaded[name].schema), given_value


def _is_refused(values: dict[str, Any], flow: Any, schema: dict[str, Any]) -> bool:
    """Return whether the server, or the flow when a run starts, refuses parameters."""
    try:
        validate(values, schema, raise_on_error=True)
        flow.validate_parameters(values)
    except (ValidationError, ParameterTypeError):
        return True
    return False


@functools.cache
def _flow(folder: str, name: str) -> Any:
    return load_flow_from_entrypoint(f"{folder}/flow.py:{name}")
