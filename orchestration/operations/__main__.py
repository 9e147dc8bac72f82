"""What is done with an environment, from the command line; the Makefile's targets call it.

python -m orchestration.operations deploy --env production --context NAME
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence

from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment, resolve
from orchestration.terminal import printable_output


def _deploy(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    start = time.monotonic()
    deploy.deploy(where, force=options.force)
    print(f"{where.name} is deployed, in {time.monotonic() - start:.0f} s. Look at it: make status, make ui")
    return 0


def _plan(where: Environment, _: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    return 2 if deploy.plan(where) else 0


def _rollback(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    deploy.rollback(where, force=options.force)
    return 0


def _undeploy(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import deploy

    if where.name != "local" and options.confirm != where.name:
        raise ClusterError(f"To take {where.name} away, say so: make undeploy ENV={where.name} CONFIRM={where.name}")
    deploy.undeploy(where)
    return 0


def _status(where: Environment, options: argparse.Namespace) -> int:
    from rich.console import Console

    from orchestration.operations import status

    found = status.look(where)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        status.show(where, found, Console(width=None if sys.stdout.isatty() else 160))
    return 0


def _logs(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import start_run
    from orchestration.operations.port_forward import connected

    with connected(where) as api:
        return 0 if start_run.follow(where, api, start_run.named(api, options.run)) else 1


def _run(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations import start_run
    from orchestration.operations.port_forward import connected

    try:
        parameters = json.loads(options.parameters or "{}")
    except ValueError as error:
        raise ClusterError(
            f'PARAMETERS={options.parameters!r} is no JSON: {error}. Write {{"day": "2013-02-08"}}'
        ) from None
    with connected(where) as api:
        run = start_run.start(api, options.deployment, parameters)
        return 0 if start_run.follow(where, api, run) else 1


def _ui(where: Environment, options: argparse.Namespace) -> int:
    from orchestration.operations.port_forward import SECRET, forwarded, user

    name = user(where).partition(":")[0]
    opened = False
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                with forwarded(where, options.port) as way:
                    if opened:
                        print("It is open again.", flush=True)
                    else:
                        opened = True
                        print(f"The UI of {where.name}: {way.url} (end with Ctrl-C)")
                        print(f"User {name}; the password, in Secret {SECRET}:")
                        print(
                            f"  kubectl --context {where.context} --namespace {where.namespace} get secret {SECRET} "
                            "--output go-template='{{index .data \"auth-string\" | base64decode}}'",
                            flush=True,
                        )
                    way.process.wait()
                print("The server's pod is gone. Opening the port to the next one", flush=True)
            except ClusterError:
                if not opened:
                    raise
                time.sleep(1)
    return 0


COMMANDS: dict[str, tuple[Callable[[Environment, argparse.Namespace], int], str]] = {
    "deploy": (_deploy, "bring it to what the checkout says"),
    "plan": (_plan, "what a deploy would change; exit status 2 if anything"),
    "rollback": (_rollback, "take back the newest deploy"),
    "undeploy": (_undeploy, "take the releases away; volumes stay"),
    "status": (_status, "one screen: components, pool, runs, deployments"),
    "logs": (_logs, "follow a run"),
    "run": (_run, "start a run of a deployment and follow it"),
    "ui": (_ui, "open the UI's port"),
}


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m orchestration.operations", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--env", default="local", help="local, staging, production or one of your own")
        command.add_argument("--context", default="", help="the cluster, by the kubeconfig's name")
        command.add_argument("--namespace", default="", help="another than the environment's")
        if name in ("deploy", "rollback"):
            command.add_argument(
                "--force", action="store_true", help="also where nothing changed, or it seems under way"
            )
        elif name == "undeploy":
            command.add_argument("--confirm", default="", help="the environment's name again")
        elif name == "status":
            command.add_argument("--json", action="store_true", help="for programs")
        elif name == "logs":
            command.add_argument("run", nargs="?", default="", help="its name or id; default: the newest")
        elif name == "run":
            command.add_argument("deployment", help="FLOW/DEPLOYMENT")
            command.add_argument("--parameters", default="", help="as JSON")
        elif name == "ui":
            command.add_argument("--port", type=int, default=4200)
    options = parser.parse_args(arguments)
    try:
        where = resolve(options.env, options.context, options.namespace)
        return COMMANDS[options.command][0](where, options)
    except ClusterError as error:
        print(f"{error}{'' if str(error).endswith('.') else '.'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run it again: what is done is kept.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
