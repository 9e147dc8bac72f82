"""The Docker stack: credentials by role, the settings of the chart, and the Docker socket for the proxy alone."""

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml
from cryptography.fernet import Fernet
from docker.types import HostConfig  # type: ignore[import-not-found]
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestration.access.control import AccessControl
from orchestration.access.credentials import Credentials, run_credential
from orchestration.access.routes import PERMISSIONS, WEBSOCKET, Role, read_routes
from orchestration.local.docker_secrets import write_secrets
from orchestration.worker.docker_policy import Policy
from tests.helm.rendering import environment, pod_specs, render
from tests.parts import examples

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
POOL = yaml.safe_load((ROOT / "docker/pool.yaml").read_text())["work_pools"][0]["base_job_template"]
PASSWORD = "the-administrators"  # noqa: S105 - of a stack in the tests
SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"


VOLUMES = ("server", "worker", "sync", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the secrets of a new stack."""
    made = tmp_path_factory.mktemp("secrets")
    for name in VOLUMES:
        (made / name).mkdir()
    write_secrets(made, PASSWORD)
    return made


def _sourced(volume: Path) -> dict[str, str]:
    """Return the variables that the containers of a volume read, as their shell reads them."""
    shell = POOL["job_configuration"]["container_create_kwargs"]["entrypoint"]
    entrypoint = shell[shell.index("sh") :]
    assert entrypoint[2].replace("$", "$$") in COMPOSE["server"]["entrypoint"], "server and runs differ"
    reads = [argument.replace("/run/secrets", str(volume)) for argument in entrypoint]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([*reads, "env", "-0"], env=environment, capture_output=True, text=True, check=True)
    found = dict(variable.partition("=")[::2] for variable in done.stdout.split("\0") if variable)
    return {name: value for name, value in found.items() if name not in ("PATH", "PWD")}


@settings(max_examples=examples(0.1), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], codec="utf-8"), min_size=1, max_size=20))
@example("a b")
@example("a&b")
@example("$(touch {folder}/executed) `touch {folder}/executed`")
@example("""'"\\""")
@example("a:b%40#;")
def test_password_reaches_the_server_unchanged(folder: Path, password: str) -> None:
    password = password.replace("{folder}", str(folder))
    write_secrets(folder, password)
    found = _sourced(folder / "server")
    assert found[SERVER] == found[CLIENT] == f"admin:{password}"
    assert not (folder / "executed").exists()


def test_each_volume_has_only_what_its_containers_need(folder: Path) -> None:
    write_secrets(folder, PASSWORD)
    mounts = re.compile(r"(\w+)-secrets:/run/secrets:ro")
    mounted = {name: mounts.findall(str(service["volumes"])) for name, service in COMPOSE.items()}
    of_server = ("postgres", "databases", "redis", "migrations", "server", "services")
    assert {name: found for name, found in mounted.items() if found} == {
        **{name: ["server"] for name in of_server},
        "worker": ["worker"],
        "deployments": ["sync"],
    }
    assert POOL["job_configuration"]["volumes"] == ["prefect-run-secrets:/run/secrets:ro"]
    files = {
        name: {file.relative_to(folder / name).as_posix() for file in (folder / name).rglob("*") if file.is_file()}
        for name in VOLUMES
    }
    assert files["worker"] == {"environment", "credentials/run-key"}
    assert files["sync"] == files["run"] == {"environment"}
    credentials = {role: (folder / f"server/credentials/{role}").read_text().strip() for role in ("worker", "sync")}
    assert _sourced(folder / "worker") == {CLIENT: credentials["worker"]}
    assert _sourced(folder / "sync") == {CLIENT: credentials["sync"]}
    assert set(_sourced(folder / "run")) == {"WAREHOUSE_URL"}


@pytest.mark.parametrize("role", [Role.RUN, Role.WORKER, Role.SYNC])
def test_only_the_administrator_may_administer(folder: Path, monkeypatch: pytest.MonkeyPatch, role: Role) -> None:
    """Attack: a container sends each request of the API with the credential that the stack gives it."""
    write_secrets(folder, PASSWORD)
    server, worker = COMPOSE["server"]["environment"], COMPOSE["worker"]["environment"]
    assert server["API_CREDENTIALS"] == worker["RUN_CREDENTIALS"] == "/run/secrets/credentials"
    monkeypatch.setenv("RUN_CREDENTIALS", str(folder / "worker/credentials"))
    credential = run_credential(uuid4()) if role is Role.RUN else _sourced(folder / role)[CLIENT]
    admin = _sourced(folder / "server")[SERVER]

    async def api(scope: Any, _: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    transport = httpx.ASGITransport(AccessControl(api, Credentials(folder / "server/credentials", admin), admin))
    denied = [
        route
        for route in read_routes()
        if route.access not in PERMISSIONS[role] | {"open"} and route.method != WEBSOCKET
    ]

    async def ask_all(used: str) -> set[int]:
        user, _, password = used.partition(":")
        async with httpx.AsyncClient(transport=transport, base_url="http://server", auth=(user, password)) as client:
            return {
                (await client.request(route.method, re.sub(r"\{\w+\}", str(uuid4()), route.path))).status_code
                for route in denied
            }

    assert len(denied) > 15
    assert asyncio.run(ask_all(credential)) == {403}
    assert asyncio.run(ask_all(admin)) == {200}


def test_stack_of_an_older_version_keeps_its_passwords(tmp_path: Path) -> None:
    """Its volumes had the databases' passwords, and runs had the administrator's."""
    for name in VOLUMES:
        (tmp_path / name).mkdir()
    older = {name: f"older-{name}" for name in ("postgres", "prefect", "warehouse")}
    for name, password in older.items():
        (tmp_path / "server" / name).write_text(f"{password}\n")
    for name in ("server", "run"):
        (tmp_path / name / "environment").write_text(f"{CLIENT}=admin:{PASSWORD}\n")

    def read() -> dict[str, str]:
        return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}

    write_secrets(tmp_path, PASSWORD)
    first = read()
    assert {name: first[f"server/{name}"].strip() for name in older} == older
    assert _sourced(tmp_path / "run") == {"WAREHOUSE_URL": "postgresql://warehouse:older-warehouse@postgres/warehouse"}
    Fernet(_sourced(tmp_path / "server")["PREFECT_SERVER_ENCRYPTION_KEY"])
    write_secrets(tmp_path, "other")
    second = read()
    assert {name for name in first | second if first.get(name) != second.get(name)} == {"server/environment"}


@pytest.mark.parametrize("component", ["server", "services", "migrations"])
def test_server_has_the_command_and_settings_of_the_chart(folder: Path, component: str) -> None:
    pods = pod_specs(render("prefect-server", {"image": {"tag": "1"}}))
    name = {"server": "Deployment/test-prefect-server-api", "services": "Deployment/test-prefect-server-services"}
    [chart] = pods[name.get(component, "Job/test-prefect-server-migrations-1")]["containers"]
    service = COMPOSE[component]
    assert service["command"] == chart["args"]
    of_chart, of_stack = environment(chart), {name: _default(value) for name, value in service["environment"].items()}
    secret = set(_sourced(folder / "server"))
    # The URL of the stack's database has all of its parts.
    parts = {f"PREFECT_SERVER_DATABASE_{part}" for part in ("DRIVER", "HOST", "PORT", "NAME", "USER", "PASSWORD")}
    assert {name for name, value in of_chart.items() if "valueFrom" in str(value) or isinstance(value, dict)} <= (
        secret | parts | {"REDIS_PASSWORD"}
    )
    places = {"PREFECT_API_URL", "PREFECT_UI_URL", "API_CREDENTIALS"}
    left_out = secret | parts | places | {"REDIS_URL", "REDIS_PASSWORD"}
    # 0 is for ever, as no variable is in the chart.
    kept = {name: value for name, value in of_stack.items() if name not in places and value != "0"}
    assert kept == {name: value for name, value in of_chart.items() if name not in left_out}


def test_databases_are_those_of_the_chart() -> None:
    pods = pod_specs(render("prefect-server", {"image": {"tag": "1"}}))
    [postgres] = pods["StatefulSet/test-prefect-server-database"]["containers"]
    [redis] = pods["Deployment/test-prefect-server-redis"]["containers"]
    assert _default(COMPOSE["postgres"]["image"]) == postgres["image"]
    assert _default(COMPOSE["redis"]["image"]) == redis["image"]
    scripts = (redis["args"][0], COMPOSE["redis"]["command"][-1])
    options = [script.partition("valkey.conf --dir")[2].replace("\\\n", " ").split() for script in scripts]
    assert options[0] == options[1]
    assert "--maxmemory" in options[0]


def _default(value: str) -> str:
    """Return a value of Compose where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Return the script in a new folder. Its `docker` prints its variables and succeeds."""
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker/stack", tmp_path / "docker/stack")
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(f"#!/bin/sh\nenv >{tmp_path}/variables\n")
    docker.chmod(0o755)
    return tmp_path / "docker/stack"


def _run(stack: Path, command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PATH": f"{stack.parent.parent}/bin:{os.environ['PATH']}"} | variables
    return subprocess.run([stack, command], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("given", "days"), [("", "7"), ("30", "30"), ("0", "36500"), ("000", "36500")])
def test_events_are_kept_for_ever_with_0_days(stack: Path, given: str, days: str) -> None:
    assert _run(stack, "down", RETENTION_EVENTS_DAYS=given).returncode == 0
    assert f"RETENTION_EVENTS_DAYS={days}\n" in (stack.parent.parent / "variables").read_text()


@pytest.mark.parametrize("text", ["a", "1.5", "-1", "$(id)"])
def test_days_that_are_no_number_are_refused(stack: Path, text: str) -> None:
    done = _run(stack, "up", RETENTION_RUNS_DAYS=text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"RETENTION_RUNS_DAYS={text} is no number of days. Set RETENTION_RUNS_DAYS to a whole"
    )


@pytest.mark.parametrize("text", ["a\nb\n", " \n", "\n"])
def test_password_file_without_a_password_is_refused(stack: Path, text: str) -> None:
    (stack.parent / "password").write_text(text)
    done = _run(stack, "up")
    assert done.returncode == 1
    assert "docker/password is not a password: it must be one line with text" in done.stderr


def test_only_the_proxy_has_the_docker_socket_and_no_network() -> None:
    proxy = COMPOSE["docker-proxy"]
    assert [name for name, service in COMPOSE.items() if "docker.sock" in str(service["volumes"])] == ["docker-proxy"]
    assert [name for name, service in COMPOSE.items() if "docker-proxy:/" in str(service["volumes"])] == [
        "worker",
        "docker-proxy",
    ]
    assert proxy["network_mode"] == "none"
    assert proxy["read_only"]
    assert proxy["cap_drop"] == ["ALL"]
    assert proxy["security_opt"] == ["no-new-privileges:true"]
    assert not {"user", "privileged", "ports", "networks"} & set(proxy), "the image's user, in the socket's group"
    assert "secrets" not in str(proxy["volumes"])
    assert COMPOSE["worker"]["environment"]["DOCKER_HOST"] == "unix:///run/docker-proxy/docker.sock"
    assert "group_add" not in COMPOSE["worker"]
    assert "docker-proxy" not in str(POOL)


def test_processes_logs_and_memory_of_each_container_are_limited() -> None:
    """A container's own file systems are memory, which the limit of the run's memory covers."""
    for name, service in COMPOSE.items():
        assert service["pids_limit"] == 1024, name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name
    # As docker-py writes it, and as the proxy allows it.
    given = POOL["job_configuration"]["container_create_kwargs"]
    names = ("pids_limit", "log_config", "tmpfs", "cap_drop", "security_opt", "read_only")
    host = HostConfig(version="1.45", **{name: given[name] for name in names})
    assert host["PidsLimit"] == 1024
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
    body = {
        "Image": "image",
        "Labels": {"io.prefect.flow-run-id": "1"},
        "HostConfig": {**host, "NetworkMode": "prefect"},
    }
    allowed = Policy.from_template(POOL, ["image"]).container(json.dumps(body).encode())
    assert allowed["HostConfig"]["PidsLimit"] == 1024


def test_names_of_services_are_reserved() -> None:
    command = COMPOSE["docker-proxy"]["command"][-1]
    reserved = command.split('--reserved-names "')[1].split('"')[0].split()
    on_the_network = {name for name, service in COMPOSE.items() if service.get("network_mode") != "none"}
    assert set(reserved) == on_the_network
