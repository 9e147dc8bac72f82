"""The move of an environment's runs to another namespace, on a Kubernetes API server without nodes."""

import json
import os
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestration.errors import ClusterError
from orchestration.operations import deploy, namespace_of_runs, release_inputs, release_plan
from orchestration.operations import environment as environments
from orchestration.operations.environment import POOL, Environment
from orchestration.operations.local_cluster import binaries
from orchestration.operations.port_forward import AUTH_SECRET
from orchestration.settings import ROOT
from tests.cluster import apiserver
from tests.helm.rendering import Object

CONTEXT = "alone"
NAMED_RUNS = ("--field-selector", "metadata.name=runs")
NAMED_TLS = ("--field-selector", "metadata.name=tls")
TLS = {"ca.crt": "ca", "tls.crt": "certificate", "tls.key": "-----BEGIN PRIVATE KEY-----"}
BEFORE, AFTER = apiserver.NAMESPACES


class Installation:
    """An environment on an API server, whose pool is installed without hooks, as no controller runs them."""

    def __init__(self, folder: Path) -> None:
        self.environment = Environment("local", CONTEXT, BEFORE)
        self.file = folder / "helm" / "environments" / "local" / f"{POOL}.yaml"
        self.file.parent.mkdir(parents=True)

    def set_namespace(self, name: str, **auth: str) -> None:
        """Write the values of the environment, by default without API roles."""
        values = {"image": {"tag": "1"}, "runs": {"namespace": name}, "api": {"auth": {"rolesSecret": ""} | auth}}
        self.file.write_text(yaml.safe_dump(values))

    def set_ca(self, **tls: str) -> None:
        """Write the Secret with the CA of the API into the values of the environment."""
        values = yaml.safe_load(self.file.read_text())
        values["api"] |= {"url": "https://prefect-server-api:4200/api", "tls": tls}
        self.file.write_text(yaml.safe_dump(values))

    def upgrade(self, *former: str) -> None:
        """Install or upgrade the pool's release."""
        given = json.dumps(former)
        options = ["--values", str(self.file), "--set-json", f"runs.formerNamespaces={given}", "--no-hooks"]
        self.environment.helm("upgrade", "--install", POOL, str(ROOT / "helm" / POOL), *options)

    def create(self, namespace: str, manifest: Object) -> None:
        text = json.dumps(manifest)
        self.environment.kubectl("apply", "--filename", "-", "--namespace", namespace, text=text)

    def start_run(self, namespace: str) -> None:
        """Create the Job of a run."""
        pod = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "none"}]}
        metadata = {"name": "a-run", "labels": {"prefect.io/flow-run-id": "id"}}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": {"spec": pod}}}
        self.create(namespace, job)

    def end_run(self, namespace: str) -> None:
        self.environment.kubectl("delete", "job", "a-run", "--namespace", namespace)

    def has_role(self, namespace: str, component: str) -> bool:
        name = ("role", f"{POOL}-{component}", "--ignore-not-found", "--output", "name", "--namespace", namespace)
        return bool(self.environment.kubectl("get", *name))


@pytest.fixture
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    """Return an environment whose values are in a new folder, and which is not installed."""
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    return Installation(tmp_path)


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apiserver.ApiServer]:
    """Run an API server, which `installation` clears for the next test."""
    with apiserver.alone(tmp_path_factory.mktemp("kubernetes")) as api:
        yield api


@pytest.fixture
def installation(
    kubernetes: apiserver.ApiServer, monkeypatch: pytest.MonkeyPatch, absent: Installation
) -> Iterator[Installation]:
    """Yield an environment on the API server."""
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.folder / "kubeconfig"))
    binaries.program("helm")  # builds it if it is missing
    folders = [os.environ["PATH"], *map(str, binaries.folders())]
    monkeypatch.setenv("PATH", ":".join(folders))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": AUTH_SECRET}}
    absent.create(BEFORE, secret | {"stringData": {"auth-string": "admin:password", "more": "of the server"}})
    yield absent
    kubernetes.clear()
    assert not absent.environment.helm("list", "--short"), "the next test installs the release from nothing"


def test_move_keeps_the_former_namespace_until_no_run_is_in_progress(installation: Installation) -> None:
    environment = installation.environment
    installation.set_namespace("")
    assert namespace_of_runs.former_namespaces(environment) == [], "nothing is installed"
    installation.upgrade()
    namespace_of_runs.copy_api_credential(environment)
    assert namespace_of_runs.former_namespaces(environment) == []

    installation.set_namespace("{{ .Release.Namespace }}-runs")
    assert environment.namespaces == [BEFORE, AFTER]
    deploy.apply_surroundings(environment)
    assert [
        resource_quota["metadata"]["namespace"] for resource_quota in environment.objects("quota", *NAMED_RUNS)
    ] == [BEFORE, AFTER]
    deploy.apply_surroundings(environment)  # keeps the Secrets
    secrets = environment.objects("secrets", "--field-selector", "metadata.name=warehouse")
    own, copied = ({key: b64decode(text).decode() for key, text in secret["data"].items()} for secret in secrets)
    assert copied == {"url": f"postgresql://warehouse:{own['password']}@warehouse.{BEFORE}:5432/warehouse"}
    assert namespace_of_runs.former_namespaces(environment) == [BEFORE], "the worker may claim a run there until then"
    with pytest.raises(ClusterError, match=f"names the Secret {AUTH_SECRET}: namespace {AFTER} has no such Secret"):
        installation.upgrade(BEFORE)
    for auth in ({"rolesSecret": "prefect-server-api-roles"}, {"existingSecret": "own"}):
        installation.set_namespace("{{ .Release.Namespace }}-runs", **auth)
        namespace_of_runs.copy_api_credential(environment)
        assert not environment.kubectl("get", "secret", AUTH_SECRET, "--ignore-not-found", "--namespace", AFTER)
    installation.set_namespace("{{ .Release.Namespace }}-runs")
    namespace_of_runs.copy_api_credential(environment)
    copied = json.loads(environment.kubectl("get", "secret", AUTH_SECRET, "--output", "json", "--namespace", AFTER))
    assert set(copied["data"]) == {"auth-string"}
    with pytest.raises(ClusterError, match=f"Add {BEFORE} to runs.formerNamespaces"):
        installation.upgrade()
    installation.upgrade(BEFORE)
    assert installation.has_role(BEFORE, "reconciler")
    assert not installation.has_role(BEFORE, "worker")
    assert installation.has_role(AFTER, "worker")

    installation.start_run(BEFORE)
    assert namespace_of_runs.former_namespaces(environment) == [BEFORE]
    installation.end_run(BEFORE)
    assert namespace_of_runs.former_namespaces(environment) == []
    installation.upgrade()
    assert not installation.has_role(BEFORE, "reconciler")
    assert installation.has_role(BEFORE, "reconciler-lease")

    namespace_of_runs.check_rollback(environment, 1)
    installation.start_run(AFTER)
    with pytest.raises(ClusterError, match=f"Runs are in progress in namespace {AFTER}, where revision 1 of"):
        namespace_of_runs.check_rollback(environment, 1)
    namespace_of_runs.check_rollback(environment, 2)
    installation.set_namespace("")
    assert namespace_of_runs.former_namespaces(environment) == [AFTER], "back again"


@pytest.mark.further
def test_only_copies_of_secrets_are_changed_and_deleted(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = installation.environment
    installation.set_namespace(AFTER)

    def credentials() -> list[str]:
        copies = environment.objects("secrets", "--field-selector", f"metadata.name={AUTH_SECRET}")
        return [b64decode(secret["data"]["auth-string"]).decode() for secret in copies]

    namespace_of_runs.copy_api_credential(environment)
    assert credentials() == ["admin:password"] * 2
    changed = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": AUTH_SECRET}}
    installation.create(BEFORE, changed | {"stringData": {"auth-string": "admin:new"}})
    namespace_of_runs.copy_api_credential(environment)
    assert credentials() == ["admin:new"] * 2
    namespace_of_runs.delete_copies(environment)
    assert credentials() == ["admin:new"]
    installation.create(AFTER, changed | {"stringData": {"auth-string": "runs:own"}})
    namespace_of_runs.copy_api_credential(environment)
    namespace_of_runs.delete_copies(environment)
    assert credentials() == ["admin:new", "runs:own"], "a person made it"

    installation.set_ca(caSecret="tls")
    namespace_of_runs.copy_ca(environment)
    with pytest.raises(ClusterError, match=f"api.tls.caSecret names the Secret tls: namespace {BEFORE} has no such"):
        installation.upgrade()
    installation.create(BEFORE, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tls"}, "stringData": TLS})
    assert namespace_of_runs.missing_ca(environment) == "tls"
    monkeypatch.setattr(release_inputs, "checkout_image", lambda _: None)
    monkeypatch.setattr(deploy, "_deploy_release", lambda *_: None)
    deploy.deploy(environment)
    assert namespace_of_runs.missing_ca(environment) == ""
    [copied] = [
        found for found in environment.objects("secrets", *NAMED_TLS) if found["metadata"]["namespace"] == AFTER
    ]
    assert copied["data"] == {"ca.crt": b64encode(b"ca").decode()}
    installation.upgrade()
    namespace_of_runs.delete_copies(environment)
    assert [found["metadata"]["namespace"] for found in environment.objects("secrets", *NAMED_TLS)] == [BEFORE]
    installation.set_ca(caSecret="tls", caKey="tls.key")
    with pytest.raises(ClusterError, match=r"tls.key is a private key, .*Set api.tls.caKey in the values"):
        namespace_of_runs.copy_ca(environment)
    installation.create(AFTER, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "tls"}, "stringData": TLS})
    installation.set_ca(caSecret="tls")
    with pytest.raises(ClusterError, match=f"names the Secret tls, which has a private key in namespace {AFTER}"):
        installation.upgrade()


@pytest.mark.further
def test_plan_names_a_namespace_that_does_not_exist_yet(
    installation: Installation, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = installation.environment
    installation.set_namespace("later")
    assert environment.absent_namespace == "later"
    with release_inputs.surroundings(environment) as folders:
        environment.kubectl("apply", "--kustomize", str(folders[0]))
    assert release_plan._plan_surroundings(environment)
    assert capsys.readouterr().out == "Namespace/later is created, with the objects of k8s/runs/local.\n"
    installation.set_namespace(AFTER)
    assert environment.absent_namespace == ""


def test_other_template_in_the_name_is_refused(absent: Installation) -> None:
    absent.set_namespace("{{ .Release.Name }}")
    with pytest.raises(ClusterError, match="make reads only the template"):
        _ = absent.environment.runs_namespace
