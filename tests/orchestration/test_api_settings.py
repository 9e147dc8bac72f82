"""Tests of the settings by which a client reaches the Prefect API, and of the process that reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.parts import free_port

READ = """
import json, sys
from dataclasses import asdict
from orchestration import api_settings
found = getattr(api_settings, sys.argv[1])()
print(json.dumps(asdict(found)), "prefect" in sys.modules)
"""

COMMAND = """
import atexit, sys
atexit.register(lambda: print(*sorted({"prefect", "rich", "httpx"} & sys.modules.keys())))
from orchestration.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _executed(code: str, *arguments: str, home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Execute code in a new process, with no settings of Prefect but these variables and the profiles in `home`."""
    own = ("PREFECT_", "SSL_CERT_FILE")
    others = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=others | {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT)} | variables,
        cwd=home,
        capture_output=True,
        text=True,
    )


VARIABLES: dict[str, str] = {
    "PREFECT_API_URL": "https://example.com/api/",
    "PREFECT_API_AUTH_STRING": "me:s3cr:et é",
    "PREFECT_API_KEY": "key",
    "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"X-Access": "token"}),
    "PREFECT_API_SSL_CERT_FILE": "/etc/ca.crt",
}


def test_child_process_reads_the_same_settings(tmp_path: Path) -> None:
    found = [_executed(READ, way, home=tmp_path, **VARIABLES).stdout for way in ("read", "read_in_child")]
    headers = {"X-Access": "token", "Authorization": "Bearer key"}
    expected = {
        "url": "https://example.com/api",
        "user": "me:s3cr:et é",
        "headers": headers,
        "is_verified": True,
        "authority_file": "/etc/ca.crt",
    }
    assert [text.splitlines()[-1] for text in found] == [
        f"{json.dumps(expected)} True",
        f"{json.dumps(expected)} False",
    ]
    insecure = _executed(READ, "read_in_child", home=tmp_path, PREFECT_API_TLS_INSECURE_SKIP_VERIFY="true").stdout
    assert json.loads(insecure.rpartition(" ")[0]) == {
        "url": "", "user": "", "headers": {}, "is_verified": False, "authority_file": ""
    }  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("watch --owner team", marks=pytest.mark.further),
        "reconcile --pool pool --namespace runs --kubernetes http://127.0.0.1:9",
    ],
)
def test_component_that_runs_for_long_imports_neither_prefect_nor_rich(tmp_path: Path, command: str) -> None:
    """They take as much memory as all the rest. The URL is that of Prefect's profile, so Prefect has read it."""
    url = f"http://127.0.0.1:{free_port()}/api"
    (tmp_path / "profiles.toml").write_text(f'active = "own"\n[profiles.own]\nPREFECT_API_URL = "{url}"\n')
    ended = _executed(COMMAND, *command.split(), "--port", str(free_port()), "--wait", "0.1", home=tmp_path)
    assert ended.returncode == 1
    assert f"The Prefect API at {url} " in ended.stderr
    assert ended.stdout == "httpx\n"


def test_settings_that_prefect_refuses_end_the_component(tmp_path: Path) -> None:
    ended = _executed(READ, "read_in_child", home=tmp_path, PREFECT_API_TLS_INSECURE_SKIP_VERIFY="perhaps")
    assert ended.returncode == 1
    assert "perhaps" in ended.stderr
    assert "Prefect's settings cannot be read" in ended.stderr.splitlines()[-1]
