"""All uses of private interfaces of Prefect, prefect-kubernetes, kopf and dateutil.

Other modules call functions and override methods with plain names. Each entry says what it `Replaces`, `Why`, and
`Until` when it is needed. docs/prefect.md lists the entries, and `tests/orchestration/test_prefect_compat.py` compares
what they use with the installed packages.

The package has several modules, as a flow run must not pay for the imports of a worker:

    workers           the worker: imports prefect-kubernetes and kopf
    flow_runs         the engine: imports Prefect's clients and runner
    blocks            the engine, before it imports Prefect: imports no Prefect
    results           the engine of a run with a signing key: imports Prefect's engines and task runners
    server_internals  schedules, automations and the server's database: imports Prefect when called
    background_services, expired_records, server_tables
                      the server's services, old records and tables: import Prefect when called
    events, recurrence, task_runners
                      events, dateutil's rules, the end of a flow with threads: import no Prefect

`orchestration/prefect_protocol.py` has what the supervisor needs, and imports nothing.
"""

import functools
import re
import warnings

TESTED_VERSIONS = {"prefect": ("3.9.1", "3.10"), "prefect-kubernetes": ("0.8.0", "0.9")}
"""The first version of each package that is tested, and the first one that is not, as in pyproject.toml."""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


@functools.cache
def warn_if_untested(package: str, version: str) -> None:
    """Warn once if the installed version of a package is not one that the tests ran with."""
    first, end = TESTED_VERSIONS[package]
    if not _numbers(first) <= _numbers(version) < _numbers(end):
        warnings.warn(
            f"{package} {version} is not tested with this project, which uses private interfaces of it: install "
            f"{package}>={first},<{end}, or run the tests that docs/prefect.md names.",
            stacklevel=2,
        )
