"""The password of the bundled Valkey is rotated while pods connect: a real Redis."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER
from orchestration.operations.local_cluster.certificates import Authority
from orchestration.operations.rotation import valkey_password
from orchestration.operations.rotation.rotation import rotate
from tests.cluster.apiserver import ApiServer
from tests.helm.rendering import one, render
from tests.orchestration.operations.rotation.installation import Installation, installed
from tests.parts import free_port, redis_server

SECRET = f"{SERVER}-redis"


@pytest.fixture(scope="module")
def installation(kubernetes: ApiServer) -> Iterator[Installation]:
    yield from installed(kubernetes, SERVER)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, installation: Installation) -> Iterator[str]:
    """Yield the address of a Redis with the password of the Secret. `valkey-cli` is its client."""
    folder = tmp_path_factory.mktemp("redis")
    with redis_server(folder) as url:
        client = shutil.which("redis-cli")
        assert client
        (folder / "valkey-cli").write_text(f'#!/bin/sh\nexec {client} -u {url.replace(":secret@", "")} "$@"\n')
        (folder / "valkey-cli").chmod(0o755)
        with redis.Redis.from_url(url) as server:
            server.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{_password(installation)}"])
        address = url.replace(":secret@", "")
        variables = {"PATH": f"{folder}:{os.environ['PATH']}"}

        def execute(pod: str, command: list[str], text: str) -> str:
            assert pod == f"deployment/{SECRET}"
            done = subprocess.run(command, input=text, env=variables, capture_output=True, text=True, check=True)
            return done.stdout

        installation.execute = execute
        for component in ("api", "services"):
            installation.roll(f"{SERVER}-{component}")
        yield address


def _password(installation: Installation) -> str:
    return installation.secret(SECRET)["password"]


def _is_accepted(url: str, password: str) -> bool:
    try:
        with redis.Redis.from_url(url, password=password) as client:
            return bool(client.ping())
    except redis.AuthenticationError:
        return False


def test_rotation_refuses_no_connection_and_ends_the_old_password(url: str, installation: Installation) -> None:
    old = _password(installation)
    is_over = threading.Event()
    refused: list[str] = []
    open_connection = redis.Redis.from_url(url, password=old)
    open_connection.ping()

    def work() -> None:
        while not is_over.is_set():
            refused.extend(
                pod.name
                for pod in list(installation.pods)
                if not _is_accepted(url, pod.variables["REDIS_PASSWORD"]) and pod in installation.pods
            )
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        rotate(valkey_password.server_redis(installation.environment), keep_old=False)
    finally:
        is_over.set()
        thread.join()
    assert refused == []
    assert open_connection.ping(), "connections stay open"
    open_connection.close()
    assert (_is_accepted(url, old), _is_accepted(url, _password(installation))) == (False, True)
    assert set(installation.secret(SECRET)) == {"password"}


def test_pod_of_valkey_is_ready_whatever_its_password(url: str, installation: Installation, tmp_path: Path) -> None:
    deployment = one(render(SERVER, {"image": {"tag": "1"}}), "Deployment", f"test-{SECRET}")
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["exec"]["command"]
    installation.execute(f"deployment/{SECRET}", probe, "")
    closed = tmp_path / "valkey-cli"
    closed.write_text("#!/bin/sh\necho Could not connect to Valkey\n")
    closed.chmod(0o755)
    assert subprocess.run(probe, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=False).returncode == 1


def test_valkey_of_a_server_with_tls_is_asked_by_tls(url: str, installation: Installation, tmp_path: Path) -> None:
    Authority(tmp_path).issue("tls", "redis")
    port = free_port()
    files = {"tls-ca-cert-file": "ca.crt", "tls-cert-file": "tls.crt", "tls-key-file": "tls.key"}
    options = {option: str(tmp_path / file) for option, file in files.items()} | {"tls-auth-clients": "no"}
    with redis.Redis.from_url(url, password=_password(installation)) as server:
        server.execute_command("CONFIG", "SET", *(word for option in options.items() for word in option))
        server.config_set("tls-port", port)
    (tmp_path / "valkey-cli").write_text(f'#!/bin/sh\nexec redis-cli -p {port} "$@"\n')
    (tmp_path / "valkey-cli").chmod(0o755)
    client = valkey_password.CLIENT.replace("/etc/prefect-tls", str(tmp_path))
    done = subprocess.run(
        ["sh", "-c", client], input=f"{_password(installation)}\nPING\n", capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stdout == "PONG\n", done.stderr


def test_password_other_than_that_of_the_secret_is_reported(url: str, installation: Installation) -> None:
    with redis.Redis.from_url(url, password=_password(installation)) as client:
        client.acl_setuser("default", enabled=True, reset_passwords=True, passwords=["+other"])
    with pytest.raises(ClusterError, match=f"Valkey refuses the password of Secret {SECRET}: .*NOAUTH"):
        rotate(valkey_password.server_redis(installation.environment), keep_old=False)


def test_external_redis_and_an_older_release_are_refused(installation: Installation) -> None:
    environment = installation.environment
    container = {"name": "valkey", "readinessProbe": {"exec": {"command": ["sh", "-c", "$REDIS_PASSWORD"]}}}
    probe = json.dumps({"spec": {"template": {"spec": {"containers": [container]}}}})
    environment.kubectl("patch", "deployment", SECRET, f"--patch={probe}")
    with pytest.raises(ClusterError, match=r"is older than this checkout: .*Deploy first"):
        valkey_password.server_redis(environment)
    environment.kubectl("create", "secret", "generic", "redis", "--from-literal=url=redis://redis:6379/0")
    external = ("--set=redis.bundled.enabled=false", "--set=redis.external.existingSecret=redis")
    installation.install(SERVER, *external)
    with pytest.raises(ClusterError, match="has no bundled Valkey"):
        valkey_password.server_redis(environment)
