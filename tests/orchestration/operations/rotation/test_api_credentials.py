"""Credentials of the Prefect API are rotated while pods call the API: real servers with access control."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from orchestration.access.credentials import credential_hash, sign_run
from orchestration.errors import ClusterError
from orchestration.operations.environment import POOL, SERVER
from orchestration.operations.rotation import api_credentials, readers
from orchestration.operations.rotation.rotation import rotate
from orchestration.protocol import CREDENTIAL_ANNOTATION, RUN_LABEL
from orchestration.settings import ROOT
from tests.cluster.apiserver import ApiServer
from tests.orchestration.operations.rotation.installation import Installation, Interrupted, Pod, installed
from tests.parts import free_port, migrated_database, served

AUTH, ROLES = f"{SERVER}-auth", f"{SERVER}-api-roles"
OIDC = (
    "--set=oidc.enabled=true",
    "--set=oidc.issuerUrl=https://id.example.com",
    "--set=oidc.clientId=prefect",
    "--set=oidc.existingSecret=oidc",
    "--set=oidc.groups.viewer={data}",
)


class Apis:
    """Runs a Prefect server for each pod of the API, and calls all of them with the credentials of all other pods.

    The kubelet mounts a changed Secret after the first time that a command in the pod has tried a credential.
    """

    def __init__(self, folder: Path, installation: Installation) -> None:
        self._folder = folder
        self._installation = installation
        self._stack: dict[str, contextlib.ExitStack] = {}
        self._is_over = threading.Event()
        self._has_changed = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.urls: dict[str, str] = {}
        self.run_credentials: list[str] = []
        self.calls = 0
        self.errors: list[str] = []
        installation.execute, installation.after_start, installation.after_end = self.execute, self.start, self.end

    def start(self, pod: Pod) -> None:
        if pod.component != "api":
            return
        home = self._folder / pod.name
        home.mkdir()
        self._mount(pod.name)
        shutil.copyfile(migrated_database(), home / "prefect.db")
        port = free_port()
        names = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")
        variables = {name: pod.variables[name] for name in (*names, "OIDC_GROUPS")}
        variables["API_CREDENTIALS"] = str(home / "credentials")
        stack = self._stack[pod.name] = contextlib.ExitStack()
        url = served(home, port, sys.executable, os.environ | variables | {"PYTHONTZPATH": ""}, "orchestration.access")
        self.urls[pod.name] = stack.enter_context(url)
        self._has_changed.set()

    def end(self, pod: Pod) -> None:
        if pod.component == "api":
            del self.urls[pod.name]
            self._stack.pop(pod.name).close()

    def _mount(self, pod: str) -> None:
        """Replace the files all at once, as the kubelet does."""
        mounted = self._folder / pod / "credentials"
        folder = self._folder / pod / uuid4().hex
        folder.mkdir()
        for key, value in self._installation.secret(ROLES).items():
            (folder / key).write_text(value)
        link = folder.with_suffix(".link")
        link.symlink_to(folder)
        link.replace(mounted)
        self._has_changed.set()

    def execute(self, pod: str, command: list[str], text: str) -> str:
        url = httpx.URL(self.urls[pod])
        variables = {"PREFECT_SERVER_API_PORT": str(url.port), "PREFECT_SERVER_API_BASE_PATH": "/api"}
        done = subprocess.run(
            [sys.executable, *command[1:]], input=text, env=os.environ | variables, cwd=ROOT, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if text != "[]":
            self._mount(pod)
        if done.returncode:
            raise ClusterError(done.stderr)
        return done.stdout

    def __enter__(self) -> "Apis":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._has_changed.set()
        self._thread.join()

    def close(self) -> None:
        for stack in self._stack.values():
            stack.close()

    def status(self, pod: str, credential: str) -> int:
        """Return the status of an API's answer to a credential."""
        encoded = base64.b64encode(credential.encode()).decode()
        header = {"Authorization": f"Basic {encoded}", "X-Forwarded-Groups": "data"}
        # Over plain HTTP nothing is verified, and the root certificates take 20 ms of the processor to load.
        return httpx.get(f"{self.urls[pod]}/hello", headers=header, timeout=60, verify=False).status_code  # noqa: S501

    def _work(self) -> None:
        while not self._is_over.is_set():
            # At each change, and in between. A call costs 10 ms of the processor.
            self._has_changed.wait(1)
            self._has_changed.clear()
            present = list(self._installation.pods)
            given = [_credential(pod) for pod in present]
            credentials = dict.fromkeys([*filter(None, given), *self.run_credentials])
            for pod in list(self.urls):
                for credential in credentials:
                    self._check(pod, credential)

    def _check(self, pod: str, credential: str) -> None:
        try:
            status = self.status(pod, credential)
        except (httpx.HTTPError, KeyError):
            status = 0
        present = {_credential(pod) for pod in self._installation.pods}
        gone = pod not in self.urls or credential not in {*present, *self.run_credentials}
        self.calls += 1
        if status != 200 and not gone:
            self.errors.append(f"{pod} answers {status} to {credential.partition(':')[0]}")


def _credential(pod: Pod) -> str:
    """Return the credential with which a pod calls the API; empty if it has none."""
    if key := pod.variables.get("OAUTH2_PROXY_BASIC_AUTH_PASSWORD"):
        return f"ann@example.com:{key}"
    return pod.variables.get("PREFECT_API_AUTH_STRING", "")


@pytest.fixture(scope="module")
def installation(kubernetes: ApiServer) -> Iterator[Installation]:
    for found in installed(kubernetes, SERVER, POOL):
        values = ("--from-literal=client-secret=a", "--from-literal=cookie-secret=b")
        found.environment.kubectl("create", "secret", "generic", "oidc", *values)
        found.install(SERVER, *OIDC)
        yield found


@pytest.fixture(scope="module")
def apis(tmp_path_factory: pytest.TempPathFactory, installation: Installation) -> Iterator[Apis]:
    found = Apis(tmp_path_factory.mktemp("apis"), installation)
    try:
        for name in ("api", "services", "oidc"):
            installation.roll(f"{SERVER}-{name}")
        for name in ("worker", "reconciler", "drift"):
            installation.roll(f"{POOL}-{name}")
        with found:
            yield found
    finally:
        found.close()


def _rotate(kind: str, installation: Installation) -> None:
    environment = installation.environment
    found = {"api": api_credentials.administrator, "roles": api_credentials.roles}[kind]
    rotate(found(environment), keep_old=False)


def _rotate_with_interruptions(kind: str, installation: Installation) -> int:
    """Rotate by commands each of which is interrupted one write later than the one before; return how many were."""
    number = 0
    while True:
        installation.interrupted_write = number
        try:
            _rotate(kind, installation)
            installation.interrupted_write = -1
            return number
        except Interrupted:
            number += 1


@pytest.mark.parametrize("is_interrupted", [False, pytest.param(True, marks=pytest.mark.further)])
def test_administrator_gets_a_new_password_and_no_request_fails(
    apis: Apis, installation: Installation, is_interrupted: bool
) -> None:
    old = installation.secret(AUTH)["auth-string"]
    [first] = apis.urls
    if is_interrupted:
        assert _rotate_with_interruptions("api", installation) > 7
    else:
        _rotate("api", installation)
    [second] = apis.urls
    new = installation.secret(AUTH)
    assert set(new) == {"auth-string"}
    assert new["auth-string"].startswith("admin:")
    assert second != first
    assert (apis.status(second, old), apis.status(second, new["auth-string"])) == (401, 200)
    assert {"operator.previous", "operator.next"}.isdisjoint(installation.secret(ROLES))
    assert apis.errors == []
    installation.environment.helm("rollback", SERVER, "2", "--no-hooks")
    assert installation.secret(AUTH) == new


def _start_run(installation: Installation, credential: str, run: UUID, name: str, *, warm: bool = False) -> None:
    """Create the Job of a run, as the worker does."""
    env = [] if warm else [{"name": "PREFECT_API_AUTH_STRING", "value": credential}]
    pod = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "none", "env": env}]}
    annotations = {CREDENTIAL_ANNOTATION: credential_hash(credential)} if warm else {}
    metadata = {"name": name, "labels": {RUN_LABEL: str(run)}, "annotations": annotations}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": {"template": {"spec": pod}}}
    installation.environment.kubectl("create", "--filename", "-", text=json.dumps(job))


def test_roles_get_new_credentials_and_runs_in_progress_keep_theirs(
    apis: Apis, installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = installation.secret(ROLES)
    person = base64.b64encode(f"{old['viewer']}\nann:secret".encode()).decode()
    installation.environment.kubectl("patch", "secret", ROLES, f'--patch={{"data": {{"viewer": "{person}"}}}}')
    runs = {"a-run": uuid4(), "warm-run": uuid4()}
    apis.run_credentials = [sign_run(old["run-key"], run) for run in runs.values()]
    for (name, run), credential in zip(runs.items(), apis.run_credentials, strict=True):
        _start_run(installation, credential, run, name, warm=name == "warm-run")
    jobs = [*runs]
    [api] = apis.urls
    waited = []

    def interrupt(*_: object) -> str:
        raise Interrupted

    def sleep(seconds: float) -> None:
        if "run-key.next" not in installation.secret(ROLES):
            waited.append(apis.status(api, apis.run_credentials[0]))
            apis.run_credentials = apis.run_credentials[1:]
            installation.environment.kubectl("delete", "job", jobs.pop(0))
            if not jobs:
                installation.execute = interrupt
        time.sleep(seconds / 2)

    monkeypatch.setattr(readers, "sleep", sleep)
    with pytest.raises(Interrupted):
        _rotate("roles", installation)
    assert waited == [200, 200], "each run's credential was valid until the end of the run"
    assert apis.status(api, old["worker"]) == 200, "interrupted before the API has read that the old credentials end"
    installation.execute = apis.execute
    _rotate("roles", installation)
    new = installation.secret(ROLES)
    assert set(new) == set(old)
    assert new["viewer"].splitlines()[1:] == ["ann:secret"]
    for role in ("worker", "reconciler", "sync"):
        assert (apis.status(api, old[role]), apis.status(api, new[role])) == (401, 200)
    assert (apis.status(api, old["viewer"]), apis.status(api, "ann:secret")) == (401, 200)
    people = [f"ann@example.com:{secret['oidc-key']}" for secret in (old, new)]
    assert [apis.status(api, person) for person in people] == [401, 200]
    assert apis.status(api, sign_run(old["run-key"], run)) == 401
    assert apis.status(api, sign_run(new["run-key"], run)) == 200
    assert apis.errors == []
    assert {pod.component for pod in installation.pods} == {
        "api", "services", "worker", "reconciler", "drift", "oidc",
    }  # fmt: skip
    assert [api] == [*apis.urls], "the API reads the Secret without a restart"


def test_older_image_and_server_without_roles_are_refused(apis: Apis, installation: Installation) -> None:
    execute = installation.execute

    def older(pod: str, command: list[str], text: str) -> str:
        raise ClusterError("AttributeError: module 'orchestration.access.credentials' has no attribute 'NEXT_SUFFIX'")

    installation.execute = older
    for kind in ("api", "roles"):
        with pytest.raises(ClusterError, match="has an image of an older release, which knows no next credentials"):
            _rotate(kind, installation)
    installation.execute = execute
    assert not installation.is_rotated(AUTH)
    installation.install(SERVER, "--set=auth.roles.enabled=false")
    for kind in ("api", "roles"):
        with pytest.raises(ClusterError, match="has no API roles, and accepts one password at a time"):
            _rotate(kind, installation)
