"""A warm pod's container: it imports first, gets its run by a file, and executes the run as any container does."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestration.runs import flow_imports, hand_over
from orchestration.settings import ROOT
from tests.parts import asked, client_of, wait_until

KEY = "k" * 64

FLOW = """
import os, sys
from pathlib import Path
from prefect import flow
from prefect.settings import get_current_settings
import sibling

@flow
def warm():
    credential = get_current_settings().api.auth_string
    Path(os.environ["NOTES"]).write_text("\\n".join([
        os.environ["PREFECT__FLOW_RUN_ID"], credential.get_secret_value() if credential else "",
        str("RUN_HAND_OVER" in os.environ or "RUN_HAND_OVER_KEY" in os.environ), sibling.NAME,
        os.environ["MARK"],
    ]))
"""


def test_hand_over_hides_the_variables_from_whoever_reads_annotations() -> None:
    variables = {"PREFECT_API_AUTH_STRING": "run-1:secret", "PREFECT__FLOW_NAME": "é"}
    text = hand_over.encrypt(variables, KEY)
    assert hand_over.decrypt(text, KEY) == variables
    assert text == hand_over.encrypt(variables, KEY), "a repeated request hands the same text over"
    assert "secret" not in text
    with pytest.raises((UnicodeDecodeError, json.JSONDecodeError)):
        hand_over.decrypt(text, "another key")


@contextmanager
def warm_container(folder: Path, url: str, seconds: float = 600) -> Iterator["subprocess.Popen[str]"]:
    """Start the container of a warm pod, which has no run yet and no credential."""
    (folder / "environment").touch()
    env = {name: text for name, text in os.environ.items() if not name.startswith("PREFECT")} | {
        "PREFECT_API_URL": url, "KUBERNETES_JOB": "warm-x7k2p", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder),
        "RUN_HAND_OVER": str(folder / "environment"), "RUN_HAND_OVER_KEY": KEY, "WARM_SECONDS": str(seconds),
        "TERMINATION_MESSAGE_PATH": str(folder / "message"), "NOTES": str(folder / "notes"),
    }  # fmt: skip
    code = "import sys; from orchestration.runs import supervisor; sys.exit(supervisor.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "prefect", "flow-run", "execute"],
        env=env, cwd=folder, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("is_given_away", [False, pytest.param(True, marks=pytest.mark.further)])
def test_warm_container_executes_the_run_that_is_handed_over(
    prefect_server: str, tmp_path: Path, is_given_away: bool
) -> None:
    """The claim is not in the Job's name. A run that was claimed again meanwhile is not executed."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/flow.py").write_text(FLOW)
    (tmp_path / "code/sibling.py").write_text("NAME = 'sibling'")
    with client_of(prefect_server) as api, warm_container(tmp_path, prefect_server) as container:
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path / "code")}}
        body = {"name": tmp_path.name, "flow_id": asked(api, "POST", "/flows/", {"name": "warm"})["id"]}
        body |= {"entrypoint": "flow.py:warm", "pull_steps": [step]}
        deployment = asked(api, "POST", "/deployments/", body)["id"]
        path = f"/deployments/{deployment}/create_flow_run"
        made = asked(api, "POST", path, {"state": {"type": "PENDING"}})
        if is_given_away:
            for type_ in ("SCHEDULED", "PENDING"):
                asked(api, "POST", f"/flow_runs/{made['id']}/set_state", {"state": {"type": type_}})
        variables = {"PREFECT__FLOW_RUN_ID": made["id"], "PREFECT_API_AUTH_STRING": "run-1:secret", "MARK": "handed"}
        variables["RUN_CLAIM"] = made["state"]["id"][-12:]
        # The kubelet replaces the file as a whole.
        (tmp_path / "new").write_text(hand_over.encrypt(variables, KEY))
        (tmp_path / "new").rename(tmp_path / "environment")
        status = container.wait(300)
        ended = asked(api, "GET", f"/flow_runs/{made['id']}")["state_type"]
    if is_given_away:
        assert (status, ended) == (-signal.SIGKILL, "PENDING")
        assert json.loads((tmp_path / "message").read_text()) == {"fenced": 1}
        assert not (tmp_path / "notes").exists()
    else:
        assert (status, ended) == (0, "COMPLETED")
        assert (tmp_path / "notes").read_text().splitlines() == [
            made["id"], "run-1:secret", "False", "sibling", "handed",
        ]  # fmt: skip


@pytest.mark.further
def test_warm_container_ends_if_no_run_takes_it(tmp_path: Path) -> None:
    with warm_container(tmp_path, "http://127.0.0.1:1/api", seconds=1) as container:
        assert container.wait(300) == 0


def wait_for_engine(container: "subprocess.Popen[str]") -> int:
    """Wait until the supervisor has started the engine; return the engine's process id."""
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    return int(str(wait_until(lambda: children.read_text().split(), "the engine")[0]))


def test_warm_container_ends_on_sigterm_at_once(tmp_path: Path) -> None:
    """A node that drains, or a worker that needs the room, does not wait for the grace period."""
    with warm_container(tmp_path, "http://127.0.0.1:1/api") as container:
        wait_for_engine(container)
        container.terminate()
        assert container.wait(300) == -signal.SIGTERM


@pytest.mark.further
def test_warm_container_whose_engine_is_killed_fails(tmp_path: Path) -> None:
    """A Job that completes would be replaced without a pause."""
    with warm_container(tmp_path, "http://127.0.0.1:1/api") as container:
        os.kill(wait_for_engine(container), signal.SIGKILL)
        assert container.wait(300) == 128 + signal.SIGKILL


def test_file_that_the_kubelet_replaces_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "environment"

    def write_after_the_first_look() -> bool:
        looks.append(file.exists())
        if len(looks) == 2:
            file.write_text(hand_over.encrypt({"A": "b"}, KEY))
        return True

    looks: list[bool] = []
    assert hand_over.wait_for_run(str(file), KEY, 300, write_after_the_first_look) == {"A": "b"}
    assert looks == [False, False]


def test_packages_of_flows_are_imported_and_users_code_is_not_executed(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "prefect.yaml").write_text(
        "deployments: [{name: a, entrypoint: 'flows/one.py:f'}, {name: b, entrypoint: absent.py:g}]"
    )
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows/one.py").write_text(
        "import telnetlib3_absent\nimport chunk_of_mine\nfrom package import inner\nraise SystemExit('executed')\n"
    )
    (tmp_path / "chunk_of_mine.py").write_text(
        "'text'\nimport colorsys\nimport os\nos.environ['A'] = 'b'\nimport pyclbr\n"
    )
    (tmp_path / "package/__init__.py").write_text("from . import sibling\nfrom .sibling import x\n")
    (tmp_path / "package/inner.py").write_text("from xml import dom\nfrom orchestration import quantity\n")
    (tmp_path / "package/sibling.py").write_text("import wave, package\n")
    code = f"""
        import sys
        from pathlib import Path
        from orchestration.runs import flow_imports
        flow_imports.import_packages_of_flows(Path({str(tmp_path)!r}))
        expected = ("pydantic.v1", "colorsys", "xml.dom", "wave", "orchestration.quantity")
        for name in (*expected, "chunk_of_mine", "package", "pyclbr"):
            print(name in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * 5 + ["False"] * 3, done.stderr


@pytest.mark.parametrize("content", [None, "deployments: 3", "{{ $X }}: [", "deployments: [{name: a}]"])
def test_image_without_readable_deployments_imports_nothing_ahead(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "prefect.yaml").write_text(content)
    flow_imports.import_packages_of_flows(tmp_path)
    assert flow_imports._flow_files(tmp_path) == set()
