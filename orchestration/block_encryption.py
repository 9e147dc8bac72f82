"""The key that encrypts secret blocks in the server's database: `PREFECT_SERVER_ENCRYPTION_KEY`.

    python -m orchestration.block_encryption store-key      # before a rotation: keep the key in the database meanwhile
    python -m orchestration.block_encryption encrypt-again  # once, after all servers have the key

A server without this variable makes a key and keeps it in the database. `orchestration.server_process` starts servers
that read blocks of both keys, and write blocks of the key in the variable.
"""

import asyncio
import os
import sys
from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from orchestration import pgbouncer
from orchestration.errors import PipelineError, SettingsError, sentence
from orchestration.prefect_compat.server_internals import (
    encrypt_blocks_again,
    read_blocks_with_stored_key,
    store_block_key,
)

VARIABLE = "PREFECT_SERVER_ENCRYPTION_KEY"


def prepare_server() -> None:
    """Have the Prefect server of this process read blocks of both keys.

    Raises:
        SettingsError: the variable has no key. The server would answer each request for a block with 500.
    """
    if os.environ.get(VARIABLE):
        _checked_key()
        read_blocks_with_stored_key()


def _checked_key() -> str:
    from cryptography.fernet import Fernet

    key = os.environ.get(VARIABLE, "")
    try:
        Fernet(key)
    except ValueError:
        raise SettingsError(
            f"{VARIABLE} has no key of 32 bytes in base64. Check the Secret: openssl rand -base64 32 prints a new key"
        ) from None
    return key


def _encrypt_again() -> None:
    from cryptography.fernet import InvalidToken

    try:
        blocks = asyncio.run(encrypt_blocks_again(_checked_key()))
    except InvalidToken:
        raise PipelineError(
            f"No block has changed: a block has neither the key of {VARIABLE} nor the key in the database. "
            "Put the key that encrypted the block back into the Secret"
        ) from None
    if blocks is None:
        print("The database has no key: all blocks have the key of the environment.")
    else:
        print(f"{blocks} blocks have the key of the environment, and the key in the database is deleted.")


def _store() -> None:
    if not asyncio.run(store_block_key(_checked_key())):
        raise PipelineError(
            f"The database has a key other than that of {VARIABLE}, so a rotation of the key is not complete. First "
            "run: python -m orchestration.block_encryption encrypt-again"
        )
    print("The key of the environment is in the database until blocks are encrypted again.")


COMMANDS = {"store-key": _store, "encrypt-again": _encrypt_again}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    if len(arguments) != 1 or arguments[0] not in COMMANDS:
        print(f"Usage: python -m orchestration.block_encryption {'|'.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        pgbouncer.use_pgbouncer()
        COMMANDS[arguments[0]]()
    except PipelineError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    except (DBAPIError, OSError) as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        print(f"The database cannot be used: {cause}. Check its address and password.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
