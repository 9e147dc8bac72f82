"""The key of secret blocks is rotated while servers read and write blocks: real servers on one database."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER
from orchestration.operations.rotation import block_key
from orchestration.operations.rotation.rotation import rotate
from orchestration.settings import ROOT
from tests import server_forks
from tests.cluster.apiserver import ApiServer
from tests.orchestration.operations.rotation.installation import Installation, Interrupted, Pod, installed
from tests.parts import free_port, migrated_database, served

SECRET, KEY = f"{SERVER}-encryption-key", "encryption-key"
VARIABLE = block_key.VARIABLE


@pytest.fixture
def installation(kubernetes: ApiServer) -> Iterator[Installation]:
    yield from installed(kubernetes, SERVER)


def _values(url: str, *names: str) -> list[str]:
    with temporary_settings({PREFECT_API_URL: url}):
        return [Secret.load(name).get() for name in names]  # type: ignore[union-attr]


def _save(url: str, name: str) -> None:
    with temporary_settings({PREFECT_API_URL: url}):
        Secret(value=name).save(name, overwrite=True)


@pytest.mark.parametrize("interrupted_writes", [(2,), pytest.param((1, 2, 4), marks=pytest.mark.further)])
def test_servers_read_all_blocks_during_and_after_a_rotation(
    tmp_path: Path, installation: Installation, interrupted_writes: tuple[int, ...]
) -> None:
    shutil.copyfile(migrated_database(), tmp_path / "prefect.db")
    urls: dict[str, str] = {}
    stacks: dict[str, contextlib.ExitStack] = {}
    errors: list[str] = []

    def start(pod: Pod) -> None:
        if pod.component == "api":
            stacks[pod.name] = contextlib.ExitStack()
            variables = os.environ | {VARIABLE: pod.variables[VARIABLE]}
            server = served(tmp_path, free_port(), sys.executable, variables, "orchestration.server_process")
            urls[pod.name] = stacks[pod.name].enter_context(server)
            if len(urls) == 1:
                _save(urls[pod.name], "before")
            # Former and new server together: each reads what the other has written.
            for writer in urls.values():
                _save(writer, f"block-{len(urls)}")
                errors.extend(
                    f"{reader} {name}" for reader in urls.values() for name in ("before", f"block-{len(urls)}")
                    if _values(reader, name) != [name]
                )  # fmt: skip

    def end(pod: Pod) -> None:
        if pod.component == "api":
            stacks.pop(pod.name).close()
            del urls[pod.name]

    def execute(pod: str, command: list[str], text: str) -> str:
        key = installation.pods[0].variables[VARIABLE]
        assert command[:2] == ["python", "-m"]
        done = server_forks.run(command[2:], os.environ | {VARIABLE: key, "PREFECT_HOME": str(tmp_path)}, ROOT)
        if done.returncode:
            raise ClusterError(done.stderr)
        return done.stdout

    old = installation.secret(SECRET)[KEY]
    installation.execute, installation.after_start, installation.after_end = execute, start, end
    try:
        installation.roll(f"{SERVER}-api")
        for number in (*interrupted_writes, -1):
            installation.interrupted_write = number
            with contextlib.suppress(Interrupted):
                rotate(block_key.server_block_key(installation.environment), keep_old=False)
        assert errors == []
        [url] = urls.values()
        _save(url, "after")
        assert _values(url, "before", "block-1", "block-2", "after") == ["before", "block-1", "block-2", "after"]
    finally:
        for stack in stacks.values():
            stack.close()
    values = installation.secret(SECRET)
    [kept] = [value for key, value in values.items() if key != KEY]
    assert kept == old, "backups made with the old key need it"
    assert values[KEY] != old
    assert len(Fernet(values[KEY])._signing_key) == 16
    assert not installation.is_rotated(SECRET)
    installation.environment.helm("rollback", SERVER, "1", "--no-hooks")
    assert installation.secret(SECRET) == values, "with its former key no server reads a block"
