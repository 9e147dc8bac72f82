"""Credentials of the Prefect API, by role.

A folder holds one file for each role, as a mounted Secret does. A line of `operator`, `viewer`, `worker`, `reconciler`
or `sync` is a credential `USER:PASSWORD`; several lines give each person a login. From `run-key` the worker derives a
credential for each flow run. With a line of `oidc-key` as its password, oauth2-proxy calls the API for people who have
logged in. While `make rotate` runs, files with the suffix `.next` hold credentials that callers will
get, and files with the suffix `.previous` those that callers may still have. All of them are valid.
"""

import base64
import binascii
import hashlib
import hmac
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from orchestration.access.routes import Role
from orchestration.errors import SettingsError

AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"
"""The setting of Prefect's client with the credential."""

RUN_CREDENTIALS_VARIABLE = "RUN_CREDENTIALS"
"""Names the folder with the key from which a worker derives the API credential of each flow run."""

RUN_KEY_FILE = "run-key"
OIDC_KEY_FILE = "oidc-key"
NEXT_SUFFIX, PREVIOUS_SUFFIX = ".next", ".previous"
RUN_USER_PREFIX = "run-"
MIN_KEY_CHARACTERS = 32
"""The minimum length of a key."""

RELOAD_SECONDS = 1.0
"""Minimum seconds between two reads of the folder. The kubelet updates a mounted Secret within about a minute."""


@dataclass(frozen=True)
class Identity:
    """A caller of the API.

    Args:
        user: the name in the audit log.
        role: what the credential permits; None for a person in no group that has a role.
        run_id: the flow run of a run's credential.
        is_person: whether oauth2-proxy has logged in the user.
    """

    user: str
    role: Role | None
    run_id: UUID | None = None
    is_person: bool = False


def basic_credential(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return USER:PASSWORD of a request; None unless exactly one valid header has them."""
    found = [value for name, value in headers if name == b"authorization"]
    if len(found) != 1:
        return None
    scheme, _, encoded = found[0].partition(b" ")
    if scheme.lower() != b"basic":
        return None
    try:
        return base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None


def sign_run(key: str, run_id: UUID) -> str:
    """Return the credential `USER:PASSWORD` of a flow run, valid for this run alone."""
    signature = hmac.digest(key.encode(), f"prefect api credential of flow run {run_id}".encode(), hashlib.sha256)
    return f"{RUN_USER_PREFIX}{run_id}:{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


def read_run_key(folder: str | os.PathLike[str]) -> str:
    """Return the key that signs the credentials of runs.

    Raises:
        SettingsError: the folder has no valid key.
    """
    keys = _read_folder(Path(folder)).keys
    if not keys:
        raise SettingsError(f"{Path(folder) / RUN_KEY_FILE} has no key. Mount the Secret with the API's credentials")
    return keys[0]


def run_credential(run_id: UUID) -> str:
    """Return the credential that a worker gives to a flow run; empty if `RUN_CREDENTIALS` names no folder.

    Raises:
        SettingsError: the folder has no valid key.
    """
    folder = os.environ.get(RUN_CREDENTIALS_VARIABLE)
    return sign_run(read_run_key(folder), run_id) if folder else ""


@dataclass(frozen=True)
class _Content:
    identities: Mapping[bytes, Identity]
    keys: tuple[str, ...]
    oidc_keys: tuple[str, ...]


def credential_hash(credential: str) -> str:
    """Return the SHA-256 of a credential, by which others find who has the credential."""
    return _digest(credential).hex()


def _digest(credential: str) -> bytes:
    # A lookup by hash takes a time that does not depend on the credential.
    return hashlib.sha256(credential.encode(errors="surrogatepass")).digest()


def _read_folder(folder: Path) -> _Content:
    """Read all files of the folder.

    Raises:
        SettingsError: the folder cannot be read, or a file has an unknown name or an invalid line.
    """
    identities: dict[bytes, Identity] = {}
    keys: dict[str, list[str]] = {RUN_KEY_FILE: [], OIDC_KEY_FILE: []}
    roles = {role.value: role for role in Role if role is not Role.RUN}
    try:
        # `run-key` sorts before `run-key.next` and `run-key.previous`: the first key signs.
        # The kubelet's entries start with two dots, ended credentials with one (`RotatedSecret.hide_previous`).
        for file in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            lines = [(number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if line.strip()]
            name = file.name.removesuffix(NEXT_SUFFIX).removesuffix(PREVIOUS_SUFFIX)
            if name in keys:
                for number, line in lines:
                    if len(line) < MIN_KEY_CHARACTERS:
                        raise SettingsError(
                            f"{file}:{number}: the key is too short. Use {MIN_KEY_CHARACTERS} random characters or more"
                        )
                if name == OIDC_KEY_FILE and len(lines) > 1:
                    raise SettingsError(f"{file}: oauth2-proxy sends one key. Keep one line")
                keys[name] += [line for _, line in lines]
            elif role := roles.get(name):
                for number, line in lines:
                    user, _, password = line.partition(":")
                    if not user or not password or user.startswith(RUN_USER_PREFIX):
                        raise SettingsError(
                            f"{file}:{number}: not USER:PASSWORD with a user that does not start with {RUN_USER_PREFIX}"
                        )
                    identities.setdefault(_digest(line), Identity(user, role))
            else:
                allowed = ", ".join([*roles, *keys])
                raise SettingsError(f"{file}: no role has this name. Name the file after one of: {allowed}")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The credentials in {folder} cannot be read: {error}") from None
    return _Content(identities, tuple(keys[RUN_KEY_FILE]), tuple(keys[OIDC_KEY_FILE]))


class Credentials:
    """Identifies callers by the credentials in a folder, and reloads the folder when its content changes.

    Args:
        folder: the mounted Secret.
        server: the server's own credential, which has the role operator.

    Raises:
        SettingsError: the folder's content is invalid. Invalid content later keeps the last valid content in use.
    """

    def __init__(self, folder: str | os.PathLike[str], server: str) -> None:
        self._folder = Path(folder)
        self._server = {_digest(server): Identity(server.partition(":")[0], Role.OPERATOR)}
        self._content = _read_folder(self._folder)
        self._loaded = time.monotonic()
        self.problem = ""
        """The reason why the newest content of the folder is not used; empty if it is used."""

    def identify(self, credential: str) -> Identity | None:
        """Return the caller of this credential; None if the credential is invalid."""
        self._reload()
        digest = _digest(credential)
        if found := self._server.get(digest) or self._content.identities.get(digest):
            return found
        user, _, _ = credential.partition(":")
        try:
            run_id = UUID(user.removeprefix(RUN_USER_PREFIX))
        except ValueError:
            return None
        for key in self._content.keys:
            if hmac.compare_digest(sign_run(key, run_id).encode(), credential.encode(errors="surrogatepass")):
                return Identity(user, Role.RUN, run_id)
        return None

    def forwarded_user(self, credential: str) -> str | None:
        """Return the person for whom oauth2-proxy sends a request; None for any credential without its key."""
        self._reload()
        user, _, password = credential.rpartition(":")
        # The key in the environment of oauth2-proxy may end with a newline, as a file may.
        given = password.rstrip("\r\n").encode(errors="surrogatepass")
        is_known = any(hmac.compare_digest(key.encode(), given) for key in self._content.oidc_keys)
        return user if is_known and user else None

    def _reload(self) -> None:
        if time.monotonic() - self._loaded < RELOAD_SECONDS:
            return
        self._loaded = time.monotonic()
        try:
            self._content = _read_folder(self._folder)
            self.problem = ""
        except SettingsError as error:
            self.problem = str(error)
