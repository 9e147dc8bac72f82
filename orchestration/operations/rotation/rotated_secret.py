"""The Secret of a rotation. Its keys record how far the rotation is, and Helm keeps its values."""

import base64
import gzip
import json
from collections.abc import Mapping
from datetime import UTC, datetime

import yaml

from orchestration.access.credentials import NEXT_SUFFIX, PREVIOUS_SUFFIX
from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment, Object

ROTATION_ANNOTATION = "prefect.io/rotation"
"""Annotation of a Secret while it is rotated: the time at which the rotation began."""

COPIED_ANNOTATION = f"{ROTATION_ANNOTATION}-copied"
"""Annotation of a Secret with copies in other namespaces: the time at which they got the new value."""

HIDDEN_PREFIX = "."
"""Prefix of the keys of values that have ended. The API reads no file with such a name."""

FIELD_MANAGER = "prefect-rotation"
"""The name under which the API server records when the Secret was changed."""

RELEASE_ANNOTATION = "meta.helm.sh/release-name"
"""Annotation of an object that Helm manages: the name of its release."""

PAGE = "docs/how-to/rotate-passwords.md"


class RotatedSecret:
    """Changes the values of a Secret in steps, each of which is one request.

    Args:
        environment: the environment of the Secret.
        kind: what the Secret is for, as SECRET= names it.
        name: the name of the Secret in the namespace of the releases.

    Raises:
        ClusterError: the Secret does not exist.
    """

    def __init__(self, environment: Environment, kind: str, name: str) -> None:
        self._environment = environment
        self.pod_annotation = f"{ROTATION_ANNOTATION}-{kind}"
        """Annotation of pods that have started with the new values: the rotation."""
        self.name = name
        try:
            self._read(environment.kubectl("get", "secret", name, "--output", "json", "--show-managed-fields"))
        except ClusterError as error:
            if "NotFound" not in str(error):
                raise
            raise ClusterError(
                f"There is no Secret {name} in namespace {environment.namespace}. Deploy first: make deploy "
                f"ENV={environment.name}"
            ) from None

    def _read(self, text: str) -> None:
        found: Object = json.loads(text)
        self._meta: Object = found["metadata"]
        self.data = {key: base64.b64decode(value).decode() for key, value in (found.get("data") or {}).items()}

    @property
    def rotation(self) -> str:
        """When the rotation in progress began; empty if there is none."""
        return str(self._meta.get("annotations", {}).get(ROTATION_ANNOTATION, ""))

    @property
    def release(self) -> str:
        """The release whose chart generated the Secret; empty if a person or another tool created the Secret."""
        return str(self._meta.get("annotations", {}).get(RELEASE_ANNOTATION, ""))

    @property
    def is_changed(self) -> bool:
        """Whether pods that start now get the new values."""
        return bool(self.rotation) and not any(key.endswith(NEXT_SUFFIX) for key in self.data)

    @property
    def changed(self) -> datetime:
        """When the rotation last changed the Secret, by the clock of the API server, to the second."""
        times = [field["time"] for field in self._meta["managedFields"] if field.get("manager") == FIELD_MANAGER]
        return datetime.fromisoformat(max(times))

    @property
    def values(self) -> dict[str, str]:
        """The values that pods get which start now."""
        return self._without_suffix("")

    @property
    def next(self) -> dict[str, str]:
        """The new values, before pods get them; empty afterwards."""
        return self._without_suffix(NEXT_SUFFIX)

    @property
    def previous(self) -> dict[str, str]:
        """The old values, hidden or not, since pods get the new ones; empty before."""
        return {key.removeprefix(HIDDEN_PREFIX): value for key, value in self._without_suffix(PREVIOUS_SUFFIX).items()}

    def _without_suffix(self, suffix: str) -> dict[str, str]:
        others = () if suffix else (NEXT_SUFFIX, PREVIOUS_SUFFIX)
        return {
            key.removesuffix(suffix): value
            for key, value in self.data.items()
            if key.endswith(suffix) and not (others and key.endswith(others))
        }

    def stage(self, values: Mapping[str, str]) -> None:
        """Begin a rotation: write the new values next to the old ones.

        Raises:
            ClusterError: a person rotates the Secret by hand.
        """
        if left := [key for key in self.data if key.endswith((NEXT_SUFFIX, PREVIOUS_SUFFIX))]:
            raise ClusterError(
                f"Secret {self.name} has the key {left[0]}, of a rotation by hand. Complete that rotation: once no pod "
                "has the old value, delete the key"
            )
        began = f"{datetime.now(UTC):%Y%m%dt%H%M%Sz}"
        self.write({f"{key}{NEXT_SUFFIX}": value for key, value in values.items()}, {ROTATION_ANNOTATION: began})

    def change(self) -> None:
        """Give the new values to pods that start from now on, and keep the old ones as the previous."""
        changes: dict[str, str | None] = {}
        for key, value in self.next.items():
            changes[key + NEXT_SUFFIX] = None
            if key in self.data:  # the chart may have deleted it since: oidc.enabled=false
                changes |= {key: value, key + PREVIOUS_SUFFIX: self.data[key]}
        self.write(changes)

    def hide_previous(self) -> None:
        """Hide the old values from pods that read the Secret as files. An interrupted command still has them."""
        changes: dict[str, str | None] = {}
        for key, value in self.previous.items():
            changes |= {key + PREVIOUS_SUFFIX: None, HIDDEN_PREFIX + key + PREVIOUS_SUFFIX: value}
        self.write(changes)

    def forget(self) -> None:
        """End the rotation: delete the old values."""
        annotations = {ROTATION_ANNOTATION: None, COPIED_ANNOTATION: None}
        self.write({key: None for key in self.data if key.endswith(PREVIOUS_SUFFIX)}, annotations)

    def note_copies(self) -> None:
        """Record that the copies have the new values only since now: pods that started before may have the old ones."""
        self.write({}, {COPIED_ANNOTATION: datetime.now(UTC).isoformat()})

    def write(self, values: Mapping[str, str | None], annotations: Mapping[str, str | None] | None = None) -> None:
        """Change values and annotations of the Secret, if the Secret is still as it was read. None deletes.

        Raises:
            ClusterError: another process has changed the Secret.
        """
        data = {
            key: None if value is None else base64.b64encode(value.encode()).decode() for key, value in values.items()
        }
        metadata = {"resourceVersion": self._meta["resourceVersion"], "annotations": annotations or {}}
        patch = json.dumps({"metadata": metadata, "data": data})
        command = ("patch", "secret", self.name, "--type=merge", "--patch-file=/dev/stdin", "--output=json")
        try:
            text = self._environment.kubectl(
                *command, f"--field-manager={FIELD_MANAGER}", "--show-managed-fields", text=patch
            )
        except ClusterError as error:
            if "the object has been modified" not in str(error):
                raise
            raise ClusterError(f"Secret {self.name} has changed meanwhile. Run the command again") from None
        self._read(text)

    def write_history(self) -> None:
        """Write the values into the revisions that Helm keeps of the release. A rollback would bring old ones back."""
        if not self.release:
            return
        selector = f"owner=helm,name={self.release}"
        for record in json.loads(self._environment.kubectl("get", "secrets", "-l", selector, "-o", "json"))["items"]:
            content = json.loads(gzip.decompress(base64.b64decode(base64.b64decode(record["data"]["release"]))))
            manifest = self._with_values(content["manifest"])
            if manifest == content["manifest"]:
                continue
            packed = base64.b64encode(gzip.compress(json.dumps(content | {"manifest": manifest}).encode()))
            patch = json.dumps({"data": {"release": base64.b64encode(packed).decode()}})
            command = ("patch", "secret", record["metadata"]["name"], "--type=merge", "--patch-file=/dev/stdin")
            self._environment.kubectl(*command, text=patch)

    def _with_values(self, manifest: str) -> str:
        """Return the manifest of a release with the values of the Secret."""
        documents = manifest.split("\n---\n")
        for at, text in enumerate(documents):
            if "kind: Secret" not in text or f"name: {self.name}" not in text:
                continue
            found = yaml.safe_load(text)
            if found["kind"] != "Secret" or found["metadata"]["name"] != self.name:
                continue
            new = {
                key: base64.b64encode(self.values[key].encode()).decode() for key in found["data"] if key in self.values
            }
            if new != {key: found["data"][key] for key in new}:
                documents[at] = yaml.safe_dump(found | {"data": found["data"] | new}, sort_keys=False)
        return "\n---\n".join(documents)
