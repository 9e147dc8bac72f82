"""Signed results: a run loads only results that a run of the same deployment has stored.

All runs of a work pool write to one storage, and the stored record names its serializer. A planted pickle would execute
code when it is loaded. So each record begins with an HMAC-SHA256 over its location and content. The signature is
verified before any of the content is parsed.

The worker has the master key. For each run, the worker derives the key of the run's deployment (HKDF, RFC 5869), and
the run receives only this key. With it, a run cannot sign a record for another deployment.
"""

import hashlib
import hmac
from pathlib import Path

from orchestration.errors import PipelineError, SettingsError

MASTER_KEY_BYTES = 32
"""The minimum length of the master key: the length of an HMAC-SHA256 digest."""

_PREFIX = b"hmac-sha256:1:"
_DIGEST_CHARACTERS = 64
_SALT = b"prefect-orchestration stored results"


class UntrustedResultError(PipelineError, ValueError):
    """A stored record without a valid signature for its location by a run of this deployment."""


def read_master_key(file: Path) -> bytes | None:
    """Return the master key of a release; None if the file is absent.

    Raises:
        SettingsError: the key is too short, or cannot be read.
    """
    try:
        key = file.read_bytes().strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(
            f"{file} cannot be read: {error.strerror}. Pass the file with the key of the release's Secret"
        ) from None
    if len(key) < MASTER_KEY_BYTES:
        raise SettingsError(
            f"{file} has a key of {len(key)} bytes: it needs {MASTER_KEY_BYTES} or more. "
            "Put the output of `openssl rand -hex 32` into the Secret"
        )
    return key


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

    Raises:
        SettingsError: the key is invalid.
    """

    def __init__(self, key: str) -> None:
        try:
            self._key = bytes.fromhex(key)
        except ValueError:
            self._key = b""
        if len(self._key) != hashlib.sha256().digest_size:
            raise SettingsError("RESULTS_SIGNING_KEY is invalid: it needs 64 hexadecimal digits. The worker sets it")

    def sign(self, location: str, content: bytes) -> bytes:
        """Return the signed record: the signature, then the content.

        Args:
            location: where the record is stored.
            content: the record without a signature.
        """
        return _PREFIX + self._digest(location, content) + b"\n" + content

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
        if not hmac.compare_digest(signature + end, self._digest(location, content) + b"\n"):
            raise UntrustedResultError(
                f"the stored result {location} has a signature of another deployment, location or content"
            )
        return content

    def _digest(self, location: str, content: bytes) -> bytes:
        name = location.encode(errors="surrogatepass")
        # With the length, no byte of the location can count as a byte of the content.
        signed = b"%s%d:%s" % (_PREFIX, len(name), name)
        return hmac.digest(self._key, signed + content, hashlib.sha256).hex().encode()
