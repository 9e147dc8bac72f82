"""Reads the unfinished runs, or only the stuck ones, each with its diagnosis."""

from datetime import UTC, datetime, timedelta

from orchestration.inspection.run_diagnosis import STUCK_AFTER, WAITING_STATES, diagnose_run
from orchestration.prefect_api import JSON, Server


async def read_unfinished_runs(server: Server, *, stuck: bool) -> list[JSON]:
    """Return the runs that are due and not finished, each with its diagnosis, in the order in which they were due.

    Args:
        server: the Prefect API.
        stuck: return only runs that have been late, claimed or Cancelling for longer than `STUCK_AFTER`, and runs whose
            pod does not start.
    """
    now = datetime.now(UTC)
    live = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    due = {
        "state": {"type": {"any_": ["SCHEDULED"]}},
        "next_scheduled_start_time": {"before_": (now - (STUCK_AFTER if stuck else timedelta())).isoformat()},
    }
    no_subflows = {"parent_task_run_id": {"is_null_": True}}
    runs = [*await server.all("/flow_runs/filter", flow_runs=due | no_subflows)]
    for run in await server.all("/flow_runs/filter", flow_runs=live | no_subflows):
        age = now - datetime.fromisoformat(run["state"]["timestamp"])
        cannot_start = run["state_name"] in WAITING_STATES and run["state"]["message"]
        if not stuck or cannot_start or (run["state_type"] != "RUNNING" and age > STUCK_AFTER):
            runs.append(run)
    runs.sort(key=lambda run: str(run["expected_start_time"]))
    diagnoses = [await diagnose_run(server, run) for run in runs]
    return [
        {
            "id": run["id"],
            "name": run["name"],
            "state": run["state_name"],
            "since": run["state"]["timestamp"],
            "work_pool": run.get("work_pool_name"),
            "why": diagnosis.sentence,
            "see": diagnosis.pages,
        }
        for run, diagnosis in zip(runs, diagnoses, strict=True)
    ]
