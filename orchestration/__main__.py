"""The command `orchestrate`: deployments as desired state, diagnosis of runs, and the reconciler."""

import argparse
import asyncio
import atexit
import contextlib
import functools
import gc
import os
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# All other modules are imported by the command that needs them, so that --help is fast.
from orchestration.errors import DeploymentsError, PipelineError, SettingsError, sentence
from orchestration.terminal import printable_output

if TYPE_CHECKING:
    from orchestration.deployments.desired_state import DesiredState
    from orchestration.prefect_api import Server

SUCCEEDED, FAILED, DIFFERS, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses."""

REPLACED_URL = "REPLACED_DATABASE_URL"
"""Variable with the URL, as libpq takes it, of the database that a restored one replaces on another server."""


class _Parser(argparse.ArgumentParser):
    """Exits with 1 on wrong arguments, as the exit status 2 of a plan means changes."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = _Parser(prog="orchestrate", description="Deployments as desired state, and runs that are never lost.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, files: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        if files:
            made.add_argument("files", nargs="*", metavar="FILE", help="default: prefect.yaml")
        made.add_argument("--owner", default="", help="the owner of the resources; default: the `name` of prefect.yaml")
        return made

    as_json = "print JSON"
    directory = "the working directory of runs; default: this directory"
    wait_at_start = "how long to wait for the API at the start"
    for name, text in (
        ("plan", "print what sync would change, as a dry run; exit status 0 no changes, 2 changes, 1 an error"),
        ("sync", "change the server to the desired state in the files"),
    ):
        made = command(name, text)
        made.add_argument(
            "--prune", action="store_true", help="delete the owner's resources that the files no longer have"
        )
        made.add_argument("--adopt", action="store_true", help="take over existing resources that have no owner")
        made.add_argument("--directory", type=Path, help=directory)
        made.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="how long to wait for the API")
        if name == "plan":
            made.add_argument("--json", action="store_true", help=as_json)
    text = "print the drift: changes on the server since the last sync; exit status 2 if there are any"
    made = command("diff", text, files=False)
    made.add_argument("--json", action="store_true", help=as_json)
    made = command("export", "write the server's resources as a file whose sync changes nothing", files=False)
    made.add_argument("--mine", action="store_true", help="only resources of the owner, and none without an owner")
    made.add_argument("--output", type=Path, metavar="FILE", help="default: print the file")
    made.add_argument("--directory", type=Path, help=directory)
    made = command("adopt", "take over resources without changing them", files=False)
    made.add_argument("names", nargs="+", metavar="KIND:KEY", help="for example deployment:etl/nightly")
    made.add_argument("--from", dest="giver", default="", metavar="OWNER", help="the present owner; default: none")
    made = command("check", "check that flows can be imported and fit their parameters and schedules; needs no server")
    made.add_argument("--quota", type=Path, metavar="FILE", help="also check runs against these quotas and limits")
    made = command("watch", "check for drift at intervals; report it by an artifact, events and metrics", files=False)
    made.add_argument("--every", type=float, default=300, metavar="SECONDS", help="the interval")
    made.add_argument("--port", type=int, default=8080, help="the port of /health and /metrics")
    made.add_argument("--wait", type=float, default=300, metavar="SECONDS", help=wait_at_start)
    text = "list runs that are due and have not ended, with the reason"
    made = commands.add_parser("runs", help=text, description=text)
    made.add_argument("--stuck", action="store_true", help="only runs that make no progress; exit status 2 if any")
    made.add_argument("--json", action="store_true", help=as_json)
    text = "explain a run: its timeline from creation to end, and the diagnosis"
    made = commands.add_parser("why", help=text, description=text)
    made.add_argument("run", metavar="RUN", help="the run's name or id")
    made.add_argument("--json", action="store_true", help=as_json)
    text = "print the page of a diagnosis: what it means and how to cure it"
    made = commands.add_parser("explain", help=text, description=text)
    text = "a diagnosis, or a state or reason such as OOMKilled; default: print the index"
    made.add_argument("name", nargs="?", default="", metavar="NAME", help=text)
    text = "print how much memory the runs of each deployment used, and suggest requests and limits"
    made = commands.add_parser("memory", help=text, description=text)
    made.add_argument("deployment", nargs="?", default="", metavar="DEPLOYMENT", help="NAME or FLOW/NAME; default: all")
    made.add_argument("--json", action="store_true", help=as_json)
    text = "settle runs in a restored database before a server uses it; exit status 2 if a person has to look"
    made = commands.add_parser("settle", help=text, description=text)
    text = "when the database was backed up, 2026-11-29T12:00:00Z; default: when its newest state of a run was set"
    made.add_argument("--backup", default="", metavar="TIME", help=text)
    made.add_argument("--stopped", default="", metavar="TIME", help="since when no worker claims runs; default: now")
    made.add_argument(
        "--executions", type=Path, metavar="FILE", help="the Jobs and pods of runs, as make restore writes them"
    )
    text = (
        "the database on the same server that the restored one replaces; its records are evidence; "
        f"default: that of the URL in the variable {REPLACED_URL}, if it is set"
    )
    made.add_argument("--replaced", default="", metavar="NAME", help=text)
    made.add_argument("--start-unknown", action="store_true", help="start due runs that may have been executed before")
    made.add_argument("--json", action="store_true", help=as_json)
    text = "check an installation, before or after it: exit status 0 ok, 2 warnings, 3 failed checks, 1 an error"
    made = commands.add_parser("doctor", help=text, description=text)
    made.add_argument("--env", default="local", help="local, staging, production or your own environment")
    made.add_argument("--context", default="", help="the kubeconfig context; default: the local cluster's")
    made.add_argument("--namespace", default="", help="a namespace other than the environment's")
    made.add_argument("--json", action="store_true", help=as_json)
    text = "run the reconcile loop, which brings runs and their pods into agreement, in the namespace of the pods"
    made = commands.add_parser("reconcile", help=text, description=text)
    made.add_argument("--pool", required=True, help="the work pool")
    text = "a namespace of the Jobs; repeat the option for several"
    made.add_argument("--namespace", required=True, action="append", help=text)
    made.add_argument("--every", type=float, default=2, metavar="SECONDS", help="the interval of the loop")
    made.add_argument("--port", type=int, default=8080, help="the port of /health and /metrics")
    made.add_argument("--wait", type=float, default=300, metavar="SECONDS", help=wait_at_start)
    made.add_argument("--lease", default="", metavar="NAME", help="the Lease for the leader election; default: none")
    text = "the namespace of the Lease; default: the first --namespace"
    made.add_argument("--lease-namespace", default="", metavar="NAME", help=text)
    made.add_argument("--identity", default=platform.node(), help="the name in the leader election; default: the host")
    text = "how long a pod may fail to start before its run is given up"
    made.add_argument("--pending", type=float, default=600, metavar="SECONDS", help=text)
    text = "how long a run may wait for capacity (a quota, full nodes) before it is given up"
    made.add_argument("--capacity", type=float, default=86_400, metavar="SECONDS", help=text)
    text = "how many lines of its pod's log the state of a crashed run shows; 0 for none"
    made.add_argument("--log-lines", type=int, default=5, metavar="N", help=text)
    made.add_argument("--kubernetes", default="", metavar="URL", help="the URL of `kubectl proxy`, outside a pod")
    made.add_argument("--no-pod-events", action="store_true", help="send the server no events of pods")
    return top


def _files(options: argparse.Namespace) -> list[str]:
    return options.files or ["prefect.yaml"]


def _name() -> str:
    """Return the name in prefect.yaml; empty if there is none."""
    from orchestration.deployments import files

    name = files.read(["prefect.yaml"])[0].get("name") if Path("prefect.yaml").exists() else None
    return name if isinstance(name, str) else ""


def _owner(options: argparse.Namespace) -> str:
    """Return the owner for a command that reads only the name in prefect.yaml.

    Raises:
        DeploymentsError: no owner is given.
    """
    name = options.owner or _name()
    if not name:
        raise DeploymentsError("No owner: add `name:` to prefect.yaml or pass --owner")
    return str(name)


@contextlib.asynccontextmanager
async def _connected_with_desired(options: argparse.Namespace) -> AsyncIterator[tuple["Server", "DesiredState"]]:
    """Connect to the server, and read the desired state from the files.

    Mistakes in files that use no variables of the server are reported without a server.
    """
    from orchestration.deployments import desired_state, files, live_state, placeholders
    from orchestration.prefect_api import connected

    documents = files.read(_files(options))
    read = functools.partial(
        desired_state.from_documents,
        documents,
        owner=options.owner,
        directory=options.directory,
        default_pool=desired_state.default_pool(),
    )
    names = placeholders.server_variables(documents)
    wanted = None if names else read()  # before the connection
    async with connected(options.wait, functools.partial(print, file=sys.stderr, flush=True)) as api:
        yield api, wanted or read(variables=await live_state.variables(api, names))


async def _plan(options: argparse.Namespace) -> int:
    from orchestration.deployments import plan, show

    async with _connected_with_desired(options) as (api, wanted):
        found = await plan.make(api, wanted, prune=options.prune, adopt=options.adopt)
    (show.print_plan_json if options.json else show.print_plan)(found)
    return DIFFERS if found.changes else SUCCEEDED


async def _sync(options: argparse.Namespace) -> int:
    from orchestration.deployments import show, sync

    async with _connected_with_desired(options) as (api, wanted):
        carried_out = await sync.sync(api, wanted, prune=options.prune, adopt=options.adopt, report=show.print_start)
    show.print_result(carried_out)
    return SUCCEEDED


async def _diff(options: argparse.Namespace) -> int:
    from orchestration.deployments import drift, show
    from orchestration.prefect_api import connected

    owner = _owner(options)
    async with connected() as api:
        found = await drift.find(api, owner)
    if options.json:
        show.print_drift_json(owner, found)
    else:
        show.print_drift(owner, found)
    return DIFFERS if found else SUCCEEDED


async def _export(options: argparse.Namespace) -> int:
    from orchestration.deployments import export, resources
    from orchestration.prefect_api import connected

    owner = _owner(options) if options.mine else options.owner or _name() or "exported"
    async with connected() as api:
        found, others = await export.read(api, owner, mine=options.mine)
    text = export.text(export.document(found, owner, options.directory or Path.cwd()))
    if options.output:
        options.output.write_text(text)
    else:
        print(text, end="")
    for name, reason in sorted(export.find_inexpressible(found).items()):
        print(f"Left out: {resources.display_name(name)} {reason}", file=sys.stderr)
    for other, number in sorted(others.items()):
        print(f"Left out: {number} of {other}. Export them by --owner '{other}'", file=sys.stderr)
    return SUCCEEDED


async def _adopt(options: argparse.Namespace) -> int:
    from orchestration.deployments import adoption, resources
    from orchestration.prefect_api import connected

    try:
        names = [resources.parse_name(name) for name in options.names]
    except ValueError as error:
        raise DeploymentsError(str(error)) from None
    owner = _owner(options)
    async with connected() as api:
        await adoption.adopt(api, owner, names, options.giver)
    print(f"{owner} has taken over {', '.join(map(resources.display_name, names))}.")
    return SUCCEEDED


async def _check(options: argparse.Namespace) -> int:
    from orchestration.deployments import check, desired_state

    pool = desired_state.default_pool() or "default"
    check.show(check.check(_files(options), owner=options.owner, pool=pool, quota=options.quota))
    return SUCCEEDED


async def _watch(options: argparse.Namespace) -> int:
    from orchestration.deployments import watch

    await watch.watch(_owner(options), every=options.every, port=options.port, wait=options.wait)
    return SUCCEEDED


async def _runs(options: argparse.Namespace) -> int:
    from orchestration.inspection import output, unfinished_runs
    from orchestration.prefect_api import connected

    async with connected() as api:
        found = await unfinished_runs.read_unfinished_runs(api, stuck=options.stuck)
    output.print_runs(found, as_json=options.json)
    return DIFFERS if found and options.stuck else SUCCEEDED


async def _why(options: argparse.Namespace) -> int:
    from orchestration.inspection import output, run_diagnosis, timeline
    from orchestration.prefect_api import connected

    async with connected() as api:
        run = await timeline.find_run(api, options.run)
        entries = await timeline.read_timeline(api, run)
        diagnosis = await run_diagnosis.diagnose_run(api, run)
    output.print_timeline(entries, diagnosis, as_json=options.json)
    return SUCCEEDED


async def _explain(options: argparse.Namespace) -> int:
    from orchestration import diagnoses

    print(diagnoses.page(diagnoses.find(options.name) if options.name else diagnoses.INDEX), end="")
    return SUCCEEDED


async def _memory(options: argparse.Namespace) -> int:
    from orchestration.inspection import memory
    from orchestration.prefect_api import connected

    async with connected() as api:
        usages = await memory.read_usage(api, options.deployment)
    memory.print_usage(usages, as_json=options.json)
    return SUCCEEDED


def _time(text: str) -> datetime:
    """Return the time that an option gives, in UTC if it names no time zone.

    Raises:
        SettingsError: it is no time.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"{text!r} is no time. Write it as 2026-11-29T12:00:00Z") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


async def _settle(options: argparse.Namespace) -> int:
    from orchestration.prefect_compat import server_records
    from orchestration.recovery import server_database
    from orchestration.recovery.settle import Moment, print_settlements, settle

    stopped = _time(options.stopped) if options.stopped else datetime.now(UTC)
    if options.backup:
        backup = _time(options.backup)
    else:
        async with server_records.transaction() as session:
            backup = await server_records.read_newest_state_time(session) or stopped
    moment = Moment(backup, stopped)
    replaced = server_database.libpq_url(options.replaced) if options.replaced else os.environ.get(REPLACED_URL, "")
    found = await settle(options.executions, moment, replaced=replaced, start_unknown=options.start_unknown)
    print_settlements(found, as_json=options.json)
    return DIFFERS if any(settlement.needs_person for settlement in found) else SUCCEEDED


async def _doctor(options: argparse.Namespace) -> int:
    try:
        from orchestration.operations.doctor import examination
    except ModuleNotFoundError as error:
        raise PipelineError(
            f"doctor is not possible here: there is no {error.name}. Run it in a checkout, as make doctor does"
        ) from None
    results = await examination.examine(options.env, options.context, options.namespace)
    examination.print_results(results, as_json=options.json)
    statuses = {"ok": SUCCEEDED, "not checked": SUCCEEDED, "warning": DIFFERS, "failed": CHECK_FAILED}
    return max(statuses[finding.status] for _, finding in results)


async def _reconcile(options: argparse.Namespace) -> int:
    from orchestration.reconciler import loop
    from orchestration.reconciler.model import Policy

    await loop.reconcile(
        options.pool,
        options.namespace,
        Policy(pending_seconds=options.pending, capacity_seconds=options.capacity, log_lines=options.log_lines),
        every=options.every,
        port=options.port,
        wait=options.wait,
        lease=options.lease,
        lease_namespace=options.lease_namespace,
        identity=options.identity,
        url=options.kubernetes,
        pod_events=not options.no_pod_events,
    )
    return SUCCEEDED


COMMANDS = {
    "plan": _plan,
    "sync": _sync,
    "diff": _diff,
    "export": _export,
    "adopt": _adopt,
    "check": _check,
    "watch": _watch,
    "runs": _runs,
    "why": _why,
    "explain": _explain,
    "memory": _memory,
    "settle": _settle,
    "doctor": _doctor,
    "reconcile": _reconcile,
}


LONG_RUNNING = {"watch", "reconcile"}
"""Components, which log, and run until a signal ends them."""


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    if arguments is None and options.command not in LONG_RUNNING:
        # In a short process garbage collection costs a quarter of the time of Prefect's import, and again at the exit.
        gc.disable()
        atexit.register(gc.freeze)
    try:
        if options.command in LONG_RUNNING:
            # httpx imports its own command line, and with it 5 MiB of other packages, unless that import fails.
            sys.modules["httpx._main"] = None  # type: ignore[assignment]
            from orchestration import logs

            name = f"orchestration.{options.command}"
            return logs.run_component(name, lambda: asyncio.run(COMMANDS[options.command](options)))
        return asyncio.run(COMMANDS[options.command](options))
    except PipelineError as error:
        print(sentence(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what is done is kept.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
