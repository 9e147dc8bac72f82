"""Jobs of `make restore` that are interrupted. The cluster is a fake whose Jobs take some polls to end."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from orchestration.errors import ClusterError
from orchestration.operations import backups, restore
from orchestration.operations.environment import Environment, Object

TEMPLATE: Object = {
    "metadata": {"uid": "u"},
    "spec": {"jobTemplate": {"metadata": {"labels": {}}, "spec": {"template": {"spec": {}}}}},
}


@dataclass
class Story:
    """What the fake cluster does.

    Args:
        polls: what each read of the Job answers: a condition, an error, or nothing. The last one stays.
        waiting: why the pod waits; empty if it runs.
        is_deletable: whether `kubectl delete` of the Job succeeds.
        calls: the arguments of kubectl, as it was called.
    """

    polls: list[str | BaseException] = field(default_factory=list)
    waiting: str = ""
    is_deletable: bool = True
    calls: list[str] = field(default_factory=list)

    @property
    def is_gone(self) -> bool:
        return any(call.startswith("delete job") for call in self.calls) and self.is_deletable


class Cluster(Environment):
    """Has one Job, which ends as a story says."""

    story: Story

    @property
    def runs_namespace(self) -> str:
        return self.namespace

    def kubectl(self, *arguments: str, text: str | None = None) -> str:  # noqa: ARG002
        self.story.calls.append(" ".join(arguments))
        match arguments:
            case ("get", "job", *_):
                answer = self.story.polls.pop(0) if len(self.story.polls) > 1 else self.story.polls[0]
                if isinstance(answer, BaseException):
                    raise answer
                conditions = [{"type": answer, "status": "True"}] if answer else []
                return json.dumps({"status": {"conditions": conditions}})
            case ("get", "pods", *_):
                return json.dumps({"items": [self._pod()]})
            case ("logs", *_):
                return "a log\n"
            case ("delete", "job", *_):
                if not self.story.is_deletable:
                    raise ClusterError("timed out waiting for the condition")
        return ""

    def _pod(self) -> Object:
        created = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        is_ended = self.story.polls[0] in ("Complete", "Failed")
        state = {"waiting": {"reason": self.story.waiting}} if self.story.waiting else {"running": {}}
        return {
            "metadata": {"name": "pod", "uid": "p", "creationTimestamp": created},
            "spec": {"containers": [{"name": "store"}]},
            "status": {
                "phase": self.story.polls[0] if is_ended else "Running",
                "containerStatuses": [{"name": "store", "state": state, "restartCount": 0}],
            },
        }


def _cluster(polls: Iterable[str | BaseException], waiting: str = "", *, is_deletable: bool = True) -> Cluster:
    cluster = Cluster("test", "test", "prefect")
    object.__setattr__(cluster, "story", Story([*polls], waiting, is_deletable))
    return cluster


@pytest.fixture(autouse=True)
def short_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups, "POLL_SECONDS", 0)


def _run(cluster: Cluster) -> str:
    return backups.run_job(cluster, TEMPLATE, "settle", lambda _: None)


def test_failed_poll_is_repeated() -> None:
    cluster = _cluster(["", ClusterError("the connection was refused"), "", "Complete"])
    assert _run(cluster) == "a log\n"
    assert not cluster.story.is_gone


@pytest.mark.parametrize(
    ("polls", "waiting", "error"),
    [
        (["", KeyboardInterrupt(), ""], "", KeyboardInterrupt),
        ([""], "ErrImagePull", ClusterError),
    ],
)
def test_job_that_is_given_up_is_gone_before_anything_else_happens(
    polls: list[str | BaseException], waiting: str, error: type[BaseException]
) -> None:
    cluster = _cluster(polls, waiting)
    with pytest.raises(error):
        _run(cluster)
    assert cluster.story.is_gone
    assert "--cascade=foreground --wait" in cluster.story.calls[-1]


def test_failed_job_stays_with_its_log() -> None:
    cluster = _cluster(["Failed"])
    with pytest.raises(ClusterError, match="a log"):
        _run(cluster)
    assert not cluster.story.is_gone


def test_job_that_has_succeeded_meanwhile_is_a_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backups, "POLL_RETRY_SECONDS", -1)
    assert _run(_cluster([ClusterError("timeout"), "Complete"])) == "a log\n"
    with pytest.raises(KeyboardInterrupt):
        _run(_cluster([KeyboardInterrupt(), "Complete"]))
    assert capsys.readouterr().err == "a log\n"


def test_nothing_starts_while_an_interrupted_job_may_replace_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Job of an unreachable node cannot be proven gone. The last kubectl names it, and no replica is added."""
    cluster = _cluster(["", KeyboardInterrupt(), ""], is_deletable=False)
    monkeypatch.setattr(backups, "read_template", lambda _: TEMPLATE)
    monkeypatch.setattr(restore, "_load", lambda *_: "20261129T120000Z")
    monkeypatch.setattr(restore, "_pack_executions", lambda _: b"")
    started = []
    monkeypatch.setattr(restore, "_stop", lambda _: datetime.now(UTC))
    monkeypatch.setattr(restore, "_start", lambda _: started.append(cluster.story.is_gone))

    def settle(*_: object, **__: object) -> None:
        _run(cluster)

    monkeypatch.setattr(restore, "_settle", settle)
    monkeypatch.setattr(backups, "refuse_unended", lambda *_: None)
    with pytest.raises(ClusterError, match=r"may still run: timed out .*delete job .* stay stopped"):
        restore.restore(cluster, "newest", identity=None, start_unknown=False)
    assert started == []
    cluster.story.is_deletable, cluster.story.polls = True, ["", KeyboardInterrupt(), ""]
    with pytest.raises(KeyboardInterrupt):
        restore.restore(cluster, "newest", identity=None, start_unknown=False)
    assert started == [True], "once the Job is gone"


def test_unended_job_of_another_restore_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Object] = [
        {"metadata": {"name": "prefect-server-backup-restore-1129120000"}, "status": {}},
        {"metadata": {"name": "prefect-server-backup-29612345"}, "status": {}},
    ]
    monkeypatch.setattr(Cluster, "objects", lambda *_: jobs)
    with pytest.raises(ClusterError, match="Job prefect-server-backup-restore-1129120000 of another restore"):
        backups.refuse_unended(_cluster([""]), ("restore", "settle"))
    jobs[0]["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    backups.refuse_unended(_cluster([""]), ("restore", "settle"))
