"""Import dbt once for tests that run many commands: each command is a fork of one process.

    forked.py serve SOCKET CHILD DBTS  builds the project here, then forks for each request
    forked.py SOCKET ARGUMENTS         runs the arguments in a fork, and exits with the fork's status

ARGUMENTS are those of an interpreter, `-P PATH`, or `dbt` and dbt's arguments. The fork runs the path, or does what the
console script `dbt` does. CHILD is the folder that `DbtProject` runs. A parse holds either for the `dbt` command or for
CHILD: the parse of CHILD stays in the project's `target/`, the parse of `dbt` becomes the file DBTS.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

PARSE = "partial_parse.msgpack"
"""File name of dbt's parse in a target folder."""


def ask(path: str, arguments: list[str], environment: dict[str, str] | None = None, folder: str = "") -> int:
    """Run the arguments in a fork; return the exit status."""
    request = [arguments, folder or str(Path.cwd()), dict(os.environ) | (environment or {})]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        socket.send_fds(client, [b"."], [0, 1, 2])
        client.sendall(json.dumps(request).encode() + b"\n")
        return int(client.makefile().readline())


def serve(path: str, child: str, dbts: str) -> None:
    """Fork for each request."""
    from dbt.cli.main import dbtRunner

    # Parsing models starts a thread, which a fork would lack and wait for. So this process parses only in forks.
    _fork(["dbt", "--quiet", "build"])
    # The first command takes one processor second more than the next. Here it runs once for all forks.
    assert dbtRunner().invoke(["--quiet", "compile"]).success
    Path("target", PARSE).replace(dbts)
    _fork(["-P", child, "--quiet", "parse"])
    gc.freeze()
    gc.disable()  # forks are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            if not os.fork():
                server.close()
                _run(client)
            client.close()
            # Reap ended forks, so that their time counts as this process's.
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _fork(arguments: list[str]) -> None:
    """Run the arguments in a fork of this process."""
    if not os.fork():
        _become(arguments, str(Path.cwd()), dict(os.environ), [])
    assert os.wait()[1] == 0, arguments


def _run(client: socket.socket) -> None:
    """Read a request, run it in another fork, and answer with the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _, files, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile() as stream:
        arguments, folder, environment = json.loads(stream.readline())
    if not (process := os.fork()):
        client.close()
        _become(arguments, folder, environment, files)
    for file in (0, 1, 2, *files):
        os.close(file)  # readers of these files wait only for the fork
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _become(arguments: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Turn this process into one that runs the arguments."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        if arguments[0] == "dbt":
            from dbt.cli import main

            if hasattr(main, "load_dotenv"):  # dbt 1.12 does this when the module is imported
                main.load_dotenv(main.find_dotenv(usecwd=True), override=False)
            sys.argv = arguments
            main.cli()
        else:
            sys.argv = arguments[1:]
            runpy.run_path(arguments[1], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
