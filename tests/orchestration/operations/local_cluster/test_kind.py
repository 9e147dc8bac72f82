"""The commands of kind and Docker that make and delete the cluster. Recording programs replace the real ones."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, kind

KIND = """#!/bin/sh
cd {state} && echo "kind $*" >>log
case "$1 $2" in
"get clusters") cat clusters 2>/dev/null || echo "No kind clusters found." >&2 ;;
"create cluster")
  cat >config
  if [ -e broken ]; then printf 'ERROR: failed to create cluster\\nport is taken\\n' >&2; exit 1; fi
  echo prefect >clusters ;;
"get nodes") printf 'prefect-worker\\nprefect-control-plane\\n' ;;
"delete cluster") rm -f clusters ;;
*) exit 9 ;;
esac
"""

DOCKER = """#!/bin/sh
cd {state} && echo "docker $*" >>log
case "$1" in
info) [ ! -e stopped ] ;;
ps) cat registry 2>/dev/null || true ;;
run) echo '{{"State":"running"}}' >registry; echo '{{"bridge":{{}}}}' >networks ;;
start) echo '{{"State":"running"}}' >registry ;;
exec) ;;
inspect) cat networks ;;
network) echo '{{"bridge":{{}},"kind":{{}}}}' >networks ;;
rm) rm -f registry networks ;;
*) exit 9 ;;
esac
"""

LOOKS = ("kind get", "docker ps", "docker inspect")
"""Commands that change nothing."""


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder with what the recording programs know, on a machine without a cluster."""
    folder = tmp_path / "state"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    programs = {
        tmp_path / "docker": DOCKER,
        binaries.cache() / f"kind-{binaries.MODULES['kind'][1]}" / "kind": KIND,
    }
    for path, script in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script.format(state=folder))
        path.chmod(0o755)
    return folder


@pytest.fixture
def changes(state: Path) -> Callable[[], list[str]]:
    """Return a function that returns the commands since its last call that change something."""

    def read() -> list[str]:
        log = state / "log"
        lines = log.read_text().splitlines()
        log.unlink()
        return [line for line in lines if not line.startswith(LOOKS)]

    return read


def _hosts(node: str) -> str:
    folder = "/etc/containerd/certs.d/localhost:5000"
    hosts = '[host."http://prefect-registry:5000"]'
    return f"docker exec {node} sh -c mkdir -p {folder} && echo '{hosts}' > {folder}/hosts.toml"


HOSTS = [_hosts("prefect-worker"), _hosts("prefect-control-plane")]


def test_up_makes_a_cluster_whose_nodes_pull_from_the_registry(state: Path, changes: Callable[[], list[str]]) -> None:
    kind.up()
    run = "docker run -d --restart=always -p 127.0.0.1:5000:5000 --network bridge --name prefect-registry"
    create = "kind create cluster --name prefect --config - --wait 120s"
    connect = "docker network connect kind prefect-registry"
    assert changes() == [create, f"{run} registry:2.8.3", *HOSTS, connect]
    assert 'config_path = "/etc/containerd/certs.d"' in (state / "config").read_text()
    kind.up()
    assert changes() == HOSTS, "what runs is left as it is"


def test_up_starts_a_stopped_registry(state: Path, changes: Callable[[], list[str]]) -> None:
    kind.up()
    changes()
    (state / "registry").write_text('{"State":"exited"}\n')
    kind.up()
    assert changes() == ["docker start prefect-registry", *HOSTS]


def test_failed_creation_is_an_error_with_the_cause(state: Path, changes: Callable[[], list[str]]) -> None:
    (state / "broken").touch()
    with pytest.raises(ClusterError, match=r"^kind create cluster failed: port is taken$"):
        kind.up()
    assert not [line for line in changes() if line.startswith("docker")], "no registry is started"


def test_down_deletes_the_cluster_and_its_registry(state: Path, changes: Callable[[], list[str]]) -> None:
    kind.up()
    changes()
    kind.down()
    assert changes() == ["kind delete cluster --name prefect", "docker rm -f prefect-registry"]
    assert {path.name for path in state.iterdir()} == {"config"}
    kind.down()  # nothing is there


@pytest.mark.parametrize("stopped", [True, False])
def test_docker_runs_if_its_daemon_answers(state: Path, stopped: bool) -> None:
    if stopped:
        (state / "stopped").touch()
    assert kind.is_docker_running() is not stopped


def test_machine_without_docker_has_no_daemon(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(state))
    assert not kind.is_docker_running()
