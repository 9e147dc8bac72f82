"""Signed results: a run loads only results that a run of the same deployment has stored.

All runs of a work pool write to one storage, and the stored record names its serializer. A planted pickle would execute
code when it is loaded. So each record begins with an HMAC-SHA256 over its location and content. The signature is
verified before any of the content is parsed.

The worker has the master key. For each run, the worker derives the key of the run's deployment (HKDF, RFC 5869), and
the run receives only this key. With it, a run cannot sign a record for another deployment.

After a rotation of the master key, a run also receives the keys of former master keys, by which it verifies records.
"""

import hashlib
import hmac
from pathlib import Path

from orchestration.errors import PipelineError, SettingsError
from orchestration.protocol import FORMER_SIGNING_KEYS_VARIABLE, SIGNING_KEY_VARIABLE

MASTER_KEY_BYTES = 32
"""The minimum length of the master key: the length of an HMAC-SHA256 digest."""

_PREFIX = b"hmac-sha256:1:"
_DIGEST_CHARACTERS = 64
_SALT = b"prefect-orchestration stored results"


class UntrustedResultError(PipelineError, ValueError):
    """A stored record without a valid signature for its location by a run of this deployment."""


def read_master_keys(file: Path) -> list[bytes]:
    """Return the master key of a release, then the former ones whose results are still loaded.

    A file of ASCII text has one key in each line. Any other file is one key. The text of several lines is a former key,
    too, as older releases took it as one.

    Returns:
        The keys; none if the file is absent.

    Raises:
        SettingsError: a key is too short, or cannot be read.
    """
    try:
        content = file.read_bytes().strip()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(
            f"{file} cannot be read: {error.strerror}. Pass the file with the key of the release's Secret"
        ) from None
    lines = [line.strip() for line in content.splitlines() if line.strip()] if content.isascii() else []
    keys = lines or [content]
    for number, key in enumerate(keys, 1):
        if len(key) < MASTER_KEY_BYTES:
            raise SettingsError(
                f"Key {number} of {file} has {len(key)} bytes: each line is a key of {MASTER_KEY_BYTES} or more. "
                "Put the output of `openssl rand -hex 32` into the Secret"
            )
    return [*keys, content] if len(keys) > 1 else keys


def derive_key(master: bytes, scope: str) -> str:
    """Return the signing key of the runs of one scope, in hexadecimal digits.

    Args:
        master: the master key of the release.
        scope: the name of the scope, such as `deployment/ID`.
    """
    pseudorandom = hmac.digest(_SALT, master, hashlib.sha256)
    return hmac.digest(pseudorandom, scope.encode() + b"\x01", hashlib.sha256).hex()


class ResultSigner:
    """Signs the records that the runs of one deployment store, and verifies them.

    Args:
        key: the signing key, as `derive_key` returns it.
        former: keys that sign nothing, but whose records are valid, too.

    Raises:
        SettingsError: a key is invalid.
    """

    def __init__(self, key: str, *former: str) -> None:
        self._keys = [_decode(text) for text in (key, *former)]

    def sign(self, location: str, content: bytes) -> bytes:
        """Return the signed record: the signature, then the content.

        Args:
            location: where the record is stored.
            content: the record without a signature.
        """
        return _PREFIX + _digest(self._keys[0], location, content) + b"\n" + content

    def verify(self, location: str, stored: bytes) -> bytes:
        """Return the content of a signed record.

        Args:
            location: where the record is stored.
            stored: the signed record.

        Raises:
            UntrustedResultError: the signature is absent or wrong.
        """
        if not isinstance(stored, bytes) or not stored.startswith(_PREFIX):
            raise UntrustedResultError(f"the stored result {location} is not signed")
        start = len(_PREFIX)
        signature, end, content = (
            stored[start : start + _DIGEST_CHARACTERS],
            stored[start + _DIGEST_CHARACTERS : start + _DIGEST_CHARACTERS + 1],
            stored[start + _DIGEST_CHARACTERS + 1 :],
        )
        digests = (_digest(key, location, content) for key in self._keys)
        if not any(hmac.compare_digest(signature + end, digest + b"\n") for digest in digests):
            raise UntrustedResultError(
                f"the stored result {location} has a signature of another deployment, location or content"
            )
        return content


def _decode(key: str) -> bytes:
    try:
        decoded = bytes.fromhex(key)
    except ValueError:
        decoded = b""
    if len(decoded) != hashlib.sha256().digest_size:
        names = f"{SIGNING_KEY_VARIABLE} or {FORMER_SIGNING_KEYS_VARIABLE}"
        raise SettingsError(f"{names} is invalid: a key needs 64 hexadecimal digits. The worker sets both")
    return decoded


def _digest(key: bytes, location: str, content: bytes) -> bytes:
    name = location.encode(errors="surrogatepass")
    # With the length, no byte of the location can count as a byte of the content.
    signed = b"%s%d:%s" % (_PREFIX, len(name), name)
    return hmac.digest(key, signed + content, hashlib.sha256).hex().encode()
