"""Start a process of the Prefect server: `python -m orchestration.server_process server services start`.

The arguments are those of `prefect`. The process reads secret blocks of the key in `PREFECT_SERVER_ENCRYPTION_KEY` and
of the key in the database. With `PGBOUNCER_ADDRESS` it connects through PgBouncer. With `SERVICES_HEALTH_PORT` it
serves the health of its background services. With `RETENTION_*_DAYS` these delete old records. An API refuses requests
that it could never read again, and has clients wait whose requests fail while migrations run. With
`API_TLS_CERTIFICATE` and `API_TLS_KEY` an API serves HTTPS.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta

from orchestration import block_encryption, pgbouncer
from orchestration.access.asgi import Application
from orchestration.access.limits import RequestLimits
from orchestration.api_tls import use_certificate
from orchestration.errors import PipelineError, sentence
from orchestration.maintenance import MaintenanceAnswers
from orchestration.prefect_compat.background_services import look_for_due_tasks_every, read_redis_settings_once
from orchestration.prefect_compat.server_internals import (
    free_only_held_slots,
    limit_claims,
    repeat_block_registration,
    wrap_server_api,
)
from orchestration.services import retention
from orchestration.services.health_endpoint import services_health_served

GARBAGE_THRESHOLDS = (50_000, 20, 100)
"""After how many new objects the garbage collector looks at each of its generations.

Python's 2,000 or less make it search the growing modules during the imports, an eighth of the start's processor time.
"""


def start_server(arguments: Sequence[str], protect: Callable[[Application], Application] | None = None) -> int:
    """Run the command `prefect`; return the exit status.

    Args:
        arguments: those of the command.
        protect: wraps the API's ASGI application, which then sees only requests that this wrapper passes on.
    """

    def wrap(api: Application) -> Application:
        from orchestration import migrations

        limited = RequestLimits(api)
        return MaintenanceAnswers(protect(limited) if protect else limited, migrations.look)

    gc.set_threshold(*GARBAGE_THRESHOLDS)
    if list(arguments[:3]) == ["server", "services", "start"]:
        _stop_services_at_sigterm()
    try:
        if list(arguments[:2]) == ["server", "start"]:
            wrap_server_api(wrap)
            repeat_block_registration()
            limit_claims()
            free_only_held_slots()
            use_certificate(os.environ)
        look_for_due_tasks_every(timedelta(seconds=1))
        read_redis_settings_once()
        pgbouncer.use_pgbouncer()
        block_encryption.prepare_server()
        retention.add_to_server()
        with services_health_served():
            from prefect.cli import app

            sys.argv = ["prefect", *arguments]
            app()
    except PipelineError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _stop_services_at_sigterm() -> None:
    """Have SIGTERM stop the background services as Ctrl+C does: they write the events that they have read.

    By default SIGTERM ends the process at once. Redis does not deliver these events again.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio replaces this handler alone
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


if __name__ == "__main__":
    sys.exit(start_server(sys.argv[1:]))
