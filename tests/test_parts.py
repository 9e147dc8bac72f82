"""The parts that tests share: the migrated database from which Prefect servers start, stopped and forked servers."""

import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from orchestration.migrations import _revisions
from tests import parts, server_forks
from tests.parts import migrated_database, stopped_servers, wait_until


def test_migrated_database_has_prefects_newest_schema_and_no_content() -> None:
    file = migrated_database()
    assert not file.with_name(f"{file.name}-wal").exists()
    with closing(sqlite3.connect(f"file:{file}?immutable=1", uri=True)) as database:
        assert database.execute("select version_num from alembic_version").fetchall() == [(_revisions()[0],)]
        tables = database.execute("select name from sqlite_master where type = 'table'").fetchall()
        rows = {name: database.execute(f'select count(*) from "{name}"').fetchone()[0] for (name,) in tables}
    assert len(rows) > 30
    assert {name for name, count in rows.items() if count} == {"alembic_version"}


def test_servers_are_stopped_while_a_block_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        monkeypatch.setattr(parts, "SERVERS", [process])

        def is_stopped() -> bool:
            return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED

        try:
            with stopped_servers():
                wait_until(is_stopped, "the server to stop", 30)
            wait_until(lambda: not is_stopped(), "the server to continue", 30)
        finally:
            process.kill()


def test_fork_ends_with_the_status_of_its_module_and_by_signals(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\nprint('printed')\nsys.exit(3)\n")
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(600)\n")
    with (tmp_path / "log").open("wb") as log:
        waits, other, ends = (
            server_forks.start([module], os.environ, tmp_path, log.fileno()) for module in ("waits", "waits", "ends")
        )
        assert ends.wait(60) == 3
        assert (tmp_path / "log").read_text() == "printed\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waits.wait(0.1)
        for fork in (waits, other):
            fork.kill()
            assert fork.wait(60) == -1
            fork.kill()


def test_output_and_errors_of_a_fork_are_separate(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import sys\nprint('printed')\nsys.exit('failed')\n")
    done = server_forks.run(["fails"], os.environ, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "printed\n", "failed\n")
