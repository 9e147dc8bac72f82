"""Start the server's background services with their health: `python -m orchestration.services server services start`.

The arguments are those of `prefect`. `SERVICES_HEALTH_PORT` is the port of `/ready`, `/live` and `/metrics`.
"""

import sys
from collections.abc import Sequence

from orchestration.errors import PipelineError
from orchestration.services.health_endpoint import services_health_served


def main(arguments: Sequence[str]) -> int:
    """Run the command `prefect` with the services' health; return the exit status."""
    try:
        with services_health_served():
            from prefect.cli import app

            sys.argv = ["prefect", *arguments]
            app()
    except PipelineError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
