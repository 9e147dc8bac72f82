"""The Docker stack: any password reaches the containers unchanged, and only the proxy has the Docker socket."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from docker.types import HostConfig  # type: ignore[import-not-found]
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestration.worker.docker_policy import Policy
from tests.parts import examples

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
POOL = yaml.safe_load((ROOT / "docker/pool.yaml").read_text())["work_pools"][0]["base_job_template"]
SERVER, CLIENT = "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"


def _script(command: list[str], folder: Path) -> list[str]:
    """Return a container's command as Compose passes it, with single dollars and its folders in `folder`."""
    folders = {"/secrets/": f"{folder}/", "/run/secrets/": f"{folder}/"}
    made = [argument.replace("$$", "$") for argument in command]
    for inside, outside in folders.items():
        made = [argument.replace(inside, outside) for argument in made]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("secrets")
    for name in ("server", "run"):
        (made / name).mkdir()
    return made


@settings(max_examples=examples(0.1), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], codec="utf-8"), min_size=1, max_size=20))
@example("a b")
@example("a&b")
@example("$(touch {folder}/executed) `touch {folder}/executed`")
@example("""'"\\""")
@example("a:b%40#;")
def test_password_reaches_server_and_runs_unchanged(folder: Path, password: str) -> None:
    password = password.replace("{folder}", str(folder))
    writes = _script(COMPOSE["secrets"]["command"], folder)
    subprocess.run(writes, input=f"{password}\n", text=True, check=True, capture_output=True)
    shell = POOL["job_configuration"]["container_create_kwargs"]["entrypoint"]
    entrypoint = shell[shell.index("sh") :]
    assert entrypoint[2].replace("$", "$$") in COMPOSE["server"]["entrypoint"], "server and runs differ"
    for place, name in (("server", SERVER), ("server", CLIENT), ("run", CLIENT)):
        reads = [argument.replace("/run/secrets", str(folder / place)) for argument in entrypoint]
        environment = {"PATH": os.environ["PATH"]}
        done = subprocess.run([*reads, "env", "-0"], env=environment, capture_output=True, text=True, check=True)
        found = dict(variable.partition("=")[::2] for variable in done.stdout.split("\0"))
        assert found[name] == f"admin:{password}", place
    assert not (folder / "executed").exists()


def test_server_without_a_password_does_not_start(tmp_path: Path) -> None:
    command = [argument.replace("$$", "$") for argument in COMPOSE["server"]["command"]]
    (tmp_path / "prefect").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "prefect").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for access, code in (("", 2), ("admin:a", 0)):
        settings = environment | {SERVER: access}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, "" if code else "started\n")
        assert ("The server has no password. Start it by make up-docker" in done.stderr) == bool(code)


@pytest.mark.parametrize("text", ["a\nb\n", " \n", "\n"])
def test_password_file_without_a_password_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "docker").mkdir()
    shutil.copy(ROOT / "docker/stack", tmp_path / "docker/stack")
    (tmp_path / "docker/password").write_text(text)
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\n")
    docker.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "docker/stack", "up"],
        env=os.environ | {"PATH": f"{docker.parent}:{os.environ['PATH']}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
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
