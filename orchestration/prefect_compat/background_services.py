"""The background services of the Prefect server, observed from inside their process.

Prefect has two kinds of them. A perpetual service is a function that docket calls each few seconds, in whichever
process is free. The others are loops in each process that wait for messages.
"""

import asyncio
import functools
import importlib
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, Protocol

from orchestration.prefect_compat import warn_if_untested
from orchestration.prefect_compat.server_internals import database_interface

TASK_QUEUE = "docket"
"""The loop that calls the perpetual services."""

_WRITES = {
    "EventPersister": ("prefect.server.events.services.event_persister", "write_events"),
    "TaskRunRecorder": ("prefect.server.services.task_run_recorder", "record_bulk_task_run_events"),
}
"""Services that take messages into their memory, and write them in batches by this function."""

_service: ContextVar[str] = ContextVar("service", default="")
_pass_errors: ContextVar[list[BaseException] | None] = ContextVar("pass_errors", default=None)
_consumers: dict[str, Any] = {}
_monitors: set[asyncio.Task[None]] = set()


class ServiceObserver(Protocol):
    """Records what the services do."""

    def expect(self, service: str, every: float | None, has_rounds: bool) -> None:
        """Add a service."""

    def round(self, service: str) -> None:
        """Record a round of a service's loop."""

    def handle(self, service: str) -> None:
        """Record that a service has taken a message."""

    def succeed(self, service: str) -> None:
        """Record a successful pass, or a message that was handled."""

    def fail(self, service: str, error: BaseException) -> None:
        """Record a pass, or the handling of a message, that failed."""

    def end(self, service: str, error: BaseException | None) -> None:
        """Record that a service's loop has ended."""


def observe_services(observer: ServiceObserver, monitor: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Have the background services that this process starts later report to an observer.

    Replaces: `_PERPETUAL_SERVICES`, `Service.start`, the broker's `Consumer`, `RedeliverySweep.due` of docket's worker
    Why: a service that hangs or fails for ever is not visible from outside the process
    Until: each service of the server reports its last pass

    Args:
        observer: gets the reports, in the services' event loop.
        monitor: called with the task queue, and run in the services' event loop.
    """
    import prefect

    warn_if_untested("prefect", prefect.__version__)
    from docket import Perpetual
    from docket.dependencies import get_single_dependency_parameter_of_type
    from prefect.server.api import background_workers as _background_workers  # noqa: F401 - registers the services
    from prefect.server.services import perpetual_services
    from prefect.server.services.base import Service

    for config in perpetual_services._PERPETUAL_SERVICES:
        perpetual = get_single_dependency_parameter_of_type(config.function, Perpetual)
        if perpetual and config.enabled_getter():
            observer.expect(config.function.__name__, perpetual.every.total_seconds(), False)
            config.function = _observed_pass(config.function, observer)
    has_rounds = _observe_consumers(observer)
    for service in Service.enabled_services():
        observer.expect(service.__name__, None, has_rounds)
        service.start = _observed_start(service.start, service.__name__, observer)  # type: ignore[method-assign]
    for service_name, (module, function) in _WRITES.items():
        _replace(module, function, functools.partial(_observed_write, service_name, observer))
    _replace("prefect.server.events.triggers", "proactive_evaluation", _observed_evaluation)
    _observe_task_queue(observer, monitor)


def _replace(module: str, name: str, wrap: Callable[[Any], Any]) -> None:
    found = importlib.import_module(module)
    setattr(found, name, wrap(getattr(found, name)))


def _observed_pass(function: Callable[..., Awaitable[None]], observer: ServiceObserver) -> Callable[..., Any]:
    name = function.__name__

    @functools.wraps(function)
    async def observed(*args: Any, **options: Any) -> None:
        errors: list[BaseException] = []
        _pass_errors.set(errors)
        try:
            await function(*args, **options)
        except BaseException as error:
            observer.fail(name, error)
            raise
        if errors:
            observer.fail(name, errors[-1])
        else:
            observer.succeed(name)

    return observed


def _observed_evaluation(evaluate: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    """Record errors that the pass over the proactive triggers logs and drops."""

    @functools.wraps(evaluate)
    async def observed(*args: Any, **options: Any) -> Any:
        try:
            return await evaluate(*args, **options)
        except Exception as error:
            errors = _pass_errors.get()
            if errors is not None:
                errors.append(error)
            raise

    return observed


def _observed_start(start: Any, name: str, observer: ServiceObserver) -> Any:
    @functools.wraps(start)
    async def observed(*args: Any, **options: Any) -> None:
        _service.set(name)
        try:
            await start(*args, **options)
        except BaseException as error:
            observer.end(name, error)
            raise
        observer.end(name, None)

    return observed


def _observed_write(service: str, observer: ServiceObserver, write: Callable[..., Awaitable[Any]]) -> Any:
    @functools.wraps(write)
    async def observed(*args: Any, **options: Any) -> Any:
        try:
            done = await write(*args, **options)
        except BaseException as error:
            observer.fail(service, error)
            raise
        observer.succeed(service)
        return done

    return observed


def _observe_consumers(observer: ServiceObserver) -> bool:
    """Observe the consumers of messages; return whether their loops make rounds without messages."""
    from prefect.server.utilities.messaging import StopConsumer
    from prefect.settings import get_current_settings

    broker: Any = importlib.import_module(get_current_settings().server.events.messaging_broker)
    has_rounds = hasattr(broker.Consumer, "_trim_stream_if_necessary")

    class ObservedConsumer(broker.Consumer):  # type: ignore[misc] # the broker is a setting
        async def run(self, handler: Callable[[Any], Awaitable[None]]) -> None:
            service = _service.get()
            if not service:
                await super().run(handler)
                return
            _consumers[service] = self

            async def observed(message: Any) -> None:
                try:
                    await handler(message)
                except StopConsumer:
                    raise
                except Exception as error:
                    observer.fail(service, error)
                    raise
                if service in _WRITES:
                    observer.handle(service)
                else:
                    observer.succeed(service)

            await super().run(observed)

        async def _trim_stream_if_necessary(self, *args: Any) -> None:
            """Record a round: the loop calls this after each read."""
            if service := _service.get():
                observer.round(service)
            await super()._trim_stream_if_necessary(*args)

    broker.Consumer = ObservedConsumer
    return has_rounds


def _observe_task_queue(observer: ServiceObserver, monitor: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    import docket

    observer.expect(TASK_QUEUE, None, True)
    worker: Any = docket.Worker
    sweep: Any = importlib.import_module(worker.__module__).RedeliverySweep
    run_forever, due = worker.run_forever, sweep.due

    async def observed_run(self: docket.Worker) -> None:
        task = asyncio.create_task(monitor(self.docket))
        _monitors.add(task)  # the event loop itself keeps no reference
        try:
            await run_forever(self)
        except BaseException as error:
            observer.end(TASK_QUEUE, error)
            raise
        observer.end(TASK_QUEUE, None)

    async def observed_due(self: Any, redis: Any) -> bool:
        """Record a round: the worker's loop asks in each whether a sweep is due."""
        observer.round(TASK_QUEUE)
        return bool(await due(self, redis))

    worker.run_forever, sweep.due = observed_run, observed_due


def add_service(function: Callable[[], Awaitable[None]], every: timedelta) -> None:
    """Add a function to the perpetual services: the task queue calls it in one process at a time.

    Replaces: `prefect.server.services.perpetual_services.perpetual_service`
    Why: what this project adds to the server's services needs no process or lock besides theirs
    Until: the server takes services of others

    Args:
        function: its name is that of the service.
        every: the time from one call to the next.
    """
    from docket import Perpetual
    from prefect.server.services.perpetual_services import perpetual_service

    schedule = Perpetual(every=every, automatic=True)

    async def service(perpetual: Perpetual = schedule) -> None:  # noqa: ARG001 - docket reads it
        await function()

    service.__name__ = function.__name__
    perpetual_service(enabled_getter=lambda: True)(service)


def redeliver_lost_passes(after: timedelta) -> None:
    """Have the task queue call a perpetual service again whose pass has got lost.

    A pass gets lost when its process or its connection to Redis ends before the pass is acknowledged.

    Replaces: the default of `redelivery_timeout` of docket's `Worker`
    Why: by default such a service does not run for 5 minutes, after each short outage of Redis
    Until: the server has a setting for it

    Args:
        after: how long the pass was not renewed. A process renews its passes four times as often.
    """
    _set_defaults_of_task_queue(redelivery_timeout=after)


def look_for_due_tasks_every(pause: timedelta) -> None:
    """Have each process of the server look less often in Redis for background tasks that have become due.

    A task that is due when it is added does not wait for that.

    Replaces: the default of `scheduling_resolution` of docket's `Worker`
    Why: by default each process looks four times a second, for tasks that are due some seconds later
    Until: the server has a setting for it

    Args:
        pause: the time from one look to the next.
    """
    _set_defaults_of_task_queue(scheduling_resolution=pause)


def _set_defaults_of_task_queue(**defaults: timedelta) -> None:
    import docket

    worker: Any = docket.Worker
    create = worker.__init__

    @functools.wraps(create)
    def create_with_defaults(self: docket.Worker, *args: Any, **options: Any) -> None:
        create(self, *args, **{**defaults, **options})

    worker.__init__ = create_with_defaults


def read_redis_settings_once() -> None:
    """Have this process read the settings of Redis once, if the server's processes use Redis.

    Replaces: calls of `RedisWorkerCleanupQueueSettings` and `RedisMessagingPublisherSettings` in prefect_redis
    Why: it reads them for each event and, for each pool with a worker, five times a second: 0.5 ms each
    Until: prefect_redis keeps them
    """
    from prefect.settings import get_current_settings

    if get_current_settings().server.events.messaging_broker.startswith("prefect_redis"):
        _replace("prefect_redis.cleanup_queue", "RedisWorkerCleanupQueueSettings", functools.cache)
        _replace("prefect_redis.messaging", "RedisMessagingPublisherSettings", functools.cache)


def retry_task_run_writes(retries: int) -> None:
    """Have the task-run recorder keep states of task runs that it cannot write.

    Replaces: the default of `max_persist_retries` of `TaskRunRecorder.start`
    Why: by default the recorder drops them after 5 tries, which is 25 s of an outage of the database
    Until: the server has a setting for it, as for the event persister
    """
    from prefect.server.services.task_run_recorder import TaskRunRecorder

    start = TaskRunRecorder.start

    @functools.wraps(start)
    async def start_patient(self: TaskRunRecorder) -> None:
        await start(self, max_persist_retries=retries)

    TaskRunRecorder.start = start_patient  # type: ignore[assignment, method-assign]


async def count_backlogs() -> dict[str, int]:
    """Return how many messages in Redis wait for each observed service: unread, and read but not acknowledged.

    Replaces: `stream` and `group` of `prefect_redis.messaging.Consumer`, `prefect_redis.client.get_async_redis_client`
    Why: a consumer without messages is healthy, and one with messages that it does not handle is not
    Until: the broker tells how many messages wait for a consumer
    """
    waiting = [
        (name, observed_consumer)
        for name, observed_consumer in _consumers.items()
        if getattr(observed_consumer, "use_consumer_group", False)
    ]
    if not waiting:
        return {}
    from prefect_redis.client import get_async_redis_client

    client = get_async_redis_client()
    found = {}
    for name, consumer in waiting:
        groups = await client.xinfo_groups(consumer.stream) if await client.exists(consumer.stream) else []
        found[name] = sum(group["pending"] + (group["lag"] or 0) for group in groups if group["name"] == consumer.group)
    return found


async def database_answers() -> None:
    """Send a statement to the database that the settings name, and wait for the answer.

    Replaces: `PrefectDBInterface.engine`
    Why: `is_db_connectable` drops the error, which says what is wrong
    Until: the readiness of the server names the error
    """
    import sqlalchemy

    async with (await database_interface().engine()).connect() as connection:
        await connection.execute(sqlalchemy.text("select 1"))
