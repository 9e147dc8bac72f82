"""`orchestrate`: deployments as desired state, and runs that are never lost, from the command line."""

import argparse
import asyncio
import atexit
import contextlib
import functools
import gc
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# Beyond these, a command imports what it needs: --help is there at once.
from orchestration.errors import DeploymentsError, PipelineError
from orchestration.terminal import printable_output

if TYPE_CHECKING:
    from orchestration.deployments.desired_state import DesiredState
    from orchestration.prefect_api import Server

NOTHING, FAILED, DIFFERS, INTERRUPTED = 0, 1, 2, 130
"""Exit statuses."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse ends with 2, which a plan says of changes."""
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"{self.prog}: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="orchestrate", description="Deployments as desired state, and runs that are never lost.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, files: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        if files:
            made.add_argument("files", nargs="*", metavar="FILE", help="default: prefect.yaml")
        made.add_argument("--owner", default="", help="whose things these are; default: the `name` of prefect.yaml")
        return made

    for name, text in (
        ("plan", "what a sync would do; exit status 0 nothing, 2 something, 1 an error"),
        ("sync", "bring the server to what the files say"),
    ):
        made = command(name, text)
        made.add_argument("--prune", action="store_true", help="delete what the owner has and the files no longer have")
        made.add_argument("--adopt", action="store_true", help="take over what exists and nobody owns")
        made.add_argument("--directory", type=Path, help="the working directory of runs; default: this one")
        made.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="for the API to answer")
        if name == "plan":
            made.add_argument("--json", action="store_true", help="for programs")
    made = command("diff", "what was changed on the server since the last sync; exit status 2 if anything", files=False)
    made.add_argument("--json", action="store_true", help="for programs")
    made = command("export", "write what the server has as a file that changes nothing when synced", files=False)
    made.add_argument("--mine", action="store_true", help="only what the owner has, without what nobody owns")
    made.add_argument("--output", type=Path, metavar="FILE", help="default: printed")
    made.add_argument("--directory", type=Path, help="the working directory of runs; default: this one")
    made = command("adopt", "take something over as it is on the server", files=False)
    made.add_argument("names", nargs="+", metavar="KIND:KEY", help="like deployment:etl/nightly")
    made.add_argument("--from", dest="giver", default="", metavar="OWNER", help="whose it is; default: nobody's")
    made = command("check", "that flows import, parameters and schedules fit; needs no server")
    made.add_argument("--quota", type=Path, metavar="FILE", help="ResourceQuota and LimitRange objects to fit in")
    made = command("watch", "look for drift from time to time: an artifact, events, metrics", files=False)
    made.add_argument("--every", type=float, default=300, metavar="SECONDS")
    made.add_argument("--port", type=int, default=8080, help="of /health and /metrics")
    made.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for the API to answer at first")
    made = commands.add_parser("runs", help="runs that are due and not over, each with why it is where it is")
    made.add_argument("--stuck", action="store_true", help="only those that do not get on; exit status 2 if any")
    made.add_argument("--json", action="store_true", help="for programs")
    made = commands.add_parser("why", help="what became of a run, from creation to end, and the diagnosis")
    made.add_argument("run", metavar="RUN", help="its name or id")
    made.add_argument("--json", action="store_true", help="for programs")
    text = "print the page of a diagnosis: what it means and how to cure it"
    made = commands.add_parser("explain", help=text, description=text)
    named = "a diagnosis, or a state or reason such as OOMKilled; default: print the index"
    made.add_argument("name", nargs="?", default="", metavar="NAME", help=named)
    text = "how much memory the runs of each deployment used, and what it should ask for"
    made = commands.add_parser("memory", help=text, description=text)
    made.add_argument("deployment", nargs="?", default="", metavar="DEPLOYMENT", help="NAME or FLOW/NAME; default: all")
    made.add_argument("--json", action="store_true", help="for programs")
    text = "bring runs and their pods into agreement, from inside of their namespace"
    made = commands.add_parser("reconcile", help=text, description=text)
    made.add_argument("--pool", required=True, help="the work pool")
    made.add_argument("--namespace", required=True, help="where its Jobs are")
    made.add_argument("--every", type=float, default=2, metavar="SECONDS")
    made.add_argument("--port", type=int, default=8080, help="of /health and /metrics")
    made.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for the API to answer at first")
    made.add_argument("--lease", default="", metavar="NAME", help="of several, the one that holds this Lease acts")
    made.add_argument("--identity", default=platform.node(), help="this one's name among them; default: the host's")
    made.add_argument("--pending", type=float, default=600, metavar="SECONDS", help="for a pod that cannot start")
    text = "for a run that waits for room: a quota, full nodes"
    made.add_argument("--capacity", type=float, default=86_400, metavar="SECONDS", help=text)
    made.add_argument("--kubernetes", default="", metavar="URL", help="of `kubectl proxy`, outside of a pod")
    made.add_argument("--no-pod-events", action="store_true", help="tell the server nothing of what happens to pods")
    return top


def _files(options: argparse.Namespace) -> list[str]:
    return options.files or ["prefect.yaml"]


def _name() -> str:
    """The name in prefect.yaml; empty if there is none."""
    from orchestration.deployments import files

    name = files.read(["prefect.yaml"])[0].get("name") if Path("prefect.yaml").exists() else None
    return name if isinstance(name, str) else ""


def _owner(options: argparse.Namespace) -> str:
    """Who is meant, where no file is read but for its name."""
    name = options.owner or _name()
    if not name:
        raise DeploymentsError("Whose things are meant is not said: no prefect.yaml with a `name` is here. Say --owner")
    return str(name)


@contextlib.asynccontextmanager
async def _wanted(options: argparse.Namespace) -> AsyncIterator[tuple["Server", "DesiredState"]]:
    """The server, and what the files want of it. A mistake in the files is found without it where they name none of
    its variables.
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
    wanted = None if names else read()
    async with connected(options.wait, functools.partial(print, file=sys.stderr, flush=True)) as api:
        yield api, wanted or read(variables=await live_state.variables(api, names))


async def _plan(options: argparse.Namespace) -> int:
    from orchestration.deployments import plan, show

    async with _wanted(options) as (api, wanted):
        found = await plan.make(api, wanted, prune=options.prune, adopt=options.adopt)
    (show.print_plan_json if options.json else show.print_plan)(found)
    return DIFFERS if found.changes else NOTHING


async def _sync(options: argparse.Namespace) -> int:
    from orchestration.deployments import show, sync

    async with _wanted(options) as (api, wanted):
        carried_out = await sync.sync(api, wanted, prune=options.prune, adopt=options.adopt, report=show.print_start)
    show.print_result(carried_out)
    return NOTHING


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
    return DIFFERS if found else NOTHING


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
    return NOTHING


async def _adopt(options: argparse.Namespace) -> int:
    from orchestration.deployments import adoption, resources
    from orchestration.prefect_api import connected

    try:
        names = [resources.parse_name(each) for each in options.names]
    except ValueError as error:
        raise DeploymentsError(str(error)) from None
    owner = _owner(options)
    async with connected() as api:
        await adoption.adopt(api, owner, names, options.giver)
    print(f"{owner} has taken over {', '.join(map(resources.display_name, names))}.")
    return NOTHING


async def _check(options: argparse.Namespace) -> int:
    from orchestration.deployments import check, desired_state

    pool = desired_state.default_pool() or "default"
    check.show(check.check(_files(options), owner=options.owner, pool=pool, quota=options.quota))
    return NOTHING


async def _watch(options: argparse.Namespace) -> int:
    from orchestration import logs
    from orchestration.deployments import watch

    logs.configure()
    await watch.watch(_owner(options), every=options.every, port=options.port, wait=options.wait)
    return NOTHING


async def _runs(options: argparse.Namespace) -> int:
    from orchestration.inspection import output, unfinished_runs
    from orchestration.prefect_api import connected

    async with connected() as api:
        found = await unfinished_runs.read_unfinished_runs(api, stuck=options.stuck)
    output.print_runs(found, as_json=options.json)
    return DIFFERS if found and options.stuck else NOTHING


async def _why(options: argparse.Namespace) -> int:
    from orchestration.inspection import output, run_diagnosis, timeline
    from orchestration.prefect_api import connected

    async with connected() as api:
        run = await timeline.find_run(api, options.run)
        entries = await timeline.read_timeline(api, run)
        diagnosis = await run_diagnosis.diagnose_run(api, run)
    output.print_timeline(entries, diagnosis, as_json=options.json)
    return NOTHING


async def _explain(options: argparse.Namespace) -> int:
    from orchestration import diagnoses

    print(diagnoses.page(diagnoses.find(options.name) if options.name else diagnoses.INDEX), end="")
    return NOTHING


async def _memory(options: argparse.Namespace) -> int:
    from orchestration.inspection import memory
    from orchestration.prefect_api import connected

    async with connected() as api:
        usages = await memory.read_usage(api, options.deployment)
    memory.print_usage(usages, as_json=options.json)
    return NOTHING


async def _reconcile(options: argparse.Namespace) -> int:
    from orchestration import logs
    from orchestration.reconciler import loop
    from orchestration.reconciler.model import Policy

    logs.configure()
    await loop.reconcile(
        options.pool,
        options.namespace,
        Policy(pending_seconds=options.pending, capacity_seconds=options.capacity),
        every=options.every,
        port=options.port,
        wait=options.wait,
        lease=options.lease,
        identity=options.identity,
        url=options.kubernetes,
        pod_events=not options.no_pod_events,
    )
    return NOTHING


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
    "reconcile": _reconcile,
}


STANDING = {"watch", "reconcile"}
"""Those that end when they are told to."""


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(arguments)
    if arguments is None and options.command not in STANDING:
        # Of a short life: looking for garbage costs a quarter of what Prefect's import takes, and again at the end.
        gc.disable()
        atexit.register(gc.freeze)
    try:
        return asyncio.run(COMMANDS[options.command](options))
    except PipelineError as error:
        print(f"{error}{'' if str(error).endswith('.') else '.'}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what is done is kept.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
