"""The commands of the README and of the local quickstart work as printed, in a fresh clone with an empty home."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.interpreters import uv_program
from tests.parts import answers, asked, client_of, copy_of_checkout, free_port, wait_until

README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "docs/start/quickstart-local.md").read_text()


def _commands(page: str) -> list[str]:
    """Return the commands in a page's blocks of bash, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    return [line.split("   #")[0].strip() for block in blocks for line in block.splitlines()]


COMMANDS = _commands(README)

FIRST_DAY = "Completed to 2013-01-01: 5,705 rows loaded, 12 models built, 26/26 tests passed"
"""What the first run of the job prints."""

_SITE_PACKAGES = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
"""Where an environment has its packages."""


def _command(start: str) -> str:
    """Return the README's command that equals or starts with a text, with its arguments as printed."""
    if start in COMMANDS:
        return start
    found = [command for command in COMMANDS if command.startswith(start)]
    assert len(found) == 1, f"the README has {found} for {start!r}"
    return found[0]


@pytest.fixture(scope="module")
def clone() -> Iterator[Path]:
    """Copy the tracked and new files of this checkout, with their changes."""
    # Not in pytest's temporary folders: another session that starts closes them to all users but root, and initdb runs
    # as another user.
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "checkout"
        copy_of_checkout(clone)
        yield clone


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a new user: no variables and an empty home, except for the caches of downloads."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VIRTUAL_ENV"))}
    path = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if Path(part) != Path(sys.executable).parent)
    return kept | {
        # Few of the installed packages are imported here. Python compiles these on import. With PIP_NO_COMPILE=1 pip
        # would compile all: it takes the 1 for the value of --compile.
        "PIP_COMPILE": "0",
        "UV_COMPILE_BYTECODE": "0",
        "PATH": path,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(cache / "pip")),
        "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(cache / "uv")),
        "PYTHONPYCACHEPREFIX": str(tmp_path_factory.mktemp("bytecode")),
    }


def _link_bytecode(environment: dict[str, str], site_packages: Path) -> None:
    """Let an environment use the bytecode of these tests' environment: to compile it again takes 20 processor seconds.

    Python compiles the files whose size or time of change differs, such as those of other versions.
    """
    prefix = environment["PYTHONPYCACHEPREFIX"]
    for name, target in (("stdlib", Path(sysconfig.get_path("stdlib"))), ("purelib", site_packages)):
        source = sysconfig.get_path(name)
        for folder, _, files in os.walk(source):
            if folder.endswith("/__pycache__") and (name == "purelib" or "-packages/" not in folder):
                links = Path(f"{prefix}{target}", os.path.relpath(folder, source)).parent
                links.mkdir(parents=True, exist_ok=True)
                for file in files:
                    with contextlib.suppress(FileExistsError):
                        (links / file).symlink_to(Path(folder, file))


def _run(command: str, clone: Path, environment: dict[str, str], status: int = 0) -> str:
    """Run a command in a shell without a terminal, check its exit status, and return its output."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@contextlib.contextmanager
def _running(command: str, clone: Path, environment: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=clone,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def stopped_afterwards(clone: Path, environment: dict[str, str]) -> Iterator[None]:
    """Stop the servers of the clone after the tests."""
    yield
    _run("make stop", clone, environment)


def _install_by_make(clone: Path, environment: dict[str, str]) -> Path:
    """Make an environment as any target of make does."""
    venv = clone / ".venv"
    if not (venv / "ready").exists():
        _link_bytecode(environment, venv / _SITE_PACKAGES)
        assert "Creating the environment" in _run("make setup", clone, environment)
    return venv


def _install_by_pip(clone: Path, environment: dict[str, str], folder: Path) -> Path:
    """Make an environment and install the project by pip, as the README does.

    uv installs the required packages, the newest that pyproject.toml allows, and pip finds them sufficient: pip alone
    takes 40 processor seconds to choose and install them.
    """
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    options = f"--quiet --python {venv}/bin/python --requirements pyproject.toml --extra dev"
    _run(f"{shlex.quote(uv_program())} pip install {options}", clone, environment)
    path = {"PATH": f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"}
    _run(_command("pip install"), clone, environment | path)
    _link_bytecode(environment, venv / _SITE_PACKAGES)
    return venv


@pytest.fixture(scope="module", params=["make", pytest.param("pip", marks=pytest.mark.further)])
def server(
    request: pytest.FixtureRequest,
    clone: Path,
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    stopped_afterwards: None,
) -> Iterator[dict[str, str]]:
    """Install the project by make or by pip, start a server, and yield the environment of the README's commands."""
    folder = tmp_path_factory.mktemp(request.param)
    by_pip = request.param == "pip"
    venv = _install_by_pip(clone, environment, folder) if by_pip else _install_by_make(clone, environment)
    environment = environment | {"PATH": f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"}
    port = 4200
    if answers("http://127.0.0.1:4200/api/health"):  # leave the person's own server alone
        port = free_port()
        environment |= {"PREFECT_SERVER_API_PORT": str(port), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    with _running(_command("prefect server start"), clone, environment, folder / "server.log"):
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/api/health"), "the server", 600)
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"), "the UI")
        runs = _command("python flows" if by_pip else "make run")
        yield environment | {"SERVER": f"http://127.0.0.1:{port}", "RUN": runs}
    wait_until(lambda: not answers(f"http://127.0.0.1:{port}/api/health"), "the end of the server")


@pytest.mark.further
def test_make_run_works_without_a_server(clone: Path, environment: dict[str, str], stopped_afterwards: None) -> None:
    if answers("http://127.0.0.1:4200/api/health"):
        pytest.skip("a Prefect server is up on port 4200, so that a run would not be on its own")
    _link_bytecode(environment, clone / ".venv" / _SITE_PACKAGES)
    output = _run(_command("make run"), clone, environment)
    assert "Creating the environment" in output
    assert FIRST_DAY in output


def test_quickstart_has_only_commands_that_are_tested() -> None:
    """The quickstart calls them in `.venv/bin`. These tests start and stop servers in another way."""
    others = {"make server", "make stop"}
    for command in _commands(QUICKSTART):
        assert command.removeprefix(".venv/bin/").removesuffix(" --watch") in {*COMMANDS, *others}
    assert FIRST_DAY in QUICKSTART


def test_error_without_a_supported_python_names_the_cure(clone: Path, environment: dict[str, str]) -> None:
    output = _run("make --always-make .venv/ready PYTHON=", clone, environment, status=2)
    assert "No Python 3.11, 3.12 or 3.13 was found. Install one, or name it: make PYTHON=" in output


def test_make_lists_all_targets(clone: Path, environment: dict[str, str]) -> None:
    output = _run("make", clone, environment)
    listed = re.findall(r"^  ([a-z-]+) +\S", output, flags=re.M)
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
    assert sorted(listed) == sorted(targets)
    assert "\x1b" not in output, "colours where there is no terminal"


def test_readme_commands_for_server_deployment_and_worker_work(
    clone: Path, server: dict[str, str], tmp_path: Path
) -> None:
    """`make run` and `python flows/example_flow.py` are the same run."""
    # Another test may have loaded the first days.
    has_run = (clone / ".warehouse").exists()
    is_new = not (clone / ".venv" / "ready").exists()
    output = _run(server["RUN"], clone, server)
    loaded = _run("make psql <<< 'select day from raw.loads order by 1'", clone, server)
    assert ("Creating the environment" in loaded) == is_new
    days = re.findall(r"2013-\d\d-\d\d", loaded)
    assert days == [f"2013-01-{number:02}" for number in range(1, len(days) + 1)]
    assert (len(days) > 1) == has_run
    assert (f"Completed to {days[-1]}: " if has_run else FIRST_DAY) in output
    [query] = re.findall(r"```sql\n(.*?)```", QUICKSTART, flags=re.S)
    assert "(5 rows)" in _run(f"make psql <<< '{query}'", clone, server)
    assert f"{server['SERVER']}/runs/flow-run/" in output
    output = _run(_command("prefect deploy "), clone, server)
    assert "successfully created" in output
    scheduled = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    with client_of(f"{server['SERVER']}/api") as api:
        made = asked(api, "GET", "/deployments/name/dbt-pipeline/dbt-pipeline-daily")
        [schedule] = [entry["schedule"] for entry in made["schedules"]]
        assert f'cron: "{schedule["cron"]}", timezone: {schedule["timezone"]}' in README
        wait_until(lambda: asked(api, "POST", "/flow_runs/filter", scheduled), "the schedule's runs", 300)
    with _running(_command("make worker"), clone, server, tmp_path / "worker.log"):
        ask = _command("prefect deployment run")
        output = _run(f"{ask} --watch", clone, server)
        assert "Flow run finished successfully in 'Completed'" in output, (tmp_path / "worker.log").read_text()


@pytest.mark.parametrize(
    ("start", "arguments"),
    [("make run DAY", ["--day", "2013-02-08", "--full-refresh"]), ("make run SELECT", ["--select=+route_performance"])],
)
def test_make_run_passes_a_day_and_a_selection(
    start: str, arguments: list[str], clone: Path, environment: dict[str, str]
) -> None:
    """`tests/flows/test_example_flow.py` runs the job with these arguments."""
    output = _run(f"{_command(start)} --dry-run --old-file=.venv/ready", clone, environment)
    assert shlex.split(output) == [".venv/bin/python", "flows/example_flow.py", *arguments]
