"""Start a process of the Prefect server: `python -m orchestration.server_process server services start`.

The arguments are those of `prefect`. The process reads secret blocks of the key in `PREFECT_SERVER_ENCRYPTION_KEY` and
of the key in the database. With `SERVICES_HEALTH_PORT` it serves the health of its background services.
"""

import sys
from collections.abc import Sequence

from orchestration import block_encryption
from orchestration.errors import PipelineError
from orchestration.services.health_endpoint import services_health_served


def start_server(arguments: Sequence[str]) -> int:
    """Run the command `prefect`; return the exit status."""
    try:
        block_encryption.prepare_server()
        with services_health_served():
            from prefect.cli import app

            sys.argv = ["prefect", *arguments]
            app()
    except PipelineError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(start_server(sys.argv[1:]))
