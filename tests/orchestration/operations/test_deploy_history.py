"""Deploys and rollbacks on a real Kubernetes API, with small charts that fail at each stage of an upgrade."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestration.errors import ClusterError
from orchestration.operations import deploy, release_inputs, rollback, rollout, sync_dry_run
from orchestration.operations.deploy_history import CONFIG_MAP
from orchestration.operations.environment import POOL, RELEASES, SERVER, Environment
from orchestration.operations.local_cluster.binaries import SHORT_LIVED
from tests.cluster.namespace import Namespace

CHART = "apiVersion: v2\nname: {}\nversion: 0.0.1\n"

CONTENT = "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {}}}\ndata: {{version: '{}'}}\n"

HOOK = """
apiVersion: batch/v1
kind: Job
metadata: {name: hook, annotations: {helm.sh/hook: WHEN}}
spec: {backoffLimit: -1, template: {spec: {restartPolicy: Never, containers: [{name: a, image: none}]}}}
"""
"""A hook that the Kubernetes API refuses."""

NEVER_READY = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME, labels: {app.kubernetes.io/instance: NAME}}
spec:
  selector: {matchLabels: {app: NAME}}
  template:
    metadata: {labels: {app: NAME}}
    spec: {nodeSelector: {no: node}, containers: [{name: a, image: none}]}
"""

BEFORE, AFTER = (HOOK.replace("WHEN", when) for when in ("pre-upgrade", "post-upgrade"))

FAILURES = ((SERVER, BEFORE), (POOL, AFTER), (POOL, NEVER_READY))
"""The release that fails, and where: at the hook before or after the change of its objects, or as its pods do not
become ready. Of the first two, the release and the place differ: Helm and the history know no other difference."""


class DeployedCharts:
    """Deploys an environment with charts of a version. The chart of one release may fail.

    Args:
        environment: the environment.
        folder: the folder of the charts.
    """

    def __init__(self, environment: Environment, folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def write(self, version: str, failing: str, failure: str) -> None:
        for release in RELEASES:
            templates = self.folder / release / "templates"
            templates.mkdir(parents=True, exist_ok=True)
            (self.folder / release / "Chart.yaml").write_text(CHART.format(release))
            (templates / "content.yaml").write_text(CONTENT.format(release, version))
            (templates / "more.yaml").write_text(failure.replace("NAME", release) if release == failing else "")

    def inputs(self, _: Environment, release: str, __: object) -> str:
        return "".join(template.read_text() for template in sorted((self.folder / release / "templates").iterdir()))

    def deploy(self, version: str, failing: str = "", failure: str = "") -> None:
        self.write(version, failing, failure)
        deploy.deploy(self.environment)

    def rollback(self) -> None:
        rollback.rollback(self.environment)

    def versions(self) -> list[str]:
        """Return the version of each release that runs."""
        found = self.environment.objects("configmaps")
        by_name = {config_map["metadata"]["name"]: config_map.get("data", {}) for config_map in found}
        return [by_name[release]["version"] for release in RELEASES]


@pytest.fixture
def charts(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeployedCharts:
    monkeypatch.setenv("TZ", "America/New_York")
    for variable, value in SHORT_LIVED.items():
        monkeypatch.setenv(variable, value)
    charts = DeployedCharts(Environment("production", namespace.context, namespace.name), tmp_path / "charts")

    @contextlib.contextmanager
    def surroundings(_: Environment) -> Iterator[list[Path]]:
        (tmp_path / "kustomization.yaml").write_text("configMapGenerator: [{name: around, literals: [a=b]}]\n")
        yield [tmp_path]

    @contextlib.contextmanager
    def no_values(*_: object) -> Iterator[list[str]]:
        yield []

    def nothing(*_: object, **__: object) -> None:
        pass

    # Runs are in the namespace of the releases.
    monkeypatch.setattr(Environment, "runs_namespace", charts.environment.namespace)
    monkeypatch.setattr(release_inputs, "CHARTS", charts.folder)
    monkeypatch.setattr(rollout, "TIMEOUT_SECONDS", 0.0)
    for module, name, replacement in (
        (deploy, "check_preconditions", nothing),
        (release_inputs, "surroundings", surroundings),
        (release_inputs, "values_options", no_values),
        (release_inputs, "input_hash", charts.inputs),
        (release_inputs, "checkout_image", lambda _: release_inputs.Image("registry/image", "sha256:0")),
        (sync_dry_run, "render_sync", nothing),
        (sync_dry_run, "check", nothing),
    ):
        monkeypatch.setattr(module, name, replacement)
    return charts


def test_rollback_takes_back_the_last_deploy_and_a_failed_one(charts: DeployedCharts) -> None:
    for version in "12":
        charts.deploy(version)
    charts.rollback()
    assert charts.versions() == ["1", "1"]
    with pytest.raises(ClusterError, match=r"There is nothing to roll back to: "):
        charts.rollback()
    with pytest.raises(ClusterError, match=f"{POOL} does not become ready"):
        charts.deploy("3", POOL, NEVER_READY)
    charts.rollback()
    assert charts.versions() == ["1", "1"]


@pytest.mark.further
def test_each_rollback_takes_back_one_deploy_until_the_first(
    charts: DeployedCharts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match=r"There is nothing to roll back: "):
        charts.rollback()
    for version in "123":
        charts.deploy(version)
    charts.deploy("3")
    assert capsys.readouterr().out.count("is up to date") == 2
    for version in "21":
        charts.rollback()
        assert charts.versions() == [version] * 2
    with pytest.raises(ClusterError, match=r"There is nothing to roll back to: "):
        charts.rollback()
    assert charts.versions() == ["1", "1"]
    charts.deploy("1")
    assert capsys.readouterr().out.count("is up to date") == 2, "the inputs are still known after a rollback"

    charts.deploy("2")
    for release, failure in FAILURES:
        with pytest.raises(ClusterError, match=f"{release} does not become ready"):
            charts.deploy("3", release, failure)
        charts.rollback()
        assert charts.versions() == ["2", "2"], (release, failure)
    # A failed deploy and the deploy that repairs it are one.
    with pytest.raises(ClusterError):
        charts.deploy("3", POOL, BEFORE)
    charts.deploy("4")
    charts.rollback()
    assert charts.versions() == ["2", "2"]

    # A failed rollback is incomplete: the next deploy continues it.
    charts.deploy("5")
    wait: Callable[[Environment, str], None] = rollout.wait_until_ready

    def fail(environment: Environment, release: str) -> None:
        if release == POOL:
            raise ClusterError("it does not start")
        wait(environment, release)

    with monkeypatch.context() as failing:
        failing.setattr(rollout, "wait_until_ready", fail)
        with pytest.raises(ClusterError, match="it does not start"):
            charts.rollback()
    charts.deploy("6")
    charts.rollback()
    assert charts.versions() == ["2", "2"], "the failed rollback and the deploy after it are one"
    charts.rollback()
    assert charts.versions() == ["1", "1"]
    with pytest.raises(ClusterError, match=r"There is nothing to roll back to: "):
        charts.rollback()

    deploy.undeploy(charts.environment)
    assert CONFIG_MAP not in [config_map["metadata"]["name"] for config_map in charts.environment.objects("configmaps")]


@pytest.mark.further
def test_error_names_revision_that_helm_no_longer_keeps(charts: DeployedCharts) -> None:
    charts.deploy("1")
    charts.deploy("2")
    charts.environment.kubectl("delete", "secret", f"sh.helm.release.v1.{SERVER}.v1")
    with pytest.raises(ClusterError, match=f"{SERVER}: revision 1, which ran before the deploy of .*, is not kept"):
        charts.rollback()
    text = charts.environment.kubectl("get", "configmap", CONFIG_MAP, "--output", "jsonpath={.data.deploys}")
    assert json.loads(text)["made"][-1]["is_complete"]
    charts.environment.kubectl("patch", "configmap", CONFIG_MAP, "--patch", '{"data": {"deploys": "none"}}')
    with pytest.raises(ClusterError, match=f"ConfigMap {CONFIG_MAP} .* Delete it"):
        charts.rollback()
