"""What is decided about one run after a restore, from the run and the evidence alone."""

import gzip
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from orchestration.errors import SettingsError
from orchestration.protocol import CLUSTER_LABEL, MAIN_CONTAINER, POOL_LABEL, RUN_LABEL, SETTLED_LABEL
from orchestration.recovery import executions
from orchestration.recovery.executions import Execution, Outcome
from orchestration.recovery.settle import HELD, KEPT_COLUMNS, LEASE, Moment, Settlement, decide, decide_unknown

RUN, POOL, FLOW = (f"{number * 8}-0000-4000-8000-000000000000" for number in "123")
BACKUP = datetime(2026, 11, 29, 12, tzinfo=UTC)
MOMENT = Moment(BACKUP, BACKUP + timedelta(hours=1))
CLAIM = "0123456789ab"
JOB = f"brave-fox-{CLAIM}"

Object = dict[str, Any]


def _run(type_: str, *, name: str = "", due: datetime = BACKUP, deployment: str | None = "d", job: str = "") -> Object:
    state = {
        "id": "s", "type": type_, "name": name or type_.capitalize(), "message": "", "timestamp": BACKUP.isoformat(),
        "state_details": {},
    }  # fmt: skip
    return {
        "id": RUN, "name": "brave-fox", "state": state, "next_scheduled_start_time": due.isoformat(),
        "expected_start_time": due.isoformat(), "deployment_id": deployment, "infrastructure_pid": job,
        "pool_type": "kubernetes", "labels": {},
    }  # fmt: skip


def _execution(outcome: Outcome, minutes: float = 5) -> Execution:
    created_at = BACKUP + timedelta(minutes=minutes)
    return Execution(
        RUN, "brave-fox", JOB, "prefect", "c", POOL, FLOW, "etl", "d", outcome, created_at, exit_code=3, claim=CLAIM
    )


def _after(found: Settlement | None) -> str:
    return f"{found.after}{' person' if found.needs_person else ''}" if found else "unchanged"


LIVE, ENDED, FAILED, GONE = Outcome.RUNNING, Outcome.COMPLETED, Outcome.FAILED, Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("run", "outcome", "previous", "after"),
    [
        # In the backup, in the cluster, in the replaced database.
        ("SCHEDULED", None, None, "Held person"),
        ("SCHEDULED", GONE, None, "Held person"),
        ("SCHEDULED", LIVE, None, "Running"),
        ("SCHEDULED", Outcome.WAITING, None, "Pending"),
        ("SCHEDULED", ENDED, None, "Completed"),
        ("SCHEDULED", FAILED, None, "Failed person"),
        ("SCHEDULED", None, "SCHEDULED", "unchanged"),
        ("SCHEDULED", None, "COMPLETED", "Completed"),
        ("SCHEDULED", None, "RUNNING", "Held person"),
        ("SCHEDULED", ENDED, "RUNNING", "Completed"),
        ("SCHEDULED", LIVE, "RUNNING", "Running"),
        ("SCHEDULED", LIVE, "COMPLETED", "Completed"),  # its pod is about to end
        ("SCHEDULED", GONE, "CRASHED", "Crashed"),
        ("RUNNING", None, None, "Held person"),
        ("RUNNING", FAILED, "SCHEDULED", "Scheduled"),  # it awaits its retry
        ("PENDING", None, None, "Held person"),
        ("CANCELLING", None, None, "Cancelled"),
        ("CANCELLING", LIVE, None, "Cancelling"),
        ("SCHEDULED", LIVE, "CANCELLING", "Cancelling"),
        ("CANCELLING", LIVE, "RUNNING", "Running"),
        ("PAUSED", None, None, "unchanged"),
        ("PAUSED", None, "COMPLETED", "Completed"),
        ("COMPLETED", None, None, "unchanged"),
        ("COMPLETED", ENDED, "FAILED", "unchanged"),
        ("FAILED", LIVE, None, "Running"),  # a person has retried it
        ("CRASHED", LIVE, None, "Running"),
        ("CRASHED", None, None, "Crashed person"),
        ("CRASHED", ENDED, None, "Completed"),
    ],
)
def test_strongest_evidence_decides(run: str, outcome: Outcome | None, previous: str | None, after: str) -> None:
    execution = _execution(outcome) if outcome else None
    found = decide(_run(run), execution, _run(previous) if previous else None, MOMENT)
    assert _after(found) == after


PAUSE = {"pause_key": "1", "pause_timeout": "2026-11-29T13:00:00Z", "run_input_keyset": {"response": "r"}}


def _paused() -> Object:
    run = _run("PAUSED", job=f"prefect:{JOB}")
    run["state"]["state_details"] = PAUSE
    return run


@pytest.mark.parametrize("state", ["RUNNING", "SCHEDULED", "PAUSED"])
def test_flow_that_waits_for_a_person_waits_on(state: str) -> None:
    """The loop of `pause_flow_run` takes `Running` for an approval."""
    found = decide(_run(state), _execution(LIVE, minutes=-5), _paused(), MOMENT)
    assert found
    assert found.state
    assert (found.state["type"], found.state["state_details"]) == ("PAUSED", PAUSE)
    assert (found.job, found.is_live, found.holds_slot) == (f"prefect:{JOB}", True, False)
    lost = decide_unknown(_execution(LIVE, minutes=-5), _paused() | dict.fromkeys(KEPT_COLUMNS), "queue")
    assert lost
    assert lost.state
    assert (lost.after, lost.state["state_details"]) == ("Paused", PAUSE)


def test_flow_that_waited_at_the_backup_waits_on_unless_a_later_job_executes_it() -> None:
    found = decide(_paused(), _execution(LIVE, minutes=-5), None, MOMENT)
    assert found
    assert (found.state, found.after, found.is_live) == (None, "Paused", True)
    assert _after(decide(_paused(), _execution(LIVE, minutes=5), None, MOMENT)) == "Running"


def test_suspended_run_keeps_what_resumes_it() -> None:
    found = decide(_run("RUNNING"), None, _paused(), MOMENT)
    assert found
    assert found.state
    assert found.state["state_details"] == PAUSE


@pytest.mark.parametrize(
    ("run", "after"),
    [
        ("SCHEDULED", "Held person"),  # it awaits its retry
        ("PENDING", "Held person"),
        ("RUNNING", "Held person"),
        ("PAUSED", "unchanged"),
        ("CRASHED", "Crashed person"),
    ],
)
@pytest.mark.parametrize("outcome", [ENDED, FAILED])
def test_attempt_that_ended_before_the_state_of_the_backup_ends_nothing(run: str, outcome: Outcome, after: str) -> None:
    ended = replace(_execution(outcome, minutes=-5), ended_at=BACKUP - timedelta(seconds=1))
    assert _after(decide(_run(run), ended, None, MOMENT)) == after
    assert _after(decide(_run("SCHEDULED"), ended, _run("RUNNING"), MOMENT)) == "Held person"


def test_attempt_before_a_retry_that_is_due_later_leaves_the_retry() -> None:
    due = MOMENT.stopped + timedelta(minutes=1)
    ended = _execution(FAILED, minutes=-5)
    assert decide(_run("SCHEDULED", due=due), ended, None, MOMENT) is None


@pytest.mark.parametrize(("outcome", "after"), [(ENDED, "Paused person"), (FAILED, "Failed person")])
def test_suspended_run_is_not_completed(outcome: Outcome, after: str) -> None:
    """The engine ends with exit code 0 when its flow is suspended."""
    assert _after(decide(_run("PAUSED"), _execution(outcome), None, MOMENT)) == after


def test_run_that_is_due_after_the_stop_starts() -> None:
    due = MOMENT.stopped + timedelta(seconds=1)
    assert decide(_run("SCHEDULED", due=due), None, None, MOMENT) is None
    assert _after(decide(_run("SCHEDULED", due=due), _execution(ENDED), None, MOMENT)) == "Completed"


def test_pod_that_outlives_its_ended_run_changes_nothing() -> None:
    assert decide(_run("COMPLETED"), _execution(LIVE, minutes=-5), None, MOMENT) is None


def test_lease_of_the_slot_of_a_live_run_is_kept() -> None:
    """Without it the server releases the slot at the end of the run, and again when the lease expires."""
    newest = _run("RUNNING")
    newest["state"]["state_details"] = {LEASE: POOL}
    elsewhere = newest | {"pool_type": "docker"}
    lost = newest | dict.fromkeys(KEPT_COLUMNS)
    for found in (
        decide(_run("SCHEDULED"), _execution(LIVE), newest, MOMENT),
        decide(_run("SCHEDULED") | {"pool_type": "docker"}, None, elsewhere, MOMENT),
        decide_unknown(_execution(LIVE), lost, "queue"),
    ):
        assert found
        assert found.state
        assert found.state["state_details"] == {LEASE: POOL}


def test_running_run_with_its_recorded_job_keeps_its_state() -> None:
    found = decide(_run("RUNNING", job=f"prefect:{JOB}"), _execution(LIVE), None, MOMENT)
    assert found
    assert (found.state, found.is_live) == (None, True)


def test_state_of_a_live_run_ends_with_the_claim_of_its_job() -> None:
    found = decide(_run("SCHEDULED"), _execution(LIVE), None, MOMENT)
    assert found
    assert found.state
    assert found.state["id"].endswith(CLAIM), "so that a later claim fences the Job"


def test_crashed_run_is_not_retried_again() -> None:
    found = decide(_run("CRASHED"), None, None, MOMENT)
    assert found
    assert (found.labels, found.state) == ({SETTLED_LABEL: "s"}, None)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"labels": {CLUSTER_LABEL: "another"}}, "cluster another"),
        ({"pool_type": "docker"}, "a work pool of type docker"),
        ({"pool_type": ""}, "a process without a work pool"),
    ],
)
def test_run_that_is_executed_elsewhere_keeps_its_newest_state(changes: Object, place: str) -> None:
    own = ["own", "hash"]
    found = decide(_run("RUNNING") | changes, None, None, MOMENT, clusters=own)
    assert found
    assert (found.state, found.is_live, found.needs_person) == (None, True, True)
    assert place in found.reason
    newest = _run("RUNNING", job=f"prefect:{JOB}") | changes
    found = decide(_run("SCHEDULED") | changes, None, newest, MOMENT, clusters=own)
    assert found
    assert found.state
    assert (_after(found), found.job, found.labels) == ("Running person", f"prefect:{JOB}", newest["labels"])
    assert found.state["id"].endswith(CLAIM), "so that a later claim fences the Job"
    unknown = decide(_run("SCHEDULED") | changes, None, None, MOMENT, clusters=own)
    assert _after(unknown) == "Held person", "it may have been executed since"


@pytest.mark.parametrize("clusters", [["own", "hash"], []])
def test_run_of_this_cluster_or_an_unknown_one_is_held(clusters: list[str]) -> None:
    run = _run("RUNNING") | {"labels": {CLUSTER_LABEL: "hash"}}
    assert _after(decide(run, None, None, MOMENT, clusters=clusters)) == "Held person"


def test_run_in_progress_stays_so_if_jobs_and_pods_were_not_read() -> None:
    """As after a recovery into another Cluster of CloudNativePG, whose pods of runs are alive."""
    newest = _run("RUNNING", job=f"prefect:{JOB}") | {"labels": {CLUSTER_LABEL: "c"}}
    for run in (_run("SCHEDULED"), _run("CRASHED")):
        found = decide(run, None, newest, MOMENT, is_cluster_read=False)
        assert found
        assert found.state
        assert (_after(found), found.job, found.labels) == ("Running person", f"prefect:{JOB}", newest["labels"])
        assert "before the restore, and Jobs and pods were not read. Look" in found.reason
        assert found.state["id"].endswith(CLAIM), "so that a later claim fences the Job"
    recorded = decide(_run("RUNNING", job=f"prefect:{JOB}"), None, newest, MOMENT, is_cluster_read=False)
    assert recorded
    assert (recorded.state, recorded.job) == (None, f"prefect:{JOB}")
    held = decide(_run("RUNNING"), None, None, MOMENT, is_cluster_read=False)
    assert held
    assert (_after(held), "Jobs and pods were not read" in held.reason) == ("Held person", True)


def test_held_run_can_be_resumed_unless_it_has_no_deployment() -> None:
    found = decide(_run("RUNNING"), None, None, MOMENT)
    assert found
    assert found.state
    assert (found.after, found.state["state_details"]) == (HELD, {"pause_reschedule": True})
    assert _after(decide(_run("RUNNING", deployment=None), None, None, MOMENT)) == "Crashed person"


def test_run_that_the_backup_lacks_is_created_while_it_is_executed() -> None:
    found = decide_unknown(_execution(LIVE), None, "queue")
    assert found
    assert found.creates
    assert (found.after, found.creates["id"], found.creates["work_queue_id"]) == ("Running", RUN, "queue")
    assert decide_unknown(_execution(ENDED), None, "queue") is None
    unknown = decide_unknown(_execution(Outcome.WAITING), None, "queue")
    assert unknown
    assert (unknown.creates, unknown.needs_person) == (None, True)


def _objects(state: Object, **changes: Object) -> list[Object]:
    labels = {RUN_LABEL: RUN, POOL_LABEL: POOL, "job-name": JOB, "prefect.io/flow-run-name": "brave-fox"}
    meta = {"namespace": "prefect", "labels": labels, "creationTimestamp": BACKUP.isoformat()}
    job = {"kind": "Job", "metadata": meta | {"name": JOB}, "spec": {"backoffLimit": 0}, "status": {}}
    status = {"phase": "Running", "containerStatuses": [{"name": MAIN_CONTAINER, "state": state}]}
    pod = {
        "kind": "Pod",
        "metadata": meta | {"name": "pod"} | changes.get("metadata", {}),
        "spec": {"containers": [{"name": MAIN_CONTAINER}]},
        "status": status | changes.get("status", {}),
    }
    return [job | {"status": changes.get("job", {})}, *([] if "no_pod" in changes else [pod])]


def _terminated(code: int) -> Object:
    return {"terminated": {"exitCode": code, "startedAt": BACKUP.isoformat(), "finishedAt": BACKUP.isoformat()}}


@pytest.mark.parametrize(
    ("objects", "outcome"),
    [
        (_objects({"running": {"startedAt": BACKUP.isoformat()}}), LIVE),
        (_objects({"waiting": {"reason": "ContainerCreating"}}), Outcome.WAITING),
        (_objects(_terminated(0)), ENDED),
        (_objects(_terminated(1)), FAILED),
        # On SIGTERM the supervisor schedules the run again, and ends with exit code 0.
        (_objects(_terminated(0), metadata={"deletionTimestamp": BACKUP.isoformat()}), GONE),
        (
            _objects(
                _terminated(0),
                status={
                    "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]
                },
            ),
            GONE,
        ),
        (_objects({}, no_pod={}), Outcome.WAITING),
        (_objects({}, no_pod={}, job={"conditions": [{"type": "Complete", "status": "True"}]}), GONE),
    ],
)
def test_outcome_is_read_from_job_and_pod(tmp_path: Path, objects: list[Object], outcome: Outcome) -> None:
    file = tmp_path / "executions"
    file.write_bytes(executions.pack(["cluster", "hash"], objects))
    evidence = executions.read(file, [POOL])
    [found] = evidence.executions.values()
    assert evidence.clusters == ["cluster", "hash"]
    assert (found.run, found.outcome, found.job, found.cluster) == (RUN, outcome, JOB, "cluster")
    assert executions.read(file, ["another server's pool"]).executions == {}


@pytest.mark.parametrize("content", [None, b"", b"no gzip", *(gzip.compress(text, mtime=0) for text in (b"{}", b"[]"))])
def test_absent_and_damaged_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "executions"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"is no list of Jobs and pods: .*`make restore` writes such a file"):
        executions.read(file, [POOL])
