"""The report about database and Redis, from a real Postgres and a real Redis."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestration.settings import ROOT
from tests.parts import new_database, redis_server, rows_of

MODULE = "orchestration.inspection.backing_services"
COMMAND = "import asyncio, json, time; from orchestration.inspection import backing_services as command\n{}\n" + (
    "print(json.dumps(asyncio.run(command.read_report())))"
)


@pytest.fixture
def database_url(postgres: str) -> Iterator[str]:
    with new_database(postgres) as url:
        yield url


def _report(database: str, redis_url: str, change: str = "", **variables: str) -> dict[str, Any]:
    """Return what the command reports in a pod of the server: a process has one database.

    The statements of `change` run before it, and can change its module `command`.
    """
    own = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.replace("postgresql://", "postgresql+asyncpg://"),
        "PREFECT_SERVER_DOCKET_URL": redis_url,
    }
    done = subprocess.run(
        [sys.executable, *(("-c", COMMAND.format(change)) if change else ("-m", MODULE))],
        cwd=ROOT, env=os.environ | own | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "secret" not in done.stdout
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_report_has_what_the_checks_need(database_url: str, tmp_path: Path) -> None:
    """The embedded Postgres has no pg_trgm. Kubernetes copies any password into the URL without encoding it."""
    password = "a/b@c:d#e?f%"  # noqa: S105
    with redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.config_set("maxmemory", "64mb")
        now = time.time()
        workers = {"services-1#7": now, "services-1#8": now, "other-services-2#7": now, "ended-3#7": now - 300}
        client.zadd("prefect-server:workers", workers)
        client.config_set("requirepass", password)
        report = _report(database_url, url.replace(":secret@", f":{password}@"), REDIS_PASSWORD=password)
    assert report["redis"] == {
        "used": report["redis"]["used"], "limit": 64 * 2**20, "eviction": "noeviction",
        "hosts": ["other-services-2", "services-1"],
    }  # fmt: skip
    assert 0 < report["redis"]["used"] < 64 * 2**20
    found = report["database"]
    assert found["version"] >= 140009
    assert found["max_connections"] > found["connections"] >= 1
    assert found["size"] > 2**20
    assert found["latency_ms"] > 0
    assert abs(found["ahead_seconds"]) < 3
    assert (found["read_only"], found["extension"]) == (False, False)


@pytest.mark.further
def test_read_only_database_is_reported(database_url: str) -> None:
    [(name,)] = rows_of(database_url, "select current_database()")
    rows_of(database_url, f"alter database {name} set default_transaction_read_only = on")
    report = _report(database_url, "memory://")
    assert report["database"]["read_only"]
    assert report["redis"] == {}


@pytest.mark.further
def test_long_imports_are_no_fault_of_the_database(database_url: str) -> None:
    change = "command.TIMEOUT_SECONDS, command.use_pgbouncer = 15, lambda: time.sleep(16)"
    report = _report(database_url, "memory://", change)
    assert report["database"]["size"] > 2**20


def test_services_that_do_not_answer_are_reported(postgres: str) -> None:
    report = _report(postgres.replace("/postgres?", "/absent?"), "redis://127.0.0.1:9/0")
    assert report["database"] == {"error": 'database "absent" does not exist'}
    assert "127.0.0.1:9" in report["redis"]["error"]
