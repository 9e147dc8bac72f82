"""The process that dbt runs in: imports dbt at once, waits for one command, reports as JSON lines.

It is run as a file and imports nothing of this project, so that dbt may live in another environment
than the flow: `[python, "-P", child.py]`.

Given arguments, it runs them as dbt's command line does: `python child.py parse` leaves a partial parse that
the process then uses with any host and user.

stdin: one line, `{"arguments": [...], "environment": {...}, "done": [...], "only": [...], "retries": n, "delay": s,
"transient": regex, "sample_rows": n}`, then nothing until the end. When it closes while dbt runs, the parent is gone:
dbt is interrupted, which cancels its SQL.

stdout, a line each:

- `selected`: whether the command selected the whole project
- `nodes`: nodes that this command selected, with what is known of them before they run
- `start`, `retry`, `rows`, `end`: what becomes of one of them, by its unique id
- `log`: a line of dbt's log from level info on, with the node that it is about
- `interrupted`: it was told to end, by a signal or by its parent's end
- `result`: the end of the command

What dbt's macros print goes to stderr. Three methods of dbt are wrapped, all there since dbt 1.5:
`GraphRunnableTask._runtime_initialize`, which selects, and `BaseRunner.safe_run`, which runs a node, as
dbt's events tell neither what was selected nor let a node be tried again; and
`ManifestLoader.build_manifest_state_check`, which says whether an earlier parse still holds.
"""

import contextlib
import gc
import json
import os
import pathlib
import re
import signal
import sys
import threading
from collections import Counter
from datetime import datetime, timezone
from typing import Any

GRACE = 2.5
"""Seconds dbt may take to cancel its SQL once it is interrupted."""

BAD = {"error", "fail", "runtime error", "partial success", "skipped"}
"""dbt's statuses that keep what comes after a node from running."""

CELL_BYTES, SAMPLE_BYTES, SQL_BYTES = 500, 10_000, 20_000
"""Bytes of a value, of all rows and of the SQL of a failing test that are shown."""

SELECTIONS = (
    "select", "exclude", "selector", "resource_types", "inline",
    "empty", "sample", "event_time_start", "event_time_end",
)  # fmt: skip
"""Options of dbt's commands, given in whatever form, that leave out nodes or rows."""

_PROGRESS = {
    "LogStartLine", "LogStartBatch", "LogStartOverload", "LogHookStartLine",
    "Formatting", "ConcurrencyLine", "EndOfRunSummary",
}  # fmt: skip
"""Events whose lines say nothing that the nodes' states do not."""

_RENDERED = (".sql", ".yml", ".yaml", ".md", ".py", ".js", ".j2", ".jinja", ".jinja2")
"""Endings of the files whose Jinja dbt renders; the last four since dbt 1.12."""

_JINJA = re.compile(r"\{([{%]).*?[%}]\}", re.DOTALL)
_SOURCE = re.compile(r"""source\(\s*['"](.+?)['"]\s*,\s*['"](.+?)['"]\s*\)""")
_CONNECTION = re.compile(r"\btarget\b(?!\s*\.\s*(name|schema|database|dbname|type|profile_name)\b)")
"""What reads more of the target than a parse depends on anyway."""

Json = dict[str, Any]


class Reporter:
    """Says on stdout what dbt does."""

    def __init__(self, command: Json, stdout: Any) -> None:
        self._done = set(command["done"])
        self._only = None if command["only"] is None else set(command["only"])
        self._retries: int = command["retries"]
        self._delay: float = command["delay"]
        self._transient = re.compile(command["transient"], re.IGNORECASE)
        self._sample_rows: int = command["sample_rows"]
        self._stdout = stdout
        self._lock = threading.Lock()
        self._task: Any = None
        self._known: set[str] = set()
        self._open: Counter[str] = Counter()
        self._status: dict[str, str] = {}
        self._because: dict[str, str] = {}
        self.interrupted = threading.Event()

    def send(self, event: str, **content: Any) -> None:
        """Write a line."""
        line = json.dumps({"event": event, **content}, default=str)
        with self._lock:
            self._stdout.write(line + "\n")

    # What was selected ------------------------------------------------------------------------

    def initialized(self, task: Any) -> None:
        """Called when dbt has selected: say what, and leave out what an earlier attempt has done."""
        self._task = task
        selected = {node.unique_id: node for node in task._flattened_nodes}
        units: set[str] = getattr(task, "selected_unit_tests", set())
        selected |= {unit: task.manifest.unit_tests[unit] for unit in units}
        part = any(getattr(task.args, option, None) for option in SELECTIONS)
        # Unit tests build nothing, and dbt advises to leave them out where data is real.
        part = part or bool({*(getattr(task.args, "exclude_resource_types", None) or ())} - {"unit_test"})
        part = part or bool(task.config.get_default_selector_name())
        if self._only is not None:
            every = len(selected)
            selected = {key: node for key, node in selected.items() if key in self._only or node.is_ephemeral_model}
            part = part or len(selected) < every
        self.send("selected", whole=not part)
        shown = {key: node for key, node in selected.items() if not node.is_ephemeral_model}
        nearest: dict[str, list[str]] = {}
        parents = {key: self._parents(node, shown, nearest) for key, node in shown.items()}
        for unit in units & shown.keys():
            # dbt runs it before the model that it tests.
            tested = next(iter(shown[unit].depends_on_nodes), "")
            parents[unit] = [parent for parent in self._above(tested, shown, nearest) if parent not in units]
            if tested in parents:
                parents[tested] = [*parents[tested], unit]
        self._describe([_described(node, task.manifest, parents[key]) for key, node in shown.items()])
        left = selected.keys() - self._done
        if len(left) < len(task._flattened_nodes) + len(units):
            self._leave(task, left)

    def _leave(self, task: Any, left: set[str]) -> None:
        """Run only these of the selected nodes, as dbt's own retry does."""
        from dbt.graph import GraphQueue

        task._flattened_nodes = [node for node in task._flattened_nodes if node.unique_id in left]
        nodes = {node.unique_id for node in task._flattened_nodes}
        if not nodes:
            task._flattened_nodes = _NothingLeft()
        task.job_queue = GraphQueue(task.graph.get_subset_graph(nodes).graph, task.manifest, nodes)
        task.num_nodes = sum(not node.is_ephemeral_model for node in task._flattened_nodes)
        if getattr(task, "selected_unit_tests", None):
            task.selected_unit_tests = task.selected_unit_tests & left
            task.build_model_to_unit_test_map(task.selected_unit_tests)

    def _describe(self, nodes: list[Json]) -> None:
        self._known |= {node["id"] for node in nodes}
        config = self._task.config
        self.send("nodes", project=config.project_name, target=config.target_name, nodes=nodes)

    def _above(self, node: str, shown: Json, nearest: dict[str, list[str]]) -> list[str]:
        found = self._task.manifest.nodes.get(node)
        return self._parents(found, shown, nearest) if found else []

    def _parents(self, node: Any, shown: Json, nearest: dict[str, list[str]]) -> list[str]:
        """The nearest nodes above that are shown, through those that are not."""
        if node.unique_id not in nearest:
            found: dict[str, None] = {}
            for parent in getattr(node, "depends_on_nodes", ()):
                if parent in shown:
                    found[parent] = None
                elif above := self._task.manifest.nodes.get(parent):
                    found |= dict.fromkeys(self._parents(above, shown, nearest))
            nearest[node.unique_id] = list(found)
        return nearest[node.unique_id]

    # How it runs ------------------------------------------------------------------------------

    def run(self, original: Any, runner: Any, manifest: Any) -> Any:
        """Run a node as dbt does, again where the database was away for a moment."""
        result = original(runner, manifest)
        for attempt in range(self._retries):
            failed = str(result.status) in ("error", "runtime error")
            if not (failed and self._transient.search(result.message or "")):
                break
            self.send(
                "retry", id=runner.node.unique_id, attempt=attempt + 1, of=self._retries, message=result.message,
                delay=self._delay, at=_now(),
            )  # fmt: skip
            if self.interrupted.wait(self._delay):
                break
            self.send("start", id=runner.node.unique_id, at=_now())
            result = original(runner, manifest)
        kind = str(runner.node.resource_type)
        if kind == "test" and str(result.status) in ("fail", "warn"):
            with contextlib.suppress(Exception):  # what there is to see is an extra
                self._show_rows(runner.adapter, result.node, manifest)
        return result

    def _show_rows(self, adapter: Any, test: Any, manifest: Any) -> None:
        sql = test.compiled_code
        shown = _cut(sql, SQL_BYTES)
        self.send("rows", id=test.unique_id, sql=shown, columns=[], rows=[])
        if not self._sample_rows:
            return
        with adapter.connection_named(f"rows {test.unique_id}"):
            limited = adapter.execute_macro(
                "get_limit_subquery_sql", macro_resolver=manifest, kwargs={"sql": sql, "limit": self._sample_rows}
            )
            _, table = adapter.execute(str(limited), fetch=True)
        columns, rows = _bounded(list(table.column_names), [list(row) for row in table.rows])
        self.send("rows", id=test.unique_id, sql=shown, columns=columns, rows=rows)

    def listen(self, event: Any) -> None:
        """dbt's callback: called in the thread of whatever happens."""
        name = event.info.name
        if name == "NodeStart":
            info = event.data.node_info
            if self._opens(info.unique_id) and info.unique_id in self._known:
                self.send("start", id=info.unique_id, at=_utc(info.node_started_at))
        elif name == "NodeFinished":
            self._finished(event.data.node_info, event.data.run_result)
        elif name == "LogHookStartLine":
            self._hook(event.data.node_info)
            self.send("start", id=event.data.node_info.unique_id, at=_utc(event.data.node_info.node_started_at))
        elif name == "LogHookEndLine":
            self._hook(event.data.node_info)
            self.result(self._task.node_results[-1], event.data.node_info.node_finished_at)
        if event.info.level not in ("debug", "test") and name not in _PROGRESS and event.info.msg.strip():
            node = getattr(event.data, "node_info", None)
            self.send("log", level=event.info.level, text=event.info.msg, id=node.unique_id if node else "")

    def _hook(self, info: Any) -> None:
        """Hooks are not selected; they are known when they run."""
        if info.unique_id not in self._known:
            node = self._task.manifest.nodes[info.unique_id]
            self._describe([_described(node, self._task.manifest, [])])

    def _opens(self, node: str) -> bool:
        """Whether a node starts now: the batches of a microbatch model start and finish within it, by its id."""
        with self._lock:
            self._open[node] += 1
            return self._open[node] == 1

    def _closes(self, node: str) -> bool:
        with self._lock:
            self._open[node] -= 1
            return self._open[node] == 0

    def _finished(self, info: Any, result: Any) -> None:
        if not self._closes(info.unique_id):
            return
        self._status[info.unique_id] = result.status
        if info.unique_id not in self._known:
            return
        if result.status == "skipped":
            self._because[info.unique_id] = self._cause(info.unique_id)
        response = dict(result.adapter_response.items())
        self.send(
            "end",
            id=info.unique_id,
            status=result.status,
            message=result.message,
            at=_utc(info.node_finished_at) if info.node_finished_at else _now(),
            seconds=result.execution_time,
            thread=result.thread,
            rows=_rows(response),
            failures=result.num_failures or None,
            because=self._because.get(info.unique_id, ""),
        )

    def _cause(self, skipped: str) -> str:
        """The node whose failure is why this one did not run."""
        graph = self._task.graph.graph
        above = set(graph.predecessors(skipped)) if skipped in graph else set()
        above |= set(getattr(self._task, "model_to_unit_test_map", {}).get(skipped, ()))
        unit = self._task.manifest.unit_tests.get(skipped)
        if unit:  # it is skipped with its model
            above |= set(graph.predecessors(unit.depends_on.nodes[0]))
        stopped = sorted(node for node in above if self._status.get(node) in BAD and not self._is_passed_over(node))
        first = next((node for node in stopped if self._status[node] != "skipped"), stopped[0] if stopped else "")
        return self._because.get(first, first)

    def _is_passed_over(self, node: str) -> bool:
        """Tell whether what reads a node runs although the node fails: `on_error: continue`, since dbt 1.12."""
        config = getattr(self._task.manifest.nodes.get(node), "config", None)
        return getattr(getattr(config, "on_error", None), "value", "") == "continue"

    def result(self, result: Any, finished: str = "", final: bool = False) -> None:
        """Say what a result of dbt's says of a node that has no event of its own, or one that no longer holds."""
        node, status = result.node, str(result.status)
        self._status[node.unique_id] = status
        self.send(
            "end",
            id=node.unique_id,
            status=status,
            message=result.message or "",
            at=_utc(finished) if finished else _now(),
            seconds=result.execution_time,
            thread=result.thread_id,
            rows=_rows(result.adapter_response or {}),
            failures=result.failures,
            because="",
            final=final,
        )

    def ended(self, outcome: Any) -> None:
        """Say how the command ended, and what dbt's results say otherwise of nodes: those that fail-fast left out."""
        for result in getattr(outcome.result, "results", None) or []:
            node = getattr(result, "node", None)
            if node is None or node.unique_id not in self._known:
                continue
            if self._status.get(node.unique_id) != str(result.status):
                self.result(result, final=True)
        error = str(outcome.exception).strip() or type(outcome.exception).__name__ if outcome.exception else None
        problems = getattr(outcome.result, "errors", None) or []  # of the catalog, which is no node
        self.send("result", success=outcome.success, error=error, problems=[str(each) for each in problems])


class _NothingLeft(list):  # type: ignore[type-arg]
    """No node, where dbt is to run the hooks all the same: with no node selected it does not."""

    def __len__(self) -> int:
        return 1


def _described(node: Any, manifest: Any, parents: list[str]) -> Json:
    """What is known of a node before it runs."""
    kind = str(node.resource_type)
    relational = kind in ("model", "seed", "snapshot")
    return {
        "id": node.unique_id,
        "name": node.name,
        "title": _title(node, manifest),
        "kind": kind,
        "path": node.original_file_path,
        "relation": getattr(node, "relation_name", None) if relational else None,
        "materialized": getattr(node.config, "materialized", None),
        "parents": parents,
        "description": (getattr(node, "description", "") or "")[:500],
        "asset": _asset(node, manifest) if relational else "",
        "reads": [
            _asset(above, manifest)
            for parent in getattr(node, "depends_on_nodes", ())
            if relational and (above := manifest.nodes.get(parent) or manifest.sources.get(parent))
            if above.relation_name and not above.is_ephemeral_model
        ],
    }


def _asset(node: Any, manifest: Any) -> str:
    """The relation's address, as the prefect-dbt integration writes it too."""
    name = getattr(node, "identifier", None) or node.alias
    return f"{manifest.metadata.adapter_type}://{node.database}/{node.schema}/{name}"


def _title(node: Any, manifest: Any) -> str:
    """A node's name as people say it."""
    kind = str(node.resource_type)
    if kind == "source":
        return f"freshness · {node.source_name}.{node.name}"
    if kind == "unit_test":
        version = getattr(node, "version", None)
        return f"unit test · {node.model}{'' if version is None else f'.v{version}'}.{node.name}"
    if kind != "test" or not getattr(node, "test_metadata", None):
        return _versioned(node)
    tested = _tested(node, manifest)
    of = f"{tested.source_name}.{tested.name}" if hasattr(tested, "source_name") else _versioned(tested)
    called = node.name if _is_named(node, tested) else node.test_metadata.name
    return f"{called} · {of}{f'.{node.column_name}' if node.column_name else ''}"


def _tested(test: Any, manifest: Any) -> Any:
    """What a generic test tests: a node, or a source, of which dbt keeps only the call."""
    if source := _SOURCE.search(str(test.test_metadata.kwargs.get("model", ""))):
        for each in manifest.sources.values():
            if (each.source_name, each.name) == source.groups() and each.unique_id in test.depends_on_nodes:
                return each
    attached = getattr(test, "attached_node", None) or next(iter(test.depends_on_nodes), "")
    return manifest.nodes.get(attached) or manifest.sources.get(attached)


def _versioned(node: Any) -> str:
    """A node's name, with its version if it is a model that has one."""
    version = getattr(node, "version", None)
    return f"{getattr(node, 'name', '')}{'' if version is None else f'.v{version}'}"


def _is_named(test: Any, tested: Any) -> bool:
    """Whether the project names a generic test: dbt makes a name of the test and its arguments otherwise."""
    try:
        from dbt.parser.generic_test_builders import synthesize_generic_test_names
    except ImportError:
        return False
    metadata = test.test_metadata
    kind = f"source_{metadata.name}" if hasattr(tested, "source_name") else metadata.name
    kind = f"{metadata.namespace}_{kind}" if metadata.namespace else kind
    of = f"{tested.source_name}_{tested.name}" if hasattr(tested, "source_name") else getattr(tested, "name", "")
    if getattr(tested, "version", None) is not None:
        of = f"{of}_v{tested.version}"
    arguments = {name: value for name, value in metadata.kwargs.items() if name != "model"}
    return test.name not in synthesize_generic_test_names(kind, of, arguments)


def _rows(response: Json) -> int | None:
    """Rows affected, as the database says; Postgres says -1 of a view."""
    rows = response.get("rows_affected")
    return int(rows) if rows is not None and int(rows) >= 0 else None


def _bounded(columns: "list[str]", rows: "list[list[Any]]") -> "tuple[list[str], list[list[Any]]]":
    """As many of the columns and rows as fit into `SAMPLE_BYTES`."""
    names: list[str] = []
    left = SAMPLE_BYTES
    for column in columns:
        name = _cut(column, CELL_BYTES)
        left -= len(name.encode()) + 2
        if left < SAMPLE_BYTES // 2:
            break
        names.append(name)
    shown = []
    for row in rows:
        cells = [_cell(value) for value in row[: len(names)]]
        left -= sum(len(str(cell).encode("utf-8", "replace")) + 2 for cell in cells)
        if left < 0:
            break
        shown.append(cells)
    return names, shown


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value[:CELL_BYTES]).hex()
    text = str(value)
    return value if isinstance(value, int) and len(text) <= CELL_BYTES else _cut(text, CELL_BYTES)


def _cut(text: str, most: int) -> str:
    """The text, at most so many bytes of it."""
    data = text[:most].encode("utf-8", "replace")
    if len(text) <= most and len(data) <= most:
        return text
    return data[: most - 4].decode("utf-8", "ignore") + " …"


def _utc(text: str) -> str:
    """dbt's times are UTC and do not say so."""
    return text if text.endswith(("Z", "+00:00")) else f"{text}+00:00"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()  # noqa: UP017 - any Python that dbt runs on


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


def _check_parse(original: Any, loader: Any) -> Any:
    """What an earlier parse has to agree with: not on host and user, unless the project's Jinja reads them.

    dbt parses anew where any of them is different, so that no parse that is made with an image would ever hold.
    """
    from dbt.adapters.factory import get_include_paths
    from dbt.contracts.files import FileHash

    check = original(loader)
    root = loader.root_project
    target = root.credentials
    dbts_own = {pathlib.Path(path) for path in get_include_paths(target.type)}
    projects = [each for each in loader.all_projects.values() if pathlib.Path(each.project_root) not in dbts_own]
    if not any(map(_reads_connection, projects)):
        holds = [root.profile_name, root.target_name, target.type, target.database, target.schema]
        check.profile_hash = FileHash.from_contents("\0".join(map(str, holds)))
    return check


def _reads_connection(project: Any) -> bool:
    folder = pathlib.Path(project.project_root)
    files = [folder / "dbt_project.yml"]
    for source in project.all_source_paths:
        files += (folder / source).rglob("*")
    for file in files:
        if file.suffix in _RENDERED and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            if file.suffix == ".py" and "target" in text:
                return True
            if any(_CONNECTION.search(block.group()) for block in _JINJA.finditer(text)):
                return True
    return False


def main(arguments: "list[str]") -> None:
    """Run the given command, or the one that stdin brings."""
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    if not arguments:
        os.dup2(2, 1)

    from dbt.cli.main import dbtRunner
    from dbt.parser.manifest import ManifestLoader
    from dbt.task.base import BaseRunner
    from dbt.task.runnable import GraphRunnableTask

    state_check = ManifestLoader.build_manifest_state_check
    ManifestLoader.build_manifest_state_check = lambda loader: _check_parse(state_check, loader)
    if arguments:
        sys.exit(not dbtRunner().invoke(arguments).success)

    # What is imported stays: the collector need not look at it again and again.
    gc.freeze()
    line = sys.stdin.readline()
    if not line:
        return
    command = json.loads(line)
    os.environ.update(command["environment"])
    reporter = Reporter(command, stdout)

    def interrupt(*_: Any) -> None:
        # dbt hangs on SIGTERM; on SIGINT it cancels what runs. Once: it must not be disturbed at that.
        if not reporter.interrupted.is_set():
            reporter.interrupted.set()
            # Not from here: what the signal came in between may hold the lock.
            threading.Thread(target=reporter.send, args=["interrupted"], daemon=True).start()
            end = threading.Timer(GRACE, os._exit, [1])
            end.daemon = True
            end.start()
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    initialize, safe_run = GraphRunnableTask._runtime_initialize, BaseRunner.safe_run

    def initialize_and_report(task: Any) -> None:
        initialize(task)
        reporter.initialized(task)

    GraphRunnableTask._runtime_initialize = initialize_and_report
    BaseRunner.safe_run = lambda runner, manifest: reporter.run(safe_run, runner, manifest)

    reporter.ended(dbtRunner(callbacks=[reporter.listen]).invoke(command["arguments"]))
    stdout.flush()
    # Everything is sent and dbt's files are closed; tearing the interpreter down takes 0.3 s.
    os._exit(0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # while it was still importing
        main(sys.argv[1:])
