"""Contracts of `orchestration.prefect_compat` with the installed Prefect, prefect-kubernetes, kopf and dateutil.

The package is the seam to their private interfaces. Each entry of the seam has a test with the entry's name, which
fails if a new version changes what the entry uses. No test here needs a server, a cluster or the network.
"""

import ast
import functools
import importlib
import inspect
import logging
import re
import tomllib
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import uuid4

import pytest

from orchestration import prefect_compat
from orchestration import prefect_protocol as wire
from orchestration.prefect_compat import events, recurrence, server_internals, server_tables, warn_if_untested
from orchestration.settings import ROOT

SEAM = sorted((ROOT / "orchestration/prefect_compat").glob("*.py"))
PROTOCOL = ROOT / "orchestration/prefect_protocol.py"
PAGE = ROOT / "docs/prefect.md"


class Entry(NamedTuple):
    """Holds the documentation of one use of a private interface."""

    name: str
    replaces: str
    why: str
    until: str


SECTIONS = ("Replaces", "Why", "Until")


def _documented(file: Path) -> Iterator[tuple[str, str]]:
    """Yield names and docstrings of public objects of the seam. A module without functions counts as one object."""
    tree = ast.parse(file.read_text())
    if file == PROTOCOL:
        yield file.stem, ast.get_docstring(tree) or ""

    def below(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
        for part in node.body:
            if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or part.name.startswith("_"):
                continue
            text = ast.get_docstring(part) or ""
            name = f"{prefix}.{part.name}"
            if file.stem != "__init__" and name not in PLAIN:
                yield name, text
            if isinstance(part, ast.ClassDef):
                yield from below(part, name)

    yield from below(tree, file.stem)


PLAIN = {
    "flow_runs.Workspace", "flow_runs.KnownRun", "flow_runs.parse_known_run", "server_records.UnreadableError",
    "expired_records.Batch", *(
    f"results.Signer{name}" for name in ("", ".sign", ".verify")
), *(
    f"background_services.ServiceObserver{name}" for name in (
        "", ".expect", ".round", ".handle", ".succeed", ".fail", ".end",
    )
), *(
    f"recurrence.RulePart.{name}" for name in (
        "frequency", "count", "interval", "start", "until", "restricts_time_alone", "has_date", "end_at",
    )
)}  # fmt: skip
"""Public names of the seam that are not entries: results, parts and arguments of entries."""


def _entry(name: str, text: str) -> Entry:
    found = dict(re.findall(rf"^({'|'.join(SECTIONS)}): (.+)$", text, re.MULTILINE))
    assert set(found) == set(SECTIONS), f"{name} has {sorted(found)} of {SECTIONS}"
    return Entry(name, *(found[section] for section in SECTIONS))


def entries() -> list[Entry]:
    """Return all entries of the seam, in the order of the modules."""
    return [_entry(*pair) for file in (*SEAM, PROTOCOL) for pair in _documented(file)]


def _object(path: str) -> Any:
    """Return the object at "module:name.name"."""
    module, _, names = path.partition(":")
    return functools.reduce(getattr, names.split("."), importlib.import_module(module)) if names else (
        importlib.import_module(module)
    )  # fmt: skip


def signature(path: str) -> Callable[[], str]:
    """Return the left side of a check: names and defaults of a function's parameters."""

    def found() -> str:
        made = inspect.signature(_object(path))
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in made.parameters.values()]
        return str(made.replace(parameters=bare, return_annotation=inspect.Signature.empty))

    return found


def lacks(path: str, *texts: str) -> Callable[[], list[str]]:
    """Return the left side of a check: those of the texts that are not in the source of an object or module."""
    return lambda: [text for text in texts if text not in inspect.getsource(_object(path))]


@functools.cache
def _worker() -> Any:
    return _object("prefect_kubernetes.worker:KubernetesWorker")(work_pool_name="none", name="none")


def _client() -> Any:
    return _object("prefect.client.orchestration:PrefectClient")("http://127.0.0.1:9/api")._client


def _rule() -> Any:
    return _object("dateutil.rrule:rrule")(
        3, count=2, interval=3, dtstart=datetime(2026, 1, 1, 6, tzinfo=UTC), byhour=6
    )


def _rule_set() -> Any:
    made = _object("dateutil.rrule:rruleset")()
    made.rrule(_rule())
    return made


def _read(part: recurrence.RulePart) -> tuple[Any, ...]:
    part.end_at(datetime(2026, 2, 1, tzinfo=UTC))
    return (part.frequency, part.count, part.interval, part.start.day, part.restricts_time_alone, part.until)


def _has_date(**more: Any) -> bool:
    hourly = _object("dateutil.rrule:rrule")(4, dtstart=datetime(2026, 1, 31), **more)
    return recurrence.RulePart(hourly).has_date(hourly._dtstart)


def _emitted(function: Callable[..., Any], where: str, *arguments: Any) -> list[dict[str, Any]]:
    """Return the events that a function of Prefect emits by the function at the path `where`."""
    found: list[dict[str, Any]] = []
    with patch(where, lambda **event: found.append(event)):
        function(*arguments)
    return found


def _task_run_event() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the event of a task run's state, as the seam makes it and as Prefect emits it."""
    from prefect.client.schemas.objects import TaskRun
    from prefect.states import Running

    state: Any = Running(message="begins")
    run = TaskRun(id=uuid4(), name="a", task_key="a", dynamic_key="0", run_count=1, flow_run_id=uuid4(), state=state)
    where = "prefect.utilities.engine"
    [theirs] = _emitted(_object(f"{where}:emit_task_run_state_change_event"), f"{where}.emit_event", run, None, state)
    about = {"name": "a", "task_key": "a", "dynamic_key": "0", "run_count": 1}
    ours = events.task_run_state_event(
        run.id, {"type": "RUNNING", "name": "Running", "message": "begins"}, state.timestamp, about, []
    )
    return ours, theirs


def _unlike_task_run_event() -> list[str]:
    """Return the fields for the server in which the two events differ."""
    ours, theirs = _task_run_event()
    their_run = theirs["payload"]["task_run"]
    about = {key: value for key, value in ours["payload"].pop("task_run").items() if their_run.get(key) != value}
    theirs["payload"].pop("task_run")
    theirs["payload"]["validated_state"]["state_details"] = {}
    different = [name for name in ("event", "payload") if ours[name] != theirs[name]]
    different += [
        key
        for key, value in ours["resource"].items()
        if key[-9:] != "timestamp" and theirs["resource"].get(key) != value
    ]
    return [*different, *about]


def _asset_events() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the events of a materialization, as the seam makes them and as Prefect emits them."""
    from prefect.assets import Asset, AssetProperties
    from prefect.context import AssetContext
    from prefect.states import Completed

    made = Asset(key="postgres://a/b", properties=AssetProperties(name="b", description="of a"))
    context = AssetContext(
        upstream_assets={Asset(key="postgres://a/a")}, downstream_assets={made}, materialized_by="dbt",
        materialization_metadata={made.key: {"rows": 1}},
    )  # fmt: skip
    theirs = _emitted(context.emit_events, "prefect.events.emit_event", Completed())
    run = uuid4()
    asset = {"address": made.key, "name": "b", "description": "of a"}
    materialized = events.asset_materialization_event(True, asset, run, ["postgres://a/a"], [], {"rows": 1})
    # Prefect adds the task run when it emits the event.
    own = {"prefect.resource.id": f"prefect.task-run.{run}", "prefect.resource.role": "task-run"}
    assert own in materialized["related"]
    assert len(materialized["related"]) == events.MATERIALIZATION_RESOURCES + 1
    materialized["related"].remove(own)
    return [events.asset_referenced_event("postgres://a/a", []), materialized], theirs


def _unlike_asset_event(number: int) -> list[str]:
    ours, theirs = (side[number] for side in _asset_events())
    for event in (ours, theirs):
        event["related"] = sorted(event.get("related", ()), key=str)
        event["payload"] = event.get("payload", {})
    return [name for name in ("event", "resource", "related", "payload") if ours[name] != theirs[name]]


LABELS = {
    f"prefect.io/{name}": name
    for kind in ("flow-run", "flow", "deployment", "work-pool", "worker")
    for name in (f"{kind}-id", f"{kind}-name")
}
OBSERVER, DIAGNOSTICS = "prefect_kubernetes.observer", "prefect_kubernetes.diagnostics"
BASE, WORKER = "prefect.workers.base:BaseWorker", "prefect_kubernetes.worker:KubernetesWorker"
SUBMIT = f"{BASE}._submit_run_and_capture_errors"
HTTP = "prefect.client.base:PrefectHttpx"
CONTROL = "prefect._internal.control_listener"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
UNSCHEDULABLE = ("untolerated taint {a: b}", "node affinity", "Insufficient cpu", "node selector", "else")
DATES = "(self, n=None, start=None, end=None)"
APP = "(settings=None, ephemeral=False, webserver_only=False, final=False, ignore_cache=False)"
CRON = {"cron": "0 6 * * *", "timezone": "UTC", "day_or": True}


def _labelled() -> list[str]:
    """Return the related resources that the seam makes of labels and the observer does not."""
    theirs = [resource.model_dump() for resource in _object(f"{OBSERVER}:_related_resources_from_labels")(LABELS)]
    return [
        resource["prefect.resource.id"] for resource in events.resources_of_labels(LABELS) if resource not in theirs
    ]


def _unlike_related() -> list[str]:
    """Return the related resources of a flow run that the seam makes and Prefect does not."""
    run = SimpleNamespace(id="r", name="heron", flow_id="f", deployment_id=None)
    made = _object("prefect.events.related:object_as_related_resource")
    theirs = [
        made(kind, kind, SimpleNamespace(id=id_, name=name)).model_dump()
        for kind, id_, name in (("flow-run", "r", "heron"), ("flow", "f", "etl"))
    ]
    ours = events.flow_run_resources(run, SimpleNamespace(name="etl"))
    return [resource["prefect.resource.id"] for resource in ours if resource not in theirs]


def _refused_trigger() -> str:
    with pytest.raises(ValueError, match="trigger"):
        server_internals.validate_automation({"name": "a", "trigger": {"type": "metric"}, "actions": []})
    return "refused"


def _unlike_storage_calls() -> list[str]:
    """The uses of a storage's bytes in Prefect's result store that are no call of the two functions."""
    source = inspect.getsource(_object("prefect.results"))
    called = re.findall(r'call_explicitly_a?sync_block_method\(\s*[\w.]+,\s*"(?:read|write)_path"', source)
    return re.findall(r"(?:read|write)_path", source)[len(called) :]


def _absent_columns(model: str, *names: str) -> list[str]:
    """Return those of some columns that a table of the server's database does not have."""
    table = getattr(server_internals.database_interface(), model).__table__
    return [name for name in names if name not in table.columns]


def _cascades(*models: str) -> list[str]:
    """Return those of some tables whose rows the database does not delete with their run."""
    tables = [getattr(server_internals.database_interface(), model).__table__ for model in models]
    cascading = {
        table.name for table in tables for key in table.foreign_keys if (key.ondelete or "").lower() == "cascade"
    }
    return [table.name for table in tables if table.name not in cascading]


Check = tuple[Callable[[], Any], Any]

CONTRACTS: dict[str, list[Check]] = {
    "workers.watched_kinds": [
        (lambda: str(_object("kopf._cogs.structs.references:Resource")("", "v1", "pods", namespaced=True)), "pods.v1"),
        (
            lacks(
                "kopf._core.reactor.orchestration:spawn_missing_watchers",
                'name=f"watcher for {what}"', 'what = f"{resource}@{namespace}"',
            ),
            [],
        ),
        (lacks(f"{OBSERVER}:_observer_thread_entry", "kopf.operator("), []),
    ],
    "workers.CompatibleWorker": [
        (lacks("prefect.utilities.dispatch:_register_subclass_of_base_type", "if abc.ABC in cls.__bases__:"), []),
        (lambda: _object("orchestration.worker.kubernetes_worker:Worker").type, "kubernetes"),
        (lambda: _object(f"{BASE}.get_worker_class_from_type")("kubernetes") is _object(WORKER), True),
    ],
    "workers.CompatibleWorker.logger": [(lambda: _worker()._logger.isEnabledFor(logging.ERROR), True)],
    "workers.CompatibleWorker.has_work_pool": [
        (lambda: _worker()._work_pool, None),
        (lacks(f"{BASE}._record_work_pool_snapshot", "self._work_pool = work_pool"), []),
    ],
    "workers.CompatibleWorker.has_synchronized": [
        (lambda: _worker()._has_successfully_synced, False),
        (lacks(f"{BASE}._initialize_after_sync", "self._has_successfully_synced = True"), []),
    ],
    "workers.CompatibleWorker.submitting": [
        (lambda: _worker()._submitting_flow_run_ids, set()),
        (lacks(f"{BASE}._submit_run", "self._submitting_flow_run_ids.remove(flow_run.id)"), []),
    ],
    "workers.CompatibleWorker.record_poll": [
        (lambda: isinstance(_worker()._last_polled_time, datetime), True),
        (lacks(f"{BASE}.is_worker_still_polling", "self._last_polled_time"), []),
    ],
    "workers.CompatibleWorker.limit_connect_time": [
        (lambda: set(_client().timeout.as_dict()), {"connect", "read", "write", "pool"}),
    ],
    "workers.CompatibleWorker.release": [
        (signature(f"{BASE}._release_limit_slot"), "(self, flow_run_id)"),
        (lambda: _worker()._cancelling_observer, None),
        (
            signature("prefect._internal.observers:FlowRunCancellingObserver.remove_in_flight_flow_run_id"),
            "(self, flow_run_id)",
        ),
    ],
    "workers.CompatibleWorker.read_due_runs": [
        (signature(f"{BASE}._get_scheduled_flow_runs"), "(self)"),
        (lacks(f"{BASE}.get_and_submit_flow_runs", "self._get_scheduled_flow_runs("), []),
    ],
    "workers.CompatibleWorker.watch_runs": [
        (lambda: _worker()._work_pool_name, "none"),
        (
            lacks(
                "prefect.server.models.events:flow_run_state_change_event",
                'event=f"prefect.flow-run.{validated_state.name}"', '"prefect.state-type": validated_state.type.value',
                'f"prefect.flow-run.{flow_run.id}"',
            ),
            [],
        ),
        (lacks("prefect.server.models.events:_as_resource_data", '"role": "work-pool"', '"name": work_pool.name'), []),
        (
            signature("prefect.events.clients:get_events_subscriber"),
            "(filter=None, reconnection_attempts=10, reconnect_on_clean_close=False)",
        ),
    ],
    "workers.CompatibleWorker.read_later_due_runs": [
        (lambda: (_worker()._work_queues, _worker()._prefetch_seconds > 0), (set(), True)),
        (lacks(f"{BASE}._get_scheduled_flow_runs", "seconds=int(self._prefetch_seconds)"), []),
        (
            lacks("prefect.server.api.workers:get_scheduled_flow_runs", "scheduled_after: DateTime = Body("),
            [],
        ),
    ],
    "workers.CompatibleWorker.synchronize": [
        (signature(f"{BASE}._sync_and_initialize"), "(self)"),
        (lacks(f"{BASE}.start", "workload=self._sync_and_initialize"), []),
        (lacks(f"{BASE}.setup", "await self._sync_and_initialize()"), []),
    ],
    "workers.CompatibleWorker.claim_and_submit": [
        (signature(f"{BASE}._submit_run"), "(self, flow_run)"),
        (lacks(f"{BASE}._submit_scheduled_flow_runs", "self._submit_run,"), []),
    ],
    "workers.CompatibleWorker.claim": [
        (signature(f"{BASE}._propose_pending_state"), "(self, flow_run)"),
        (lacks(f"{BASE}._submit_run", "await self._propose_pending_state(flow_run)"), []),
    ],
    "workers.CompatibleWorker.label_claimed_run": [
        (signature(f"{BASE}._give_worker_labels_to_flow_run"), "(self, flow_run_id)"),
        (lacks(SUBMIT, "await self._give_worker_labels_to_flow_run(flow_run.id)"), []),
    ],
    "workers.CompatibleWorker.report_submitting": [
        (signature(f"{BASE}._propose_submitting_state"), "(self, flow_run)"),
        (lacks(SUBMIT, "await self._propose_submitting_state(flow_run)"), []),
    ],
    "workers.CompatibleWorker.report_refusal": [
        (signature(f"{BASE}._propose_crashed_state"), "(self, flow_run, message, client=None)"),
        (lacks(SUBMIT, "await self._propose_crashed_state(flow_run, message)"), []),
    ],
    "workers.CompatibleWorker.create_job": [
        (signature(f"{WORKER}._create_job"), "(self, configuration, client)"),
        (lacks(f"{WORKER}.run", "await self._create_job(configuration, client)"), []),
    ],
    "workers.CompatibleWorker.kubernetes_client": [
        (signature(f"{WORKER}._get_configured_kubernetes_client"), "(self, configuration)"),
        (signature(f"{WORKER}.kill_infrastructure"), "(self, infrastructure_pid, configuration, grace_seconds=30)"),
    ],
    "workers.run_of_configuration": [
        (
            lacks(
                "prefect.workers.base:BaseJobConfiguration.prepare_for_flow_run",
                "self._related_objects = {", '"flow-run": flow_run',
            ),
            [],
        ),
    ],
    "flow_runs.retry_first_requests": [
        (lacks(f"{HTTP}{kind}Client", "self._has_connected: bool = False", "if self._has_connected:"), [])
        for kind in ("Async", "Sync")
    ],
    "flow_runs.limit_log_lines": [
        (signature("prefect.logging.handlers:APILogWorker.send"), "(self, item)"),
        (lacks("prefect.logging.handlers:emit_api_log", "APILogWorker.instance().send(log)"), []),
        (lacks("prefect.task_runners", "APILogWorker.instance()", "api_log_worker.send("), []),
        (lacks("prefect.logging.handlers:APILogHandler.prepare", "message=formatted_message,", "level=record.lev"), []),
    ],
    "flow_runs.bound_retry_pauses": [
        (signature("prefect.utilities.math:clamped_poisson_interval"), "(average_interval, clamping_factor=0.3)"),
        *((lacks(f"{HTTP}{kind}Client", "clamped_poisson_interval("), []) for kind in ("Async", "Sync")),
    ],
    "flow_runs.share_certificates": [
        *(
            (lacks(f"prefect.client.orchestration:{name}Client.__init__", "ssl.create_default_context(cafile="), [])
            for name in ("Prefect", "SyncPrefect")
        ),
        (lacks("prefect._internal.version_checking:check_server_version", "ssl.create_default_context(cafile="), []),
    ],
    "flow_runs.keep_default_storage": [
        *(
            (signature(f"prefect.client.orchestration:{name}Client.read_server_default_result_storage"), "(self)")
            for name in ("Prefect", "SyncPrefect")
        ),
        *(
            (lacks(f"prefect.results:_{name}", ".read_server_default_result_storage()"), [])
            for name in (f"{prefix}read_server_default_result_storage_block_id" for prefix in ("", "a"))
        ),
    ],
    "flow_runs.check_version_once": [
        (signature("prefect._internal.version_checking:_api_version_check_key"), "(api_url, client_version)"),
        *(
            (lacks(f"prefect.client.orchestration:{name}_once", "_api_version_check_key("), [])
            for name in (f"{client}Client.raise_for_api_version_mismatch" for client in ("Prefect", "SyncPrefect"))
        ),
        (lacks("prefect._internal.version_checking:check_server_version", "_api_version_check_key("), []),
    ],
    "flow_runs.observe_responses": [
        (signature(f"{HTTP}{kind}Client.send"), "(self, request, *args, **kwargs)") for kind in ("Async", "Sync")
    ],
    "flow_runs.hold_until_due": [
        *(
            (signature(f"prefect.flow_engine:{name}.begin_run"), "(self)")
            for name in ("FlowRunEngine", "AsyncFlowRunEngine")
        ),
        (lacks("prefect.server.orchestration.core_policy:WaitForScheduledTime", "round(delay.microseconds / 1e6)"), []),
    ],
    "flow_runs.reload_settings": [
        (signature("prefect.context:refresh_global_settings_context"), "()"),
    ],
    "flow_runs.prepare_workspace": [
        (
            signature("prefect.runner._workspace_resolver:prepare_workspace_for_flow_run"),
            "(flow_run_id, workspace_root)",
        ),
        (
            signature("prefect.runner._workspace_resolver:prepare_workspace"),
            "(client, flow_run, deployment, workspace_root)",
        ),
        *(
            (lacks(f"prefect.client.orchestration:PrefectClient.{name}", f"return {model}.model_validate("), [])
            for name, model in {"read_flow_run": "FlowRun", "read_deployment": "DeploymentResponse"}.items()
        ),
        (signature("prefect.runner._workspace_starter:workspace_environment"), "(workspace)"),
        (
            lambda: {"working_directory", "runtime_entrypoint"}
            - set(_object("prefect.runner._workspace_resolver:PreparedWorkspace").model_fields),
            set(),
        ),
        (lacks("prefect.flow_engine", f'os.environ.get("{wire.FLOW_ENTRYPOINT_VARIABLE}")'), []),
    ],
    "flow_runs.use_known_run": [
        (signature("prefect.flow_engine:load_flow_run"), "(flow_run_id)"),
        (lacks("prefect.engine", "load_flow_run(flow_run_id=flow_run_id)"), []),
    ],
    "flow_runs.run_engine": [
        (lacks("prefect.engine", 'if __name__ == "__main__":', wire.FLOW_RUN_ID_VARIABLE), []),
        (lacks("prefect.engine", "configure_from_env()"), []),
    ],
    "blocks.defer_notifications": [
        (lacks("prefect.blocks", "import prefect.blocks.notifications", "import prefect.blocks.webhook"), []),
        (
            lambda: {_object(f"prefect.blocks.{module}").__name__ for module in ("notifications", "webhook")},
            {"prefect.blocks.notifications", "prefect.blocks.webhook"},
        ),
    ],
    "blocks.look_up_before_import": [
        (signature("prefect.blocks.core:Block.get_block_class_from_key"), "(key)"),
        (lacks("prefect.blocks.core:Block.get_block_class_from_key", "load_prefect_collections()"), []),
        (signature("prefect.utilities.dispatch:lookup_type"), "(cls, dispatch_key)"),
    ],
    "results.guard_writes": [
        (signature("prefect.results:call_explicitly_sync_block_method"), "(block, method, args, kwargs)"),
        (signature("prefect.results:call_explicitly_async_block_method"), "(block, method, args, kwargs)"),
        (_unlike_storage_calls, []),
        (signature("prefect.filesystems:LocalFileSystem._resolve_path"), "(self, path)"),
        # An error of this type is logged in one line, without its traceback.
        *(
            (lacks(f"prefect.transactions:{name}.commit", "except SerializationError as exc:"), [])
            for name in ("Transaction", "AsyncTransaction")
        ),
    ],
    "results.sign_records": [
        (signature("prefect.results:call_explicitly_sync_block_method"), "(block, method, args, kwargs)"),
        (signature("prefect.results:call_explicitly_async_block_method"), "(block, method, args, kwargs)"),
        # No other way leads to the bytes of a record.
        (_unlike_storage_calls, []),
    ],
    "results.keep_links_out": [
        (signature("prefect.filesystems:LocalFileSystem._resolve_path"), "(self, path)"),
        *(
            (lacks(f"prefect.filesystems:LocalFileSystem.{name}", "self._resolve_path(path)"), [])
            for name in ("aread_path", "awrite_path")
        ),
        (lacks("prefect.results:ResultStore.create_result_record", "str(_resolve_path(key))"), []),
    ],
    "results.check_separate_results": [
        (signature("prefect.results:ResultStore.exists"), "(self, key)"),
        (signature("prefect.results:ResultStore.aexists"), "(self, key)"),
        (lacks("prefect.transactions:Transaction.begin", "self.store.exists(key=self.key)"), []),
        (lacks("prefect.transactions:AsyncTransaction.begin", "self.store.aexists(key=self.key)"), []),
    ],
    "results.rerun_unreadable_subflows": [
        (signature(f"prefect.flow_engine:{name}.load_subflow_run"), "(self, parent_task_run, client, context)")
        for name in ("FlowRunEngine", "AsyncFlowRunEngine")
    ],
    "results.prepare_child_processes": [
        (lacks("prefect.task_runners:ProcessPoolTaskRunner", "initializer=_initialize_process_pool_worker"), []),
        (
            signature("prefect.task_runners:_initialize_process_pool_worker"),
            "(message_queue=None, initializer=None, initargs=())",
        ),
    ],
    "task_runners.cancel_events": [
        (lambda: _object("prefect.task_runners:ThreadPoolTaskRunner")()._cancel_events, {}),
    ],
    "prefect_protocol": [
        (
            lambda: _object("prefect._internal.attempt_control:BYTE_FOR_INTENT"),
            {"cancel": wire.CANCEL, "reschedule": wire.RESCHEDULE, "relinquish": wire.RELINQUISH},
        ),
        (
            lambda: _object("prefect._internal.attempt_control:encode_negotiation")(
                _object("prefect._internal.attempt_control:CURRENT_PROTOCOL_VERSION"), 0
            ),
            wire.NO_RECEIPTS,
        ),
        (lacks(f"{CONTROL}:_acknowledge_intent", f"sock.sendall({wire.ACKNOWLEDGED!r})".replace("'", '"')), []),
        (
            lacks(f"{CONTROL}:configure_from_env", wire.CONTROL_PORT_VARIABLE, wire.CONTROL_TOKEN_VARIABLE),
            [],
        ),
    ],
    "server_internals.server_schedule": [
        (lambda: type(server_internals.server_schedule(CRON)).__name__, "CronSchedule"),
        (
            lambda: type(server_internals.server_schedule({"rrule": "FREQ=DAILY"}).to_rrule()).__name__,
            "rrule",
        ),
    ],
    "server_internals.schedule_dates": [
        (signature("prefect.server.schemas.schedules:CronSchedule._get_dates_generator"), DATES),
        (lambda: [date.hour for date in server_internals.schedule_dates(CRON, 1, NOW)], [6]),
    ],
    "server_internals.anchored_rrule": [
        (
            signature("prefect._internal.schemas.validators:normalize_rrule_string"),
            "(rrule_string, *, now=None, timezone=None)",
        ),
        (lambda: server_internals.anchored_rrule("FREQ=DAILY", "UTC").partition(":")[0], "DTSTART"),
    ],
    "server_internals.validated_rrule": [
        (signature("prefect._internal.schemas.validators:validate_rrule_string"), "(v)"),
    ],
    "server_internals.cron_fires": [
        (lambda: server_internals.cron_fires("0 6 * * *", True, NOW), True),
        (lambda: server_internals.cron_fires("0 6 30 2 *", True, NOW), False),
        (
            lambda: issubclass(_object("prefect._vendor.croniter.croniter:CroniterBadCronError"), ValueError),
            True,
        ),
    ],
    "server_internals.validate_automation": [(_refused_trigger, "refused")],
    "server_internals.database_interface": [
        (lambda: hasattr(server_internals.database_interface().orm, "versions_dir"), True),
        (signature("prefect.server.database:PrefectDBInterface.run_migrations_upgrade"), "(self)"),
        (signature("prefect.server.database:PrefectDBInterface.engine"), "(self)"),
    ],
    "server_internals.migrations_config": [
        (signature("prefect.server.database.alembic_commands:alembic_config"), "()"),
        (
            lambda: Path(server_internals.migrations_config().get_main_option("version_locations") or "").is_dir(),
            True,
        ),
    ],
    "server_internals.database_url": [
        (lambda: hasattr(server_internals.database_interface().database_config, "connection_url"), True),
    ],
    "server_records.transaction": [
        (
            signature("prefect.server.database:PrefectDBInterface.session_context"),
            "(self, begin_transaction=False, with_for_update=False)",
        ),
    ],
    "server_records.read_runs": [
        (lambda: _absent_columns("FlowRun", "id", "state_type", "end_time", "expected_start_time"), []),
        (lambda: _absent_columns("FlowRun", "work_queue_id"), []),
        (lambda: _absent_columns("WorkQueue", "id", "work_pool_id"), []),
        (lambda: _absent_columns("WorkPool", "id", "type"), []),
        (
            lambda: {"next_scheduled_start_time", "parent_task_run_id", "deployment_id", "infrastructure_pid", "labels"}
            - set(_object("prefect.server.schemas.core:FlowRun").model_fields),
            set(),
        ),
    ],
    "server_records.read_parents": [(lambda: _absent_columns("TaskRun", "id", "flow_run_id"), [])],
    "server_records.read_newest_state_time": [(lambda: _absent_columns("FlowRunState", "timestamp"), [])],
    "server_records.read_pools": [(lambda: _absent_columns("WorkPool", "id", "name", "default_queue_id"), [])],
    "server_records.read_places": [
        (lambda: _absent_columns("Deployment", "id"), []),
        (lambda: _absent_columns("WorkQueue", "id"), []),
    ],
    "server_records.read_schedules": [
        (lambda: _absent_columns("DeploymentSchedule", "id", "deployment_id", "active", "schedule"), []),
        (lambda: _absent_columns("Deployment", "id", "flow_id", "name", "paused"), []),
    ],
    "server_records.read_keys": [(lambda: _absent_columns("FlowRun", "idempotency_key"), [])],
    "server_records.schedule_key": [
        (
            lacks(
                "prefect.server.models.deployments:_generate_scheduled_flow_runs",
                'f"scheduled {deployment.id} {deployment_schedule.id} {date}"', "._get_dates_generator(",
            ),
            [],
        ),
    ],
    "server_records.set_run_state": [
        (
            signature("prefect.server.models.flow_runs:set_flow_run_state"),
            "(session, flow_run_id, state, force=False, flow_policy=None, orchestration_parameters=None, "
            "client_version=None)",
        ),
        (lambda: _absent_columns("FlowRun", "labels", "infrastructure_pid"), []),
    ],
    "server_records.label_run": [(lambda: _absent_columns("FlowRun", "labels"), [])],
    "server_records.create_run": [
        (
            signature("prefect.server.models.flow_runs:create_flow_run"),
            "(db, session, flow_run, orchestration_parameters=None)",
        ),
        (signature("prefect.server.models.flows:create_flow"), "(db, session, flow)"),
    ],
    "server_records.reset_slots": [
        (lambda: _absent_columns("ConcurrencyLimitV2", "id", "active_slots", "limit"), []),
        (lambda: _absent_columns("ConcurrencyLimit", "active_slots"), []),
        (lambda: _absent_columns("Deployment", "concurrency_limit_id"), []),
    ],
    "server_records.read_previous_runs": [
        (
            lambda: _absent_columns(
                "FlowRun", "parameters", "tags", "auto_scheduled", "job_variables", "state_id", "state_name", "created",
                "labels", "infrastructure_pid",
            ),
            [],
        ),
        (lambda: _absent_columns("FlowRunState", "id", "message", "timestamp", "state_details"), []),
        (lambda: _absent_columns("WorkQueue", "id", "work_pool_id"), []),
        (lambda: _absent_columns("WorkPool", "id", "type"), []),
    ],
    "server_records.read_previous_pools": [(lambda: _absent_columns("WorkPool", "id", "name"), [])],
    "server_records.read_previous_keys": [(lambda: _absent_columns("FlowRun", "idempotency_key", "state_type"), [])],
    "expired_records.delete_runs": [
        (
            lacks(
                "prefect.server.services.db_vacuum:vacuum_old_flow_runs",
                "db.FlowRun.parent_task_run_id.is_(None)", "db.FlowRun.end_time <",
            ),
            [],
        ),
        (lambda: _absent_columns("FlowRun", "id", "state_type", "end_time", "parent_task_run_id", "deployment_id"), []),
        (lambda: _cascades("FlowRunState", "FlowRunInput", "TaskRun", "TaskRunState"), []),
        (lambda: _absent_columns("Artifact", "id", "key", "created", "flow_run_id"), []),
        (
            lambda: set(server_internals.database_interface().ArtifactCollection.__table__.columns.keys()),
            {
                "id", "created", "updated", "key", "latest_id", "task_run_id", "flow_run_id", "type", "data",
                "description", "metadata_",
            },
        ),
    ],
    "expired_records.delete_task_runs": [
        (lambda: _absent_columns("TaskRun", "id", "end_time", "state_type", "flow_run_id"), []),
    ],
    "expired_records.delete_logs": [(lambda: _absent_columns("Log", "id", "timestamp", "flow_run_id"), [])],
    "expired_records.delete_artifacts": [
        (lambda: _absent_columns("Artifact", "updated"), []),
        (lambda: _absent_columns("FlowRunState", "result_artifact_id"), []),
        (lambda: _absent_columns("TaskRunState", "result_artifact_id"), []),
    ],
    "server_tables.tune_tables": [
        (lambda: _absent_columns("FlowRun", "deployment_id", "end_time", "start_time", "expected_start_time"), []),
        (
            lambda: {
                server_internals.database_interface().FlowRun.metadata.tables.get(table) is None
                for table in server_tables.GROWING_TABLES
            },
            {False},
        ),
    ],
    "server_internals.temporary_server_variables": [
        (signature("prefect.server.api.server:create_app"), APP),
        (
            lacks(
                "prefect.server.api.server:create_app",
                'os.getenv("PREFECT__SERVER_EPHEMERAL")', 'os.getenv("PREFECT__SERVER_FINAL")',
            ),
            [],
        ),
        (lambda: server_internals.TEMPORARY_SERVER_APP, "prefect.server.api.server:create_app"),
    ],
    "server_internals.wrap_server_api": [
        (signature("prefect.server.api.server:create_app"), APP),
        # The command imports the function when it is called, and mounts the API by this name.
        (
            lacks("prefect.cli._server_utils:_run_in_foreground", "from prefect.server.api.server import create_app"),
            [],
        ),
        (lacks("prefect.server.api.server:create_app", 'app=api_app, name="api"'), []),
    ],
    "server_internals.wrap_server_ui": [
        (lacks("prefect.server.api.server:create_app", 'app=ui_app, name="ui"'), []),
    ],
    "server_internals.serve_https": [
        (lacks("prefect.cli._server_utils:_run_in_foreground", "uvicorn.run("), []),
    ],
    "server_internals.repeat_block_registration": [
        (
            lacks(
                "prefect.server.api.server:create_app",
                "block_registration import run_block_auto_registration", "await run_block_auto_registration(session=",
            ),
            [],
        ),
        (signature("prefect.server.models.block_registration:run_block_auto_registration"), "(session)"),
    ],
    "server_internals.check_expected_states": [
        (signature("prefect.server.models.flow_runs:MinimalFlowPolicy.priority"), "()"),
        (signature("prefect.server.orchestration.core_policy:CoreFlowPolicy.priority"), "()"),
        # The server locks the run's row before it compiles the rules, also those of a forced state.
        (
            lacks(
                "prefect.server.models.flow_runs:set_flow_run_state",
                "for_update=True", "flow_policy = MinimalFlowPolicy", "flow_policy.compile_transition_rules",
            ),
            [],
        ),
        (
            signature("prefect.server.orchestration.rules:BaseOrchestrationRule.abort_transition"),
            "(self, reason)",
        ),
    ],
    "server_internals.free_only_held_slots": [
        (
            lacks("prefect.server.orchestration.core_policy:CoreFlowPolicy.priority", "ReleaseFlowConcurrencySlots,"),
            [],
        ),
        (
            signature("prefect.server.orchestration.core_policy:ReleaseFlowConcurrencySlots.after_transition"),
            "(self, context)",
        ),
        (
            signature("prefect.server.orchestration.core_policy:_release_concurrency_lease"),
            "(session, lease_id, fallback_concurrency_limit_ids=None, fallback_slots=1)",
        ),
        (
            lacks(
                "prefect.server.orchestration.core_policy:ReleaseFlowConcurrencySlots.after_transition",
                "context.initial_state", "context.session", "states.StateType.CANCELLING",
            ),
            [],
        ),
    ],
    "server_internals.limit_claims": [
        (signature("prefect.server.orchestration.core_policy:CoreFlowPolicy.priority"), "()"),
        (lacks("prefect.server.models.flow_runs:set_flow_run_state", "flow_policy.compile_transition_rules"), []),
        (
            lacks(
                "prefect.server.api.flow_runs:set_flow_run_state",
                "begin_transaction=True, with_for_update=True", "flow_policy=flow_policy",
            ),
            [],
        ),
        (
            signature("prefect.server.orchestration.rules:BaseOrchestrationRule.abort_transition"),
            "(self, reason)",
        ),
    ],
    "background_services.observe_services": [
        (
            lacks(
                "prefect.server.services.perpetual_services:register_and_schedule_perpetual_services",
                "docket.register(config.function)", "docket.add(config.function, key=config.function.__name__)",
            ),
            [],
        ),
        (lacks("prefect.server.services.base:Service.running", "service.start()"), []),
        (lacks("prefect.server.api.background_workers:background_worker", "worker.run_forever()"), []),
        (lacks("docket.worker:Worker._worker_loop", "await redelivery_sweep.due(redis)"), []),
        *(
            (lacks(f"prefect_redis.messaging:Consumer.{name}", "await self._trim_stream_if_necessary("), [])
            for name in ("run", "_run_without_consumer_group")
        ),
        (lacks("prefect_redis.messaging:Consumer._handle_message", "await handler("), []),
        (lacks("prefect.server.utilities.messaging:create_consumer", "module.Consumer("), []),
        (lacks("prefect.server.events.services.event_persister:create_handler", "await write_events("), []),
        (
            lacks("prefect.server.services.task_run_recorder:consumer", "await record_bulk_task_run_events("),
            [],
        ),
        (lacks("prefect.server.events.triggers:evaluate_proactive_triggers", "await proactive_evaluation("), []),
    ],
    "background_services.add_service": [
        (
            signature("prefect.server.services.perpetual_services:perpetual_service"),
            "(enabled_getter, run_in_ephemeral=False, run_in_webserver=False)",
        ),
    ],
    "background_services.redeliver_lost_passes": [
        (lambda: "redelivery_timeout" in inspect.signature(_object("docket:Worker")).parameters, True),
        (lacks("prefect.server.api.background_workers:background_worker", "Worker(docket) as worker"), []),
    ],
    "background_services.look_for_due_tasks_every": [
        (lambda: "scheduling_resolution" in inspect.signature(_object("docket:Worker")).parameters, True),
    ],
    "background_services.read_redis_settings_once": [
        (lacks("prefect_redis.cleanup_queue:WorkerCleanupQueue._prefix", "RedisWorkerCleanupQueueSettings()"), []),
        (lacks("prefect_redis.messaging:Publisher.__init__", "RedisMessagingPublisherSettings()"), []),
    ],
    "background_services.retry_task_run_writes": [
        (
            signature("prefect.server.services.task_run_recorder:TaskRunRecorder.start"),
            "(self, max_persist_retries=5)",
        ),
    ],
    "background_services.count_backlogs": [
        (
            lacks(
                "prefect_redis.messaging:Consumer.__init__",
                "self.stream =", "self.group =", "self.use_consumer_group =",
            ),
            [],
        ),
        (lacks("prefect_redis.messaging:Consumer.run", "xreadgroup(", "groupname=self.group"), []),
    ],
    "background_services.database_answers": [
        (signature("prefect.server.database:PrefectDBInterface.engine"), "(self)"),
    ],
    "server_internals.read_blocks_with_stored_key": [
        (signature("prefect.server.database.orm_models:decrypt_fernet"), "(session, data)"),
        (signature("prefect.server.database.orm_models:encrypt_fernet"), "(session, data)"),
        (
            lacks("prefect.server.database.orm_models:BlockDocument.decrypt_data", "decrypt_fernet(session, "),
            [],
        ),
        (
            lacks(
                "prefect.server.utilities.encryption:_get_fernet_encryption",
                '"PREFECT_SERVER_ENCRYPTION_KEY"', 'read_configuration(session, "ENCRYPTION_KEY")',
                'configured_key.value["fernet_key"]',
            ),
            [],
        ),
    ],
    "server_internals.encrypt_blocks_again": [
        (lacks("prefect.server.database.orm_models:BlockDocument.encrypt_data", "self.data = await encrypt"), []),
        (lambda: hasattr(server_internals.database_interface().Configuration, "value"), True),
    ],
    "server_internals.store_block_key": [
        (lambda: hasattr(server_internals.database_interface().Configuration, "key"), True),
    ],
    "recurrence.RulePart": [
        (
            lambda: _read(recurrence.RulePart(_rule())),
            (3, 2, 3, 1, True, datetime(2026, 2, 1, tzinfo=UTC)),
        ),
        (lambda: [_has_date(bymonth=2, bymonthday=day) for day in (29, 31)], [True, False]),
        (lambda: [_has_date(**more) for more in ({}, {"bymonth": 2}, {"byweekday": 0})], [True, True, True]),
        (lambda: [_has_date(byminute=[0, 30], bysetpos=place) for place in (2, -3)], [True, False]),
    ],
    "recurrence.parts": [(lambda: [type(part.rule).__name__ for part in recurrence.parts(_rule_set())], ["rrule"])],
    "events.pod_event_id": [
        (
            lacks(
                f"{OBSERVER}:_replicate_pod_event",
                "uuid.uuid5(", "uuid.NAMESPACE_URL", '"uid": uid',
                '"phase": phase', '"restart_count": ', "sort_keys=True",
            ),
            [],
        ),
    ],
    "events.pod_resource": [
        (
            lacks(
                f"{OBSERVER}:_replicate_pod_event",
                'f"prefect.kubernetes.pod.{uid}"', '"kubernetes.namespace": namespace', '"kubernetes.diagnosis"',
                'event=f"prefect.kubernetes.pod.{phase.lower()}"',
            ),
            [],
        ),
    ],
    "events.resources_of_labels": [(_labelled, [])],
    "events.PodDiagnosis": [
        (
            lambda: {diagnosis.value for diagnosis in events.PodDiagnosis}
            - {category.value for category in _object(f"{DIAGNOSTICS}:DiagnosisCategory")},
            set(),
        ),
    ],
    "events.unschedulable_diagnosis": [
        (
            lambda: [_object(f"{DIAGNOSTICS}:_categorize_unschedulable")(message) for message in UNSCHEDULABLE],
            [events.unschedulable_diagnosis(message) for message in UNSCHEDULABLE],
        )
    ],
    "events.flow_run_resources": [(_unlike_related, [])],
    "events.task_run_state_event": [(_unlike_task_run_event, [])],
    "events.asset_referenced_event": [(lambda: _unlike_asset_event(0), [])],
    "events.asset_materialization_event": [(lambda: _unlike_asset_event(1), [])],
}  # fmt: skip


@pytest.mark.parametrize("entry", CONTRACTS)
def test_entry_matches_the_installed_packages(entry: str) -> None:
    for number, (found, expected) in enumerate(CONTRACTS[entry]):
        assert found() == expected, f"{entry}: check {number} of its private interfaces has another result"


def test_every_entry_has_reasons_and_a_contract() -> None:
    assert sorted(entry.name for entry in entries()) == sorted(CONTRACTS)
    assert all(CONTRACTS.values())


def test_documentation_page_has_all_entries() -> None:
    rows = [f"| `{name}` | {replaces} | {why} | {until} |" for name, replaces, why, until in entries()]
    table = "\n".join(["| entry | replaces | why | needed until |", "|---|---|---|---|", *rows])
    assert table in PAGE.read_text(), f"{PAGE} has to have this table:\n{table}"


def test_tested_versions_are_the_bounds_of_the_project() -> None:
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for package, (first, end) in prefect_compat.TESTED_VERSIONS.items():
        assert f"{package}>={first},<{end}" in bounds


@pytest.mark.parametrize(
    ("version", "warned"),
    [("3.9.1", 0), ("3.9.1.dev2+g1", 0), ("3.9.12", 0), ("3.9.0", 1), ("3.10.0rc1", 1), ("3.10", 1), ("4.0", 1)],
)
def test_untested_version_warns_once_and_names_the_page(version: str, warned: int) -> None:
    warn_if_untested.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                warn_if_untested("prefect", version)
    finally:
        warn_if_untested.cache_clear()
    assert ["docs/prefect.md" in str(warning.message) for warning in found] == [True] * warned


PACKAGES = ("prefect", "prefect_kubernetes", "kopf", "dateutil")

TEXTS = (
    "PREFECT__",
    "prefect._",
    "prefect.server.",
    "prefect.kubernetes.",
    "prefect.task-run.",
    "prefect.asset.",
    "watcher for ",
)
"""The beginnings of undocumented names in Prefect and kopf: variables, modules, events and tasks."""


@functools.cache
def _names_of_workers() -> frozenset[str]:
    """Return the private names of Prefect's Kubernetes worker. A subclass must not read, set or override them."""
    return frozenset(attribute for attribute in (*dir(_worker()), *vars(_worker())) if _is_private(attribute))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_private_module(path: str) -> bool:
    package, *parts = path.split(".")
    if package not in PACKAGES:
        return False
    return package == "kopf" or parts[:1] == ["server"] or parts[:1] == ["observer"] or any(map(_is_private, parts))


def _imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield path and local name of each import of a statement."""
    match node:
        case ast.Import(names=names):
            yield from ((alias.name, alias.asname or alias.name.partition(".")[0]) for alias in names)
        case ast.ImportFrom(module=str(module), names=names):
            yield from ((f"{module}.{alias.name}", alias.asname or alias.name) for alias in names)


def private_names(source: str) -> Iterator[str]:
    """Yield the private names of Prefect, prefect-kubernetes, kopf and dateutil in the source of a module."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = dict(pair[::-1] for node in nodes for pair in _imports(node))
    foreign = {name for name, path in imported.items() if path.partition(".")[0] in PACKAGES}
    # dbt's own private names are used in dbt's process, where nothing of Prefect is imported.
    is_dbt = not foreign and any(path.partition(".")[0] == "dbt" for path in imported.values())
    for node in nodes:
        match node:
            case ast.For(target=ast.Name(id=name), iter=iterated) if foreign & {
                inner.id for inner in ast.walk(iterated) if isinstance(inner, ast.Name)
            }:
                foreign.add(name)
    for node in nodes:
        yield from (path for path, _ in _imports(node) if _is_private_module(path))
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls" | "os")):
                pass
            case ast.Attribute(attr=name) if _is_private(name) and not is_dbt:
                yield ast.unparse(node)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                if _is_private(name):
                    yield name
            case ast.Call(func=ast.Attribute(attr="run_module"), args=[ast.Constant(value=str(name)), *_]):
                yield from [name] if name.partition(".")[0] in PACKAGES else []
            case ast.Constant(value=str(text)) if text.startswith(TEXTS):
                yield text
            case ast.Constant(value=bytes(text)) if text.startswith(b"\0PF"):
                yield repr(text)
            case ast.keyword(arg=str(name)) if name.startswith(TEXTS):
                yield name
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id=name)) as target]) if name in foreign:
                yield f"{ast.unparse(target)} ="
            case ast.ClassDef(bases=bases) if any(ast.unparse(base).endswith("Worker") for base in bases):
                yield from sorted(set(_class_names(node)) & _names_of_workers())


def _class_names(node: ast.ClassDef) -> Iterator[str]:
    """Yield the attributes that a class reads and sets on `self`, and the names of its methods."""
    for child in ast.walk(node):
        match child:
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name


def test_no_private_name_is_used_outside_the_seam() -> None:
    sources = {
        file: file.read_text()
        for folder in ("orchestration", "flows", "k8s")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file not in (*SEAM, PROTOCOL)
    }
    assert len(sources) > 50
    assert {
        f"{file.relative_to(ROOT)}: {name}" for file, source in sources.items() for name in private_names(source)
    } == set()


USES = {
    "from prefect.runner._workspace_resolver import prepare_workspace_for_flow_run": 1,
    "from prefect._vendor.croniter.croniter import CroniterError, croniter": 2,
    "from prefect.server.schemas import schedules": 1,
    "import kopf\n@kopf.on.startup()\nasync def note(**_): ...": 1,
    "from prefect.client import base\nbase.clamped_poisson_interval = 1": 1,
    "from prefect.client import base\nfor client in (base.A, base.B):\n    client.send = 1\n    client._x = 2": 3,
    "getattr(task_runner, '_cancel_events', {})": 1,
    "part._until < now": 1,
    "self.client._client": 1,
    "from prefect_kubernetes import KubernetesWorker\nclass W(KubernetesWorker):\n"
    "    def a(self): self._last_polled_time = self._logger\n    async def _submit_run(self): super()._submit_run()": 4,
    "environment = {'PREFECT__CONTROL_PORT': '1'} | dict(PREFECT__FLOW_ENTRYPOINT='f')": 2,
    "uvicorn.run('prefect.server.api.server:create_app')": 1,
    "runpy.run_module('prefect.engine')": 1,
    "connection.sendall(b'\\x00PF\\x02\\x00')": 1,
    "event = f'prefect.asset.materialization.{outcome}'": 1,
    "name.startswith(f'watcher for {kind}.')": 1,
    "import dbt.task\ntask._flattened_nodes": 0,
    "import os\nclass A:\n    def f(self): self._x = os._exit(0)": 0,
    "from prefect import flow, __version__\nfrom prefect.settings import get_current_settings": 0,
}
"""Source texts with each kind of use, and the number of private names in each."""


@pytest.mark.parametrize(("source", "found"), USES.items())
def test_use_of_a_private_name_is_found(source: str, found: int) -> None:
    assert len(list(private_names(source))) == found, list(private_names(source))
