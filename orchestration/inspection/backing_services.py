"""Report about the server's database and Redis as JSON, in a pod of the server: `orchestrate doctor` runs this there.

    python -m orchestration.inspection.backing_services

Prefect's settings name the database and the Redis. The report has no password.
"""

import asyncio
import json
import os
import time
from datetime import UTC, datetime
from statistics import median
from typing import Any
from urllib.parse import quote

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from orchestration.pgbouncer import use_pgbouncer
from orchestration.prefect_compat.server_internals import database_interface

Report = dict[str, Any]

PINGS = 5
"""How many times the latency is measured."""

TIMEOUT_SECONDS = 20.0
"""How long database and Redis may each take to answer."""

HEARTBEAT_SECONDS = 30.0
"""How old the last heartbeat of a process may be that still uses the Redis."""

EXTENSION = "pg_trgm"
"""The extension that the indexes of Prefect's schema need."""


async def read_database() -> Report:
    """Return what the checks need to know about the database that the settings name."""
    use_pgbouncer()
    engine = await database_interface().engine()
    if engine.dialect.name != "postgresql":
        return {"dialect": engine.dialect.name}
    # The limit is for the answers: on a busy node the imports before them can take longer.
    async with asyncio.timeout(TIMEOUT_SECONDS), engine.connect() as connection:
        pings = []
        for _ in range(PINGS):
            start = time.perf_counter()
            await connection.execute(text("select 1"))
            pings.append(time.perf_counter() - start)
        before = datetime.now(UTC)
        now = await _value(connection, "select clock_timestamp()")
        middle = before + (datetime.now(UTC) - before) / 2
        return {
            "dialect": "postgresql",
            "version": int(await _value(connection, "show server_version_num")),
            "latency_ms": median(pings) * 1000,
            "ahead_seconds": (now - middle).total_seconds(),
            "max_connections": int(await _value(connection, "show max_connections"))
            - int(await _value(connection, "show superuser_reserved_connections")),
            "connections": await _value(
                connection, "select count(*) from pg_stat_activity where backend_type = 'client backend'"
            ),
            "size": await _value(connection, "select pg_database_size(current_database())"),
            "extension": await _value(
                connection,
                f"select count(*) from pg_extension where extname = '{EXTENSION}'",  # noqa: S608
            )
            > 0,
            "read_only": await _value(connection, "select current_setting('transaction_read_only')") == "on",
        }


async def _value(connection: AsyncConnection, statement: str) -> Any:
    return (await connection.execute(text(statement))).scalar()


async def read_redis() -> Report:
    """Return what the checks need to know about the Redis that the settings name; nothing if they name none."""
    from prefect.settings import get_current_settings
    from redis.asyncio import Redis

    docket = get_current_settings().server.docket
    if docket.url.startswith("memory:"):
        return {}
    password = os.environ.get("REDIS_PASSWORD", "")
    # The command of the pod encodes the password. This process has the variable as Kubernetes sets it.
    url = docket.url.replace(f":{password}@", f":{quote(password, safe='')}@") if password else docket.url
    async with asyncio.timeout(TIMEOUT_SECONDS), Redis.from_url(url, decode_responses=True) as redis:
        information = await redis.info()
        # A worker of the docket is named HOST#PID, and the host of a pod is its name. The score is its last heartbeat.
        since = float((await redis.time())[0]) - HEARTBEAT_SECONDS
        recent = await redis.zrangebyscore(f"{docket.name}:workers", since, "+inf")
        return {
            "used": information["used_memory"],
            "limit": information["maxmemory"],
            "eviction": information["maxmemory_policy"],
            "hosts": sorted({str(name).partition("#")[0] for name in recent}),
        }


async def read_report() -> Report:
    """Return the report about both. An `error` stands for what cannot be read."""
    report: Report = {}
    for name, read in (("database", read_database), ("redis", read_redis)):
        try:
            report[name] = await read()
        except TimeoutError:
            report[name] = {"error": f"no answer within {TIMEOUT_SECONDS:.0f} s"}
        except Exception as error:
            # Drivers raise errors of many classes.
            cause = getattr(error, "orig", None) or error
            report[name] = {"error": (str(cause) or type(cause).__name__).splitlines()[0].split(">: ")[-1]}
    return report


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read_report())))
