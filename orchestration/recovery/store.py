"""The store of backups: a folder or an S3 bucket, with each backup's dump and a file of facts about the dump.

A dump is stored once it is verified, and its facts last: a backup without facts is incomplete, and is none. Encrypted
dumps are files in the age format (https://age-encryption.org). The backup's pod has public keys alone, so who takes
over the pod cannot read older backups, and `age --decrypt` opens a dump without this project.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from orchestration.errors import PipelineError, SettingsError

NEWEST = "newest"
"""Names the newest backup of a store."""

_NAME_FORMAT = "%Y%m%dT%H%M%SZ"

INCOMPLETE_AFTER = timedelta(days=1)
"""How old the dump of an incomplete backup is when it is deleted."""


class BackupError(PipelineError):
    """A backup that is absent, damaged, or cannot be stored, read or decrypted."""


@dataclass(frozen=True)
class Backup:
    """Facts about a backup.

    Args:
        name: its name: the time of the snapshot.
        time: the time of the snapshot, in ISO 8601.
        revision: the revision of the schema.
        tables: the number of tables.
        rows: the number of rows of all tables.
        size: the size of the stored dump in bytes.
        sha256: the hash of the stored dump.
        is_encrypted: whether the dump is encrypted.
        counts: the number of rows of each table, and the revision, as the script `backup` wrote them.
    """

    name: str
    time: str
    revision: str
    tables: int
    rows: int
    size: int
    sha256: str
    is_encrypted: bool
    counts: str

    @property
    def file(self) -> str:
        """The name of the stored dump."""
        return f"{self.name}.dump{'.age' if self.is_encrypted else ''}"


class Store:
    """A folder or bucket with backups.

    Args:
        url: `file:///PATH` or `s3://BUCKET/PREFIX`.
        endpoint: the URL of an S3 service that is not Amazon's; empty for Amazon's.
        region: the region of the bucket; empty for the service's default.

    Raises:
        SettingsError: the URL names no such place.
    """

    def __init__(self, url: str, endpoint: str = "", region: str = "") -> None:
        import fsspec

        client = {"endpoint_url": endpoint, "region_name": region}
        given = {name: value for name, value in client.items() if value}
        options: dict[str, Any] = {"client_kwargs": given} if url.startswith("s3://") else {}
        if not url.startswith(("s3://", "file:///")):
            raise SettingsError(f"{url} is no place for backups. Write file:///PATH or s3://BUCKET/PREFIX")
        self.url = url.rstrip("/")
        self._files, self._root = fsspec.url_to_fs(self.url, **options)

    def backups(self) -> list[Backup]:
        """Return all complete backups, the newest first.

        Raises:
            BackupError: the store cannot be read.
        """
        found = [Backup(**json.loads(self._files.cat_file(path))) for path in self._paths() if path.endswith(".json")]
        return sorted(found, key=lambda backup: backup.name, reverse=True)

    def put(self, folder: Path, recipients: Sequence[str]) -> Backup:
        """Store the verified dump in a folder, and return its facts.

        Args:
            folder: the folder with `dump`, `counts` and `time`.
            recipients: the public keys that the dump is encrypted for; none to store the dump as it is.

        Raises:
            SettingsError: a recipient is no public key.
            BackupError: the store does not hold what was written.
        """
        dump = folder / "dump"
        if recipients:
            dump = encrypt(dump, recipients)
            (folder / "dump").unlink()  # the folder has space for two
        counts = (folder / "counts").read_text()
        lines = dict(line.rsplit("|", 1) for line in counts.splitlines())
        revision = lines.pop("revision")
        time = (folder / "time").read_text().strip()
        name = datetime.fromisoformat(time).astimezone(UTC).strftime(_NAME_FORMAT)
        backup = Backup(
            name, time, revision, len(lines), sum(map(int, lines.values())), dump.stat().st_size, _hash(dump),
            bool(recipients), counts,
        )  # fmt: skip
        self._files.makedirs(self._root, exist_ok=True)
        path = f"{self._root}/{backup.file}"
        facts = f"{self._root}/{backup.name}.json"
        try:
            self._files.put_file(str(dump), path)
            # A volume that is full or a proxy that cuts a body off would otherwise be noticed at the restore.
            copy = folder / "copy"
            self._files.get_file(path, str(copy))
            if _hash(copy) != backup.sha256:
                raise BackupError(
                    f"{self.url} does not hold what was written to {backup.file}. Check its space and its log"
                )
            copy.unlink()
            self._files.pipe_file(f"{facts}.new", json.dumps(asdict(backup), indent=2).encode())
            self._files.mv(f"{facts}.new", facts)
        except BaseException:
            # Incomplete backups of a day would fill the volume for good.
            for part in (path, f"{facts}.new"):
                with contextlib.suppress(Exception):
                    self._files.rm_file(part)
            raise
        return backup

    def fetch(self, name: str, folder: Path, identity: Path | None) -> Backup:
        """Copy a backup's dump and counts into a folder, decrypted, and return its facts.

        Args:
            name: the backup's name, or `NEWEST`.
            folder: the folder for `dump` and `counts`.
            identity: a file with age's secret keys; None for a backup that is not encrypted.

        Raises:
            BackupError: the backup is absent or damaged, or the identity does not open it.
        """
        backups = self.backups()
        chosen = [backup for backup in backups if name in (backup.name, NEWEST)]
        if not chosen:
            known = ", ".join(backup.name for backup in backups[:10]) or "none"
            raise BackupError(f"There is no backup {name} in {self.url}. There are: {known}. Choose one of these")
        backup = chosen[0]
        if backup.is_encrypted and not identity:
            raise BackupError(f"Backup {backup.name} is encrypted. Name the file with age's secret key: IDENTITY=FILE")
        stored = folder / backup.file
        folder.mkdir(parents=True, exist_ok=True)
        self._files.get_file(f"{self._root}/{backup.file}", str(stored))
        if _hash(stored) != backup.sha256:
            raise BackupError(f"Backup {backup.name} is damaged: {backup.file} has another hash. Choose another backup")
        if backup.is_encrypted:
            assert identity
            decrypt(stored, folder / "dump", identity)
            stored.unlink()
        else:
            stored.rename(folder / "dump")
        (folder / "counts").write_text(backup.counts)
        (folder / "time").write_text(backup.time)
        return backup

    def prune(self, last: int, days: int, now: datetime) -> list[str]:
        """Delete backups that are neither new nor young enough; return their names. Old incomplete ones go, too.

        Args:
            last: how many of the newest backups stay, whatever their age. At least one stays.
            days: for how many days a backup stays.
            now: the time.
        """
        oldest = (now - timedelta(days=days)).strftime(_NAME_FORMAT)
        complete = self.backups()
        deleted = [backup for backup in complete[max(last, 1) :] if backup.name < oldest]
        for backup in deleted:
            # The facts first: without them the rest is an incomplete backup.
            self._files.rm_file(f"{self._root}/{backup.name}.json")
            self._files.rm_file(f"{self._root}/{backup.file}")
        kept = {backup.name for backup in complete}
        abandoned = (now - INCOMPLETE_AFTER).strftime(_NAME_FORMAT)
        for path in self._paths():
            name = path.rpartition("/")[2].partition(".")[0]
            if name not in kept and name < abandoned:
                self._files.rm_file(path)
        return [backup.name for backup in deleted]

    def _paths(self) -> list[str]:
        """Return the paths of this module's files. Other files in the folder are none of its business."""
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        paths = self._files.ls(self._root, detail=False)
        return [path for path in paths if re.search(r"/\d{8}T\d{6}Z\.(json|json\.new|dump|dump\.age)$", path)]


def time_of(name: str) -> datetime:
    """Return the time of a backup, from its name.

    Raises:
        BackupError: the name is none of a backup.
    """
    try:
        return datetime.strptime(name, _NAME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise BackupError(f"{name!r} is no name of a backup. Choose one that `make backups` lists") from None


def encrypt(file: Path, recipients: Sequence[str]) -> Path:
    """Encrypt a file for public keys, and return the path of the encrypted file.

    Raises:
        SettingsError: a recipient is no public key of age.
    """
    import pyrage

    try:
        keys = [pyrage.x25519.Recipient.from_str(recipient) for recipient in recipients]
    except pyrage.RecipientError as error:
        raise SettingsError(
            f"backup.encryption.recipients has a key that is not age's: {error}. It begins with age1"
        ) from None
    encrypted = file.with_suffix(".age")
    pyrage.encrypt_file(str(file), str(encrypted), keys)
    return encrypted


def decrypt(file: Path, target: Path, identity: Path) -> None:
    """Decrypt a file with the secret keys in another file.

    Raises:
        BackupError: the identity has no key of age, or none of its keys opens the file.
    """
    import pyrage

    lines = [line.strip() for line in identity.read_text().splitlines()]
    try:
        keys = [pyrage.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
        pyrage.decrypt_file(str(file), str(target), keys)
    except (pyrage.IdentityError, pyrage.DecryptError) as error:
        raise BackupError(
            f"The identity does not open {file.name}: {error}. Name the key that it was encrypted for"
        ) from None


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
