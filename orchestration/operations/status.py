"""An environment on one screen: what runs, what is late, how each deployment's last run went."""

from datetime import UTC, datetime
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestration.errors import ClusterError
from orchestration.operations import release_diagnosis
from orchestration.operations.environment import RELEASES, Environment, Object
from orchestration.operations.port_forward import connected
from orchestration.terminal import one_line

COLOURS = {"COMPLETED": "green", "RUNNING": "blue", "FAILED": "red", "CRASHED": "red", "CANCELLED": "yellow"}


def look(environment: Environment) -> Object:
    """The environment's state: `components`, `pool`, `runs` (that run or are late), `deployments`, `problems`."""
    components = []
    for release in RELEASES:
        for each in environment.objects(
            "deployments,statefulsets", "--selector", release_diagnosis.of_release(release)
        ):
            container = each["spec"]["template"]["spec"]["containers"][0]
            components.append(
                {
                    "name": each["metadata"]["labels"]["app.kubernetes.io/component"],
                    "ready": each["status"].get("readyReplicas", 0),
                    "wanted": each["spec"].get("replicas", 1),
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
        for line in release_diagnosis.why(environment, release)
        if not line.startswith("event")
    ]
    with connected(environment) as api:
        return {"components": components, "problems": problems} | _of_api(api)


def _of_api(api: httpx.Client) -> Object:
    def ask(path: str, **body: Any) -> Any:
        return api.post(path, json=body).raise_for_status().json()

    pools = []
    for pool in ask("/work_pools/filter"):
        workers = ask(f"/work_pools/{pool['name']}/workers/filter", limit=200)
        pools.append(
            {
                "name": pool["name"],
                "status": "PAUSED" if pool["is_paused"] else pool["status"],
                "limit": pool["concurrency_limit"],
                "workers": sum(worker["status"] == "ONLINE" for worker in workers),
            }
        )
    names = {each["id"]: each for each in ask("/deployments/filter")}
    flows = {each["id"]: each["name"] for each in ask("/flows/filter")}

    def shown(run: Object) -> Object:
        deployment = names.get(run["deployment_id"], {})
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
    runs = [shown(run) for which in (busy, late) for run in ask("/flow_runs/filter", flow_runs=which, limit=50)]
    deployments = []
    ended = {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}}
    for deployment in names.values():
        of = {"id": {"any_": [deployment["id"]]}}
        last = ask("/flow_runs/filter", deployments=of, flow_runs=ended, sort="END_TIME_DESC", limit=1)
        coming = {"state": {"type": {"any_": ["SCHEDULED"]}}}
        following = ask("/flow_runs/filter", deployments=of, flow_runs=coming, sort="EXPECTED_START_TIME_ASC", limit=1)
        deployments.append(
            {
                "name": f"{flows.get(deployment['flow_id'], '')}/{deployment['name']}",
                "paused": deployment["paused"],
                "last": shown(last[0]) if last else None,
                "next": following[0]["expected_start_time"] if following else None,
            }
        )
    return {"pools": pools, "runs": runs, "deployments": sorted(deployments, key=lambda each: str(each["name"]))}


def show(environment: Environment, found: Object, console: Console) -> None:
    """Print what `look` found."""
    console.print(f"[bold]{environment.name}[/] · namespace {environment.namespace} of {environment.context}\n")
    table = _table("component", "ready", "image")
    for each in found["components"]:
        good = each["ready"] == each["wanted"]
        table.add_row(
            _cell(each["name"]),
            f"[{'green' if good else 'red'}]{each['ready']}/{each['wanted']}[/]",
            _cell(_short(each["image"])),
        )
    console.print(table, "")
    table = _table("work pool", "status", "workers", "limit")
    for each in found["pools"]:
        colour = "green" if each["status"] == "READY" else "red"
        table.add_row(
            _cell(each["name"]), f"[{colour}]{each['status']}[/]", str(each["workers"]), str(each["limit"] or "none")
        )
    console.print(table, "")
    table = _table("running or late", "flow", "state", "since")
    for each in found["runs"]:
        since = _ago(each["started"] or each["expected"])
        table.add_row(_cell(each["name"]), _cell(each["flow"]), _state(each["state"]), since)
    if found["runs"]:
        console.print(table, "")
    else:
        console.print("No run is running or late.\n")
    table = _table("deployment", "last run", "state", "started", "took", "next")
    for each in found["deployments"]:
        last = each["last"]
        row = (
            [_cell(last["name"]), _state(last["state"]), _ago(last["started"]), f"{last['seconds']:.0f} s"]
            if last
            else ["none"] + [""] * 3
        )
        table.add_row(_cell(each["name"]), *row, "paused" if each["paused"] else _moment(each["next"]))
    console.print(table, "")
    for line in found["problems"]:
        console.print(f"[red]{escape(line)}[/]", highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _cell(text: str) -> str:
    """Return a name for a cell: brackets in it are no markup, and it stays on its line."""
    return escape(one_line(text))


def _state(state: str) -> str:
    return f"[{COLOURS.get(state, 'yellow')}]{state.capitalize()}[/]"


def _short(image: str) -> str:
    name, _, digest = image.partition("@sha256:")
    return f"{name}@{digest[:12]}" if digest else name


def _moment(text: str | None) -> str:
    return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M} UTC" if text else ""


def _ago(text: str | None) -> str:
    if not text:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
