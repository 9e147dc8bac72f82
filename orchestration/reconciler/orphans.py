"""What a dead execution leaves on the server: task runs and subflows that say Running, and the slots that they hold."""

from orchestration.prefect_api import JSON, Server
from orchestration.reconciler.model import Pod

UNFINISHED = {"state": {"type": {"any_": ["PENDING", "RUNNING", "SCHEDULED", "PAUSED", "CANCELLING"]}}}


async def release(server: Server, run: str) -> None:
    """Give back the slots of concurrency limits by tag that its task runs hold: the server's own lease of one ends only
    after a minute.

    What is set to a final state is not tried again with its run, so all else is left as it is.

    Args:
        server: of the run.
        run: its id.

    Raises:
        ApiError: the server does not answer.
    """
    tasks, _ = await _unfinished(server, run)
    await _release(server, tasks)


async def give_back(server: Server, pods: list[Pod]) -> None:
    """Give back the slots that executions held whose pods are known to have ended, as far as these have left it: also
    those of `concurrency("name")`, whose leases the server ends only after minutes.

    Args:
        server: of the run.
        pods: of the run.

    Raises:
        ApiError: the server does not answer.
    """
    for lease in {each for pod in pods if pod.end and pod.end.seen for each in pod.end.leases}:
        # One that is over already is none to the server; one that has no leases does not know the path.
        path = "/v2/concurrency_limits/decrement-with-lease"
        await server.ask("POST", path, {"lease_id": lease}, absent=True, idempotent=True)


async def end(server: Server, run: str, sentence: str) -> None:
    """Set all that is not over to Crashed, for a run that is not tried again.

    Args:
        server: of the run.
        run: its id.
        sentence: why.

    Raises:
        ApiError: the server does not answer.
    """
    tasks, flows = await _unfinished(server, run)
    await _release(server, tasks)
    body = {"state": {"type": "CRASHED", "name": "Crashed", "message": sentence}, "force": True}
    for each in tasks:
        await server.ask("POST", f"/task_runs/{each['id']}/set_state", body)
    for each in flows:
        await server.ask("POST", f"/flow_runs/{each['id']}/set_state", body)


async def _release(server: Server, tasks: list[JSON]) -> None:
    for each in tasks:
        if each["tags"]:
            await server.ask(
                "POST", "/concurrency_limits/decrement", {"names": each["tags"], "task_run_id": each["id"]}
            )


async def _unfinished(server: Server, run: str) -> tuple[list[JSON], list[JSON]]:
    """Its task runs and subflows, and theirs. A subflow with a deployment has a pod of its own and goes on."""
    flows: list[JSON] = []
    parents = [run]
    elsewhere: set[str] = set()
    while parents:
        which = {"parent_flow_run_id": {"any_": parents}} | UNFINISHED
        found = await server.all("/flow_runs/filter", flow_runs=which)
        elsewhere |= {each["parent_task_run_id"] for each in found if each["deployment_id"]}
        found = [each for each in found if not each["deployment_id"]]
        flows += found
        parents = [each["id"] for each in found]
    of = {"id": {"any_": [run, *(each["id"] for each in flows)]}}
    tasks = await server.all("/task_runs/filter", flow_runs=of, task_runs=UNFINISHED)
    return [each for each in tasks if each["id"] not in elsewhere], flows
