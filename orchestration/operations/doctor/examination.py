"""Run all checks on an environment, and print what they found."""

import contextlib
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from orchestration.errors import ApiError, ClusterError
from orchestration.operations.doctor import (  # noqa: F401 - the import registers the checks
    cluster_checks,
    database_checks,
    release_checks,
    server_checks,
)
from orchestration.operations.doctor.findings import CHECKS, Check, Finding, Status, run_checks
from orchestration.operations.doctor.installation import Installation
from orchestration.operations.environment import Environment, resolve
from orchestration.operations.local_cluster.choice import choose_context
from orchestration.operations.port_forward import forward_port, read_credentials
from orchestration.prefect_api import Server, connected
from orchestration.terminal import json_text, one_line

URL_VARIABLE = "PREFECT_API_URL"

PROGRAM_SECONDS = 50.0
"""How long one call of kubectl or helm may take."""

RETRY_SECONDS = 5.0
"""For how long a request of the Prefect API is retried."""

_COLOURS: dict[Status, str] = {"ok": "32", "warning": "33", "failed": "31", "not checked": "2"}


async def examine(name: str, context: str, namespace: str = "") -> list[tuple[Check, Finding]]:
    """Return all checks with their findings.

    Args:
        name: the environment's name.
        context: the kubeconfig context of its cluster; empty for the local cluster's.
        namespace: a namespace other than the environment's.

    Raises:
        ClusterError: the environment does not exist or its cluster cannot be used, and `PREFECT_API_URL` names no
            server that could be checked without it.
    """
    environment: Environment | str
    try:
        found = resolve(name, context or (choose_context() if name == "local" else ""), namespace)
        environment = dataclasses.replace(found, limit_seconds=PROGRAM_SECONDS)
    except ClusterError as error:
        if URL_VARIABLE not in os.environ:
            raise
        environment = str(error)
    async with _connect(environment) as server:
        findings = await run_checks(Installation(environment, server), CHECKS)
    return list(zip(CHECKS, findings, strict=True))


@contextlib.asynccontextmanager
async def _connect(environment: Environment | str) -> AsyncIterator[Server | str]:
    """Yield the Prefect API, or the reason why it cannot be reached.

    The API is that of `PREFECT_API_URL`, and so the way through proxies is checked, too; else the environment's by a
    port forward.
    """
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_SSL_CERT_FILE,
        PREFECT_API_URL,
        temporary_settings,
    )

    with contextlib.ExitStack() as stack:
        if URL_VARIABLE not in os.environ:
            if isinstance(environment, str):
                yield environment
                return
            try:
                credentials = read_credentials(environment)
                forward = stack.enter_context(forward_port(environment))
            except ClusterError as error:
                reason = " ".join(str(error).split())
                absent = f"there is no Prefect server in namespace {environment.namespace}"
                yield absent if "(NotFound)" in reason else f"the Prefect server cannot be reached: {reason}"
                return
            settings = {PREFECT_API_URL: f"{forward.url}/api", PREFECT_API_AUTH_STRING: credentials}
            if forward.ca:
                settings[PREFECT_API_SSL_CERT_FILE] = forward.ca
            stack.enter_context(temporary_settings(settings))
        async with connected() as server:
            server.retry_seconds = RETRY_SECONDS
            try:
                await server.ask("GET", "/health")
            except ApiError as error:
                reason = str(error)
            else:
                yield server
                return
        yield reason


def print_results(results: Sequence[tuple[Check, Finding]], *, as_json: bool) -> None:
    """Print a line for each check, below it the cure if there is one; or JSON."""
    counts = Counter(finding.status for _, finding in results)
    if as_json:
        checks = [
            {"group": check.group, "check": check.name, **dataclasses.asdict(finding)} for check, finding in results
        ]
        print(json_text(checks))
        return
    is_coloured = sys.stdout.isatty()
    width = max(len(check.name) for check, _ in results)
    group = ""
    for check, finding in results:
        if check.group != group:
            print(f"{'' if not group else chr(10)}{check.group}")
            group = check.group
        status = f"{finding.status:<11}"
        if is_coloured:
            status = f"\033[{_COLOURS[finding.status]}m{status}\033[0m"
        print(f"  {status}  {check.name:<{width}}  {one_line(finding.text)}")
        if finding.cure:
            print(f"  {'':<11}  {'':<{width}}  -> {one_line(finding.cure)}")
    print(f"\n{', '.join(f'{counts[status]} {status}' for status in _COLOURS if counts[status])}")
