"""The Prefect server's database and its neighbours on the same database server."""

from sqlalchemy.engine import make_url

from orchestration.errors import SettingsError
from orchestration.prefect_compat.server_internals import database_url


def libpq_url(name: str = "") -> str:
    """Return the URL of a database on the server's database server, as libpq takes it.

    Args:
        name: the name of the database; empty for the database that Prefect's settings name.

    Raises:
        SettingsError: the settings name no Postgres.
    """
    url = make_url(database_url())
    if url.get_backend_name() != "postgresql":
        raise SettingsError(
            "A restore needs a Postgres, and the settings name none. Set PREFECT_SERVER_DATABASE_CONNECTION_URL"
        )
    # asyncpg calls `ssl` what libpq calls `sslmode`.
    query = {"sslmode" if key == "ssl" else key: value for key, value in url.query.items()}
    url = url.set(drivername="postgresql", database=name or url.database, query=query)
    return url.render_as_string(hide_password=False)
