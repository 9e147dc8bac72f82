"""Show an environment on one screen: components, pool, running and late runs, each deployment's last and next run."""

from datetime import UTC, datetime
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestration.errors import ClusterError
from orchestration.operations import release_diagnosis
from orchestration.operations.environment import RELEASES, Environment, Object
from orchestration.operations.port_forward import api_client
from orchestration.terminal import one_line

COLOURS = {"COMPLETED": "green", "RUNNING": "blue", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow"}


def read_status(environment: Environment) -> Object:
    """Return the state of an environment.

    Returns:
        `components`, `problems`, `pools`, `runs` (in progress or late) and `deployments`.

    Raises:
        ClusterError: nothing is deployed, or the Prefect API does not answer.
    """
    components = []
    for release in RELEASES:
        selector = release_diagnosis.release_selector(release)
        for workload in environment.objects("deployments,statefulsets", "--selector", selector):
            container = workload["spec"]["template"]["spec"]["containers"][0]
            components.append(
                {
                    "name": workload["metadata"]["labels"]["app.kubernetes.io/component"],
                    "ready": workload["status"].get("readyReplicas", 0),
                    "wanted": workload["spec"].get("replicas", 1),
                    "image": container["image"],
                }
            )
    if not components:
        raise ClusterError(
            f"Nothing is deployed in namespace {environment.namespace} of {environment.context}. "
            f"Deploy it: make deploy ENV={environment.name}"
        )
    problems = [
        line
        for release in RELEASES
        for line in release_diagnosis.explain_release(environment, release)
        if not line.startswith("event")
    ]
    with api_client(environment) as api:
        return {"components": components, "problems": problems} | _read_api(api)


def _read_api(api: httpx.Client) -> Object:
    """Return pools, runs and deployments."""

    def query(path: str, **body: Any) -> Any:
        return api.post(path, json=body).raise_for_status().json()

    pools = []
    for pool in query("/work_pools/filter"):
        workers = query(f"/work_pools/{pool['name']}/workers/filter", limit=200)
        pools.append(
            {
                "name": pool["name"],
                "status": "PAUSED" if pool["is_paused"] else pool["status"],
                "limit": pool["concurrency_limit"],
                "workers": sum(worker["status"] == "ONLINE" for worker in workers),
            }
        )
    deployments_by_id = {deployment["id"]: deployment for deployment in query("/deployments/filter")}
    flows = {flow["id"]: flow["name"] for flow in query("/flows/filter")}

    def summary(run: Object) -> Object:
        deployment = deployments_by_id.get(run["deployment_id"], {})
        return {
            "name": run["name"],
            "flow": flows.get(run["flow_id"], ""),
            "deployment": deployment.get("name", ""),
            "state": "LATE" if run["state_name"] == "Late" else run["state_type"],
            "message": (run["state"] or {}).get("message") or "",
            "expected": run["expected_start_time"],
            "started": run["start_time"],
            "seconds": run["total_run_time"] or run["estimated_run_time"],
        }

    busy = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING", "PAUSED"]}}}
    late = {"state": {"name": {"any_": ["Late"]}}}
    runs = [summary(run) for states in (busy, late) for run in query("/flow_runs/filter", flow_runs=states, limit=50)]
    deployments = []
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}
    for deployment in deployments_by_id.values():
        same = {"id": {"any_": [deployment["id"]]}}
        last = query("/flow_runs/filter", deployments=same, flow_runs=ended, sort="END_TIME_DESC", limit=1)
        coming = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        following = query(
            "/flow_runs/filter", deployments=same, flow_runs=coming, sort="EXPECTED_START_TIME_ASC", limit=1
        )
        deployments.append(
            {
                "name": f"{flows.get(deployment['flow_id'], '')}/{deployment['name']}",
                "paused": deployment["paused"],
                "last": summary(last[0]) if last else None,
                "next": following[0]["expected_start_time"] if following else None,
            }
        )
    return {
        "pools": pools,
        "runs": runs,
        "deployments": sorted(deployments, key=lambda deployment: str(deployment["name"])),
    }


def print_status(environment: Environment, found: Object, console: Console) -> None:
    """Print what `read_status` returned as tables."""
    console.print(
        f"[bold]{environment.name}[/] · namespace {' and '.join(environment.namespaces)} of {environment.context}\n"
    )
    table = _table("component", "ready", "image")
    for component in found["components"]:
        colour = "green" if component["ready"] == component["wanted"] else "red"
        table.add_row(
            _cell(component["name"]),
            f"[{colour}]{component['ready']}/{component['wanted']}[/]",
            _cell(_short_image(component["image"])),
        )
    console.print(table, "")
    table = _table("work pool", "status", "workers", "limit")
    for pool in found["pools"]:
        colour = "green" if pool["status"] == "READY" else "red"
        table.add_row(
            _cell(pool["name"]), f"[{colour}]{pool['status']}[/]", str(pool["workers"]), str(pool["limit"] or "none")
        )
    console.print(table, "")
    table = _table("running or late", "flow", "state", "since")
    for run in found["runs"]:
        since = _ago(run["started"] or run["expected"])
        table.add_row(_cell(run["name"]), _cell(run["flow"]), _state(run["state"]), since)
    if found["runs"]:
        console.print(table, "")
    else:
        console.print("No run is running or late.\n")
    table = _table("deployment", "last run", "state", "started", "took", "next")
    for deployment in found["deployments"]:
        last = deployment["last"]
        row = (
            [_cell(last["name"]), _state(last["state"]), _ago(last["started"]), f"{last['seconds']:.0f} s"]
            if last
            else ["none"] + [""] * 3
        )
        following = "paused" if deployment["paused"] else _minute(deployment["next"])
        table.add_row(_cell(deployment["name"]), *row, following)
    console.print(table, "")
    for line in found["problems"]:
        console.print(f"[red]{escape(line)}[/]", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _cell(text: str) -> str:
    """Return a name as the text of a cell: brackets are not markup, and the name stays on one line."""
    return escape(one_line(text))


def _state(state: str) -> str:
    return f"[{COLOURS.get(state, 'yellow')}]{state.capitalize()}[/]"


def _short_image(image: str) -> str:
    name, _, digest = image.partition("@sha256:")
    return f"{name}@{digest[:12]}" if digest else name


def _minute(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else ""


def _ago(text: str | None) -> str:
    if not text:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
