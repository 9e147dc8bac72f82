"""Test the Docker stack on one machine: start, daily run, attacks of a run and of the worker, faults, stop, upgrade.

`make test` does not collect this file; `make test-long FOR=docker-pool` runs it.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestration.errors import ClusterError
from orchestration.operations import registry
from orchestration.operations.local_cluster import binaries, images
from orchestration.settings import ROOT
from tests.docker.daemon import Daemon, docker, docker_daemon
from tests.parts import client_of, copy_of_checkout, free_port, wait_until
from tests.versions.catalogue import PREVIOUS_COMMIT

DAILY = "dbt-pipeline/dbt-pipeline-daily"

SECRETS = ("postgres", "prefect", "warehouse", "redis", "encryption-key", "credentials/*")

CALL = """
import base64, json, os, sys, urllib.error, urllib.request
statuses = []
for method, path, body in json.loads(sys.argv[1]):
    request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, json.dumps(body).encode(), method=method)
    request.add_header("Content-Type", "application/json")
    access = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
    request.add_header("Authorization", f"Basic {access}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            statuses.append(answer.status)
    except urllib.error.HTTPError as error:
        statuses.append(error.code)
print(json.dumps(statuses))
"""
"""Makes calls of the API in a run's container, with the credential of that container."""

ASK = """
import http.client, socket, sys
method, target, body = sys.argv[1:]
connection = http.client.HTTPConnection("docker")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/docker-proxy/docker.sock")
connection.request(method, target, body or None, {"Content-Type": "application/json"})
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


@dataclass(frozen=True)
class Stack:
    """Runs the stack of a checkout on a Docker daemon.

    Args:
        checkout: the folder of the checkout.
        environment: environment variables of the commands.
        daemon: the daemon; None for the machine's own.
        output: what `make up-docker` printed.
    """

    checkout: Path
    environment: dict[str, str]
    daemon: Daemon | None
    output: str = ""

    def make(self, target: str, status: int = 0, **variables: str) -> str:
        """Run a target of the Makefile, assert its exit status, and return what it printed."""
        done = subprocess.run(
            ["make", target],
            cwd=self.checkout, env=self.environment | variables, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def docker(self, *arguments: str) -> str:
        """Run a Docker command, and return its standard output."""
        return docker(self.environment["DOCKER_HOST"], *arguments)

    def prefect(self, *arguments: str) -> str:
        """Run a Prefect command as the how-to page describes, and return what it printed."""
        return binaries.run(["docker/stack", "prefect", *arguments], self.environment, self.checkout)

    def containers(self, *filters: str) -> list[dict[str, Any]]:
        """Return what `docker inspect` shows of the running containers of the stack and of flow runs."""
        options = [option for value in ("network=prefect", *filters) for option in ("--filter", value)]
        running = self.docker("ps", "--quiet", *options).split()
        inspected: list[dict[str, Any]] = json.loads(self.docker("inspect", *running)) if running else []
        return inspected

    def start_run(self) -> tuple[str, dict[str, Any]]:
        """Start a run of the daily deployment, and return the run's id and its container."""
        run = re.findall(r"UUID: (\S+)", self.prefect("deployment", "run", DAILY))[0]
        container = wait_until(lambda: self.containers(f"label=io.prefect.flow-run-id={run}"), "the run's container")
        return run, container[0]

    def service(self, name: str) -> str:
        """Return the id of a service's container."""
        [found] = self.docker("ps", "--quiet", "--filter", f"label=com.docker.compose.service={name}").split()
        return found

    def ask_proxy(self, method: str, target: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Send a request to the Docker proxy from the worker's container; return the answer's status and body."""
        text = json.dumps(body) if body else ""
        output = self.docker("exec", self.service("worker"), "python", "-c", ASK, method, target, text)
        status, _, answer = output.partition(" ")
        return int(status), answer

    def sql(self, statement: str, database: str = "warehouse", user: str = "postgres") -> str:
        """Run a statement in one of the databases, and return its rows."""
        return self.docker("exec", self.service("postgres"), "psql", "-U", user, "-d", database, "-Atc", statement)

    @property
    def password(self) -> Path:
        """The file with the password of user admin."""
        return self.checkout / "docker" / "password"

    @property
    def url(self) -> str:
        """The URL of the UI."""
        return f"http://127.0.0.1:{self.environment['PORT']}"


@pytest.fixture(scope="module")
def machine(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Return a daemon without a stack, and a new checkout."""
    checkout = tmp_path_factory.mktemp("checkout")
    copy_of_checkout(checkout)
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)  # docker/build lists files by git
    with docker_daemon(tmp_path_factory.mktemp("docker")) as daemon:
        host = daemon.host if daemon else os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        environment = os.environ | {"DOCKER_HOST": host, "PORT": str(free_port()), "IMAGE": image}
        if registry.has_image(images.POSTGRES):  # this machine reaches only its own registry
            archive = tmp_path_factory.mktemp("databases") / "image.tar"
            for target in ("postgres", "valkey"):
                environment[f"{target.upper()}_IMAGE"] = _load_database_image(host, archive, target)
        yield Stack(checkout, environment, daemon)


def _load_database_image(host: str, archive: Path, target: str) -> str:
    """Build the image of a database, typically from the builder's cache, and load the image into the daemon."""
    name, folder = f"{target}:test", ROOT / "docker/databases"
    isolation = ["--isolation", "chroot", "--network", "host", "--tls-verify=false", "--layers"]
    options = ["--build-arg", f"BASE_IMAGE={images.BASE}", "--target", target, "--quiet", str(folder)]
    built = binaries.run(["buildah", "build", *isolation, *options]).strip()
    binaries.run(["buildah", "push", "--quiet", built, f"docker-archive:{archive}:{name}"])
    docker(host, "load", "--quiet", "--input", str(archive))
    archive.unlink()
    return name


@pytest.fixture(scope="module")
def stack(machine: Stack) -> Stack:
    """Start the stack from nothing."""
    return replace(machine, output=machine.make("up-docker"))


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator[httpx.Client]:
    """Yield a client of the Prefect API, with the generated password."""
    auth = httpx.BasicAuth("admin", stack.password.read_text().strip())
    with client_of(f"{stack.url}/api", auth) as client:
        yield client


def _wait_until_ended(api: httpx.Client, run: str) -> tuple[str, str]:
    """Wait until a flow run has ended, and return the type and the message of its final state."""

    def state() -> Any:
        found = api.get(f"/flow_runs/{run}").raise_for_status().json()["state"]
        return found["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and found

    found = wait_until(state, f"the end of flow run {run}", 180)
    return found["type"], found["message"] or ""


def test_files_of_the_stack_pass_orchestrate_check() -> None:
    command = [sys.executable, "-m", "orchestration", "check", "prefect.yaml", "docker/pool.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_start_without_docker_is_an_error_with_the_cure(machine: Stack) -> None:
    lines = machine.make("up-docker", status=2, DOCKER_HOST="unix:///nowhere.sock").splitlines()
    assert "Docker does not answer" in lines[0]
    assert "Start it, or name another daemon in DOCKER_HOST" in lines[0]
    assert len(lines) == 2, "the message, and make's own line"
    assert not machine.password.exists()


def test_taken_port_is_an_error_with_the_cure(machine: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = machine.make("up-docker", status=2, PORT=str(port))
    assert f"Port {port} of this machine is taken. Choose another: make up-docker PORT=4201" in output


def test_start_prints_url_user_and_first_command(stack: Stack) -> None:
    assert f"{stack.url}, user admin, password in docker/password" in stack.output
    assert f"docker/stack prefect deployment run {DAILY} --watch" in stack.output
    assert stat.S_IMODE(stack.password.stat().st_mode) == 0o600
    ignored = subprocess.run(["git", "check-ignore", "-q", "docker/password"], cwd=stack.checkout, check=False)
    assert ignored.returncode == 0


def test_ui_and_api_are_behind_the_password_on_loopback(stack: Stack, api: httpx.Client) -> None:
    assert httpx.get(stack.url, timeout=30).text.lstrip().lower().startswith("<!doctype html>")
    assert api.get("/admin/version").status_code == 200
    for auth in (None, ("admin", "wrong")):
        assert httpx.get(f"{stack.url}/api/admin/version", auth=auth, timeout=30).status_code == 401
    published = [
        ports for container in stack.containers() for ports in container["NetworkSettings"]["Ports"].values() if ports
    ]
    assert [port["HostIp"] for ports in published for port in ports] == ["127.0.0.1"]


def test_daily_deployment_runs_as_a_restricted_container(stack: Stack, api: httpx.Client) -> None:
    deployed = {deployment["name"] for deployment in api.post("/deployments/filter", json={}).json()}
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert deployed == {deployment["name"] for deployment in written}
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_until(lambda: api.post("/flow_runs/filter", json=scheduled).json(), "the scheduler to schedule", 90)
    # A scheduled run would disturb the following tests. A paused schedule stays paused.
    daily = api.get(f"/deployments/name/{DAILY}").json()
    [schedule] = daily["schedules"]
    api.patch(f"/deployments/{daily['id']}/schedules/{schedule['id']}", json={"active": False}).raise_for_status()

    run, container = stack.start_run()
    assert _wait_until_ended(api, run)[0] == "COMPLETED"
    assert container["Config"]["Image"] == stack.environment["IMAGE"]
    assert container["Config"]["User"] == "65532:65532"
    confined = container["HostConfig"]
    assert confined["ReadonlyRootfs"]
    assert confined["CapDrop"] == ["ALL"]
    assert confined["SecurityOpt"] == ["no-new-privileges:true"]
    assert confined["Memory"] == 2**30
    assert [mount["Destination"] for mount in container["Mounts"]] == ["/run/secrets"], "no Docker socket"
    label = f"label=io.prefect.flow-run-id={run}"
    wait_until(lambda: not stack.docker("ps", "--all", "--quiet", "--filter", label), "the container to be removed")

    assert stack.sql("select day from raw.loads") == "2013-01-01"
    assert int(stack.sql("select count(*) from analytics.carrier_daily_punctuality")) > 5
    last = "Finished in state Completed()"

    def is_logged() -> bool:
        logs = api.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).json()
        return any(log["message"] == last for log in logs)

    wait_until(is_logged, "the run's last line in the API")


def test_containers_and_api_show_no_password(stack: Stack, api: httpx.Client) -> None:
    server = stack.service("server")
    passwords = stack.docker("exec", server, "sh", "-c", f"cd /run/secrets && cat {' '.join(SECRETS)}").split()
    passwords.append(stack.password.read_text().strip())
    assert len({password for password in passwords if len(password) >= 32}) == 9
    run, container = stack.start_run()
    pool = api.get("/work_pools/default").json()
    assert pool["type"] == "docker"
    assert pool["base_job_template"]["variables"]["properties"]["image"]["default"] == stack.environment["IMAGE"]
    shown = json.dumps([stack.containers(), container, pool, api.post("/deployments/filter", json={}).json()])
    assert not [password for password in passwords if password in shown]
    assert _wait_until_ended(api, run)[0] == "COMPLETED"


def test_run_is_refused_the_calls_of_an_administrator(stack: Stack, api: httpx.Client) -> None:
    """Attack: code in a run's container uses all credentials that it finds there."""
    daily = api.get(f"/deployments/name/{DAILY}").json()
    [other, *_] = api.post("/flow_runs/filter", json={"limit": 1}).json()
    run, container = stack.start_run()
    template = {"job_configuration": {"privileged": True}, "variables": {"type": "object", "properties": {}}}
    attacks = [
        ("PATCH", "/work_pools/default", {"base_job_template": template}),
        ("DELETE", "/work_pools/default", None),
        ("POST", "/deployments/", {"name": "attack", "flow_id": daily["flow_id"]}),
        ("PATCH", f"/deployments/{daily['id']}", {"job_variables": {"command": "id"}}),
        ("DELETE", f"/deployments/{daily['id']}", None),
        ("POST", "/automations/", {}),
        ("POST", "/variables/", {"name": "attack", "value": "1"}),
        ("POST", "/block_documents/", {}),
        ("GET", "/admin/settings", None),
        ("POST", "/work_pools/default/get_scheduled_flow_runs", {}),
        ("DELETE", f"/flow_runs/{other['id']}", None),
        ("POST", f"/flow_runs/{other['id']}/set_state", {"state": {"type": "CRASHED"}, "force": True}),
    ]
    own = ("PATCH", f"/flow_runs/{run}", {"tags": ["mine"]})
    calls = json.dumps([*attacks, own])
    assert json.loads(stack.docker("exec", container["Id"], "python", "-c", CALL, calls)) == [403] * len(attacks) + [
        204
    ]
    files = stack.docker("exec", container["Id"], "sh", "-c", "cat /run/secrets/* /proc/1/environ | tr '\\0' '\\n'")
    credentials = [line.partition(":")[0] for line in files.splitlines() if "AUTH_STRING" in line]
    assert set(credentials) == {f"PREFECT_API_AUTH_STRING=run-{run}"}
    secrets = stack.docker("exec", stack.service("server"), "sh", "-c", f"cd /run/secrets && cat {' '.join(SECRETS)}")
    kept = {secret for secret in [*secrets.split(), stack.password.read_text().strip()] if secret in files}
    assert len(kept) == 1, "the warehouse's password alone"
    assert _wait_until_ended(api, run)[0] == "COMPLETED"
    denied = [
        json.loads(line)
        for line in stack.docker("logs", stack.service("server")).splitlines()
        if line[:8] == '{"audit"'
    ]
    refused = [line for line in denied if line["user"] == f"run-{run}" and line["status"] == 403]
    assert [(line["method"], line["path"]) for line in refused] == [(method, path) for method, path, _ in attacks]


def test_server_refuses_json_that_it_could_not_read_again(api: httpx.Client) -> None:
    deep = "[" * 300 + "]" * 300
    answer = api.post(
        "/flows/", content=f'{{"name": "deep", "tags": {deep}}}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    assert "levels of lists and objects" in answer.text


def test_template_that_changes_on_the_server_has_no_effect(stack: Stack, api: httpx.Client) -> None:
    """Attack: a stolen administrator's password changes the template, to make every later run root on the machine."""
    pool = api.get("/work_pools/default").json()
    stolen = json.loads(json.dumps(pool["base_job_template"]))
    stolen["job_configuration"] |= {"privileged": True, "volumes": ["/:/host"], "network_mode": "host", "networks": []}
    api.patch("/work_pools/default", json={"base_job_template": stolen}).raise_for_status()
    assert api.get("/work_pools/default").json()["base_job_template"]["job_configuration"]["privileged"]
    run, container = stack.start_run()
    assert not container["HostConfig"]["Privileged"]
    assert container["HostConfig"]["NetworkMode"] == "prefect"
    assert [mount["Destination"] for mount in container["Mounts"]] == ["/run/secrets"]
    assert _wait_until_ended(api, run)[0] == "COMPLETED"
    api.patch("/work_pools/default", json={"base_job_template": pool["base_job_template"]}).raise_for_status()


def test_worker_cannot_become_root_on_the_machine(stack: Stack) -> None:
    """Attack: code in the worker's container sends requests to the Docker proxy."""
    proxy, worker = json.loads(stack.docker("inspect", stack.service("docker-proxy"), stack.service("worker")))
    assert proxy["HostConfig"]["NetworkMode"] == "none"
    assert proxy["Config"]["User"] == worker["Config"]["User"] == "65532:65532"
    assert not [mount for mount in worker["Mounts"] if "docker.sock" in mount["Source"]]
    confined = {"NetworkMode": "prefect", "CapDrop": ["ALL"], "SecurityOpt": ["no-new-privileges:true"]}
    body = {
        "Image": stack.environment["IMAGE"],
        "Labels": {"io.prefect.flow-run-id": "attack"},
        "HostConfig": confined | {"ReadonlyRootfs": True},
    }
    attacks: list[dict[str, Any]] = [
        {"Binds": ["/:/host"]},
        {"binds": ["/:/host"]},
        {"Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}]},
        {"Privileged": True},
        {"PidMode": "host"},
        {"NetworkMode": "host"},
        {"CapAdd": ["SYS_ADMIN"]},
        {"VolumesFrom": [proxy["Id"]]},
    ]
    for attack in attacks:
        host: dict[str, Any] = confined | {"ReadonlyRootfs": True} | attack
        status, answer = stack.ask_proxy("POST", "/v1.41/containers/create?name=attack", body | {"HostConfig": host})
        assert (status, "the Docker proxy refused this" in answer) == (403, True), attack
    for method, target in (
        ("POST", f"/v1.41/containers/{proxy['Id']}/exec"),
        ("GET", f"/v1.41/containers/{proxy['Id']}/json"),
        ("POST", f"/v1.41/containers/{proxy['Id']}/stop"),
        ("GET", "/v1.41/containers/json"),
        ("GET", "/v1.41/volumes"),
    ):
        assert stack.ask_proxy(method, target)[0] == 403, target
    assert not stack.docker("ps", "--all", "--quiet", "--filter", "name=attack")
    status, answer = stack.ask_proxy("POST", "/v1.41/containers/create?name=allowed", body)
    assert status == 201, answer
    stack.docker("rm", "allowed")


def test_run_with_a_forbidden_image_is_crashed_with_the_cure(stack: Stack, api: httpx.Client) -> None:
    daily = api.get(f"/deployments/name/{DAILY}").json()
    made = api.post(f"/deployments/{daily['id']}/create_flow_run", json={"job_variables": {"image": "postgres:17.6"}})
    kind, message = _wait_until_ended(api, made.raise_for_status().json()["id"])
    assert kind == "CRASHED"
    assert "the image 'postgres:17.6' is not allowed. Allow it in RUN_IMAGES of make up-docker" in message


def test_cancelled_run_is_stopped_through_the_proxy(stack: Stack, api: httpx.Client) -> None:
    run, container = stack.start_run()
    wait_until(lambda: api.get(f"/flow_runs/{run}").json()["state"]["type"] == "RUNNING", "the run to run", 180)
    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    api.post(f"/flow_runs/{run}/set_state", json=cancelling).raise_for_status()
    assert _wait_until_ended(api, run)[0] == "CANCELLED"
    wait_until(lambda: not stack.containers(f"id={container['Id']}"), "the container to be stopped", 60)


def test_killed_run_is_crashed(stack: Stack, api: httpx.Client) -> None:
    """The state has the exit code. Prefect's worker misses the code if Docker removes the container first."""

    def kill_a_run() -> str:
        run, container = stack.start_run()
        wait_until(lambda: api.get(f"/flow_runs/{run}").json()["state"]["type"] == "RUNNING", "the run to run", 180)
        stack.docker("kill", container["Id"])
        kind, message = _wait_until_ended(api, run)
        assert kind == "CRASHED"
        return message

    messages = [kill_a_run()]
    while "status code 137" not in messages[-1] and len(messages) < 3:
        assert "No heartbeat" in messages[-1]
        messages.append(kill_a_run())
    assert "status code 137" in messages[-1], messages


def test_restarted_docker_restarts_the_stack_and_crashes_the_interrupted_run(stack: Stack, api: httpx.Client) -> None:
    if stack.daemon is None:
        pytest.skip("the machine's own Docker is not restarted")
    run, _ = stack.start_run()
    begun = {
        "filter": {"event": {"name": ["prefect.flow-run.Running"]}, "any_resource": {"id": [f"prefect.flow-run.{run}"]}}
    }
    # The server keeps new events in memory for a moment, and loses them when it ends.
    wait_until(lambda: api.post("/events/filter", json=begun).json()["events"], "the run to run", 180)
    stack.daemon.stop()
    stack.daemon.start()

    def is_back() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return bool(api.get("/health").is_success)
        return False

    wait_until(is_back, "the server to be back", 180)
    assert _wait_until_ended(api, run)[0] == "CRASHED"
    again, _ = stack.start_run()
    assert _wait_until_ended(api, again)[0] == "COMPLETED"
    wait_until(lambda: not stack.containers(f"label=io.prefect.flow-run-id={again}"), "its container to be removed")


def test_warehouse_user_cannot_connect_to_the_prefect_database(stack: Stack) -> None:
    assert stack.sql("select current_user", user="warehouse") == "warehouse"
    with pytest.raises(ClusterError, match="permission denied for database"):
        stack.sql("select 1", database="prefect", user="warehouse")


def test_second_start_keeps_everything_and_corrects_drift(stack: Stack, api: httpx.Client) -> None:
    def read_everything() -> list[Any]:
        listed = [api.post(f"/{kind}/filter", json={}).json() for kind in ("work_pools", "deployments", "automations")]
        ids = [sorted(item["id"] for item in items) for items in listed]
        return [*ids, {container["Id"] for container in stack.containers()}, stack.password.read_text()]

    before = read_everything()
    assert [len(ids) for ids in before[:4]] == [1, 2, 1, 5]
    daily = f"/deployments/name/{DAILY}"
    written = api.get(daily).json()
    api.patch(f"/deployments/{written['id']}", json={"description": "by hand"}).raise_for_status()
    stack.make("up-docker")
    assert read_everything() == before
    assert api.get(daily).json()["description"] == written["description"]


def test_stop_keeps_the_volumes(stack: Stack) -> None:
    run, _ = stack.start_run()
    output = stack.make("down-docker")
    for label in ("com.docker.compose.project=prefect", f"io.prefect.flow-run-id={run}"):
        assert not stack.docker("ps", "--all", "--quiet", "--filter", f"label={label}")
    volumes = set(stack.docker("volume", "ls", "--quiet", "--filter", "name=prefect-").split())
    secrets = {f"prefect-{name}-secrets" for name in ("server", "worker", "sync", "run")}
    assert volumes == {"prefect-database", "prefect-docker-proxy", *secrets}
    assert set(output.split("docker volume rm ")[1].split()) == volumes


def test_stack_of_the_previous_release_is_upgraded(stack: Stack, api: httpx.Client, tmp_path: Path) -> None:
    """Its files with the present image: volumes, passwords and containers of before. Runs had the API's password."""
    volumes = stack.docker("volume", "ls", "--quiet", "--filter", "name=prefect-").split()
    stack.docker("volume", "rm", *volumes)
    archive = subprocess.run(
        ["git", "archive", PREVIOUS_COMMIT, "docker", "Makefile"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x"], cwd=tmp_path, input=archive.stdout, check=True)
    shutil.copy(stack.password, tmp_path / "docker/password")
    older = replace(stack, checkout=tmp_path)
    older.make("up-docker")
    before, container = older.start_run()
    password = stack.password.read_text().strip()
    assert password in stack.docker("exec", container["Id"], "cat", "/run/secrets/environment")
    assert _wait_until_ended(api, before)[0] == "COMPLETED"
    block = _make_secret_block(api)

    stack.make("up-docker")
    assert api.get(f"/flow_runs/{before}").json()["state"]["type"] == "COMPLETED"
    assert stack.sql("select day from raw.loads") == "2013-01-01"
    for _ in range(2):
        document = api.get(f"/block_documents/{block}", params={"include_secrets": True}).raise_for_status().json()
        assert document["data"] == {"value": "of the older stack"}
        encrypted = ["docker/stack", "python", "-m", "orchestration.block_encryption", "encrypt-again"]
        output = binaries.run(encrypted, stack.environment, stack.checkout)
    assert "all blocks have the key of the environment" in output
    run, container = stack.start_run()
    assert password not in stack.docker("exec", container["Id"], "sh", "-c", "cat /run/secrets/* /proc/1/environ")
    assert _wait_until_ended(api, run)[0] == "COMPLETED"


def _make_secret_block(api: httpx.Client) -> str:
    """Create a block with a secret value, and return its id."""
    kind = api.get("/block_types/slug/secret").raise_for_status().json()
    schemas = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    [schema, *_] = api.post("/block_schemas/filter", json=schemas).raise_for_status().json()
    block = {"name": "older", "data": {"value": "of the older stack"}}
    ids = {"block_type_id": kind["id"], "block_schema_id": schema["id"]}
    made = api.post("/block_documents/", json=block | ids).raise_for_status().json()
    return str(made["id"])
