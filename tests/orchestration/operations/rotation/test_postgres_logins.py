"""The password of the bundled Postgres is rotated while pods open connections, on a real Postgres."""

import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest

from orchestration.errors import ClusterError
from orchestration.operations.environment import OVERLAYS, SERVER, Environment
from orchestration.operations.rotation import postgres_logins, readers, rotated_secret
from orchestration.operations.rotation.rotation import rotate
from orchestration.settings import ROOT
from tests.cluster.apiserver import ApiServer
from tests.orchestration.operations.rotation.installation import Installation, Interrupted, Pod, installed
from tests.parts import debian_postgres, rows_of

SECRET = f"{SERVER}-database"


@pytest.fixture(scope="module")
def installation(kubernetes: ApiServer) -> Iterator[Installation]:
    yield from installed(kubernetes, SERVER)


@pytest.fixture(scope="module")
def postgres(installation: Installation) -> Iterator[str]:
    """Yield a Postgres with the logins of a new volume. The superuser alone needs no password."""
    with debian_postgres() as url:
        host = url.partition("host=")[2]
        script = ROOT / "helm" / "prefect-server" / "files" / "application-user"
        variables = {
            "PGHOST": host,
            "POSTGRES_USER": "postgres",
            "APPLICATION_USER": "prefect",
            "PATH": "/usr/bin:/bin",
        }
        password = installation.secret(SECRET)["password"]
        subprocess.run(["bash", script], env=variables | {"POSTGRES_PASSWORD": password}, check=True)
        [(file,)] = rows_of(url, "show hba_file")
        Path(file).write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        rows_of(url, "select pg_reload_conf()")

        def execute(pod: str, command: list[str], text: str) -> str:
            assert pod in ("prefect-server-database-0", "warehouse-0")
            assert command[0] == "psql"
            done = subprocess.run(command, input=text, env=variables, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ClusterError(done.stderr)
            return done.stdout

        installation.execute = execute
        for component in ("api", "services"):
            installation.roll(f"{SERVER}-{component}")
        yield url


def _connect(postgres: str, user: str, password: str) -> psycopg.Connection:
    return psycopg.connect(f"postgresql://{user}:{quote(password)}@/prefect?host={postgres.partition('host=')[2]}")


class Clients:
    """Opens connections as each pod of the server, and uses what other pods have created."""

    def __init__(self, postgres: str, installation: Installation) -> None:
        self._postgres = postgres
        self._installation = installation
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._one_at_a_time = threading.Lock()
        self.calls: dict[str, int] = {}
        self.errors: list[str] = []

    def __enter__(self) -> "Clients":
        # The kubelet ends a pod's process before the pod is deleted.
        self._installation.after_start = self._call
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._installation.after_start = lambda _: None

    def _work(self) -> None:
        while not self._is_over.is_set():
            time.sleep(0.2)
            for pod in list(self._installation.pods):
                if "PREFECT_SERVER_DATABASE_PASSWORD" in pod.variables:
                    try:
                        self._call(pod)
                    except psycopg.Error as error:
                        if pod in self._installation.pods:
                            self.errors.append(f"{pod.name}: {error}")

    def _call(self, pod: Pod) -> None:
        user, password = (pod.variables[f"PREFECT_SERVER_DATABASE_{name}"] for name in ("USER", "PASSWORD"))
        # If two transactions create the same table at the same time, one fails despite `if not exists`.
        with self._one_at_a_time, _connect(self._postgres, user, password) as connection:
            table = f"table_{len(self.calls) % 5}"
            connection.execute(f"create table if not exists {table} ()")
            connection.execute(f"alter table {table} add column if not exists more int")
            [(owner,)] = connection.execute(
                "select distinct tableowner from pg_tables where tablename like 'table_%%'"
            ).fetchall()
            assert owner == "prefect"
        self.calls[pod.name] = self.calls.get(pod.name, 0) + 1


def _rotate(installation: Installation, *, keep_old: bool = False) -> None:
    rotate(postgres_logins.server_database(installation.environment), keep_old=keep_old)


def _is_accepted(postgres: str, values: dict[str, str]) -> bool:
    try:
        _connect(postgres, values["username"], values["password"]).close()
    except psycopg.OperationalError as error:
        if "password authentication failed" not in str(error):
            raise
        return False
    return True


def test_rotation_fails_no_connection_and_ends_the_old_password(postgres: str, installation: Installation) -> None:
    first = installation.secret(SECRET)
    with Clients(postgres, installation) as clients:
        _rotate(installation, keep_old=True)
        assert _is_accepted(postgres, first)
        assert installation.is_rotated(SECRET)
        _rotate(installation)
        second = installation.secret(SECRET)
        assert not _is_accepted(postgres, first)
        _rotate(installation)
        third = installation.secret(SECRET)
    assert clients.errors == []
    assert len(clients.calls) == 6, "two pods of each password"
    assert [login["username"] for login in (first, second, third)] == ["prefect", "prefect_2", "prefect"]
    assert [_is_accepted(postgres, login) for login in (first, second, third)] == [False, False, True]
    assert _is_accepted(postgres, third | {"username": "prefect_2"}), "a chart of an older release knows one login"
    assert not installation.is_rotated(SECRET)
    assert set(third) == {"username", "password"}
    installation.install(SERVER)
    assert installation.secret(SECRET) == third, "an upgrade keeps it"


@pytest.mark.further
def test_interrupted_rotation_is_completed_by_the_same_command(postgres: str, installation: Installation) -> None:
    """The commands are interrupted at later and later writes, until one completes the rotation."""
    before = installation.secret(SECRET)
    with Clients(postgres, installation) as clients:
        for number in itertools.chain([0, 1], itertools.count(1)):
            installation.interrupted_write = number
            try:
                _rotate(installation)
                break
            except Interrupted:
                assert number == 0 or installation.is_rotated(SECRET)
    installation.interrupted_write = -1
    assert number > 5, "a command interrupted in each step"
    after = installation.secret(SECRET)
    assert (_is_accepted(postgres, before), _is_accepted(postgres, after)) == (False, True)
    assert set(after) == {"username", "password"}
    assert after["username"] != before["username"], "one rotation"
    assert clients.errors == []


@pytest.mark.further
def test_upgrade_and_rollback_keep_the_new_password(postgres: str, installation: Installation) -> None:
    _rotate(installation)
    rotated = installation.secret(SECRET)
    installation.install(SERVER)
    assert installation.secret(SECRET) == rotated
    installation.environment.helm("rollback", SERVER, "1", "--no-hooks")
    assert installation.secret(SECRET) == rotated


@pytest.mark.further
def test_old_password_stays_while_a_pod_that_is_not_restarted_has_it(
    postgres: str, installation: Installation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backup = installation.run_pod(("PASSWORD", SECRET, "password"), ("USER", SECRET, "username"))
    before = installation.secret(SECRET)
    polls = itertools.count()

    def sleep(_: float) -> None:
        assert _is_accepted(postgres, before)
        if next(polls) == 2:
            installation.end(backup)

    monkeypatch.setattr(readers, "sleep", sleep)
    _rotate(installation)
    assert next(polls) == 3
    assert capsys.readouterr().err.count(f"stays valid: {backup.name}\n") == 1
    assert not _is_accepted(postgres, before)


def test_secret_of_a_person_and_rotation_by_hand_are_refused(installation: Installation) -> None:
    with pytest.raises(ClusterError, match=r"There is no Secret absent in namespace prefect\. Deploy first"):
        rotated_secret.RotatedSecret(installation.environment, "database", "absent")
    kubectl = installation.environment.kubectl
    kubectl("annotate", "secret", SECRET, "meta.helm.sh/release-name-")
    with pytest.raises(ClusterError, match="is not generated by the chart"):
        _rotate(installation)
    kubectl("annotate", "secret", SECRET, f"meta.helm.sh/release-name={SERVER}")
    kubectl("patch", "secret", SECRET, "--patch", '{"stringData": {"password.previous": "x"}}')
    with pytest.raises(ClusterError, match=r"has the key password\.previous, of a rotation by hand"):
        _rotate(installation)
    kubectl("patch", "secret", SECRET, "--type=json", '--patch=[{"op": "remove", "path": "/data/password.previous"}]')


def test_concurrent_change_is_refused(installation: Installation) -> None:
    secret = rotated_secret.RotatedSecret(installation.environment, "database", SECRET)
    installation.environment.kubectl("annotate", "secret", SECRET, "other=1", "--overwrite")
    with pytest.raises(ClusterError, match=r"has changed meanwhile\. Run the command again"):
        secret.stage({"password": "x"})
    assert not installation.is_rotated(SECRET)


def test_warehouse_of_another_namespace_of_runs_keeps_its_old_login_until_the_runs_end(
    postgres: str, installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = installation.environment
    with pytest.raises(ClusterError, match="The warehouse of local is external"):
        postgres_logins.local_warehouse(environment)
    runs = "prefect-runs"
    monkeypatch.setattr(Environment, "runs_namespace", runs)
    overlay = OVERLAYS / "local" / "warehouse"
    environment.kubectl("create", "--filename", str(overlay / "statefulset.yaml"))
    options = ("--context", environment.context, "--namespace", environment.namespace)
    subprocess.run([overlay / "secret", *options], check=True)
    postgres_logins.local_warehouse(environment).copy()  # nothing: the first deploy with this namespace makes the copy
    subprocess.run([overlay / "secret", *options], env=os.environ | {"RUNS_NAMESPACE": runs}, check=True)
    before = installation.secret("warehouse")
    host = postgres.partition("host=")[2]
    script = {"PGHOST": host, "POSTGRES_USER": "postgres", "APPLICATION_USER": "warehouse"}
    script["POSTGRES_PASSWORD"] = before["password"]
    subprocess.run(["bash", overlay / "application-user"], env=os.environ | script, check=True)

    def is_accepted(url: str) -> bool:
        login = urlsplit(url)
        try:
            psycopg.connect(f"postgresql://{login.username}:{login.password}@/warehouse?host={host}").close()
        except psycopg.OperationalError:
            return False
        return True

    run = installation.run_pod(("WAREHOUSE_URL", "warehouse", "url"), namespace=runs)
    polls = itertools.count()

    def sleep(_: float) -> None:
        assert is_accepted(run.variables["WAREHOUSE_URL"])
        if next(polls) == 0:
            time.sleep(1)  # Kubernetes keeps no fractions: a pod of the second of the change counts as an older one
            later = installation.run_pod(("WAREHOUSE_URL", "warehouse", "url"), namespace=runs)
            assert "warehouse_2:" in later.variables["WAREHOUSE_URL"]
            installation.end(run)

    monkeypatch.setattr(readers, "sleep", sleep)
    rotate(postgres_logins.local_warehouse(environment), keep_old=False)
    assert next(polls) == 1
    after = installation.secret("warehouse")
    copy = installation.secret("warehouse", runs)
    assert is_accepted(after["url"])
    assert is_accepted(copy["url"])
    assert not is_accepted(before["url"])
    assert after["url"] == f"postgresql://warehouse_2:{after['password']}@warehouse:5432/warehouse"
    assert copy == {"url": after["url"].replace("@warehouse:", "@warehouse.prefect:")}


def test_pgbouncer_accepts_both_logins_before_a_pod_gets_the_new_one(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation.install("prefect-server", "--set=pgbouncer.enabled=true")
    installation.roll("prefect-server-pgbouncer")
    started: list[tuple[str, set[str]]] = []
    monkeypatch.setattr(
        installation, "after_start", lambda pod: started.append((pod.component, {*installation.secret(SECRET)}))
    )
    _rotate(installation)
    assert [component for component, _ in started] == ["pgbouncer", "api", "services"]
    assert started[0][1] == {"username", "password", "username.next", "password.next"}
    [deployment] = json.loads(
        installation.environment.kubectl(
            "get", "deployments", "--selector=app.kubernetes.io/component=pgbouncer", "--output=json"
        )
    )["items"]
    [connection, *_] = deployment["spec"]["template"]["spec"]["initContainers"]
    referenced = {entry["valueFrom"]["secretKeyRef"]["key"] for entry in connection["env"] if "valueFrom" in entry}
    assert referenced == {f"{key}{suffix}" for key in ("username", "password") for suffix in ("", ".next", ".previous")}
