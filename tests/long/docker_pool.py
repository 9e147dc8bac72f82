"""One machine with Docker: up, the daily deployment as a container, a killed one, up again, down.

`make test` does not collect this file; `make test-long FOR=docker-pool` runs it.
"""

import contextlib
import json
import os
import re
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

DAILY = "dbt-pipeline/dbt-pipeline-daily"


@dataclass(frozen=True)
class Stack:
    """A checkout whose stack runs on a Docker daemon."""

    checkout: Path
    environment: dict[str, str]
    daemon: Daemon | None
    """None where the daemon is the machine's own."""
    said: str = ""

    def make(self, target: str, status: int = 0, **variables: str) -> str:
        """Run a target of the Makefile; what it printed."""
        done = subprocess.run(
            ["make", target],
            cwd=self.checkout, env=self.environment | variables, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def docker(self, *arguments: str) -> str:
        return docker(self.environment["DOCKER_HOST"], *arguments)

    def prefect(self, *arguments: str) -> str:
        """Run a Prefect command as the page says; what it printed."""
        return binaries.run(["docker/stack", "prefect", *arguments], self.environment, self.checkout)

    def containers(self, *filters: str) -> list[dict[str, Any]]:
        """What `docker inspect` shows of the stack's containers that run, those of flow runs too."""
        options = [option for each in ("network=prefect", *filters) for option in ("--filter", each)]
        running = self.docker("ps", "--quiet", *options).split()
        inspected: list[dict[str, Any]] = json.loads(self.docker("inspect", *running)) if running else []
        return inspected

    def start_run(self) -> tuple[str, dict[str, Any]]:
        """Ask for the daily deployment; the id of its run and the container that the worker starts for it."""
        run = re.findall(r"UUID: (\S+)", self.prefect("deployment", "run", DAILY))[0]
        container = wait_until(lambda: self.containers(f"label=io.prefect.flow-run-id={run}"), "the run's container")
        return run, container[0]

    def sql(self, statement: str, database: str = "warehouse", user: str = "postgres") -> str:
        """The rows of a statement in one of the databases."""
        [postgres] = self.docker("ps", "--quiet", "--filter", "label=com.docker.compose.service=postgres").split()
        return self.docker("exec", postgres, "psql", "-U", user, "-d", database, "-Atc", statement)

    @property
    def password(self) -> Path:
        return self.checkout / "docker" / "password"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['PORT']}"


@pytest.fixture(scope="module")
def machine(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A daemon without a stack, and a checkout that has never been up."""
    checkout = tmp_path_factory.mktemp("checkout")
    copy_of_checkout(checkout)
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)  # docker/build asks git what there is
    with docker_daemon(tmp_path_factory.mktemp("docker")) as daemon:
        host = daemon.host if daemon else os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
        environment = os.environ | {"DOCKER_HOST": host, "PORT": str(free_port()), "IMAGE": image}
        if registry.has_image(images.POSTGRES):  # this machine reaches no image registry but its own
            environment["POSTGRES_IMAGE"] = _load_postgres_image(
                host, tmp_path_factory.mktemp("postgres") / "image.tar"
            )
        yield Stack(checkout, environment, daemon)


def _load_postgres_image(host: str, archive: Path) -> str:
    """Build today's image of Postgres, most of it from the builder's cache, and give it to the daemon."""
    name, folder = "postgres:test", ROOT / "docker/databases"
    isolation = ["--isolation", "chroot", "--network", "host", "--tls-verify=false", "--layers"]
    options = ["--build-arg", f"BASE_IMAGE={images.BASE}", "--target", "postgres", "--quiet", str(folder)]
    built = binaries.run(["buildah", "build", *isolation, *options]).strip()
    binaries.run(["buildah", "push", "--quiet", built, f"docker-archive:{archive}:{name}"])
    docker(host, "load", "--quiet", "--input", str(archive))
    archive.unlink()
    return name


@pytest.fixture(scope="module")
def stack(machine: Stack) -> Stack:
    """The stack, up from nothing, and what `make up-docker` said."""
    return replace(machine, said=machine.make("up-docker"))


@pytest.fixture(scope="module")
def api(stack: Stack) -> Iterator[httpx.Client]:
    """The server's API, with the password that was generated."""
    auth = httpx.BasicAuth("admin", stack.password.read_text().strip())
    with client_of(f"{stack.url}/api", auth) as client:
        yield client


def _wait_until_ended(api: httpx.Client, run: str) -> tuple[str, str]:
    """The type and message of the state that a flow run ends in."""

    def state() -> Any:
        found = api.get(f"/flow_runs/{run}").raise_for_status().json()["state"]
        return found["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") and found

    found = wait_until(state, f"the end of flow run {run}", 180)
    return found["type"], found["message"] or ""


def test_the_stacks_files_are_ones_that_orchestrate_takes() -> None:
    command = [sys.executable, "-m", "orchestration", "check", "prefect.yaml", "docker/pool.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_docker_one_line_says_so(machine: Stack) -> None:
    said = machine.make("up-docker", status=2, DOCKER_HOST="unix:///nowhere.sock").splitlines()
    assert "Docker does not answer" in said[0]
    assert "Start it, or name another in DOCKER_HOST" in said[0]
    assert len(said) == 2, "and make's own line"
    assert not machine.password.exists()


def test_taken_port_is_named_with_its_cure(machine: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = machine.make("up-docker", status=2, PORT=str(port))
    assert f"Port {port} of this machine is taken. Choose another: make up-docker PORT=4201" in said


def test_up_says_how_to_get_in(stack: Stack) -> None:
    assert f"{stack.url}, user admin, password in docker/password" in stack.said
    assert f"docker/stack prefect deployment run {DAILY} --watch" in stack.said
    assert stat.S_IMODE(stack.password.stat().st_mode) == 0o600
    ignored = subprocess.run(["git", "check-ignore", "-q", "docker/password"], cwd=stack.checkout, check=False)
    assert ignored.returncode == 0


def test_ui_and_api_are_behind_the_password_on_loopback(stack: Stack, api: httpx.Client) -> None:
    assert httpx.get(stack.url, timeout=30).text.lstrip().lower().startswith("<!doctype html>")
    assert api.get("/admin/version").status_code == 200
    for auth in (None, ("admin", "wrong")):
        assert httpx.get(f"{stack.url}/api/admin/version", auth=auth, timeout=30).status_code == 401
    published = [ports for each in stack.containers() for ports in each["NetworkSettings"]["Ports"].values() if ports]
    assert [port["HostIp"] for ports in published for port in ports] == ["127.0.0.1"]


def test_the_daily_deployment_runs_as_a_container_of_the_image(stack: Stack, api: httpx.Client) -> None:
    deployed = {each["name"] for each in api.post("/deployments/filter", json={}).json()}
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert deployed == {each["name"] for each in written}
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    wait_until(lambda: api.post("/flow_runs/filter", json=scheduled).json(), "the scheduler to schedule", 90)
    # From here on a run of the schedule's own would be among those of tests. What is paused stays so.
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

    def logged() -> bool:
        logs = api.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [run]}}}).json()
        return any(each["message"] == last for each in logs)

    wait_until(logged, "the run's last line in the API")


def test_no_password_is_in_a_container_s_environment_or_the_api(stack: Stack, api: httpx.Client) -> None:
    [server] = stack.docker("ps", "--quiet", "--filter", "label=com.docker.compose.service=server").split()
    files = ["postgres", "prefect", "warehouse"]
    passwords = stack.docker("exec", server, "sh", "-c", f"cd /run/secrets && cat {' '.join(files)}").split()
    passwords.append(stack.password.read_text().strip())
    assert len({each for each in passwords if len(each) >= 32}) == 4
    run, container = stack.start_run()
    pool = api.get("/work_pools/default").json()
    assert pool["type"] == "docker"
    assert pool["base_job_template"]["variables"]["properties"]["image"]["default"] == stack.environment["IMAGE"]
    shown = json.dumps([stack.containers(), container, pool, api.post("/deployments/filter", json={}).json()])
    assert not [each for each in passwords if each in shown]
    assert _wait_until_ended(api, run)[0] == "COMPLETED"


def test_a_run_that_is_killed_is_crashed(stack: Stack, api: httpx.Client) -> None:
    """With its exit code, unless Docker had removed the container by the time Prefect's worker asked for that."""

    def killed() -> str:
        run, container = stack.start_run()
        running = lambda: api.get(f"/flow_runs/{run}").json()["state"]["type"] == "RUNNING"  # noqa: E731
        wait_until(running, "the run to run", 180)
        stack.docker("kill", container["Id"])
        kind, message = _wait_until_ended(api, run)
        assert kind == "CRASHED"
        return message

    messages = [killed()]
    while "status code 137" not in messages[-1] and len(messages) < 3:
        assert "No heartbeat" in messages[-1]
        messages.append(killed())
    assert "status code 137" in messages[-1], messages


def test_restarted_docker_brings_the_stack_back_and_reports_the_cut_run(stack: Stack, api: httpx.Client) -> None:
    if stack.daemon is None:
        pytest.skip("the machine's own Docker is not restarted")
    run, _ = stack.start_run()
    begun = {
        "filter": {"event": {"name": ["prefect.flow-run.Running"]}, "any_resource": {"id": [f"prefect.flow-run.{run}"]}}
    }
    # The server keeps events in memory for a moment, and what it has there is lost with it.
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


def test_the_warehouse_s_user_does_not_get_into_prefect_s_database(stack: Stack) -> None:
    assert stack.sql("select current_user", user="warehouse") == "warehouse"
    with pytest.raises(ClusterError, match="permission denied for database"):
        stack.sql("select 1", database="prefect", user="warehouse")


def test_up_again_makes_nothing_anew_and_brings_back_what_somebody_changed(stack: Stack, api: httpx.Client) -> None:
    def all_there_is() -> list[Any]:
        listed = [api.post(f"/{kind}/filter", json={}).json() for kind in ("work_pools", "deployments", "automations")]
        ids = [sorted(each["id"] for each in kind) for kind in listed]
        return [*ids, {each["Id"] for each in stack.containers()}, stack.password.read_text()]

    before = all_there_is()
    assert [len(ids) for ids in before[:4]] == [1, 2, 1, 3]
    daily = f"/deployments/name/{DAILY}"
    written = api.get(daily).json()
    api.patch(f"/deployments/{written['id']}", json={"description": "by hand"}).raise_for_status()
    stack.make("up-docker")
    assert all_there_is() == before
    assert api.get(daily).json()["description"] == written["description"]


def test_down_leaves_the_volumes_alone(stack: Stack) -> None:
    run, _ = stack.start_run()
    said = stack.make("down-docker")
    for label in ("com.docker.compose.project=prefect", f"io.prefect.flow-run-id={run}"):
        assert not stack.docker("ps", "--all", "--quiet", "--filter", f"label={label}")
    volumes = set(stack.docker("volume", "ls", "--quiet", "--filter", "name=prefect-").split())
    assert volumes == {"prefect-database", "prefect-server-secrets", "prefect-run-secrets"}
    assert set(said.split("docker volume rm ")[1].split()) == volumes
