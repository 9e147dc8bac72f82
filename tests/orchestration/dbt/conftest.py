"""Fixtures: projects that are parsed once a session, one that is built once, and the server's view of flow runs."""

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
"""Name of each test's database: a parse holds only for a database of the same name."""

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
"""Whether tests use more random graphs and end more runs than in CI."""


@pytest.fixture
def server(prefect_server: str) -> Iterator[Server]:
    """Yield the session's Prefect server."""
    with client_of(prefect_server) as client:
        yield Server(client)


@pytest.fixture
def database(postgres: str, tiny: "Tiny") -> Iterator[str]:
    """Yield the URL of a new, empty database, which is in `WAREHOUSE_URL`. dbt runs in forks."""
    with new_database(postgres, DATABASE) as url:
        yield url


def parsed(folder: Path, tiny: "Tiny") -> Path:
    """Parse a project as `docker/Dockerfile` does, for a host and a user that no run has."""
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
    """Return the folder of a parsed project with every kind of node, for tests to copy."""
    return parsed(every_kind(tmp_path_factory.mktemp("parsed") / "shop"), tiny)


@pytest.fixture(scope="session")
def parsed_small(tiny: "Tiny", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a parsed project of three models, for tests to copy."""
    return parsed(small(tmp_path_factory.mktemp("parsed") / "small"), tiny)


@pytest.fixture
def shop(tmp_path: Path, database: str, parsed_shop: Path) -> Path:
    """Return the folder of a project with every kind of node, parsed and not built."""
    return shutil.copytree(parsed_shop, tmp_path / "shop")


@pytest.fixture
def folder(tmp_path: Path, database: str, parsed_small: Path) -> Path:
    """Return the folder of a project of three models, parsed and not built."""
    return shutil.copytree(parsed_small, tmp_path / "small")


def use(folder: Path, **options: Any) -> DbtProject:
    """Return the project in a folder as flows use it, with its artifacts in `<folder>.kept`."""
    return DbtProject(folder, environment=warehouse.environment, artifacts=f"{folder}.kept", **options)


@pytest.fixture
def project(shop: Path) -> Iterator[DbtProject]:
    """Yield the project with every kind of node."""
    project = use(shop)
    yield project
    project.close()


@pytest.fixture
def small_project(folder: Path) -> Iterator[DbtProject]:
    """Yield the project of three models."""
    project = use(folder)
    yield project
    project.close()


class Built(NamedTuple):
    """Holds what an undisturbed build of the project with every kind of node left."""

    folder: Path
    """The project with its `target/`, for tests to copy. The artifacts are in the neighbouring folder `shop.kept`."""
    database: str
    """Name of a template database with the tables that the build left."""
    result: DbtResult
    results: dict[str, str]
    """dbt's statuses by node, from run_results.json."""
    run: str
    """The flow run's id."""
    tables: dict[str, Any]
    """The rows that the build left, by table."""


@pytest.fixture(scope="session")
def built(
    postgres: str, prefect_server: str, tiny: "Tiny", parsed_shop: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Built]:
    """Build the project with every kind of node once a session."""
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
        # Postgres waits 5 s for other sessions to end; a busy machine may need longer.
        wait_until(lambda: not rows_of(postgres, sessions), "the end of the build's sessions", 240)
        rows_of(postgres, f"create database {template} template {DATABASE}")
    yield Built(folder, template, found[0], results_of(folder), run, left)
    rows_of(postgres, f"drop database {template}")


class Tiny(NamedTuple):
    """A small project for tests that run many commands, and the forks that run dbt faster than new processes."""

    folder: Path
    """The project after a build, with its `target/`, for tests to copy. Its parse holds for `DbtProject`."""
    dbts_parse: Path
    """The parse of the project that holds for the `dbt` command."""
    python: Path
    """An interpreter for `DbtProject`: a fork of a process that has imported dbt."""
    socket: Path
    """The socket of the process that forks: see `forked`."""

    @property
    def dbt(self) -> list[str]:
        """The `dbt` command that runs in a fork."""
        return [str(self.python), "dbt"]


@contextlib.contextmanager
def forks(postgres: str, work: Path) -> Iterator[Tiny]:
    """Run dbt in forks: in this context `Tiny.python` is the default interpreter of `DbtProject`.

    A real interpreter takes 1.2 processor seconds to import dbt and another one to warm up. The tests of the child
    process (`test_project`), of ended runs (`test_ends`) and of flows in separate processes use a real interpreter.
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
