"""Deploy and operate an environment from the command line. The Makefile's targets call it.

python -m orchestration.operations deploy --env production --context NAME
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestration.errors import ClusterError, sentence
from orchestration.operations.environment import Environment, resolve
from orchestration.terminal import json_text, printable_output

WIDTH_WITHOUT_TERMINAL = 160
"""Columns of `status` where the output is not a terminal."""


def _deploy(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    start = time.monotonic()
    deploy.deploy(environment, force=options.force)
    seconds = time.monotonic() - start
    print(f"{environment.name} is deployed, in {seconds:.0f} s. Look at it: make status, make ui")
    return 0


def _plan(environment: Environment, _: argparse.Namespace) -> int:
    from orchestration.operations import release_plan

    return 2 if release_plan.plan(environment) else 0


def _rollback(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import rollback

    rollback.rollback(environment, force=options.force)
    return 0


def _undeploy(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    name = environment.name
    if name != "local" and options.confirm != name:
        raise ClusterError(f"Confirm that {name} is to be uninstalled: make undeploy ENV={name} CONFIRM={name}")
    deploy.undeploy(environment)
    return 0


def _status(environment: Environment, options: argparse.Namespace) -> int:
    from rich.console import Console

    from orchestration.operations import status

    found = status.read_status(environment)
    if options.json:
        print(json_text(found))
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
        status.print_status(environment, found, console)
    return 0


def _logs(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import follow_run
    from orchestration.operations.port_forward import api_client

    with api_client(environment) as api:
        return 0 if follow_run.follow(environment, api, follow_run.find_run(api, options.run)) else 1


def _run(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import follow_run, start_run
    from orchestration.operations.port_forward import api_client

    try:
        parameters = json.loads(options.parameters or "{}")
    except ValueError as error:
        raise ClusterError(
            f'PARAMETERS={options.parameters!r} is not JSON: {error}. Write {{"day": "2013-02-08"}}'
        ) from None
    with api_client(environment) as api:
        run = start_run.start(api, options.deployment, parameters)
        return 0 if follow_run.follow(environment, api, run) else 1


def _ui(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations.port_forward import AUTH_SECRET, forward_port, read_credentials

    user = read_credentials(environment).partition(":")[0]
    is_open = False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                with forward_port(environment, options.port) as forward:
                    if is_open:
                        print("It is open again.", flush=True)
                    else:
                        is_open = True
                        print(f"The UI of {environment.name}: {forward.url} (end with Ctrl-C)")
                        print(f"User {user}; the password, in Secret {AUTH_SECRET}:")
                        print(
                            f"  kubectl --context {environment.context} --namespace {environment.namespace} "
                            f"get secret {AUTH_SECRET} "
                            "--output go-template='{{index .data \"auth-string\" | base64decode}}'",
                            flush=True,
                        )
                    forward.process.wait()
                print("The server's pod is gone. Opening the port to the next one", flush=True)
            except ClusterError:
                if not is_open:
                    raise
                time.sleep(1)
    return 0


def _backup(environment: Environment, _: argparse.Namespace) -> int:
    from orchestration.operations import backups

    backups.back_up(environment)
    return 0


def _backups(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import backups

    backups.list_backups(environment, as_json=options.json)
    return 0


def _rotate(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations.rotation import kinds

    kinds.rotate(environment, options.secret, keep_old=options.keep_old)
    return 0


def _restore(environment: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import restore

    name = environment.name
    if not options.backup:
        raise ClusterError("No backup is named: make restore FROM=NAME, or FROM=newest. List them: make backups")
    if name != "local" and options.confirm != name:
        raise ClusterError(f"Confirm that the database of {name} is to be replaced: make restore ... CONFIRM={name}")
    identity = Path(options.identity) if options.identity else None
    restore.restore(environment, options.backup, identity=identity, start_unknown=options.start_unknown)
    return 0


COMMANDS: dict[str, tuple[Callable[[Environment, argparse.Namespace], int], str]] = {
    "deploy": (_deploy, "deploy the checkout to the environment"),
    "plan": (_plan, "dry run: print what a deploy would change; exit status 2 for a change"),
    "rollback": (_rollback, "roll back the newest deploy"),
    "undeploy": (_undeploy, "uninstall the releases; volumes stay"),
    "status": (_status, "print components, pool, runs and deployments on one screen"),
    "logs": (_logs, "follow a run"),
    "run": (_run, "start a run of a deployment and follow it"),
    "backup": (_backup, "back up the server's database now"),
    "backups": (_backups, "list the backups of the server's database"),
    "restore": (_restore, "restore a backup of the server's database, and settle the runs"),
    "rotate": (_rotate, "rotate a password without downtime"),
    "ui": (_ui, "forward a port of this machine to the UI"),
}


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.operations", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--env", default="local", help="local, staging, production or your own environment")
        command.add_argument("--context", default="", help="the kubeconfig context of the cluster")
        command.add_argument("--namespace", default="", help="a namespace other than the environment's")
        if name in ("deploy", "rollback"):
            command.add_argument(
                "--force", action="store_true", help="also if nothing changed, or a deploy seems to be in progress"
            )
        elif name == "undeploy":
            command.add_argument("--confirm", default="", help="the environment's name again")
        elif name == "restore":
            command.add_argument("backup", help="its name, or newest")
            command.add_argument("--identity", default="", metavar="FILE", help="age's secret key")
            command.add_argument("--start-unknown", action="store_true", help="start runs that may have been executed")
            command.add_argument("--confirm", default="", help="the environment's name again")
        elif name == "rotate":
            command.add_argument("secret", nargs="?", default="", help="what to rotate; empty: list what there is")
            command.add_argument("--keep-old", action="store_true", help="stop before the old value ends")
        elif name in ("status", "backups"):
            command.add_argument("--json", action="store_true", help="print JSON")
        elif name == "logs":
            command.add_argument("run", nargs="?", default="", help="its name or id; default: the newest")
        elif name == "run":
            command.add_argument("deployment", help="FLOW/DEPLOYMENT")
            command.add_argument("--parameters", default="", help="parameters of the run, as JSON")
        elif name == "ui":
            command.add_argument("--port", type=int, default=4200, help="port of this machine (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        environment = resolve(options.env, options.context, options.namespace)
        return COMMANDS[options.command][0](environment, options)
    except ClusterError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the command again: it keeps what is done.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
