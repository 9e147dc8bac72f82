"""Checks of the server's database and Redis, as a pod of the server reports them."""

from orchestration.operations.doctor.cluster_checks import shorten
from orchestration.operations.doctor.findings import LIMIT_SECONDS, Finding, check, failed, ok, warning
from orchestration.operations.doctor.installation import Installation, UncheckedError, database_mode
from orchestration.operations.environment import SERVER, Object
from orchestration.quantity import parse_quantity

GROUP = "database and redis"

OLDEST_POSTGRES = 140009
"""The oldest supported version, as `server_version_num`."""

SLOW_MS, TOO_SLOW_MS = 10.0, 100.0
"""The latency that is worth a warning, and that fails the check. A request of the Prefect API waits ten times."""

FULL, TOO_FULL = 0.8, 0.95
"""The share of a limit that is worth a warning, and that fails the check."""

MIB = 2**20
PAGE = "docs/how-to/external-postgres-and-redis.md"


async def _read(installation: Installation, name: str) -> Object:
    """Return a part of the report of the server's pod."""
    found: Object = (await installation.read_report())[name]
    if "error" in found:
        raise UncheckedError(f"the server's pod cannot read it: {found['error']}")
    return found


async def _read_postgres(installation: Installation) -> Object:
    found = await _read(installation, "database")
    if found["dialect"] != "postgresql":
        raise UncheckedError(f"the server's database is {found['dialect']}")
    return found


@check(GROUP, "database", 2 * LIMIT_SECONDS)
async def check_database(installation: Installation) -> Finding:
    """The server's database answers, is a supported Postgres, and takes writes."""
    found: Object = (await installation.read_report())["database"]
    if "error" in found:
        return failed(f"the server's pod cannot use it: {found['error']}", f"Check the Secret with its URL: {PAGE}")
    if found["dialect"] != "postgresql":
        return failed(f"it is {found['dialect']}", f"Use Postgres: {PAGE}")
    shown = f"Postgres {found['version'] // 10000}.{found['version'] % 10000}"
    if found["version"] < OLDEST_POSTGRES:
        return failed(f"{shown}; Prefect needs 14.9 or later", "Upgrade Postgres")
    if found["read_only"]:
        return failed(f"{shown} is read-only", "Name the primary in the URL of the database")
    return ok(shown)


@check(GROUP, "database latency", 2 * LIMIT_SECONDS)
async def check_database_latency(installation: Installation) -> Finding:
    """A statement takes a few milliseconds."""
    latency = (await _read_postgres(installation))["latency_ms"]
    shown = f"{latency:.1f} ms a statement"
    cure = "Place the server's pods and the database in one region, or give the database more processors"
    if latency > TOO_SLOW_MS:
        return failed(shown, cure)
    return warning(shown, cure) if latency > SLOW_MS else ok(shown)


@check(GROUP, "database connections", 2 * LIMIT_SECONDS)
async def check_database_connections(installation: Installation) -> Finding:
    """The pools of all server processes, or of PgBouncer, fit max_connections."""
    found = await _read_postgres(installation)
    values = await installation.read_values(SERVER)
    pods = {"api": 0, "services": 0}
    for component in pods:
        if component == "api" or values["services"]["separate"]:
            scaling = values[component].get("autoscaling") or {}
            pods[component] = scaling["maxReplicas"] if scaling.get("enabled") else values[component]["replicas"]
    pgbouncer = values.get("pgbouncer") or {}  # older charts have none
    if pgbouncer.get("enabled"):
        # The process that runs the services also listens for notifications, on one connection without PgBouncer.
        listening = pods["services" if values["services"]["separate"] else "api"]
        most = pgbouncer["replicas"] * (pgbouncer["defaultPoolSize"] + pgbouncer["reservePoolSize"]) + listening
        opened = f"PgBouncer and the services open up to {most}"
        cure = "Raise max_connections, or lower pgbouncer.defaultPoolSize and reservePoolSize"
    else:
        processes = sum(pods.values())
        most = processes * (values["database"]["poolSize"] + values["database"]["maxOverflow"])
        opened = f"{processes} server processes open up to {most}"
        cure = "Raise max_connections, lower database.poolSize and maxOverflow, or enable PgBouncer"
    shown = f"{found['connections']} of {found['max_connections']} in use; {opened}"
    if found["connections"] >= found["max_connections"] * TOO_FULL:
        return failed(shown, cure)
    if most > found["max_connections"] or found["connections"] >= found["max_connections"] * FULL:
        return warning(shown, cure)
    return ok(shown)


@check(GROUP, "database size", 2 * LIMIT_SECONDS)
async def check_database_size(installation: Installation) -> Finding:
    """The database fits its volume, unless it is external."""
    size = (await _read_postgres(installation))["size"]
    values = await installation.read_values(SERVER)
    mode = database_mode(values)
    if mode == "external":
        return ok(f"{size / MIB:.0f} MiB in an external database")
    share = size / float(parse_quantity(values["database"][mode]["storage"]["size"]))
    shown = f"{size / MIB:.0f} MiB, {share:.0%} of its volume"
    cure = "Lower retention.days (docs/how-to/retention.md), or enlarge the volume"
    if share >= TOO_FULL:
        return failed(shown, cure)
    return warning(shown, cure) if share >= FULL else ok(shown)


@check(GROUP, "database extension", 2 * LIMIT_SECONDS)
async def check_database_extension(installation: Installation) -> Finding:
    """The extension pg_trgm is installed, which the indexes of Prefect's schema need."""
    if (await _read_postgres(installation))["extension"]:
        return ok("pg_trgm is installed")
    return failed("pg_trgm is not installed", "As a superuser of the database: create extension pg_trgm")


@check(GROUP, "redis memory", 2 * LIMIT_SECONDS)
async def check_redis_memory(installation: Installation) -> Finding:
    """Redis has free memory, and evicts no key without an expiry."""
    found = await _read(installation, "redis")
    if not found:
        return ok("the server uses no Redis")
    if found["eviction"].startswith("allkeys"):
        return failed(
            f"maxmemory-policy {found['eviction']} may evict leases and tasks of the services",
            "Set it to volatile-lru or noeviction",
        )
    if not found["limit"]:
        return ok(f"{found['used'] / MIB:.0f} MiB used, without a limit")
    share = found["used"] / found["limit"]
    shown = f"{found['used'] / MIB:.0f} MiB, {share:.0%} of maxmemory ({found['eviction']})"
    if share >= TOO_FULL and found["eviction"] == "noeviction":
        return failed(shown, "Raise maxmemory: writes fail when it is full")
    return warning(shown, "Raise maxmemory: redis.bundled.maxMemory") if share >= FULL else ok(shown)


@check(GROUP, "redis shared", 2 * LIMIT_SECONDS)
async def check_redis_shared(installation: Installation) -> Finding:
    """No other release uses the Redis database: two releases would take each other's events and tasks."""
    found = await _read(installation, "redis")
    if not found:
        return ok("the server uses no Redis")
    pods = {pod["metadata"]["name"] for pod in await installation.read_objects("pods")}
    if others := sorted(set(found["hosts"]) - pods):
        return failed(
            f"other processes use this database: {shorten(others)}",
            f"Give each release a separate database, as redis://HOST:6379/1: {PAGE}",
        )
    return ok(f"used by {shorten(found['hosts']) or 'no service yet'} alone")
