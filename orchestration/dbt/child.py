"""The process that dbt runs in: imports dbt at once, waits for one command, reports as JSON lines.

stdin: one line, `{"arguments": [...], "environment": {...}}`, then nothing until the end. When it
closes while dbt runs, the parent is gone: dbt is interrupted, which cancels its SQL.
stdout: `{"event": "log"|"node"|"result", ...}` a line. What dbt's macros print goes to stderr.
"""

import json
import os
import signal
import sys
import threading
import time
from typing import Any

GRACE = 5.0
"""Seconds dbt may take to cancel its SQL once it is interrupted."""


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os._exit(1)


def _node(result: Any) -> dict[str, Any]:
    node = result.node
    rows = (result.adapter_response or {}).get("rows_affected")
    return {
        "id": node.unique_id,
        "name": node.name,
        "kind": str(node.resource_type),
        "path": node.original_file_path,
        "relation": getattr(node, "relation_name", None),
        "materialized": getattr(node.config, "materialized", None),
        "status": str(result.status),
        "message": result.message or "",
        "seconds": result.execution_time,
        "rows": rows if rows is not None and rows >= 0 else None,  # Postgres says -1 of a view
        "failures": result.failures,
    }


def main() -> None:
    """Run the one command that stdin brings."""
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(event: str, **content: Any) -> None:
        with lock:
            protocol.write(json.dumps({"event": event, **content}, default=str) + "\n")

    # dbt hangs on SIGTERM; on SIGINT it cancels what runs.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from dbt.cli.main import dbtRunner

    line = sys.stdin.readline()
    if not line:
        return
    command = json.loads(line)
    os.environ.update(command["environment"])
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def listen(event: Any) -> None:
        info = event.info
        if info.name in ("LogModelResult", "LogTestResult", "LogSeedResult", "LogSnapshotResult"):
            data = event.data
            send(
                "node",
                kind=data.node_info.resource_type,
                name=data.node_info.node_name,
                status=data.node_info.node_status,
                result=data.status if info.name != "LogTestResult" else "",
                number=data.index,
                of=getattr(data, "total", None) or data.num_models,
                seconds=data.execution_time,
            )
        elif info.level in ("warn", "error") or info.name == "UnableToPartialParse":
            send("log", level=info.level, text=info.msg)

    outcome = dbtRunner(callbacks=[listen]).invoke(command["arguments"])
    error = str(outcome.exception).strip() if outcome.exception else None
    # Not all results are nodes that run: an operation has none, an exposure is there for its lineage.
    results = [
        result
        for result in getattr(outcome.result, "results", None) or []
        if hasattr(result, "node") and result.node.resource_type != "exposure"
    ]
    send(
        "result",
        success=outcome.success,
        error=error,
        nodes=[_node(result) for result in results],
    )
    protocol.flush()
    # Everything is sent and dbt's files are closed; tearing the interpreter down takes 0.3 s.
    os._exit(0)


if __name__ == "__main__":
    main()
