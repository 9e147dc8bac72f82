"""Deploys and rollbacks by helm on a real Kubernetes API, of charts that are small enough to fail at each place."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestration.errors import ClusterError
from orchestration.operations import deploy, release_inputs, rollback, rollout, sync_dry_run
from orchestration.operations.deploy_history import CONFIG_MAP
from orchestration.operations.environment import POOL, RELEASES, SERVER, Environment
from tests.cluster.namespace import Namespace

CHART = "apiVersion: v2\nname: {}\nversion: 0.0.1\n"

CONTENT = "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {}}}\ndata: {{version: '{}'}}\n"

HOOK = """
apiVersion: batch/v1
kind: Job
metadata: {name: hook, annotations: {helm.sh/hook: WHEN}}
spec: {backoffLimit: -1, template: {spec: {restartPolicy: Never, containers: [{name: a, image: none}]}}}
"""
"""What the Kubernetes API refuses."""

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

BEFORE, AFTER = (HOOK.replace("WHEN", each) for each in ("pre-upgrade", "post-upgrade"))

FAILURES = ((SERVER, BEFORE), (SERVER, AFTER), (POOL, BEFORE), (POOL, AFTER), (POOL, NEVER_READY))
"""At the hook before the release's objects are changed, at the hook after, or as its pods do not become ready."""


class Place:
    """An environment with charts of a version, of which one may fail."""

    def __init__(self, environment: Environment, folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def write(self, version: str, failing: str, how: str) -> None:
        for release in RELEASES:
            templates = self.folder / release / "templates"
            templates.mkdir(parents=True, exist_ok=True)
            (self.folder / release / "Chart.yaml").write_text(CHART.format(release))
            (templates / "content.yaml").write_text(CONTENT.format(release, version))
            (templates / "more.yaml").write_text(how.replace("NAME", release) if release == failing else "")

    def inputs(self, _: Environment, release: str, __: object) -> str:
        return "".join(each.read_text() for each in sorted((self.folder / release / "templates").iterdir()))

    def deploy(self, version: str, failing: str = "", how: str = "") -> None:
        self.write(version, failing, how)
        deploy.deploy(self.environment)

    def rollback(self) -> None:
        rollback.rollback(self.environment)

    def versions(self) -> list[str]:
        """What runs, of each release."""
        found = self.environment.objects("configmaps")
        by_name = {each["metadata"]["name"]: each.get("data", {}) for each in found}
        return [by_name[release]["version"] for release in RELEASES]


@pytest.fixture
def place(namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TZ", "America/New_York")
    made = Place(Environment("production", namespace.context, namespace.name), tmp_path / "charts")

    @contextlib.contextmanager
    def surroundings(_: Environment) -> Iterator[Path]:
        (tmp_path / "kustomization.yaml").write_text("configMapGenerator: [{name: around, literals: [a=b]}]\n")
        yield tmp_path

    @contextlib.contextmanager
    def no_values(*_: object) -> Iterator[list[str]]:
        yield []

    def nothing(*_: object, **__: object) -> None:
        pass

    monkeypatch.setattr(release_inputs, "CHARTS", made.folder)
    monkeypatch.setattr(rollout, "TIMEOUT_SECONDS", 0.0)
    for module, name, replacement in (
        (deploy, "check_preconditions", nothing),
        (release_inputs, "surroundings", surroundings),
        (release_inputs, "values_options", no_values),
        (release_inputs, "input_hash", made.inputs),
        (release_inputs, "checkout_image", lambda _: release_inputs.Image("registry/image", "sha256:0")),
        (sync_dry_run, "render_sync", nothing),
        (sync_dry_run, "check", nothing),
    ):
        monkeypatch.setattr(module, name, replacement)
    return made


def test_each_rollback_takes_back_one_deploy_until_there_is_none(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match=r"There is no deploy in .* to take back"):
        place.rollback()
    for version in "123":
        place.deploy(version)
    place.deploy("3")
    assert capsys.readouterr().out.count("is up to date") == 2
    for version in "21":
        place.rollback()
        assert place.versions() == [version] * 2
    with pytest.raises(ClusterError, match=r"There is no deploy in .* to go back to"):
        place.rollback()
    assert place.versions() == ["1", "1"]
    place.deploy("1")
    assert capsys.readouterr().out.count("is up to date") == 2, "what runs is known after a rollback too"

    place.deploy("2")
    for release, how in FAILURES:
        with pytest.raises(ClusterError, match=f"{release} does not become ready"):
            place.deploy("3", release, how)
        place.rollback()
        assert place.versions() == ["2", "2"], (release, how)
    # What failed and was mended is one deploy.
    with pytest.raises(ClusterError):
        place.deploy("3", POOL, BEFORE)
    place.deploy("4")
    place.rollback()
    assert place.versions() == ["2", "2"]

    # A rollback that fails half way is not over.
    place.deploy("5")
    wait: Callable[[Environment, str], None] = rollout.wait_until_ready

    def fail(environment: Environment, release: str) -> None:
        if release == POOL:
            raise ClusterError("it does not start")
        wait(environment, release)

    with monkeypatch.context() as failing:
        failing.setattr(rollout, "wait_until_ready", fail)
        with pytest.raises(ClusterError, match="it does not start"):
            place.rollback()
    place.deploy("6")
    place.rollback()
    assert place.versions() == ["2", "2"], "with the rollback that failed it was one deploy"
    place.rollback()
    assert place.versions() == ["1", "1"]
    with pytest.raises(ClusterError, match=r"There is no deploy in .* to go back to"):
        place.rollback()

    deploy.undeploy(place.environment)
    assert CONFIG_MAP not in [each["metadata"]["name"] for each in place.environment.objects("configmaps")]


def test_revision_that_helm_no_longer_keeps_is_named(place: Place) -> None:
    place.deploy("1")
    place.deploy("2")
    place.environment.kubectl("delete", "secret", f"sh.helm.release.v1.{SERVER}.v1")
    with pytest.raises(ClusterError, match=f"{SERVER}: revision 1, which ran before the deploy of .*, is not kept"):
        place.rollback()
    text = place.environment.kubectl("get", "configmap", CONFIG_MAP, "--output", "jsonpath={.data.deploys}")
    assert json.loads(text)["made"][-1]["is_complete"]
    place.environment.kubectl("patch", "configmap", CONFIG_MAP, "--patch", '{"data": {"deploys": "none"}}')
    with pytest.raises(ClusterError, match=f"ConfigMap {CONFIG_MAP} .* Delete it"):
        place.rollback()
