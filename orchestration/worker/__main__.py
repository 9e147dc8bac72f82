"""Run the worker of a work pool on Kubernetes or Docker.

python -m orchestration.worker --pool default [--type docker] [--namespace NS] [--queue NAME]... [--limit N]
[--name NAME] [--template FILE] [--signing-key FILE] [--warm N] [--warm-max-age SECONDS]
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from httpx import HTTPError, HTTPStatusError
from prefect.client.schemas.objects import FlowRun
from prefect.settings import get_current_settings
from prefect.workers.base import BaseWorker

from orchestration import logs
from orchestration.access.credentials import AUTH_VARIABLE, run_credential
from orchestration.errors import ApiError
from orchestration.prefect_api import check_certificate
from orchestration.runs.result_signing import read_master_keys
from orchestration.worker import job_template

DOCKER_FILE = "docker/pool.yaml"
"""Where a person changes the template of the Docker pool."""

logger = logging.getLogger("orchestration.worker")  # __name__ is __main__ here


async def serve(worker: BaseWorker[Any, Any, Any], drain: Callable[[], Awaitable[None]] | None = None) -> None:
    """Run the worker until SIGTERM or SIGINT; then drain it, if it can."""
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_end.set)
    working = asyncio.create_task(worker.start(with_healthcheck=True))
    waiting = asyncio.create_task(asked_to_end.wait())
    await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if asked_to_end.is_set():
        if drain:
            draining = asyncio.ensure_future(drain())
            await asyncio.wait({working, draining}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
        working.cancel()
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


def docker_worker(template: dict[str, Any] | None, **options: Any) -> BaseWorker[Any, Any, Any]:
    """Return Prefect's Docker worker. It gives each run a credential for this run alone, as the Kubernetes worker does.

    Args:
        template: the base job template that it uses; None takes that of the server's pool.
        options: those of Prefect's worker.
    """
    from prefect_docker.worker import DockerWorker, DockerWorkerJobConfiguration  # type: ignore[import-untyped]

    class Configuration(DockerWorkerJobConfiguration):  # type: ignore[misc]
        """Replaces the credential that job variables may name."""

        def prepare_for_flow_run(self, flow_run: FlowRun, *arguments: Any, **options: Any) -> None:
            super().prepare_for_flow_run(flow_run, *arguments, **options)
            if credential := run_credential(flow_run.id):
                self.env[AUTH_VARIABLE] = credential

    worker: BaseWorker[Any, Any, Any] = DockerWorker(**options)
    worker.job_configuration = (
        job_template.configuration_of(template, Configuration, DOCKER_FILE) if template else Configuration
    )
    return worker


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestration.worker", description="Run a pool's flow runs as Jobs or containers."
    )
    parser.add_argument("--pool", required=True, help="the work pool")
    parser.add_argument(
        "--type",
        choices=["kubernetes", "docker"],
        default="kubernetes",
        help="run flow runs as Jobs or as containers",
    )
    parser.add_argument("--namespace", help="the namespace of the Jobs; default: that of the pool's template")
    parser.add_argument("--queue", action="append", help="take runs of this queue alone; may be repeated")
    parser.add_argument("--limit", type=int, help="how many runs to submit at once")
    parser.add_argument("--name", help="the worker's name; default: a random name")
    parser.add_argument("--template", type=Path, help="a file with the base job template; default: the pool's")
    parser.add_argument("--signing-key", type=Path, help="the master key of stored results; default: runs sign nothing")
    parser.add_argument("--warm", type=int, default=0, help="how many warm pods wait for runs")
    parser.add_argument("--warm-max-age", type=float, default=600, help="seconds after which a warm pod is replaced")
    options = parser.parse_args(arguments)
    if options.type == "docker" and options.namespace:
        parser.error("--namespace is for Kubernetes")
    if options.type == "docker" and options.signing_key:
        parser.error("--signing-key is for Kubernetes")
    if options.warm and not options.namespace:
        parser.error("--warm needs --namespace")
    return logs.run_component(logger.name, lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Run the worker of a command line.

    Raises:
        SettingsError: the template or the signing key is wrong.
        ApiError: the Prefect API cannot be used.
    """
    settings = get_current_settings().worker
    template = job_template.read(options.template, options.pool) if options.template else None
    signing_keys = read_master_keys(options.signing_key) if options.signing_key else []
    if options.signing_key and not signing_keys:
        logger.warning("%s is absent: runs store results without signatures.", options.signing_key)
    # The worker waits for an API that does not answer. It would wait for another certificate in vain.
    asyncio.run(check_certificate())
    common = {
        "template": template,
        "name": options.name,
        "work_pool_name": options.pool,
        "work_queues": options.queue,
        "limit": options.limit,
        "prefetch_seconds": settings.prefetch_seconds,
        "heartbeat_interval_seconds": int(settings.heartbeat_seconds),
        "create_pool_if_not_found": False,
    }
    try:
        if options.type == "docker":
            asyncio.run(serve(docker_worker(**common)))
        else:
            # Here, as it imports all of Kubernetes.
            from orchestration.worker.kubernetes_worker import Worker

            worker = Worker(
                namespace=options.namespace,
                signing_keys=signing_keys,
                warm_replicas=options.warm,
                warm_max_age_seconds=options.warm_max_age,
                **common,
            )
            asyncio.run(serve(worker, worker.drain))
    except HTTPStatusError as error:
        status = error.response.status_code
        cure = ". Check the Secret with USER:PASSWORD" if status in (401, 403) else ""
        raise ApiError(f"The Prefect API at {error.request.url} answers {status}{cure}") from None
    except HTTPError as error:
        raise ApiError(f"The Prefect API cannot be used: {str(error) or type(error).__name__}") from None


if __name__ == "__main__":
    sys.exit(main())
