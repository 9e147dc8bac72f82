"""Cleans up after a dead run attempt: unfinished task runs and subflows, and the concurrency slots that they hold."""

from orchestration.prefect_api import JSON, Server
from orchestration.reconciler.model import Pod

UNFINISHED = {"state": {"type": {"any_": ["PENDING", "RUNNING", "SCHEDULED", "PAUSED", "CANCELLING"]}}}


async def release_tag_slots(server: Server, run: str) -> None:
    """Release the slots of tag concurrency limits that a run's task runs hold.

    The server's own leases of these slots expire only after a minute. The states of the task runs stay: a task run in a
    final state would not be executed by the run's retry.

    Args:
        server: the Prefect API.
        run: the run's id.

    Raises:
        ApiError: the server does not answer.
    """
    tasks, _ = await _read_unfinished(server, run)
    await _release_slots_of_tasks(server, tasks)


async def release_leased_slots(server: Server, pods: list[Pod]) -> None:
    """Release the concurrency slots of run attempts whose pods are confirmed to have ended.

    The pod's termination message names the leases. Slots of `concurrency("name")` are among them: the server ends their
    leases only after minutes.

    Args:
        server: the Prefect API.
        pods: the pods of the run.

    Raises:
        ApiError: the server does not answer.
    """
    for lease in {lease for pod in pods if pod.end and pod.end.is_confirmed for lease in pod.end.leases}:
        # 404 for a lease that is over, and on a server without leases.
        path = "/v2/concurrency_limits/decrement-with-lease"
        await server.ask("POST", path, {"lease_id": lease}, absent=True, idempotent=True)


async def crash_unfinished(server: Server, run: str, sentence: str) -> None:
    """Set the unfinished task runs and subflows of a run to Crashed, if the run is not retried.

    Args:
        server: the Prefect API.
        run: the run's id.
        sentence: the message of the Crashed states.

    Raises:
        ApiError: the server does not answer.
    """
    tasks, subflows = await _read_unfinished(server, run)
    await _release_slots_of_tasks(server, tasks)
    body = {"state": {"type": "CRASHED", "name": "Crashed", "message": sentence}, "force": True}
    for task in tasks:
        await server.ask("POST", f"/task_runs/{task['id']}/set_state", body)
    for subflow in subflows:
        await server.ask("POST", f"/flow_runs/{subflow['id']}/set_state", body)


async def _release_slots_of_tasks(server: Server, tasks: list[JSON]) -> None:
    for task in tasks:
        if task["tags"]:
            body = {"names": task["tags"], "task_run_id": task["id"]}
            await server.ask("POST", "/concurrency_limits/decrement", body)


async def _read_unfinished(server: Server, run: str) -> tuple[list[JSON], list[JSON]]:
    """Return the unfinished task runs and subflows of a run, those of its subflows included.

    A subflow with a deployment has its own pod and stays as it is.
    """
    subflows: list[JSON] = []
    parents = [run]
    tasks_of_deployments: set[str] = set()
    while parents:
        run_filter = {"parent_flow_run_id": {"any_": parents}} | UNFINISHED
        found = await server.all("/flow_runs/filter", flow_runs=run_filter)
        tasks_of_deployments |= {subflow["parent_task_run_id"] for subflow in found if subflow["deployment_id"]}
        found = [subflow for subflow in found if not subflow["deployment_id"]]
        subflows += found
        parents = [subflow["id"] for subflow in found]
    run_filter = {"id": {"any_": [run, *(subflow["id"] for subflow in subflows)]}}
    tasks = await server.all("/task_runs/filter", flow_runs=run_filter, task_runs=UNFINISHED)
    return [task for task in tasks if task["id"] not in tasks_of_deployments], subflows
