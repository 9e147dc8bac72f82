"""Mistakes in files: one message with file, line and cure, before a request is sent."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestration.__main__ import main
from orchestration.deployments import check, desired_state, files
from orchestration.deployments.resources import DEPLOYMENT, KINDS
from orchestration.errors import DeploymentsError
from orchestration.settings import ROOT
from tests.parts import examples

HEAD = "name: shop\n"


def deployment(more: str = "", name: str = "a") -> str:
    lines = "".join(f"    {line}\n" for line in more.splitlines())
    return f"  - name: {name}\n    entrypoint: flow.py:etl\n    work_pool: {{name: p}}\n{lines}"


def with_deployment(more: str = "") -> str:
    return HEAD + "deployments:\n" + deployment(more)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.py").write_text(
        "from prefect import flow\n\n@flow\ndef etl(day: int, name: str = 'x') -> None:\n    pass\n"
    )
    (tmp_path / "broken.py").write_text("import nowhere\n")
    return tmp_path


def test_valid_file_is_read(folder: Path) -> None:
    (folder / "prefect.yaml").write_text(with_deployment("parameters: {day: 1}\nschedules: [{cron: '0 6 * * *'}]"))
    read = desired_state.read(["prefect.yaml"])
    (found,) = read.of_kind(DEPLOYMENT)
    assert read.owner == "shop"
    assert found.key == "etl/a"
    assert found.where == "prefect.yaml:3"


def _bomb(line: str) -> str:
    """Return nine lines, of which each repeats the line before ten times."""
    first = "  a0: &a0 {x: 1}\n"
    others = (line.format(n=n, aliases=", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))
    return "definitions:\n" + first + "".join(others)


@pytest.mark.parametrize(
    "line", ["  a{n}: &a{n} [{aliases}]\n", "  a{n}: &a{n} {{<<: [{aliases}]}}\n"], ids=["list", "merge"]
)
def test_exploding_aliases_are_refused_at_once(folder: Path, line: str) -> None:
    (folder / "prefect.yaml").write_text(HEAD + _bomb(line))
    with pytest.raises(DeploymentsError, match=r"prefect\.yaml: its aliases expand to 3\.\de\+09 values"):
        desired_state.read(["prefect.yaml"])


@st.composite
def merged_mappings(draw: st.DrawFn) -> str:
    """Draw mappings that merge others, which may have an anchor on any of them."""
    anchors: list[str] = []

    def mapping(depth: int) -> str:
        if draw(st.booleans()) and anchors:
            return f"*{draw(st.sampled_from(anchors))}"
        parts = []
        for key in draw(st.lists(st.sampled_from(["x", "y", "z", "<<", "<< "]), unique=True, max_size=4)):
            if key in "xyz":
                value = mapping(depth - 1) if depth and draw(st.booleans()) else draw(st.integers(0, 9))
                parts.append(f"{key}: {value}")
            elif depth:
                merged = [mapping(depth - 1) for _ in range(draw(st.integers(1, 2)))]
                parts.append(f"{key}: [{', '.join(merged)}]" if merged[1:] else f"{key}: {merged[0]}")
        text = f"{{{', '.join(parts)}}}"
        if draw(st.booleans()):
            anchors.append(f"a{len(anchors)}")
            text = f"&{anchors[-1]} {text}"
        return text

    names = draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1))
    return "".join(f"{name}: {mapping(3)}\n" for name in names)


@given(text=merged_mappings())
@settings(max_examples=examples(3), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_merge_keys_mean_what_yaml_says(folder: Path, text: str) -> None:
    (folder / "merged.yaml").write_text(text)
    assert files.plain(files.read(["merged.yaml"])[0]) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "where", "expected"),
    [
        pytest.param("name: shop\ndeployments: [\n", ":3:1: ", "invalid YAML", id="not YAML"),
        pytest.param("name: shop\n  x: y\n", ":2:4: ", "invalid YAML", id="indentation"),
        pytest.param("- a\n", ":1: ", "expected a mapping", id="a list"),
        pytest.param("deployments: []\n", ":1: ", "Add `name:", id="no owner"),
        pytest.param(HEAD + "deplyments: []\n", ":2: ", "Did you mean deployments?", id="unknown key"),
        pytest.param(with_deployment("schedles: []"), ":6: ", "Did you mean schedules?", id="unknown key below"),
        pytest.param(with_deployment("schedules: [{corn: x}]"), ":6: ", "Did you mean cron?", id="unknown key deeper"),
        pytest.param(
            HEAD + "deployments:\n  - {nme: a, entrypoint: 'flow.py:etl'}\n",
            ":3: ",
            "Did you mean name?",
            id="misspelt",
        ),
        pytest.param(HEAD + "name: x\n", ":2: ", "duplicate key name, first in line 1", id="a key twice"),
        pytest.param(
            HEAD + "definitions: {<<: &a {x: 1, x: 2}}\n", ":2: ", "duplicate key x", id="a key twice in a merge"
        ),
        pytest.param(
            with_deployment() + deployment(),
            ":6: ",
            "deployment etl/a is declared twice, first in prefect.yaml:3",
            id="twice",
        ),
        pytest.param(
            HEAD + "variables:\n- {name: a, value: 1}\n- {name: a, value: 2}\n",
            ":4: ",
            "variable a is declared twice",
            id="a variable twice",
        ),
        pytest.param(with_deployment("schedules: [{cron: '0 0 30 2 *'}]"), ":6: ", "never fires", id="never fires"),
        pytest.param(with_deployment("schedules: [{cron: '0 6 * *'}]"), ":6: ", "does not parse", id="no cron"),
        pytest.param(
            with_deployment("schedules:\n- cron: '0 6 * * *'\n  timezone: Europe/Brlin"),
            ":8: ",
            'Did you mean "Europe/Berlin"',
            id="no timezone",
        ),
        pytest.param(
            with_deployment("schedules: [{cron: '0 6 * * *', interval: 5}]"),
            ":6: ",
            "Give it exactly one",
            id="two kinds",
        ),
        pytest.param(with_deployment("schedules: [{rrule: 'FREQ=NEVER'}]"), ":6: ", "does not parse", id="no rrule"),
        pytest.param(
            with_deployment("schedules: [{interval: 5, slug: a}, {interval: 6, slug: a}]"),
            ":6: ",
            "the slug a",
            id="slugs",
        ),
        pytest.param(with_deployment("parameters: {day: soon}"), ":6: ", "day", id="a parameter's type"),
        pytest.param(with_deployment("parameters: {dy: 1}"), ":6: ", "day", id="an unknown parameter"),
        pytest.param(
            with_deployment("schedules: [{interval: 5}]"), ":3: ", "day", id="a scheduled run without its parameter"
        ),
        pytest.param(with_deployment("tags: yes"), ":6: ", "tags should be a valid list", id="a type"),
        pytest.param(
            with_deployment(f"tags: {[f't{number}' for number in range(91)]}"), ":6: ", "has 91 tags", id="many tags"
        ),
        pytest.param(
            with_deployment("paused: 'never'"), ":6: ", "paused should be a valid boolean, not 'never'", id="a boolean"
        ),
        pytest.param(with_deployment("concurrency_limit: 0"), ":6: ", "limit", id="a limit"),
        pytest.param(with_deployment("build: [{a: b}]"), ":6: ", "build steps are not run here", id="build steps"),
        pytest.param(with_deployment("triggers: [{expect: 5}]"), ":6: ", "expect", id="a trigger"),
        pytest.param(with_deployment("description: '{{ $NOT_SET }}'"), ":6: ", "export NOT_SET=", id="the environment"),
        pytest.param(HEAD + "include: [teams/*.yaml]\n", ":2: ", "no file matches teams/*.yaml", id="include"),
        pytest.param(
            HEAD + "deployments:\n  - {name: a, entrypoint: 'flw.py:etl'}\n",
            ":3: ",
            "Did you mean flow.py",
            id="no script",
        ),
        pytest.param(
            HEAD + "deployments:\n  - {name: a, entrypoint: 'flow.py:elt'}\n", ":3: ", "etl", id="no such flow"
        ),
        pytest.param(
            HEAD + "deployments:\n  - {name: a, entrypoint: 'broken.py:etl'}\n",
            ":3: ",
            "No module named 'nowhere'",
            id="no import",
        ),
        pytest.param(
            HEAD + "deployments:\n  - {name: a, entrypoint: 'flow.py:etl'}\n",
            ":3: ",
            "names no work pool",
            id="no pool",
        ),
        pytest.param(
            HEAD + "work_pools:\n  - {name: prefect-x, type: process}\n", ":3: ", "choose another", id="a reserved name"
        ),
        pytest.param(
            HEAD + "automations:\n  - {name: a, trigger: {type: event}, actions: [{type: fly}]}\n",
            ":3: ",
            "actions",
            id="an action",
        ),
        *(
            pytest.param(with_deployment(f"paused: {text}"), ":6: ", "invalid value", id=text)
            for text in ('!!bool "{{ $PAUSED }}"', "!!int ''", "!!int '-'", "!!float ''", "!!timestamp abc")
        ),
        pytest.param(
            with_deployment("!!bool abc: 1"), ":6: ", "invalid value abc (it is no !!bool)", id="key of a type"
        ),
        *(
            pytest.param(HEAD + f"include: ['{pattern}']\n", ":2: ", "include has", id=f"include {pattern[:20]}")
            for pattern in ("teams/**.yaml", "***", "x" * 300)
        ),
        *(
            pytest.param(HEAD + f"include: ['{pattern}']\n", ":2: ", "include", id=f"include {pattern}")
            for pattern in (".", "./", "..", "~", "[", "*\\")
        ),
        *(
            pytest.param(
                HEAD + f"variables: {value}\n", ":2: ", "variables should be a valid list", id=f"variables {value}"
            )
            for value in ("5", "true", "{a: 1}")
        ),
        *(
            pytest.param(
                with_deployment(f"triggers: [{{name: {name}, expect: [b]}}]"),
                ":6: ",
                "the name of a trigger should be text",
                id=f"trigger {name}",
            )
            for name in ("[a]", "{a: 1}", "5", "null", "''")
        ),
        *(
            pytest.param(HEAD + text, ":2: ", "should be less than or equal to 2147483647", id=f"{text[:20]} of 2**31")
            for text in (
                "concurrency_limits: [{name: x, limit: 2147483648}]\n",
                "tag_concurrency_limits: [{tag: x, limit: 2147483648}]\n",
                "work_pools: [{name: x, type: process, concurrency_limit: 2147483648}]\n",
                "work_pools: [{name: x, type: process, queues: [{name: q, priority: 2147483648}]}]\n",
            )
        ),
        pytest.param(
            with_deployment("concurrency_limit: 2147483648"), ":6: ", "less than or equal to", id="limit of 2**31"
        ),
        pytest.param(
            HEAD + f"variables: [{{name: x, value: {'x' * 5000}}}]\n",
            ":2: ",
            "value is refused by the server: Variable value must be less than 5000",
            id="long variable",
        ),
        pytest.param(
            with_deployment(f"parameters: {{day: 1, name: {'x' * 524288}}}"),
            ":6: ",
            "the parameters have 524,307 bytes as JSON, and the server takes 524,288",
            id="large parameters",
        ),
        pytest.param(
            with_deployment(
                f"parameters: {{day: 1}}\nschedules:\n- {{cron: '0 6 * * *', parameters: {{name: {'x' * 524288}}}}}"
            ),
            ":8: ",
            "bytes as JSON",
            id="large parameters of a schedule",
        ),
        pytest.param(
            HEAD + f"concurrency_limits: [{{name: x, limit: 1, slot_decay_per_second: 1{'0' * 400}}}]\n",
            ":2: ",
            "slot_decay_per_second should be a number of slots",
            id="rate of 400 digits",
        ),
    ],
)
def test_mistake_is_refused_with_its_line(folder: Path, text: str, where: str, expected: str) -> None:
    (folder / "prefect.yaml").write_text(text)
    with pytest.raises(DeploymentsError) as caught:
        desired_state.read(["prefect.yaml"])
    message = str(caught.value)
    assert message.startswith(f"prefect.yaml{where}"), message
    assert expected in message


def test_absent_file_is_refused_without_a_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "absent.yaml"]) == 1
    assert capsys.readouterr().err == "absent.yaml does not exist. Change to its folder, or name another file.\n"


def test_unknown_option_does_not_exit_with_the_status_of_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--pruen"])
    assert ended.value.code == 1, "2 means that there are changes"
    assert "unrecognized arguments: --pruen" in capsys.readouterr().err


def test_included_files_are_read_with_their_own_lines(folder: Path) -> None:
    (folder / "teams").mkdir()
    (folder / "teams" / "one.yaml").write_text("deployments:\n" + deployment("parameters: {day: 1}", "one"))
    (folder / "teams" / "two.yaml").write_text("deployments:\n" + deployment("tags: [x]\nnme: y", "two"))
    (folder / "prefect.yaml").write_text(HEAD + "include: teams/*.yaml\ndeployments:\n" + deployment())
    with pytest.raises(DeploymentsError, match=r"^teams/two\.yaml:6: unknown key nme\. Did you mean name\?"):
        desired_state.read(["prefect.yaml"])
    (folder / "teams" / "two.yaml").write_text("deployments:\n" + deployment("tags: [x]", "two"))
    assert [deployment.key for deployment in desired_state.read(["prefect.yaml"]).of_kind(DEPLOYMENT)] == [
        "etl/a",
        "etl/one",
        "etl/two",
    ]


@pytest.mark.parametrize("name", ["PREFECT_API_AUTH_STRING", "HOME", "sync_region", "NOT_SYNC_REGION"])
@pytest.mark.parametrize(
    "place", ["description: '{{ $%s }}'", "description: '{{ %s }}'", "pull: [{a.step: {x: '{{ $%s }}'}}]"]
)
def test_variable_that_files_may_not_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    monkeypatch.setenv("SYNC_ENVIRONMENT", "SYNC_*, TEAM")
    monkeypatch.setenv(name, "s3cret")
    (folder / "prefect.yaml").write_text(with_deployment(place % name))
    with pytest.raises(DeploymentsError, match=r"files may read SYNC_\*, TEAM\. Name the variable") as refused:
        desired_state.read(["prefect.yaml"])
    assert "s3cret" not in str(refused.value)


def test_variable_that_files_may_read_is_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNC_ENVIRONMENT", "SYNC_*, TEAM")
    monkeypatch.setenv("SYNC_REGION", "eu")
    monkeypatch.setenv("TEAM", "data")
    (folder / "prefect.yaml").write_text(with_deployment("description: '{{ $SYNC_REGION }} {{ TEAM }}'"))
    [found] = desired_state.read(["prefect.yaml"]).of_kind(DEPLOYMENT)
    assert found.fields["description"] == "eu data"


def test_anchors_and_environment_variables_are_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGION", "eu")
    (folder / "prefect.yaml").write_text(
        HEAD + "definitions:\n  daily: &daily {cron: '0 6 * * *', timezone: Europe/Berlin}\ndeployments:\n"
        + deployment("schedules:\n- <<: *daily\n  slug: one\nparameters: {day: 1, name: '{{ $REGION }}'}")
    )  # fmt: skip
    (found,) = desired_state.read(["prefect.yaml"]).of_kind(DEPLOYMENT)
    assert found.fields["schedules"]["one"]["schedule"]["timezone"] == "Europe/Berlin"
    assert found.fields["parameters"] == {"day": 1, "name": "eu"}


def test_values_of_the_environment_get_their_type(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "120")
    monkeypatch.setenv("OFF", "false")
    (folder / "prefect.yaml").write_text(
        with_deployment(
            "parameters: {day: 1}\npaused: '{{ $OFF }}'\nenforce_parameter_schema: '{{ $OFF }}'\n"
            "concurrency_limit: {limit: '{{ $N }}', grace_period_seconds: '{{ $N }}'}\n"
            "schedules:\n- {interval: '{{ $N }}', active: '{{ $OFF }}', slug: a}\n"
            "- {interval: 'PT{{ $N }}S', slug: b}\n"
            "- {cron: '0 6 * * *', day_or: '{{ $OFF }}', slug: c}"
        )
        + "work_pools: [{name: p, type: process, concurrency_limit: '{{ $N }}',"
        " queues: [{name: q, priority: '{{ $N }}'}]}]\n"
        "concurrency_limits: [{name: l, limit: '{{ $N }}', slot_decay_per_second: '{{ $N }}', active: '{{ $OFF }}'}]\n"
        "tag_concurrency_limits: [{tag: t, limit: '{{ $N }}'}]\n"
        "automations: [{name: m, enabled: '{{ $OFF }}', trigger: {type: event, expect: [a]},"
        " actions: [{type: do-nothing}]}]\n"
    )
    found = {name: item.fields for name, item in desired_state.read(["prefect.yaml"]).objects.items()}
    etl = found["deployment", "etl/a"]
    assert (etl["paused"], etl["enforce_parameter_schema"], etl["concurrency_limit"]) == (False, False, 120)
    assert etl["concurrency_options"]["grace_period_seconds"] == 120
    schedules = etl["schedules"]
    assert [schedules[slug]["schedule"].get("interval") for slug in "abc"] == [120, 120, None]
    assert (schedules["a"]["active"], schedules["c"]["schedule"]["day_or"]) == (False, False)
    assert found["work-pool", "p"]["concurrency_limit"] == found["work-queue", "p/q"]["priority"] == 120
    limit = found["concurrency-limit", "l"]
    assert (limit["limit"], limit["slot_decay_per_second"], limit["active"]) == (120, 120, False)
    assert found["tag-concurrency-limit", "t"]["concurrency_limit"] == 120
    assert found["automation", "m"]["enabled"] is False


def test_example_of_the_docs_is_valid_and_has_every_kind(folder: Path) -> None:
    (example,) = re.findall(
        r"```yaml\n(.*?)```", (ROOT / "docs" / "how-to" / "manage-deployments.md").read_text(), re.DOTALL
    )
    (folder / "teams").mkdir()
    (folder / "teams" / "a.yaml").write_text("deployments: []\n")
    (folder / "flows").mkdir()
    (folder / "flows" / "example_flow.py").write_text(
        "from prefect import flow\n\n@flow\ndef dbt_pipeline(full_refresh: bool = False) -> None:\n    pass\n"
    )
    (folder / "prefect.yaml").write_text(example)
    assert main(["check"]) == 0
    assert {kind for kind, _ in desired_state.read(["prefect.yaml"]).objects} == set(KINDS)


def test_check_shows_the_next_five_times(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "prefect.yaml").write_text(
        with_deployment("parameters: {day: 1, name: '{{ $NOT_SET }}'}\nschedules: [{cron: '0 6 * * *'}]")
    )
    assert main(["check"]) == 0
    output = capsys.readouterr().out
    assert output.count(" 06:00") == 5
    assert "NOT_SET" in output, "a value that an image build does not know is noted and is no error"
    assert "plan and sync check that it exists" in output


def test_whole_values_come_from_variables_of_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGION", "eu")
    variables = {
        "values": {"day": 1, "name": "{{ $REGION }}"},
        "off": False,
        "pool": {"name": "p", "job_variables": {"env": ["{{ $REGION }}"]}},
        "times": [{"cron": "0 6 * * *"}],
    }
    (folder / "prefect.yaml").write_text(
        HEAD + "deployments:\n- name: a\n  entrypoint: flow.py:etl\n  parameters: '{{ prefect.variables.values }}'\n"
        "  work_pool: '{{ prefect.variables.pool }}'\n  schedules: '{{ prefect.variables.times }}'\n"
        "  paused: '{{ prefect.variables.off }}'\n"
    )
    read = desired_state.from_documents(files.read(["prefect.yaml"]), variables=variables)
    [found] = read.of_kind(DEPLOYMENT)
    assert found.fields["parameters"] == {"day": 1, "name": "eu"}
    assert (found.fields["work_pool_name"], found.fields["job_variables"]) == ("p", {"env": ["eu"]})
    assert (list(found.fields["schedules"]), found.fields["paused"]) == (["cron 0 6 * * * UTC"], False)


@pytest.mark.parametrize("placeholder", ["{{ prefect.variables.x }}", "{{ $NOT_SET }}"])
def test_check_accepts_a_placeholder_in_the_place_of_any_value(
    folder: Path, capsys: pytest.CaptureFixture[str], placeholder: str
) -> None:
    (folder / "typed.py").write_text(
        "from datetime import date\nfrom prefect import flow\n\n@flow\ndef typed(day: date) -> None: ...\n"
    )
    lines = [
        "parameters: {day: X}",
        "parameters: X\nschedules: [{cron: '0 6 * * *'}]",
        "parameters: {day: 2024-01-01}\nschedules: [{cron: '0 6 * * *', parameters: X}]",
        "tags: X",
        "tags: [X]",
        "description: X",
        "schedules: X",
        "schedules: [{cron: X}]",
        "parameters: {day: 2024-01-01}\nschedules: [X, {cron: '0 6 * * *', active: X, day_or: X}, X, {interval: X}]",
        "schedule: X",
        "triggers: [{expect: [a.b], enabled: X}]",
        "concurrency_limit: X",
        "concurrency_limit: {limit: X, collision_strategy: X, grace_period_seconds: X}",
        "paused: X\nenforce_parameter_schema: X",
        "version_type: X",
        "work_pool: X",
        "work_pool: {name: p, work_queue_name: X, job_variables: X}",
        "work_pool: {name: p, job_variables: {cpu: X}}",
        "entrypoint: X",
    ]
    for line in lines:
        entry = {"entrypoint": "typed.py:typed", "work_pool": "{name: p}"}
        own = {name: value for name, value in entry.items() if f"{name}:" not in line}
        text = "".join(f"  {name}: {value}\n" for name, value in own.items()) + f"  {line}\n".replace("\n", "\n  ")
        (folder / "prefect.yaml").write_text(f"{HEAD}deployments:\n- name: a\n{text}".replace("X", f"'{placeholder}'"))
        assert main(["check"]) == 0, (line, capsys.readouterr().err)
        printed = capsys.readouterr().out
        assert f"{placeholder} is " in printed, line
        assert len(re.findall("is known only to the server|is not set here", printed)) <= 2, line


def test_check_accepts_a_variable_of_the_environment_in_other_objects(folder: Path) -> None:
    (folder / "prefect.yaml").write_text(
        HEAD + "work_pools: [{name: p, type: process, concurrency_limit: '{{ $A }}'}]\n"
        "concurrency_limits: [{name: a, limit: '{{ $A }}', active: '{{ $B }}'}, {name: b, limit: 1},\n"
        "  {name: c, limit: 1, slot_decay_per_second: '{{ $A }}'}, {name: d, limit: 1}]\n"
        "remote_file_systems: [{name: r, basepath: '{{ $A }}'}]\n"
    )
    assert list(check.check(["prefect.yaml"]).objects) == [("concurrency-limit", "b"), ("concurrency-limit", "d")]
    (folder / "prefect.yaml").write_text(HEAD + "concurrency_limits: [{name: a, limit: '{{ prefect.variables.x }}'}]\n")
    with pytest.raises(DeploymentsError, match=r"^prefect\.yaml:2: limit should be a valid integer"):
        check.check(["prefect.yaml"])


def test_check_reads_a_schedule_with_an_unknown_parameter(folder: Path) -> None:
    schedule = "schedules: [{cron: '99 6 * * *', parameters: {day: '{{ $NOT_SET }}'}}]"
    (folder / "prefect.yaml").write_text(with_deployment(schedule))
    with pytest.raises(DeploymentsError, match=r"^prefect\.yaml:6: .*does not parse"):
        check.check(["prefect.yaml"])


def test_check_refuses_a_run_above_the_quota(folder: Path) -> None:
    pool = (
        "work_pools:\n- name: p\n  type: kubernetes\n  base_job_template:\n    job_configuration:\n"
        "      job_manifest: {spec: {template: {spec: {containers: [{name: c, resources: "
        "{limits: {memory: '{{ memory_limit }}'}}}]}}}}\n"
        "    variables: {properties: {memory_limit: {type: string, default: 1Gi}}}\n"
    )
    text = with_deployment("parameters: {day: 1}").replace("{name: p}", "{name: p, job_variables: {memory_limit: 8Gi}}")
    (folder / "prefect.yaml").write_text(text + pool)
    quota = folder / "quota.yaml"
    quota.write_text("kind: ResourceQuota\nmetadata: {name: runs}\nspec: {hard: {limits.memory: 4Gi}}\n")
    with pytest.raises(DeploymentsError, match=r"prefect.yaml:3: deployment etl/a: .*8Gi.*4Gi"):
        check.check(["prefect.yaml"], quota=quota)
    quota.write_text("kind: ResourceQuota\nmetadata: {name: runs}\nspec: {hard: {limits.memory: 16Gi}}\n")
    check.check(["prefect.yaml"], quota=quota)
