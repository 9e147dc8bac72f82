"""Functions of the Prefect server for schedules, automations and its database, called without a server.

Each function imports what it needs when it is called: each of these imports takes a second.
"""

import functools
import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any

from orchestration.prefect_compat import warn_if_untested

if TYPE_CHECKING:
    from alembic.config import Config
    from prefect.server.database import PrefectDBInterface

_BLOCK_KEY = "ENCRYPTION_KEY"
"""The entry of the server's configuration table that has the key of the blocks."""

REGISTRATIONS = 10
"""How often a server tries to register block types: it fails when another server has just inserted the same one."""


def _check_version() -> None:
    import prefect

    warn_if_untested("prefect", prefect.__version__)


def server_schedule(form: Mapping[str, Any]) -> Any:
    """Return the server's object for a schedule in the form of the API.

    Replaces: the classes of `prefect.server.schemas.schedules`
    Why: a schedule is checked before it is sent
    Until: the Prefect API validates a schedule without saving the schedule
    """
    _check_version()
    from prefect.server.schemas import schedules

    kinds = {"cron": schedules.CronSchedule, "interval": schedules.IntervalSchedule, "rrule": schedules.RRuleSchedule}
    return next(made(**form) for kind, made in kinds.items() if kind in form)


def schedule_dates(form: Mapping[str, Any], n: int, start: datetime, end: datetime | None = None) -> list[datetime]:
    """Return the next `n` dates of a schedule in the form of the API, up to `end`, as the scheduler finds them.

    Replaces: `_get_dates_generator` of the classes in `prefect.server.schemas.schedules`
    Why: `orchestrate` shows when a deployment runs next, and whether runs are due during a sync
    Until: `get_dates` can be called without an event loop
    """
    return sorted(server_schedule(form)._get_dates_generator(n=n, start=start, end=end))


def anchored_rrule(rrule: str, timezone: str) -> str:
    """Return the rule with a DTSTART. The server adds one to a rule without.

    Replaces: `prefect._internal.schemas.validators.normalize_rrule_string`
    Why: without a DTSTART a rule of minutes is walked from 2020 on
    Until: the Prefect API validates a schedule without saving the schedule
    """
    _check_version()
    from prefect._internal.schemas.validators import normalize_rrule_string

    return normalize_rrule_string(rrule, timezone=timezone)


def validated_rrule(rrule: str) -> str:
    """Return the rule if the server accepts it.

    Replaces: `prefect._internal.schemas.validators.validate_rrule_string`
    Why: a schedule is checked before it is sent
    Until: the Prefect API validates a schedule without saving the schedule

    Raises:
        ValueError: the server refuses the rule.
    """
    _check_version()
    from prefect._internal.schemas.validators import validate_rrule_string

    return validate_rrule_string(rrule)


def cron_fires(cron: str, day_or: bool, now: datetime) -> bool:
    """Return whether a cron expression has a date from `now` on.

    Replaces: `prefect._vendor.croniter`
    Why: a schedule is checked before it is sent, and the server takes one that never fires
    Until: the Prefect API validates a schedule without saving the schedule

    Raises:
        ValueError: the server's parser refuses the expression.
    """
    _check_version()
    from prefect._vendor.croniter.croniter import CroniterBadDateError, croniter

    dates = croniter(cron, now, day_or=day_or)  # type: ignore[no-untyped-call]
    try:
        dates.get_next(float)  # type: ignore[no-untyped-call]
    except CroniterBadDateError:
        return False
    return True


def validate_automation(fields: dict[str, Any]) -> None:
    """Raise pydantic's ValidationError for an automation that the server refuses.

    Replaces: `prefect.server.events.schemas.automations.AutomationCreate`
    Why: the client's class takes triggers that only Prefect Cloud has
    Until: the client's class refuses what the server does not have
    """
    _check_version()
    from prefect.server.events.schemas.automations import AutomationCreate

    AutomationCreate.model_validate(fields)


def database_interface() -> "PrefectDBInterface":
    """Return the server's interface to the database that the settings name.

    Replaces: `prefect.server.database.provide_database_interface`
    Why: one process migrates the database under a lock, and the others wait for the schema
    Until: `prefect server database` has a command that waits and one that locks
    """
    _check_version()
    from prefect.server.database import provide_database_interface

    return provide_database_interface()


def database_url() -> str:
    """Return the URL of the database that the settings name, as SQLAlchemy takes it.

    Replaces: `PrefectDBInterface.database_config`
    Why: the settings name the database by a URL or by its parts
    Until: a public function returns the URL
    """
    return str(database_interface().database_config.connection_url)


def migrations_config() -> "Config":
    """Return Alembic's configuration of the server's migrations.

    Replaces: `prefect.server.database.alembic_commands.alembic_config`
    Why: the revisions in the image tell whether a schema is older or newer than the image
    Until: `prefect server database` tells the revisions it knows
    """
    _check_version()
    from prefect.server.database.alembic_commands import alembic_config

    config = alembic_config()
    config.set_main_option("version_locations", str(database_interface().orm.versions_dir))
    return config


TEMPORARY_SERVER_APP = "prefect.server.api.server:create_app"


def temporary_server_variables() -> dict[str, str]:
    """Return the environment variables of a server that runs only while a flow runs.

    Replaces: `PREFECT__SERVER_EPHEMERAL`, `PREFECT__SERVER_FINAL`, `prefect.server.api.server.create_app`
    Why: Prefect's own temporary server starts after the flow's imports, in the flow's memory
    Until: a command starts Prefect's temporary server on a socket
    """
    return {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


def wrap_server_api(wrap: Callable[[Any], Any]) -> None:
    """Have `prefect server start` serve its API through a wrapper: `wrap` gets the API's ASGI application.

    Replaces: `prefect.server.api.server.create_app`
    Why: the server has one credential, and no permissions by route
    Until: the server has roles, or takes middleware from a setting
    """
    _wrap_mount("api", wrap)


def wrap_server_ui(wrap: Callable[[Any], Any]) -> None:
    """Have `prefect server start` serve its UI through a wrapper: `wrap` gets the UI's ASGI application.

    Replaces: `prefect.server.api.server.create_app`
    Why: the UI asks for a password, also if a proxy has logged the person in
    Until: a setting tells the UI that a proxy logs people in
    """
    _wrap_mount("ui", wrap)


def _wrap_mount(name: str, wrap: Callable[[Any], Any]) -> None:
    _check_version()
    from prefect.server.api import server
    from starlette.routing import Mount

    create_app = server.create_app

    def create_wrapped_app(*args: Any, **options: Any) -> Any:
        app = create_app(*args, **options)
        [mount] = [route for route in app.routes if isinstance(route, Mount) and route.name == name]
        if not getattr(mount, "is_wrapped", False):
            mount.app = wrap(mount.app)
            mount.is_wrapped = True  # type: ignore[attr-defined]
        return app

    server.create_app = create_wrapped_app


def serve_https(certificate: str, key: str) -> None:
    """Have `prefect server start` serve HTTPS instead of HTTP.

    Replaces: `uvicorn.run`
    Why: the command passes no certificate on
    Until: the server takes certificate and key from settings

    Args:
        certificate: the file with the certificate and its chain.
        key: the file with the certificate's key.
    """
    _check_version()
    import uvicorn

    uvicorn.run = functools.partial(uvicorn.run, ssl_certfile=certificate, ssl_keyfile=key)


def repeat_block_registration() -> None:
    """Repeat the registration of Prefect's block types when another server registers them at the same time.

    Replaces: `run_block_auto_registration` of `prefect.server.models.block_registration`
    Why: on an empty database two servers that start at once insert the same block types, and one of the two would end
    Until: the server ignores a block type that another server has inserted
    """
    _check_version()
    from prefect.server.models import block_registration
    from sqlalchemy.exc import IntegrityError

    register = block_registration.run_block_auto_registration

    async def register_repeatedly(session: Any) -> None:
        for attempt in range(1, REGISTRATIONS + 1):
            try:
                await register(session)
            except IntegrityError:  # the next attempt finds what the other server has inserted
                if attempt == REGISTRATIONS:
                    raise
            else:
                break

    block_registration.run_block_auto_registration = register_repeatedly


def check_expected_states(expected: ContextVar[str]) -> None:
    """Have the server abort a proposed state of a flow run whose current state is not the expected one.

    The server compares and writes in one transaction, in which it holds the lock of the run's row. The comparison also
    covers a forced state.

    Replaces: `priority` of `CoreFlowPolicy` and `MinimalFlowPolicy` in `prefect.server.orchestration.core_policy`
    Why: a state that arrives late would replace a newer state, which its sender has not seen
    Until: the Prefect API takes the id of the expected state with a proposed state

    Args:
        expected: the id of the state that the current request expects; empty if the request expects none.
    """
    _check_version()
    import prefect.server.models  # noqa: F401 - the policies can only be imported after the models
    from prefect.server.orchestration.core_policy import CoreFlowPolicy, MinimalFlowPolicy
    from prefect.server.orchestration.rules import (
        ALL_ORCHESTRATION_STATES,
        FlowRunOrchestrationRule,
        OrchestrationContext,
    )

    class ExpectState(FlowRunOrchestrationRule):
        FROM_STATES = TO_STATES = ALL_ORCHESTRATION_STATES

        async def before_transition(
            self,
            initial_state: Any,  # noqa: ARG002 - the signature is Prefect's
            proposed_state: Any,  # noqa: ARG002
            context: OrchestrationContext[Any, Any],
        ) -> None:
            if (state := expected.get()) and str(context.run.state_id) != state:
                await self.abort_transition(f"The run's state is {context.run.state_id}, not the expected {state}")

    for policy in (CoreFlowPolicy, MinimalFlowPolicy):
        _prepend(policy, ExpectState)


def _prepend(policy: Any, rule: Any) -> None:
    """Add a rule in front of those of a policy."""
    priority = policy.priority
    policy.priority = staticmethod(lambda: [rule, *priority()])


def limit_claims() -> None:
    """Have the server abort the claim of a flow run whose work pool or queue has no free slot.

    The server compares the limits only when a worker polls. A poll skips the rows that claims of another worker have
    locked, still counts their slots as free, and returns other runs. Claims in a pool with a limit take turns: each
    sees the claims before it.

    Replaces: `priority` of `CoreFlowPolicy` in `prefect.server.orchestration.core_policy`
    Why: two workers together claim up to twice as many runs as the pool has slots
    Until: the server compares the limits when a run becomes Pending
    """
    _check_version()
    import prefect.server.models  # noqa: F401 - the policies can only be imported after the models
    from prefect.server.orchestration.core_policy import CoreFlowPolicy
    from prefect.server.orchestration.rules import FlowRunOrchestrationRule, OrchestrationContext
    from prefect.server.schemas.states import StateType
    from sqlalchemy import func, or_, select

    class LimitClaims(FlowRunOrchestrationRule):
        FROM_STATES = {StateType.SCHEDULED}  # noqa: RUF012 - the name is Prefect's
        TO_STATES = {StateType.PENDING}  # noqa: RUF012

        async def before_transition(
            self,
            initial_state: Any,  # noqa: ARG002 - the signature is Prefect's
            proposed_state: Any,  # noqa: ARG002
            context: OrchestrationContext[Any, Any],
        ) -> None:
            db, session, queue_id = database_interface(), context.session, context.run.work_queue_id
            pool, queue, run = db.WorkPool, db.WorkQueue, db.FlowRun
            limits = select(pool.id, pool.concurrency_limit, queue.concurrency_limit).where(
                pool.id == queue.work_pool_id, queue.id == queue_id
            )
            pool_id, pool_limit, queue_limit = (await session.execute(limits)).one_or_none() or (None, None, None)
            if pool_limit is None and queue_limit is None:
                return
            counts = (
                select(run.work_queue_id, func.count())
                .where(run.work_queue_id == queue.id, queue.work_pool_id == pool_id)
                # As in a poll, runs of a paused queue take no slots of the pool.
                .where(or_(queue.is_paused.is_(False), queue.id == queue_id))
                .where(run.state_type.in_([StateType.PENDING, StateType.RUNNING]))
                .group_by(run.work_queue_id)
            )

            async def find_full() -> str:
                taken: dict[Any, int] = dict((await session.execute(counts)).all())
                if pool_limit is not None and sum(taken.values()) >= pool_limit:
                    return f"All {pool_limit} slots of the work pool are taken"
                if queue_limit is not None and taken.get(queue_id, 0) >= queue_limit:
                    return f"All {queue_limit} slots of the work queue are taken"
                return ""

            # A claim that waits for its turn holds a connection, so that one that must fail does not wait.
            full = await find_full()
            if not full and session.get_bind().dialect.name == "postgresql":
                # Until the end of the transaction. On SQLite one process at a time writes.
                key = f"prefect-orchestration: work pool {pool_id}"
                await session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(key, 0))))
                full = await find_full()
            if full:
                await self.abort_transition(full)

    _prepend(CoreFlowPolicy, LimitClaims)


def free_only_held_slots() -> None:
    """Have the server free a slot of a deployment only for the run that holds it, and only when its process is gone.

    A run that waits for a retry or for a slot holds none. Its cancellation would free the slot of a run in progress,
    and a third run would begin next to that run. The process of a paused run goes on to renew its lease, and Prefect
    cancels the flow if there is no lease. A slot that no transition frees is free once its lease expires.

    Replaces: `ReleaseFlowConcurrencySlots` in `prefect.server.orchestration.core_policy`
    Why: with a limit of one, two runs of a deployment execute at the same time, and a paused run crashes
    Until: the server frees a slot only for the run that holds it
    """
    _check_version()
    import prefect.server.models  # noqa: F401 - the policies can only be imported after the models
    from prefect.server.concurrency.lease_storage import get_concurrency_lease_storage
    from prefect.server.orchestration import core_policy
    from prefect.server.schemas.states import StateType
    from sqlalchemy import select

    keeps_process = {StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING}

    class FreeOnlyHeldSlots(core_policy.ReleaseFlowConcurrencySlots):
        async def after_transition(self, context: Any) -> None:
            before, after = context.initial_state, context.proposed_state
            if self.nullified_transition() or before is None or after is None:
                return
            if before.type == StateType.PAUSED or (before.type == StateType.CANCELLING and await self._waited(context)):
                lease_id = before.state_details.deployment_concurrency_lease_id
                if after.type not in keeps_process and await self._exists(lease_id):
                    await core_policy._release_concurrency_lease(session=context.session, lease_id=lease_id)
            elif after.type != StateType.PAUSED or after.state_details.pause_reschedule:
                await super().after_transition(context)

        async def _exists(self, lease_id: Any) -> bool:
            return bool(lease_id and await get_concurrency_lease_storage().read_lease(lease_id=lease_id))

        async def _waited(self, context: Any) -> bool:
            """Return whether a Cancelling run was waiting before."""
            cancelling = context.initial_state
            state = database_interface().FlowRunState
            before = (
                select(state.type)
                .where(state.flow_run_id == context.run.id, state.type != StateType.CANCELLING)
                .where(state.timestamp <= cancelling.timestamp)
                .order_by(state.timestamp.desc())
                .limit(1)
            )
            return await context.session.scalar(before) in (StateType.SCHEDULED, StateType.PAUSED)

    core_policy.ReleaseFlowConcurrencySlots = FreeOnlyHeldSlots  # type: ignore[misc]


def read_blocks_with_stored_key() -> None:
    """Have this process use the key in the database, as long as there is one, next to the key of the environment.

    It reads blocks of both keys. It writes blocks of the key in the database, so that an older server can read the
    blocks after a rollback.

    Replaces: `decrypt_fernet` and `encrypt_fernet` in `prefect.server.database.orm_models`
    Why: without `PREFECT_SERVER_ENCRYPTION_KEY` the server keeps its key in the database, and later reads one key only
    Until: the server reads blocks with several keys
    """
    _check_version()
    from cryptography.fernet import Fernet, InvalidToken
    from prefect.server.database import orm_models
    from prefect.server.models.configuration import read_configuration
    from prefect.server.utilities.encryption import decrypt_fernet, encrypt_fernet
    from sqlalchemy import select
    from sqlalchemy.ext.asyncio import AsyncSession

    async def decrypt(session: AsyncSession, data: str) -> dict[str, Any]:
        try:
            content: dict[str, Any] = await decrypt_fernet(session, data)
        except InvalidToken:
            stored = await read_configuration(session, _BLOCK_KEY)  # type: ignore[attr-defined]
            if stored is None:
                raise
            content = json.loads(Fernet(stored.value["fernet_key"]).decrypt(data.encode()))
        return content

    async def encrypt(session: AsyncSession, data: Mapping[str, Any]) -> str:
        db = database_interface()
        # Not by `read_configuration`, which caches: the key may be deleted by another process.
        stored = await session.scalar(select(db.Configuration).where(db.Configuration.key == _BLOCK_KEY))
        if stored is None:
            return await encrypt_fernet(session, data)
        return Fernet(stored.value["fernet_key"]).encrypt(json.dumps(data).encode()).decode()

    orm_models.decrypt_fernet = decrypt  # type: ignore[attr-defined]
    orm_models.encrypt_fernet = encrypt  # type: ignore[attr-defined]


async def store_block_key(key: str) -> bool:
    """Write the key of the blocks into the database, unless the database has one.

    Replaces: `db.Configuration` of `prefect.server.database.orm_models`
    Why: a server that gets another key finds the former one there
    Until: the server reads blocks with several keys

    Returns:
        Whether the key in the database is this one.
    """
    from sqlalchemy import select

    db = database_interface()
    # Without `with_for_update` SQLite refuses the write after the read if a server has written in between.
    async with db.session_context(begin_transaction=True, with_for_update=True) as session:
        stored = await session.scalar(select(db.Configuration).where(db.Configuration.key == _BLOCK_KEY))
        if stored is None:
            session.add(db.Configuration(key=_BLOCK_KEY, value={"fernet_key": key}))
            return True
        return bool(stored.value["fernet_key"] == key)


async def encrypt_blocks_again(key: str) -> int | None:
    """Encrypt all blocks with `key` instead of the key in the database, and delete that one, in a single transaction.

    Replaces: `db.BlockDocument.data`, `db.Configuration` of `prefect.server.database.orm_models`
    Why: whoever has the database, or a dump, can read all blocks while the key is in the database
    Until: `prefect server` has a command that changes the key

    Returns:
        How many blocks there are; None if the database has no key.

    Raises:
        InvalidToken: neither key decrypts a block. Nothing has changed.
    """
    from cryptography.fernet import Fernet, MultiFernet
    from sqlalchemy import select

    db = database_interface()
    async with db.session_context(begin_transaction=True, with_for_update=True) as session:
        stored = await session.scalar(select(db.Configuration).where(db.Configuration.key == _BLOCK_KEY))
        if stored is None:
            return None
        keys = MultiFernet([Fernet(key), Fernet(stored.value["fernet_key"])])
        blocks = (await session.scalars(select(db.BlockDocument).with_for_update())).all()
        for block in blocks:
            block.data = keys.rotate(block.data.encode()).decode()
        await session.delete(stored)
        return len(blocks)
