"""The projects that tests begin with, parsed once a session, and one of them built; what the server has of its runs."""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.dbt.process import CHILD
from tests.orchestration.dbt import forked, projects, versions
from tests.orchestration.dbt.projects import every_kind, small, tables
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import client_of, new_database, rows_of, wait_until

DATABASE = "shop"
"""Every test's database, one after the other: a parse holds for the name of its database."""

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
"""Whether there is time for more random graphs and more ends of runs than CI has."""


@pytest.fixture
def server(prefect_server: str) -> Iterator[Server]:
    """What the session's Prefect server has."""
    with client_of(prefect_server) as client:
        yield Server(client)


@pytest.fixture
def database(postgres: str, tiny: "Tiny") -> Iterator[str]:
    """A new, empty database; `WAREHOUSE_URL` names it. dbt runs in forks."""
    with new_database(postgres, DATABASE) as url:
        yield url


def _parsed(folder: Path, tiny: "Tiny") -> Path:
    """Parse a project as `docker/Dockerfile` does: for a host and a user that no run has."""
    subprocess.run(
        [tiny.python, "-P", CHILD, "parse", "--project-dir", folder, "--profiles-dir", folder],
        env=os.environ | {"PGHOST": "build", "PGUSER": "build", "PGDATABASE": DATABASE},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return folder


@pytest.fixture(scope="session")
def parsed_shop(tiny: "Tiny", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with every kind of node, parsed; to be copied."""
    return _parsed(every_kind(tmp_path_factory.mktemp("parsed") / "shop"), tiny)


@pytest.fixture(scope="session")
def parsed_small(tiny: "Tiny", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of three models, parsed; to be copied."""
    return _parsed(small(tmp_path_factory.mktemp("parsed") / "small"), tiny)


@pytest.fixture
def shop(tmp_path: Path, database: str, parsed_shop: Path) -> Path:
    """A project with every kind of node, parsed and not built."""
    return shutil.copytree(parsed_shop, tmp_path / "shop")


@pytest.fixture
def folder(tmp_path: Path, database: str, parsed_small: Path) -> Path:
    """A project of three models, parsed and not built."""
    return shutil.copytree(parsed_small, tmp_path / "small")


def use(folder: Path, **options: Any) -> DbtProject:
    """The project in a folder as flows use it; its artifacts are kept beside it."""
    return DbtProject(folder, environment=warehouse.environment, artifacts=f"{folder}.kept", **options)


@pytest.fixture
def project(shop: Path) -> Iterator[DbtProject]:
    """The project with every kind of node."""
    project = use(shop)
    yield project
    project.close()


@pytest.fixture
def small_project(folder: Path) -> Iterator[DbtProject]:
    """The project of three models."""
    project = use(folder)
    yield project
    project.close()


class Built(NamedTuple):
    """A build of the project with every kind of node, in a flow, that nothing disturbed."""

    folder: Path
    """The project with its `target/`, for tests to copy; what is kept of the run is in `shop.kept` beside it."""
    database: str
    """Of what the build left, as a template."""
    result: DbtResult
    results: dict[str, str]
    """dbt's statuses, as dbt wrote them."""
    run: str
    """The flow run's id."""
    tables: dict[str, Any]
    """The rows that it left."""


@pytest.fixture(scope="session")
def built(
    postgres: str, prefect_server: str, tiny: "Tiny", parsed_shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Built]:
    """That build."""
    folder = shutil.copytree(parsed_shop, tmp_path_factory.mktemp("built") / "shop")
    found: list[DbtResult] = []

    @flow
    def daily() -> None:
        found.append(use(folder).build())

    template = f"{DATABASE}_built"
    with new_database(postgres, DATABASE) as url:
        run = Server.run(daily(return_state=True))
        left = tables(functools.partial(rows_of, url))
        sessions = f"select 1 from pg_stat_activity where datname = '{DATABASE}'"
        # Postgres waits 5 s for them, a busy machine may need longer to end them.
        wait_until(lambda: not rows_of(postgres, sessions), "the end of the build's sessions", 240)
        rows_of(postgres, f"create database {template} template {DATABASE}")
    yield Built(folder, template, found[0], results_of(folder), run, left)
    rows_of(postgres, f"drop database {template}")


class Tiny(NamedTuple):
    """A project for tests that run many commands, and what runs them at a fraction of what a process costs."""

    folder: Path
    """The project after a whole build, with its `target/`, for tests to copy: its parse holds for `DbtProject`."""
    dbts_parse: Path
    """The parse of the project that holds for the `dbt` command."""
    python: Path
    """An interpreter for `DbtProject` that is a fork of a process that has dbt imported."""
    socket: Path
    """What forks: see `forked`."""

    @property
    def dbt(self) -> list[str]:
        """The `dbt` command, in a fork."""
        return [str(self.python), "dbt"]


@contextlib.contextmanager
def forks(postgres: str, work: Path) -> Iterator[Tiny]:
    """Run dbt in forks: meanwhile each `DbtProject` without an interpreter of its own has `Tiny.python`.

    A child of a real interpreter imports dbt for 1.2 processor seconds and warms up for another one. The tests of the
    child process (`test_project`), of runs that end (`test_ends`) and of flows' own processes have real ones.
    """
    made = Tiny(projects.tiny(work / "tiny"), work / forked.PARSE, work / "python", work / "socket")
    made.python.write_text(f'#!/bin/sh\nexec "{versions.tested()}" -I -S "{forked.__file__}" "{made.socket}" "$@"\n')
    made.python.chmod(0o755)
    files = map(str, (made.socket, CHILD, made.dbts_parse))
    command = [str(versions.tested()), "-P", str(forked.__file__), "serve", *files]
    with contextlib.ExitStack() as stack:
        with new_database(postgres, DATABASE):
            environment = {**os.environ, **warehouse.environment()}
            server = subprocess.Popen(command, env=environment, cwd=made.folder, stdout=subprocess.PIPE)
            stack.enter_context(server)
            stack.callback(server.terminate)
            assert server.stdout
            assert server.stdout.readline() == b"ready\n"
        defaults = DbtProject.__init__.__kwdefaults__
        assert defaults
        stack.enter_context(pytest.MonkeyPatch.context()).setitem(defaults, "python", made.python)
        yield made
