"""The store of backups, in a folder and in S3."""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyrage
import pytest

from orchestration.errors import SettingsError
from orchestration.recovery.__main__ import main
from orchestration.recovery.store import BackupError, Store
from tests.parts import s3_server

COUNTS = "public.flow|1000\npublic.flow_run|500\nrevision|91e2b8f3d6a4\n"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, variables[name])
        yield variables


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(f"file://{tmp_path}/backups")
    variables = request.getfixturevalue("s3")
    return Store(f"s3://results/{tmp_path.name}", variables["endpoint"], "us-east-1")


def _dump(folder: Path, time: datetime, content: bytes = b"PGDMP") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dump").write_bytes(content)
    (folder / "counts").write_text(COUNTS)
    (folder / "time").write_text(f"{time:%Y-%m-%dT%H:%M:%S.%fZ}\n")
    return folder


NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


def test_stored_backup_is_listed_and_fetched(store: Store, tmp_path: Path) -> None:
    assert store.backups() == []
    for days in (2, 1):
        store.put(_dump(tmp_path / "work", NOW - timedelta(days=days), b"PGDMP" * days), [])
    newest, older = store.backups()
    assert (newest.name, older.name) == ("20261128T120000Z", "20261127T120000Z")
    assert (newest.tables, newest.rows, newest.revision) == (2, 1500, "91e2b8f3d6a4")
    assert store.fetch("newest", tmp_path / "a", None) == newest
    assert store.fetch(older.name, tmp_path / "b", None) == older
    assert (tmp_path / "b/dump").read_bytes() == b"PGDMPPGDMP"
    assert (tmp_path / "b/counts").read_text() == COUNTS
    with pytest.raises(BackupError, match="There are: 20261128T120000Z, 20261127T120000Z"):
        store.fetch("absent", tmp_path / "c", None)


def test_encrypted_backup_needs_a_key_of_a_recipient(store: Store, tmp_path: Path) -> None:
    keys = [pyrage.x25519.Identity.generate() for _ in range(3)]
    backup = store.put(_dump(tmp_path / "work", NOW, b"SECRET" * 1000), [str(key.to_public()) for key in keys[:2]])
    files = [path.name for path in (tmp_path / "backups").glob("*")]
    assert backup.file.endswith(".dump.age")
    for number, key in enumerate(keys):
        (tmp_path / f"key{number}").write_text(f"# created: today\n{key}\n")
    with pytest.raises(BackupError, match="is encrypted"):
        store.fetch(backup.name, tmp_path / "a", None)
    with pytest.raises(BackupError, match="The identity does not open"):
        store.fetch(backup.name, tmp_path / "a", tmp_path / "key2")
    for number in (0, 1):
        store.fetch(backup.name, tmp_path / "b", tmp_path / f"key{number}")
        assert (tmp_path / "b/dump").read_bytes() == b"SECRET" * 1000
    assert all(b"SECRET" not in (tmp_path / "backups" / name).read_bytes() for name in files)


def test_old_backups_are_deleted_but_not_the_newest(store: Store, tmp_path: Path) -> None:
    for days in (40, 39, 38, 10, 0):
        store.put(_dump(tmp_path / "work", NOW - timedelta(days=days)), [])
    assert store.prune(last=3, days=30, now=NOW) == ["20261021T120000Z", "20261020T120000Z"]
    assert store.prune(0, 0, NOW + timedelta(days=1)) == ["20261119T120000Z", "20261022T120000Z"]
    assert [backup.name for backup in store.backups()] == ["20261129T120000Z"], "one stays in any case"


def test_incomplete_backup_is_none_and_is_deleted_after_a_day(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/backups")
    store.put(_dump(tmp_path / "work", NOW), [])
    (tmp_path / "backups/20261129T110000Z.dump").write_bytes(b"half")
    (tmp_path / "backups/notes.txt").write_text("a person's")
    assert len(store.backups()) == 1
    store.prune(7, 30, NOW)
    assert (tmp_path / "backups/20261129T110000Z.dump").exists(), "another backup may be in progress"
    store.prune(7, 30, NOW + timedelta(days=2))
    assert {path.name for path in (tmp_path / "backups").iterdir()} == {
        "20261129T120000Z.dump", "20261129T120000Z.json", "notes.txt"
    }  # fmt: skip


def test_damaged_backup_is_refused(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/backups")
    backup = store.put(_dump(tmp_path / "work", NOW), [])
    (tmp_path / "backups" / backup.file).write_bytes(b"PGDMQ")
    with pytest.raises(BackupError, match="is damaged"):
        store.fetch(backup.name, tmp_path / "a", None)


def test_wrong_recipient_is_named_before_anything_is_stored(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="begins with age1"):
        Store(f"file://{tmp_path}/backups").put(_dump(tmp_path / "work", NOW), ["ssh-rsa AAA"])
    assert not (tmp_path / "backups").exists()


def test_command_stores_prunes_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ["--to", f"file://{tmp_path}/backups", "--folder", str(_dump(tmp_path / "work", NOW))]
    assert main(["store", *to, "--keep-last", "1", "--keep-days", "1"]) == 0
    assert "Backup 20261129T120000Z is in file:///" in capsys.readouterr().out
    assert main(["list", "--json", *to]) == 0
    [facts] = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["rows"]) == ("20261129T120000Z", 1500)
    assert main(["list", "--to", "http://example.com"]) == 1
    assert "http://example.com is no place for backups. Write file:///PATH or s3://" in capsys.readouterr().err


def test_full_volume_has_space_again_without_a_person(tmp_path: Path) -> None:
    """Here the size of files is limited, which fails a write as a full volume does."""
    store, work = Store(f"file://{tmp_path}/backups"), tmp_path / "work"
    for days in (50, 40):
        store.put(_dump(work, datetime.now(UTC) - timedelta(days=days)), [])
    _dump(work, datetime.now(UTC), b"PGDMP" * 100_000)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from orchestration.recovery.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["store", "--to", store.url, "--folder", str(work), "--keep-last", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "cannot be used: [Errno 27] File too large" in done.stderr
    [newest] = store.backups()
    names = {path.name for path in (tmp_path / "backups").iterdir()}
    assert names == {f"{newest.name}.dump", f"{newest.name}.json"}, "old backups and the partial one are gone"


def test_unreachable_bucket_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orchestration.recovery", "list", "--to", "s3://absent/a"]
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--endpoint", "http://127.0.0.1:9"],
        env=environment | {"PYTHONPATH": ":".join(sys.path), "AWS_MAX_ATTEMPTS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "s3://absent/a cannot be used: " in done.stderr
