"""Rules of all charts: examples render, pods are restricted, schemas are closed, each validation has a test."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from orchestration.settings import ROOT
from tests.helm import test_prefect_server, test_prefect_work_pool
from tests.helm.rendering import KUBERNETES, Object, assert_restricted, objects_of, one, pod_specs, references, render
from tests.test_docs import dropped_words

CHARTS = {"prefect-server": test_prefect_server, "prefect-work-pool": test_prefect_work_pool}
EXAMPLES = sorted((ROOT / "helm").glob("*/examples/*.yaml"))

# Validations that need a cluster, which `helm template` does not ask. tests/e2e has their tests.
VALIDATIONS_THAT_NEED_A_CLUSTER = {"prefect-server": 3, "prefect-work-pool": 6}
"""How many rules depend on Secrets or kinds of the cluster. Other tests break these rules."""


@pytest.fixture(params=CHARTS)
def chart(request: pytest.FixtureRequest) -> Path:
    return ROOT / "helm" / str(request.param)


def test_all_charts_are_tested() -> None:
    assert {path.parent.name for path in (ROOT / "helm").glob("*/Chart.yaml")} == set(CHARTS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_example_renders_pods(example: Path) -> None:
    assert pod_specs(render(example.parent.parent.name, example))


@pytest.mark.parametrize("values", ["TAG", "MAXIMAL"])
def test_pods_meet_the_restricted_standard(chart: Path, values: str) -> None:
    assert_restricted(render(chart.name, getattr(CHARTS[chart.name], values)))


@pytest.mark.parametrize("values", ["TAG", "MAXIMAL"])
def test_every_pod_has_an_account_of_its_component(chart: Path, values: str) -> None:
    objects = render(chart.name, getattr(CHARTS[chart.name], values))
    accounts = {manifest["metadata"]["name"]: manifest for manifest in objects if manifest["kind"] == "ServiceAccount"}
    assert "default" not in accounts
    assert not any(account["automountServiceAccountToken"] for account in accounts.values())
    users: dict[str, set[str]] = {name: set() for name in accounts}
    for name, spec in pod_specs(objects).items():
        users[spec["serviceAccountName"]].add(re.sub(r".*-|-?\d+$", "", name.removesuffix("-1")))
    shared = [components for components in users.values() if len(components) > 1]
    assert shared == ([{"api", "services", "migrations"}] if chart.name == "prefect-server" else [])
    assert [name for name, components in users.items() if not components] == (
        [name for name in accounts if name.endswith(("-runs", "runner"))]
    )


@pytest.mark.parametrize("values", ["TAG", "MAXIMAL"])
def test_what_a_pod_names_is_in_its_namespace(chart: Path, values: str) -> None:
    """Of what the chart itself renders. All other Secrets and ConfigMaps exist already."""
    given = getattr(CHARTS[chart.name], values)
    if chart.name == "prefect-work-pool":
        runs = given.get("runs", {}) | {"namespace": "flows", "results": {"storage": "volume"}}
        given = given | {"runs": runs}
    objects = render(chart.name, given)
    places: dict[str, set[str]] = {}
    for manifest in objects:
        place = manifest["metadata"].get("namespace", "prefect")
        places.setdefault(f"{manifest['kind']}/{manifest['metadata']['name']}", set()).add(place)
    pods = {(*places[name], name): spec for name, spec in pod_specs(objects).items()}
    if chart.name == "prefect-work-pool":
        template = test_prefect_work_pool.pool_of(objects)["base_job_template"]
        account = template["variables"]["properties"]["service_account_name"]["default"]
        job = template["job_configuration"]
        spec = job["job_manifest"]["spec"]["template"]["spec"]
        pods[job["namespace"], "a run"] = spec | {"serviceAccountName": account}
    for (home, name), spec in pods.items():
        for reference in references(spec):
            is_made_here = reference in places or reference.startswith("ServiceAccount/")
            assert not is_made_here or home in places.get(reference, ()), f"{name} in {home} names {reference}"


@pytest.mark.parametrize("values", ["TAG", "MAXIMAL"])
def test_disk_of_every_pod_is_limited(chart: Path, values: str) -> None:
    objects = render(chart.name, getattr(CHARTS[chart.name], values))
    specs = [*pod_specs(objects).values()]
    if chart.name == "prefect-work-pool":
        template = test_prefect_work_pool.pool_of(objects)["base_job_template"]
        specs.append(template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"])
    for spec in specs:
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            if container["image"] != "proxy:1":
                assert container["resources"]["limits"]["ephemeral-storage"]
                assert container["resources"]["requests"]["ephemeral-storage"]
        assert all(volume["emptyDir"]["sizeLimit"] for volume in spec.get("volumes", []) if "emptyDir" in volume)


def test_every_rule_has_a_negative_test(chart: Path) -> None:
    texts = [file.read_text() for file in (chart / "templates").glob("_validate*.tpl")]
    rules = re.findall(r"{{- fail (?:\(printf )?\"(.*)", "".join(texts))
    messages = [message for _, message in CHARTS[chart.name].REFUSED]
    untested = [rule for rule in rules if not any(message in rule for message in messages)]
    assert len(untested) == VALIDATIONS_THAT_NEED_A_CLUSTER[chart.name], untested


def test_values_are_short_and_schema_refuses_unknown_keys(chart: Path) -> None:
    text = (chart / "values.yaml").read_text()
    assert len(text.splitlines()) < 400
    schema = json.loads((chart / "values.schema.json").read_text())

    def check(value: Any, rule: Object, path: str) -> None:
        rule = schema["$defs"][rule["$ref"].split("/")[-1]] if "$ref" in rule else rule
        if isinstance(value, dict) and "properties" in rule:
            assert rule["additionalProperties"] is False, path
            for key, entry in value.items():
                assert key in rule["properties"], f"{path}.{key} is not in the schema"
                check(entry, rule["properties"][key], f"{path}.{key}")

    check(yaml.safe_load(text), schema, "")
    assert not re.search(r"(?i)password: *\S", text)


def test_app_version_is_the_locked_prefect(chart: Path) -> None:
    locked = re.search(r'name = "prefect"\nversion = "(.*)"', (ROOT / "uv.lock").read_text())
    assert locked
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"] == locked[1]


def test_oldest_supported_kubernetes_is_among_the_checked_schemas(chart: Path) -> None:
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["kubeVersion"] == f">={KUBERNETES[-1]}.0-0"


def test_field_unknown_to_one_kubernetes_version_is_refused() -> None:
    pod: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a"},
        "spec": {"containers": [{"name": "a"}]},
    }
    for version in KUBERNETES:
        assert kubernetes_validate.validate(pod, version, strict=True) == version, "another version's schemas were used"
    assert objects_of(yaml.safe_dump(pod)) == [pod]
    pod["spec"]["resources"] = {"limits": {"memory": "1Gi"}}  # of a pod as a whole, since 1.32
    kubernetes_validate.validate(pod, KUBERNETES[0], strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        objects_of(yaml.safe_dump(pod))


def test_render_returns_a_copy_to_each_caller() -> None:
    first = render("prefect-server", test_prefect_server.TAG)
    kept = yaml.safe_dump(first)
    first[0].clear()
    assert yaml.safe_dump(render("prefect-server", test_prefect_server.TAG)) == kept


def test_named_templates_have_at_most_60_lines(chart: Path) -> None:
    for file in (chart / "templates").glob("_*.tpl"):
        for definition in re.findall(r"{{- define.*?\n{{- end -}}\n", file.read_text(), flags=re.S):
            assert definition.count("\n") <= 60, file.name


SHARED_TEMPLATES = ("_disruption.tpl", "_validatepods.tpl", "_validatevalues.tpl", "_values.tpl")


@pytest.mark.parametrize("name", SHARED_TEMPLATES)
def test_shared_templates_are_the_same_in_all_charts(name: str) -> None:
    texts = [(ROOT / "helm" / chart / "templates" / name).read_text().replace(chart, "CHART") for chart in CHARTS]
    assert len(set(texts)) == 1


def _prose(file: Path) -> str:
    """Return the comments and messages in a file of a chart; all of NOTES.txt."""
    text = file.read_text()
    if file.name == "NOTES.txt":
        return text
    return " ".join(re.findall(r"(?:^|\s)#.*|{{-? ?/\*(?:.|\n)*?\*/|{{- fail .*|^ *message: .*", text, flags=re.M))


def test_comments_and_messages_use_the_terms_of_the_field() -> None:
    files = [path for path in sorted((ROOT / "helm").rglob("*")) if path.suffix in (".yaml", ".tpl", ".txt")]
    found = {str(path.relative_to(ROOT)): words for path in files if (words := dropped_words(_prose(path)))}
    assert len(files) > 60
    assert found == {}


def test_accounts_of_pods_that_once_had_none_survive_a_rollback() -> None:
    """A rollback cannot take `serviceAccountName` out of a pod template, so the pods would not be created."""
    volume = {"image": {"tag": "1"}, "runs": {"results": {"storage": "volume"}}}
    for chart, values, components in (
        ("prefect-server", {"image": {"tag": "1"}}, ("database", "redis")),
        ("prefect-work-pool", volume, ("drift", "results")),
    ):
        objects = render(chart, values)
        for component in components:
            account = one(objects, "ServiceAccount", f"test-{chart}-{component}")
            assert account["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
