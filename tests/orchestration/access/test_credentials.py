"""Credentials are read from files by role, rotate without a restart, and are derived for each run."""

import time
from pathlib import Path
from uuid import uuid4

import pytest

from orchestration.access import credentials
from orchestration.access.credentials import Credentials, Identity, read_run_key, sign_run
from orchestration.access.routes import Role
from orchestration.errors import SettingsError

SERVER = "admin:of-the-server"
KEY = "k" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "worker").write_text("worker:first\n")
    (tmp_path / "viewer").write_text("ann:a:b\nben:c\n")
    (tmp_path / "run-key").write_text(KEY)
    (tmp_path / "..data").mkdir()
    return tmp_path


def test_credential_has_the_role_of_its_file(folder: Path) -> None:
    known = Credentials(folder, SERVER)

    assert known.identify(SERVER) == Identity("admin", Role.OPERATOR)
    assert known.identify("worker:first") == Identity("worker", Role.WORKER)
    assert known.identify("ann:a:b") == Identity("ann", Role.VIEWER)
    assert known.identify("ben:c") == Identity("ben", Role.VIEWER)
    for wrong in ("worker:", "worker:second", "ann:a", "", "first", KEY):
        assert known.identify(wrong) is None


def test_credential_of_a_run_is_valid_for_this_run_alone(folder: Path) -> None:
    known = Credentials(folder, SERVER)
    run, other = uuid4(), uuid4()
    signed = sign_run(read_run_key(folder), run)

    assert known.identify(signed) == Identity(f"run-{run}", Role.RUN, run)
    assert known.identify(signed.replace(str(run), str(other))) is None
    assert known.identify(sign_run("l" * 32, run)) is None
    assert known.identify(f"run-{run}:") is None


def test_rotated_credentials_are_read_without_a_restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0)
    known = Credentials(folder, SERVER)
    run = uuid4()
    before = sign_run(KEY, run)

    (folder / "worker.next").write_text("worker:second\n")
    (folder / "run-key.next").write_text("n" * 32)
    for valid in ("worker:first", "worker:second", before, sign_run("n" * 32, run)):
        assert known.identify(valid)
    assert read_run_key(folder) == KEY, "the next key signs nothing"
    (folder / "worker.next").unlink()
    (folder / "run-key.next").unlink()

    (folder / "worker").write_text("worker:second\n")
    (folder / "worker.previous").write_text("worker:first\n")
    (folder / "run-key").write_text("n" * 32)
    (folder / "run-key.previous").write_text(KEY)
    assert known.identify("worker:first")
    assert known.identify("worker:second")
    assert known.identify(before)
    assert known.identify(sign_run(read_run_key(folder), run))

    (folder / "worker.previous").unlink()
    (folder / "run-key.previous").unlink()
    assert not known.identify("worker:first")
    assert not known.identify(before)


def test_key_of_oauth2_proxy_names_a_person_and_rotates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0)
    known = Credentials(folder, SERVER)
    assert known.forwarded_user(f"ann@example.com:{KEY}") is None, "the key of runs is another"
    for name, key in (("oidc-key", "o"), ("oidc-key.next", "n"), ("oidc-key.previous", "p")):
        (folder / name).write_text(key * 32)
        assert known.forwarded_user(f"ann@example.com:{key * 32}") == "ann@example.com"
        assert known.forwarded_user(f"a:b@example.com:{key * 32}") == "a:b@example.com"
        (folder / name).unlink()
        assert known.forwarded_user(f"ann@example.com:{key * 32}") is None


def test_invalid_change_keeps_the_last_valid_credentials(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "RELOAD_SECONDS", 0)
    known = Credentials(folder, SERVER)

    (folder / "worker").write_text("no colon")
    assert known.identify("worker:first")
    assert "worker:1" in known.problem
    assert "no colon" not in known.problem

    (folder / "worker").write_text("worker:third")
    assert known.identify("worker:third")
    assert not known.problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("admin", "a:b", "Name the file after one of"),
        ("worker", "secret", "worker:1: not USER:PASSWORD"),
        ("worker", "a:b\n:c", "worker:2: not USER:PASSWORD"),
        ("operator", "run-1:x", "does not start with run-"),
        ("run-key", "k" * 31, "run-key:1: the key is too short"),
        ("oidc-key", "k" * 31, "oidc-key:1: the key is too short"),
    ],
)
def test_invalid_file_stops_the_server(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(SettingsError, match=message) as raised:
        Credentials(tmp_path, SERVER)
    assert content.splitlines()[-1] not in str(raised.value)


def test_missing_folder_or_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        Credentials(tmp_path / "absent", SERVER)
    with pytest.raises(SettingsError, match="has no key"):
        read_run_key(tmp_path)


def test_files_are_read_at_most_once_per_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    known = Credentials(folder, SERVER)
    (folder / "worker").write_text("worker:second\n")
    assert known.identify("worker:first")

    now += 2
    assert not known.identify("worker:first")
