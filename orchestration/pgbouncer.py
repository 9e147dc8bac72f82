"""Connect the Prefect server to its database through PgBouncer.

    python -m orchestration.pgbouncer FOLDER [--tls-mode MODE] [--ca-file FILE]

The command writes the files that PgBouncer reads: FOLDER/database.ini has the address of the database, FOLDER/tls.ini
the settings of TLS, and FOLDER/userlist.txt users and passwords. Prefect's settings name the database
(`PREFECT_SERVER_DATABASE_*`). During a rotation `PGBOUNCER_NEXT_*` is the login of servers that start later, and
`PGBOUNCER_PREVIOUS_*` that of servers that have not restarted yet.

A process that calls `use_pgbouncer` connects SQLAlchemy to `PGBOUNCER_ADDRESS` (HOST:PORT), by TLS if
`PGBOUNCER_CA_FILE` names the certificate of PgBouncer's CA. Its settings still name Postgres. Prefect's services listen
there for changed automations, without SQLAlchemy: in transaction mode PgBouncer passes no notification on.
"""

import argparse
import os
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError

from orchestration.errors import PipelineError, SettingsError, sentence

VARIABLE, CA_VARIABLE = "PGBOUNCER_ADDRESS", "PGBOUNCER_CA_FILE"

_OTHER_LOGINS = ("PGBOUNCER_NEXT_", "PGBOUNCER_PREVIOUS_")
"""Variables with the logins of a rotation begin so, and end with USER and PASSWORD."""

_SETTINGS = "PREFECT_SERVER_DATABASE_"

TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
"""The values of `ssl` in a URL for asyncpg, and of PgBouncer's `server_tls_sslmode`."""

_PAGE = "docs/how-to/external-postgres-and-redis.md"


def use_pgbouncer() -> None:
    """Have SQLAlchemy connect to PgBouncer wherever a URL names a Postgres, if the variable is set.

    Raises:
        SettingsError: the variable has no port.
    """
    if _address() and not event.contains(Engine, "do_connect", connect_to_pgbouncer):
        event.listen(Engine, "do_connect", connect_to_pgbouncer)


def connect_to_pgbouncer(dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
    """Replace the address in the parameters of a new connection. SQLAlchemy then connects."""
    if dialect.name == "postgresql" and (address := _address()):
        # The settings of TLS and the choice between several hosts are for Postgres.
        ca_file = os.environ.get(CA_VARIABLE)
        tls = ssl.create_default_context(cafile=ca_file) if ca_file else False
        parameters.update(host=address[0], port=address[1], ssl=tls)
        parameters.pop("target_session_attrs", None)


def _address() -> tuple[str, int] | None:
    """Return host and port of PgBouncer; None if the process connects to Postgres.

    Raises:
        SettingsError: the variable has no port.
    """
    address = os.environ.get(VARIABLE, "")
    host, _, port = address.rpartition(":")
    if address and not (host and port.isdecimal()):
        raise SettingsError(f"{VARIABLE} is {address!r}, without a port. Set it to HOST:PORT")
    return (host, int(port)) if address else None


def _database(environment: Mapping[str, str]) -> URL:
    """Return the address of the database that Prefect's settings name.

    Raises:
        SettingsError: PgBouncer cannot connect to it.
    """
    if text := environment.get(f"{_SETTINGS}CONNECTION_URL"):
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):  # the error may show the password
            raise SettingsError(
                f"{_SETTINGS}CONNECTION_URL is no URL. Check the Secret: postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME"
            ) from None
    else:
        parts = {name.lower(): environment.get(f"{_SETTINGS}{name}") for name in ("HOST", "PORT", "USER", "PASSWORD")}
        url = URL.create(
            "postgresql+asyncpg",
            username=parts["user"],
            password=parts["password"],
            host=parts["host"],
            port=int(parts["port"] or 5432),
            database=environment.get(f"{_SETTINGS}NAME"),
        )
    if url.get_backend_name() != "postgresql":
        raise SettingsError(
            f"PgBouncer needs a Postgres, and the server's database is {url.get_backend_name()}. See {_PAGE}"
        )
    found = {"user": url.username, "password": url.password, "host": url.host, "database": url.database}
    if missing := [name for name, value in found.items() if not value]:
        raise SettingsError(
            f"The URL of the database has no {' and no '.join(missing)}, which PgBouncer needs. "
            "Check the Secret: postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME"
        )
    if any(ord(character) < ord(" ") for value in found.values() for character in str(value)):
        raise SettingsError(
            "The URL of the database has a line break or a tab, which PgBouncer cannot read. Check the Secret"
        )
    return url


def _quoted(value: object, mark: str) -> str:
    return mark + str(value).replace(mark, 2 * mark) + mark


def write_files(folder: Path, environment: Mapping[str, str], tls_mode: str = "", ca_file: str = "") -> None:
    """Write the files that PgBouncer reads.

    Args:
        folder: where to write them.
        environment: variables with Prefect's settings of the database.
        tls_mode: one of `TLS_MODES`; by default that of the URL, else `prefer`, as asyncpg has it.
        ca_file: the certificate of the CA that signed the database's certificate.

    Raises:
        SettingsError: PgBouncer cannot connect to the database.
    """
    url = _database(environment)
    mode = tls_mode or url.query.get("ssl") or url.query.get("sslmode") or "prefer"
    if mode not in TLS_MODES:
        raise SettingsError(f"`ssl` is {mode!r} in the URL of the database. Set it to one of {', '.join(TLS_MODES)}")
    if str(mode).startswith("verify-") and not ca_file:
        raise SettingsError(
            f"`ssl` is {mode} in the URL of the database, and PgBouncer has no certificate to check it against. "
            "Set pgbouncer.serverTLS.caSecret to a Secret with the certificate of the CA"
        )
    # `*` has the clients' database: a name in this file has letters, digits, `_`, `.` and `-` only.
    address = f"* = host={_quoted(url.host, chr(39))} port={url.port or 5432}"
    tls = [f"server_tls_sslmode = {mode}", *([f"server_tls_ca_file = {ca_file}"] if ca_file else [])]
    others = {
        environment.get(f"{prefix}USER", ""): environment.get(f"{prefix}PASSWORD", "") for prefix in _OTHER_LOGINS
    }
    logins = {user: password for user, password in others.items() if user} | {str(url.username): str(url.password)}
    users = [f"{_quoted(user, chr(34))} {_quoted(password, chr(34))}" for user, password in logins.items()]
    previous = os.umask(0o077)
    try:
        # The files are parts of sections. A section that is opened twice has the defaults for what the second lacks.
        for name, lines in (("database.ini", [address]), ("tls.ini", tls), ("userlist.txt", users)):
            (folder / name).write_text("\n".join([*lines, ""]))
    finally:
        os.umask(previous)


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.pgbouncer", description="Write PgBouncer's files.")
    parser.add_argument("folder", type=Path, help="where to write them")
    parser.add_argument("--tls-mode", choices=TLS_MODES, default="", help="by default that of the database's URL")
    parser.add_argument("--ca-file", default="", help="the certificate of the CA of the database")
    options = parser.parse_args(arguments)
    try:
        write_files(options.folder, os.environ, options.tls_mode, options.ca_file)
    except PipelineError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
