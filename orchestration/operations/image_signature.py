"""Verify the signature of the image that a deploy uses, its bill of materials and its provenance.

`make push SIGN=1` (docker/sign) signs them by cosign.
"""

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from orchestration.errors import ClusterError
from orchestration.operations.environment import run_program
from orchestration.progress import step
from orchestration.settings import ROOT

CHECKS = {
    "signature": ("verify",),
    "bill of materials": ("verify-attestation", "--type", "cyclonedx"),
    "provenance": ("verify-attestation", "--type", "slsaprovenance1"),
}
"""The command of cosign, by what it verifies."""

TIMEOUT_SECONDS = 120.0

_UNSIGNED = (
    "no signatures found",
    "no matching signatures",
    "no matching attestations",
    "none of the attestations matched",
)
"""What cosign prints where a signature or an attestation is missing or by another key. The exit status does not."""

# The key alone is trusted, not Sigstore's log. With this variable cosign does not ask Sigstore for the keys of the log.
_WITHOUT_LOG = {"SIGSTORE_REKOR_PUBLIC_KEY": os.devnull}


def verify(image: str, tag: str, key: Path) -> None:
    """Verify that the owner of a key has signed an image, its bill of materials and its provenance.

    The provenance has to name the tag that led to the image. Otherwise a user who may push could move the tag to an
    older image, which is signed, too.

    Args:
        image: REPOSITORY@DIGEST.
        tag: the tag of that image in the registry.
        key: the file of the public key.

    Raises:
        ClusterError: cosign is missing, something is not signed by the key, or the registry does not answer.
    """
    with step("Verifying the image's signature", "2 s"):
        cosign = run_program([str(ROOT / "docker" / "sign"), "--cosign"]).strip()
        outputs = {name: _run(cosign, name, image, key) for name in CHECKS}
        signed = sorted({_tag(envelope) for envelope in outputs["provenance"].splitlines()})
        if tag not in signed:
            raise ClusterError(
                f"{image} is refused: the registry has it under the tag {tag}, but it was signed as "
                f"{' and '.join(signed)}. Push and sign the image of this checkout: make push SIGN=1"
            )


def _run(cosign: str, name: str, image: str, key: Path) -> str:
    """Verify the part `name` of `CHECKS`, and return the output of cosign.

    Raises:
        ClusterError: the part is not signed by the key, or cannot be verified.
    """
    command = [cosign, *CHECKS[name], "--key", str(key), "--insecure-ignore-tlog=true", image]
    variables = os.environ | _WITHOUT_LOG
    try:
        done = subprocess.run(
            command, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"{image} is refused: cosign has not verified its {name} after {TIMEOUT_SECONDS:.0f} s. Check that the "
            "registry answers"
        ) from None
    if not done.returncode:
        return done.stdout
    file = key.relative_to(ROOT)
    errors = [line.removeprefix("Error: ") for line in done.stderr.splitlines() if line.startswith("Error: ")]
    cause = (errors or done.stderr.splitlines() or [f"cosign ended with exit status {done.returncode}"])[-1]
    if any(text in done.stderr for text in _UNSIGNED):
        raise ClusterError(
            f"{image} is refused: it has no {name} by the key of {file} ({cause.rstrip(': ')}). Push and sign the "
            "image of this checkout with that key: make push SIGN=1"
        )
    raise ClusterError(
        f"{image} is refused: its {name} cannot be verified: {cause}. Check {file}, and that you may pull the image"
    )


def _tag(envelope: str) -> str:
    """Return the tag that a provenance names, from cosign's output for it."""
    statement: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return str(statement["predicate"]["buildDefinition"]["externalParameters"].get("tag"))
