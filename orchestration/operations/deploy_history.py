"""Record which revisions each deploy replaced, and from which inputs each revision was made.

The record is a ConfigMap of the environment. Helm overwrites a revision's description when the revision fails or is
rolled back. Each change is written before a release is touched, so that an interrupted deploy can be rolled back too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from orchestration.errors import ClusterError
from orchestration.operations.environment import RELEASES, Environment, Object

CONFIG_MAP = "prefect-deploys"

MAX_DEPLOYS = 20
"""Deploys in the record: as many as Helm keeps revisions."""


@dataclass
class Deploy:
    """A deploy that can be rolled back. The names of its fields are the keys in the ConfigMap.

    Args:
        at: when it began, in UTC.
        before: the revision of each changed release before the deploy; 0 if the release was not installed.
        is_complete: whether it succeeded and no rollback of it has begun.
    """

    at: str
    before: dict[str, int] = field(default_factory=dict)
    is_complete: bool = False


class DeployHistory:
    """Keeps the deploys of an environment, oldest first. Deploys that were rolled back are removed.

    Args:
        environment: the environment whose ConfigMap holds the record.

    Raises:
        ClusterError: the cluster does not answer, or the record cannot be read.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        text = environment.kubectl(
            "get", "configmap", CONFIG_MAP, "--ignore-not-found", "--output", "go-template={{.data.deploys}}"
        )
        try:
            record: Object = json.loads(text) if text else {}
            self.deploys = [Deploy(**deploy) for deploy in record.get("made", [])]
            self.inputs: dict[str, dict[str, str]] = record.get("inputs", {})
        except (ValueError, TypeError, AttributeError):
            raise ClusterError(
                f"ConfigMap {CONFIG_MAP} in {environment.namespace} has no readable record of deploys. Delete it; "
                "make cannot roll back the deploys before then"
            ) from None

    def is_current(self, release: str, revisions: Sequence[Object], inputs: str) -> bool:
        """Return whether the newest revision is deployed and was made from these inputs.

        Args:
            release: the name of the release.
            revisions: its revisions, oldest first.
            inputs: the hash of its inputs.
        """
        if not revisions or revisions[-1]["status"] != "deployed":
            return False
        return self.inputs.get(release, {}).get(str(revisions[-1]["revision"])) == inputs

    def begin_deploy(self) -> None:
        """Begin a deploy. It continues an incomplete one: a rollback then takes back both."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        unfinished = self.deploys.pop().before if self.deploys and not self.deploys[-1].is_complete else {}
        self.deploys = [*self.deploys, Deploy(now, unfinished)][-MAX_DEPLOYS:]

    def record_before(self, release: str, revisions: Sequence[Object]) -> None:
        """Record which revision of a release runs before the deploy changes it.

        Args:
            release: the name of the release.
            revisions: its revisions, oldest first.
        """
        self.deploys[-1].before.setdefault(release, _running(revisions))
        self._write()

    def record_inputs(self, release: str, revision: int, inputs: str) -> None:
        """Record the hash of the inputs that a revision was made from."""
        recorded = [*self.inputs.get(release, {}).items(), (str(revision), inputs)]
        self.inputs[release] = dict(recorded[-MAX_DEPLOYS:])
        self._write()

    def complete_deploy(self) -> None:
        """Record that the deploy succeeded. A deploy that changed nothing is not recorded."""
        if self.deploys[-1].before:
            self.deploys[-1].is_complete = True
            self._write()
        else:
            self.deploys.pop()

    def begin_rollback(self) -> Deploy:
        """Begin the rollback of the newest deploy, and return that deploy.

        Raises:
            ClusterError: no release ran before that deploy.
        """
        if not self.deploys or not any(self.deploys[-1].before.values()):
            namespace = self._environment.namespace
            raise ClusterError(
                f"There is nothing to roll back to: no deploy in {namespace} is recorded before the present one"
            )
        self.deploys[-1].is_complete = False
        self._write()
        return self.deploys[-1]

    def complete_rollback(self) -> None:
        """Remove the newest deploy, which was rolled back."""
        self.deploys.pop()
        self._write()

    def delete(self) -> None:
        """Delete the record. Its revisions mean nothing once the releases are uninstalled."""
        self._environment.kubectl("delete", "configmap", CONFIG_MAP, "--ignore-not-found")

    def _write(self) -> None:
        inputs = {release: self.inputs.get(release, {}) for release in RELEASES}
        text = json.dumps({"made": [asdict(deploy) for deploy in self.deploys], "inputs": inputs})
        config_map = {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}, "data": {"deploys": text},
        }  # fmt: skip
        self._environment.kubectl("apply", "--filename", "-", text=json.dumps(config_map))


def _running(revisions: Sequence[Object]) -> int:
    """Return the number of the deployed revision, or of the newest that was deployed once; 0 if there is none."""
    good = [revision for revision in revisions if revision["status"] in ("deployed", "superseded")]
    deployed = [revision for revision in good if revision["status"] == "deployed"]
    return int((deployed or good)[-1]["revision"]) if good else 0
