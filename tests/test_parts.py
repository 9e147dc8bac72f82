"""The migrated database from which tests start Prefect servers."""

import sqlite3
from contextlib import closing

from orchestration.migrations import _revisions
from tests.parts import migrated_database


def test_migrated_database_has_prefects_newest_schema_and_no_content() -> None:
    file = migrated_database()
    assert not file.with_name(f"{file.name}-wal").exists()
    with closing(sqlite3.connect(f"file:{file}?immutable=1", uri=True)) as database:
        assert database.execute("select version_num from alembic_version").fetchall() == [(_revisions()[0],)]
        tables = database.execute("select name from sqlite_master where type = 'table'").fetchall()
        rows = {name: database.execute(f'select count(*) from "{name}"').fetchone()[0] for (name,) in tables}
    assert len(rows) > 30
    assert {name for name, count in rows.items() if count} == {"alembic_version"}
