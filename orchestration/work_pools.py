"""Job variables that runs get from their work pool."""

from urllib.parse import quote

from orchestration.prefect_api import JSON, Server


async def read_pool_defaults(server: Server, pool: str) -> JSON:
    """Return the defaults of a work pool's job variables by name; nothing for a pool that does not exist.

    Args:
        server: the server with the pool.
        pool: the name of the pool.

    Raises:
        ApiError: the server does not answer.
    """
    found = await server.ask("GET", f"/work_pools/{quote(pool, safe='')}", absent=True) or {}
    properties = (found.get("base_job_template") or {}).get("variables", {}).get("properties", {})
    return {name: variable.get("default") for name, variable in properties.items()}
