"""What belongs to one deploy: which revisions its releases had before, and from which inputs each revision was made.

It is kept in a ConfigMap of the environment, as Helm overwrites a revision's description when that fails or is taken
back. It is written before a release is touched, so that a deploy that is interrupted can be taken back too.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from orchestration.errors import ClusterError
from orchestration.operations.environment import RELEASES, Environment, Object

CONFIG_MAP = "prefect-deploys"

KEPT = 20
"""Deploys that are remembered: as many as Helm keeps revisions."""


@dataclass
class Deploy:
    """A deploy that can be taken back.

    Args:
        at: when it began.
        before: the revision of each release that it has touched, as it was before; 0 is none.
        is_complete: whether it has ended well, and taking it back has not begun.
    """

    at: str
    before: dict[str, int] = field(default_factory=dict)
    is_complete: bool = False


class Deploys:
    """The deploys of an environment, oldest first; those that were taken back are not among them.

    Args:
        environment: where they are recorded.

    Raises:
        ClusterError: the cluster does not answer, or what is recorded cannot be read.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        text = environment.kubectl(
            "get", "configmap", CONFIG_MAP, "--ignore-not-found", "--output", "go-template={{.data.deploys}}"
        )
        try:
            found: Object = json.loads(text) if text else {}
            self.made = [Deploy(**each) for each in found.get("made", [])]
            self.inputs: dict[str, dict[str, str]] = found.get("inputs", {})
        except (ValueError, TypeError, AttributeError):
            raise ClusterError(
                f"ConfigMap {CONFIG_MAP} in {environment.namespace} has no record of deploys that can be read. Delete "
                "it; deploys before then cannot be taken back by make"
            ) from None

    def begin(self) -> None:
        """Begin a deploy. With one that has not ended well it is one: what was before that is what runs."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        unfinished = self.made.pop().before if self.made and not self.made[-1].is_complete else {}
        self.made = [*self.made, Deploy(now, unfinished)][-KEPT:]

    def touch(self, release: str, history: Sequence[Object]) -> None:
        """Note which revision of a release is there before it is changed.

        Args:
            release: which.
            history: its revisions, oldest first.
        """
        self.made[-1].before.setdefault(release, _running(history))
        self._write()

    def note(self, release: str, revision: int, inputs: str) -> None:
        """Note from which inputs a revision was made."""
        self.inputs[release] = dict(
            [*self.inputs.get(release, {}).items(), (str(revision), inputs)][-KEPT:],
        )
        self._write()

    def end(self) -> None:
        """Note that the deploy has ended well; one that changed nothing is none."""
        if self.made[-1].before:
            self.made[-1].is_complete = True
            self._write()
        else:
            self.made.pop()

    def take_back(self) -> Deploy:
        """Begin to take back the newest deploy; which.

        Raises:
            ClusterError: there is none before it.
        """
        if not self.made or not any(self.made[-1].before.values()):
            where = self._environment.namespace
            raise ClusterError(
                f"There is no deploy in {where} to go back to: none is recorded before the one that runs"
            )
        self.made[-1].is_complete = False
        self._write()
        return self.made[-1]

    def taken_back(self) -> None:
        """Note that the newest deploy was taken back."""
        self.made.pop()
        self._write()

    def forget(self) -> None:
        """Remove the record: without the releases its revisions mean nothing."""
        self._environment.kubectl("delete", "configmap", CONFIG_MAP, "--ignore-not-found")

    def _write(self) -> None:
        inputs = {release: self.inputs.get(release, {}) for release in RELEASES}
        text = json.dumps({"made": [asdict(each) for each in self.made], "inputs": inputs})
        made = {
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": CONFIG_MAP}, "data": {"deploys": text},
        }  # fmt: skip
        self._environment.kubectl("apply", "--filename", "-", text=json.dumps(made))


def _running(history: Sequence[Object]) -> int:
    """The revision that runs, of one that failed the one before it; 0 if there is none."""
    good = [each for each in history if each["status"] in ("deployed", "superseded")]
    deployed = [each for each in good if each["status"] == "deployed"]
    return int((deployed or good)[-1]["revision"]) if good else 0
