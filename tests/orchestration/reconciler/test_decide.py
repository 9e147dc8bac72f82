"""Tests of the decision, on single cases and on random histories of a run, its worker, Jobs and pods."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestration import diagnosis_table, protocol
from orchestration.protocol import (
    CAUSE_LABEL,
    CHECK_INTERVAL_SECONDS,
    CHECK_TIMEOUT_SECONDS,
    CLAIM_ANNOTATION,
    CLAIM_LOST,
    CLUSTER_LABEL,
    CRASHES_LABEL,
    DISRUPTIONS_LABEL,
    FENCED_LABEL_PREFIX,
    FENCED_WITHIN_SECONDS,
    FINAL_STATES,
    LOST_LABEL,
    NAMESPACE_LABEL,
    REFUSAL_LABEL,
    RETRIED_LABEL,
    RUN_LABEL,
    SETTLED_LABEL,
    WARM_LABEL,
    WARM_TAKEN,
    claim_of,
    is_given_away,
)
from orchestration.reconciler import state_messages
from orchestration.reconciler.budget import RetryBudget, decide_retry
from orchestration.reconciler.causes import Cause
from orchestration.reconciler.decide import (
    Action,
    Adopt,
    Cancel,
    Cancelled,
    Crash,
    Explain,
    GiveAway,
    Retry,
    Stop,
    TimeOut,
    Unclaim,
    decide,
    is_steady,
)
from orchestration.reconciler.kubernetes_objects import JobObject
from orchestration.reconciler.model import End, Job, Pod, Policy, Refusal, Run
from orchestration.runs.supervisor import after_sigterm
from tests.parts import examples

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def run(type_: str, seconds: float = 100, **more: object) -> Run:
    fields = {"job": "job-1", "namespace": "ns", "name": "heron", "deployment": "d"} | more
    return Run("r", type_, fields.pop("state", type_.title()), "s", ago(seconds), **fields)  # type: ignore[arg-type]


def job(name: str = "job-1", seconds: float = 100, **more: object) -> Job:
    return Job(name, "r", ago(seconds), **more)  # type: ignore[arg-type]


def pod(job: str = "job-1", seconds: float = 100, **more: object) -> Pod:
    return Pod(f"{job}-pod", "r", job, ago(seconds), **more)  # type: ignore[arg-type]


def end(seconds: float = 20, code: int | None = 137, reason: str = "Error", **more: object) -> End:
    return End(ago(seconds), code, reason, **more)  # type: ignore[arg-type]


def decided(run: Run | None, jobs: list[Job], pods: list[Pod]) -> list[Action]:
    return decide(run, jobs, pods, NOW, Policy())


def kind_of(action: Action) -> str:
    assert isinstance(action, Crash | Retry)
    return action.cause.kind


def test_no_action_for_run_in_live_pod() -> None:
    assert decided(run("RUNNING"), [job()], [pod(has_started=True)]) == []
    assert decided(run("PENDING", 5), [job(seconds=4)], [pod(seconds=3)]) == []
    assert decided(run("SCHEDULED"), [], []) == []
    in_process = run("SCHEDULED", state="AwaitingRetry", waits_in_process=True)
    assert decided(in_process, [job()], [pod(has_started=True)]) == []
    assert [kind_of(action) for action in decided(in_process, [], [])] == ["crash"]
    suspended = run("PAUSED", state="Suspended")
    assert decided(suspended, [job(is_finished=True)], [pod(end=end(code=0))]) == []


def test_paused_run_whose_process_is_gone_crashes() -> None:
    """A resumed run would wait for this process. The retry pauses again."""
    paused = run("PAUSED", state="Paused", waits_in_process=True)
    assert decided(paused, [job()], [pod(has_started=True)]) == []
    gone = decided(paused, [job(is_finished=True)], [pod(has_started=True, end=end(oom=True, reason="OOMKilled"))])
    assert [kind_of(action) for action in gone] == ["oom"]


@pytest.mark.parametrize(
    ("ended", "kind", "text"),
    [
        (end(code=137), "crash", "exit code 137 (SIGKILL)"),
        (end(code=0, reason="Completed"), "crash", "exit code 0"),
        (end(reason="OOMKilled", oom=True, peak=700 * 2**20), "oom", "memory limit of 700Mi; it used at most 700 MiB"),
        (end(code=0, reason="Completed", oom=True), "oom", "OOMKilled"),
        (end(code=143, disruption="EvictionByEvictionAPI"), "disruption", "evicted by the API"),
        (end(code=None, reason="Evicted", message="The node was low on memory"), "disruption", "low on memory"),
        (end(code=None, reason="OutOfpods", has_begun=False), "disruption", "before its container ran: OutOfpods"),
        (end(code=None, reason="Failed", message="init container a ended with exit code 1"), "crash", "exit code 1"),
        (end(has_begun=False), "disruption", "before its flow began: the Prefect API did not answer"),
    ],
)
def test_dead_run_crashes_with_cause(ended: End, kind: str, text: str) -> None:
    (action,) = decided(run("RUNNING"), [job(is_finished=True)], [pod(has_started=True, memory="700Mi", end=ended)])
    assert kind_of(action) == kind
    assert isinstance(action, Crash)
    assert text in action.cause.sentence


def test_run_belongs_to_labelled_cluster_and_namespace() -> None:
    """The worker labels a run. A run that is executed by hand has no Job, and the reconciler ignores it."""
    ours = {CLUSTER_LABEL: "one"}
    one, two = {"one", "as one was marked before"}, {"two"}
    assert run("RUNNING", labels=ours).belongs_to(one, "ns")
    assert run("RUNNING", labels={CLUSTER_LABEL: "as one was marked before"}).belongs_to(one, "ns"), (
        "by an older version"
    )
    assert not run("RUNNING", labels=ours).belongs_to(one, "other")
    elsewhere = ours | {NAMESPACE_LABEL: "other"}
    assert not run("PENDING", labels=elsewhere, job="", namespace="").belongs_to(one, "ns"), (
        "its Job will be created in the other namespace"
    )
    assert not run("RUNNING", labels=ours).belongs_to(two, "ns"), "another cluster's namespace has the same name"
    moved = run("PENDING", labels=ours | {NAMESPACE_LABEL: "new"}, job="job-of-an-earlier-claim", namespace="ns")
    assert moved.belongs_to(one, "new")
    assert not moved.belongs_to(one, "ns"), "claimed for another namespace, with the Job of an earlier claim"
    assert not run("RUNNING", labels={}).belongs_to(one, "ns"), "claimed by a worker that writes no label"
    assert not run("RUNNING", labels={}, job="", namespace="").belongs_to(one, "ns"), "executed by hand"
    assert run("PENDING", labels={}, job="", namespace="").belongs_to(one, "ns"), "a claim without a label or a Job"
    assert run("RUNNING", labels=ours, job="", namespace="").belongs_to(one, "ns"), (
        "its worker died before it recorded a Job"
    )


def test_only_run_in_one_live_pod_is_steady() -> None:
    running, executes = run("RUNNING"), pod(has_started=True)
    assert is_steady(running, [job()], [executes])
    for pods in ([], [pod()], [executes, pod()], [replace(executes, end=end())], [replace(executes, deleted_at=NOW)]):
        assert not is_steady(running, [job()], pods)
    assert not is_steady(running, [], [executes])
    assert not is_steady(running, [job(), job("job-2")], [executes])
    for other in (
        run("PENDING"),
        run("CANCELLING"),
        run("RUNNING", job="job-2"),
        run("RUNNING", is_deployment_deleted=True),
    ):
        assert not is_steady(other, [job()], [executes])


def test_run_with_unconfirmed_end_has_time_to_report() -> None:
    assert decided(run("RUNNING", 1), [job(is_finished=True)], []) == []
    assert decided(run("RUNNING", 1), [job(is_finished=True)], [pod(end=end(seconds=2))]) == [], (
        "the pod's clock differs"
    )
    [crash] = decided(run("RUNNING", 1), [job(is_finished=True)], [pod(end=end(seconds=0.1))])
    assert isinstance(crash, Crash)


def test_run_of_deleted_pod_crashes_once_job_is_finished() -> None:
    assert decided(run("RUNNING"), [job()], []) == [], "Kubernetes has not counted the pod yet"
    assert [kind_of(action) for action in decided(run("RUNNING"), [job(is_finished=True)], [])] == ["crash"]
    assert [kind_of(action) for action in decided(run("RUNNING"), [], [])] == ["crash"], "the Job is gone too"


def test_claim_without_job_is_given_away_and_unrecorded_job_is_adopted() -> None:
    lost = run("PENDING", 61, job="")
    assert [type(action) for action in decided(lost, [], [])] == [GiveAway]
    given_away = replace(lost, state=CLAIM_LOST, since=NOW)
    assert [type(action) for action in decided(given_away, [job("job-0", is_finished=True)], [])] == [Unclaim]
    assert [type(action) for action in decided(given_away, [job()], [pod()])] == [Stop], "the Job was created meanwhile"
    assert decided(given_away, [], [pod(deleted_at=NOW)]) == [], "its pod has yet to end"
    assert decided(run("PENDING", 59, job=""), [], []) == []
    assert decided(lost, [job(seconds=60)], []) == [Adopt(lost, "job-1")]
    # Claimed again after a crash: the recorded Job belongs to the earlier claim.
    again = run("PENDING", 10)
    assert decided(again, [job(is_finished=True)], [pod(end=end(seconds=30))]) == []
    assert decided(again, [job(is_finished=True), job("job-2", seconds=5)], [pod("job-2", seconds=4)]) == [
        Adopt(again, "job-2")
    ]


def test_run_whose_worker_died_before_the_hand_over_is_given_away() -> None:
    """Its Job is that of a warm pod, which has no label of the run and waits."""
    taken = job("warm-x7k2p", seconds=61, warm_claim="0123456789ab")
    late = run("PENDING", 61, job="")
    assert [type(action) for action in decided(late, [taken], [])] == [Adopt, GiveAway]
    assert decided(run("PENDING", 59, job="warm-x7k2p"), [replace(taken, created_at=ago(59))], []) == []
    given_away = replace(late, state=CLAIM_LOST, since=NOW)
    assert [type(action) for action in decided(given_away, [taken], [])] == [Stop]
    assert decided(late, [taken], [pod("warm-x7k2p", seconds=500, has_started=True)])[1:] == [], "it has the run"


def test_run_whose_warm_pod_died_before_the_run_began_crashes() -> None:
    """The pod is older than the claim. Its Job counts from the moment when the run took it."""
    taken = job("warm-x7k2p", seconds=4, warm_claim="0123456789ab", is_finished=True)
    dead = pod("warm-x7k2p", seconds=500, has_started=True, end=end(seconds=1))
    assert [kind_of(action) for action in decided(run("PENDING", 4, job="warm-x7k2p"), [taken], [dead])] == ["crash"]


def test_job_of_a_warm_pod_has_the_claim_and_the_time_of_its_run() -> None:
    def read(annotation: str, warm: str = WARM_TAKEN) -> Job:
        labels, annotations = {RUN_LABEL: "r", WARM_LABEL: warm}, {CLAIM_ANNOTATION: annotation}
        meta = {"name": "warm-x7k2p", "creationTimestamp": NOW, "labels": labels, "annotations": annotations}
        return Job.read(JobObject.model_validate({"metadata": meta, "spec": {}}), timedelta(seconds=2))

    found = read(f"0199c0de-0000-7000-8000-0000000000a1 {ago(-60).isoformat()}")
    assert (found.claim, found.created_at) == ("0000000000a1", ago(-62))
    assert read(f"0199c0de-0000-7000-8000-0000000000a1 {ago(-60).isoformat()}", warm="").claim == "", "a job variable"
    for text in ("", "0199c0de-0000-7000-8000-0000000000a1", f"a1 {ago(0).isoformat()}", "a 2026-11-29T10:00:00"):
        assert (read(text).claim, read(text).created_at) == ("", ago(-2))


def test_pod_that_does_not_start_is_explained_and_given_up_after_timeout() -> None:
    stuck = pod(seconds=5, waiting=("ErrImagePull", "not found"))
    (action,) = decided(run("PENDING", 6), [job(seconds=6)], [stuck])
    assert isinstance(action, Explain)
    assert action.state == "ImagePullBackOff"
    assert "not found" in action.sentence
    explained = run("PENDING", 3, state="ImagePullBackOff", message=action.sentence)
    assert decided(explained, [job(seconds=6)], [replace(stuck, waiting=("ImagePullBackOff", "back-off"))]) == []
    (action,) = decided(replace(explained, since=ago(1)), [job(seconds=601)], [replace(stuck, created_at=ago(601))])
    assert kind_of(action) == "start"
    (action,) = decided(run("PENDING", 6), [job(seconds=5, refusal="exceeded quota")], [])
    assert isinstance(action, Explain)
    assert "exceeded quota" in action.sentence


def test_cancelling_run_is_cancelled_after_its_pod_ended() -> None:
    assert decided(run("CANCELLING", 2), [job()], [pod(has_started=True)]) == []
    (action,) = decided(run("CANCELLING", 4), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace is None
    assert decided(run("CANCELLING", 4), [job(is_deleted=True)], [pod(has_started=True, deleted_at=ago(1))]) == []
    cancelling = run("CANCELLING", 4)
    for ended, lost in (([], ("job-1",)), ([pod(end=end())], ())):
        assert decided(cancelling, [job(is_deleted=True)], ended) == [
            Cancelled(cancelling, "Nothing of it is left in the cluster", lost)
        ], "a pod whose end is unconfirmed may still be executing"


def test_run_of_deleted_deployment_is_cancelled_immediately() -> None:
    for type_ in ("PENDING", "RUNNING"):
        orphaned = run(type_, 1, is_deployment_deleted=True)
        assert decided(orphaned, [job()], [pod(has_started=True)]) == [Cancel(orphaned, "Its deployment was deleted")]
    (action,) = decided(run("CANCELLING", 1, is_deployment_deleted=True), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace is None
    decision = decide_retry(run("CRASHED"), Cause("crash", ""), None)
    assert (decision.is_retried, decision.labels) == (False, {SETTLED_LABEL: "s"}), "no worker could claim it"


def test_jobs_of_finished_and_deleted_runs_are_deleted() -> None:
    assert [type(decided_action) for decided_action in decided(None, [job()], [pod(has_started=True)])] == [Stop]
    assert decided(run("COMPLETED", 30), [job()], [pod(has_started=True)]) == []
    assert [
        type(decided_action) for decided_action in decided(run("COMPLETED", 61), [job()], [pod(has_started=True)])
    ] == [Stop]
    assert decided(run("CRASHED", 10), [job()], [pod(has_started=True)]) == [], "its process may still report the cause"
    (action,) = decided(run("CRASHED", 16), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace == 0
    older = [job("job-0", seconds=200), job()]
    stopped = decided(run("RUNNING"), older, [pod("job-0", has_started=True), pod(has_started=True)])
    assert [decided_action.job for decided_action in stopped if isinstance(decided_action, Stop)] == ["job-0"]


def test_crash_is_retried_within_budget() -> None:
    crashed = run("CRASHED", 5)
    (action,) = decided(crashed, [job(is_finished=True)], [pod(end=end())])
    assert isinstance(action, Retry)
    first = decide_retry(crashed, action.cause, RetryBudget())
    assert (first.is_retried, first.delay_seconds) == (True, 0)
    assert first.labels == {CRASHES_LABEL: 1, RETRIED_LABEL: "s crash", CAUSE_LABEL: ""}
    # Interrupted after the retry was counted: the decision is the same.
    assert decide_retry(replace(crashed, labels=first.labels or {}), action.cause, RetryBudget()) == first
    second = decide_retry(replace(crashed, labels={CRASHES_LABEL: 1}), action.cause, RetryBudget())
    assert (second.is_retried, second.delay_seconds) == (True, 10)
    third = decide_retry(replace(crashed, labels={CRASHES_LABEL: 2}), action.cause, RetryBudget())
    assert (third.is_retried, third.labels) == (False, {SETTLED_LABEL: "s"})
    assert decided(replace(crashed, labels=third.labels or {}), [], []) == []
    assert decided(replace(crashed, deployment=""), [], []) == []


def test_lost_run_attempt_is_fenced_before_retry() -> None:
    jobs = [job("job-1", 200, is_finished=True), job("job-2", is_finished=True)]
    for recorded, ended, lost in (
        ("job-2", [], ("job-2",)),
        ("job-2", [pod("job-2", end=end())], ()),
        ("job-1", [pod("job-1", 200, end=end())], ("job-2",)),  # its worker died before it recorded the newer Job
        ("", [pod("job-1", 200, end=end())], ("job-2",)),
        ("job-2", [pod("job-2", end=replace(end(), is_confirmed=False))], ("job-2",)),  # its node was given up
    ):
        [crash] = decided(run("RUNNING", 20, job=recorded), jobs, ended)
        assert isinstance(crash, Crash)
        assert crash.lost == lost
    cause = Cause("crash", "gone")
    assert (
        decide_retry(run("CRASHED", labels={LOST_LABEL: True}), cause, RetryBudget()).delay_seconds
        == FENCED_WITHIN_SECONDS
    )
    assert decide_retry(run("CRASHED", labels={LOST_LABEL: False}), cause, RetryBudget()).delay_seconds == 0


def test_disruption_has_separate_budget_and_failed_start_has_none() -> None:
    recorded = run("CRASHED", 5, labels={CAUSE_LABEL: "disruption", CRASHES_LABEL: 2}, message="Drained")
    (action,) = decided(recorded, [], [])
    assert kind_of(action) == "disruption"
    gone = decided(run("RUNNING"), [job(is_finished=True, is_disrupted=True)], [])
    assert [kind_of(decided_action) for decided_action in gone] == ["disruption"], (
        "the condition of the Job outlives the pod"
    )
    assert isinstance(action, Retry)
    assert decide_retry(recorded, action.cause, RetryBudget()).labels == {
        DISRUPTIONS_LABEL: 1,
        RETRIED_LABEL: "s disruption",
        CAUSE_LABEL: "",
    }
    assert not decide_retry(recorded, Cause("start", ""), RetryBudget()).is_retried


@pytest.mark.parametrize(
    ("limit", "most", "grown"),
    [("700Mi", "", "1050Mi"), ("1Gi", "1.2Gi", "1228Mi"), ("2Gi", "1Gi", ""), ("", "", ""), ("1e9", "", "1430Mi")],
)
def test_memory_limit_grows_after_oom(limit: str, most: str, grown: str) -> None:
    found = decide_retry(run("CRASHED"), Cause("oom", "", limit), RetryBudget(memory_max=most))
    assert found.memory_limit == grown
    assert found.is_retried


def test_invalid_job_variables_leave_default_budget() -> None:
    found = RetryBudget.from_job_variables(
        {"crash_retries": "5", "memory_growth": "much", "memory_max": None, "env": {}}
    )
    assert found == RetryBudget(crash_retries=5)


FULL = "0/1 nodes are available: 1 Insufficient cpu"


@pytest.mark.parametrize(
    ("waiting", "refused", "patience"),
    [
        (("Unschedulable", FULL), "", Policy().capacity_seconds),
        (("SchedulingGated", "gates"), "", Policy().capacity_seconds),
        (("Unschedulable", "1 node(s) didn't match Pod's node affinity/selector"), "", Policy().pending_seconds),
        (("ImagePullBackOff", "back-off"), "", Policy().pending_seconds),
        (("FailedMount", 'secret "absent" not found'), "", Policy().pending_seconds),
        (None, "exceeded quota: runs, requested: pods=1, used: pods=20, limited: pods=20", Policy().capacity_seconds),
        (None, "maximum memory usage per Container is 4Gi", Policy().pending_seconds),
    ],
)
def test_run_waits_longer_for_capacity_than_for_cure(
    waiting: tuple[str, str] | None, refused: str, patience: float
) -> None:
    state = waiting[0] if waiting else "PodRefused"
    waits = run("PENDING", 5, state=state)
    for age in (patience - 1, patience + 1):
        made = [pod(seconds=age, waiting=waiting)] if waiting else []
        found = decided(waits, [job(seconds=age, refusal=refused)], made)
        assert [kind_of(action) for action in found] == ([] if age < patience else ["start"])


@pytest.mark.parametrize(
    ("capacity", "patience"), [(True, Policy().capacity_seconds), (False, Policy().pending_seconds)]
)
def test_refused_job_is_requested_again_until_run_is_given_up(capacity: bool, patience: float) -> None:
    """A refusal costs no retry, as nothing has started. An older Job of the run does not belong to this claim."""
    message = f"{state_messages.JOB_NOT_CREATED}exceeded quota"

    def refused(since: float, age: float, attempts: int = 0) -> Run:
        label = Refusal(ago(since), capacity, attempts).label
        return run(
            "PENDING", age, state=diagnosis_table.JOB_REFUSED, job="", message=message, labels={REFUSAL_LABEL: label}
        )

    assert decided(refused(59, 59), [], []) == []
    assert decided(refused(patience - 1, 61), [], []) == [GiveAway(refused(patience - 1, 61), message)]
    again = replace(refused(61, 61), job="job-0")
    assert decided(again, [job("job-0", 500, is_finished=True)], [pod("job-0", 500, end=end())]) == [
        GiveAway(again, message)
    ]
    [crash] = decided(refused(patience + 1, 5), [], [])
    assert isinstance(crash, Crash)
    assert crash.cause.kind == "start"
    assert crash.cause.sentence.startswith(f"{message}. Given up after")
    assert crash.labels[REFUSAL_LABEL] == "", "a retry by hand has the whole waiting time again"
    assert not decide_retry(
        replace(refused(1, 1), type="CRASHED"), crash.cause, RetryBudget(crash_retries=0)
    ).is_retried
    created = job(seconds=3)
    assert [type(action) for action in decided(refused(61, 5), [created], [])] == [Adopt], (
        "the API's answer was lost, and the Job exists"
    )


def test_refusal_label_is_read_as_written() -> None:
    made = Refusal(ago(5), True, 3)
    assert Refusal.read({REFUSAL_LABEL: made.label}) == made
    for none in ({}, {REFUSAL_LABEL: ""}, {REFUSAL_LABEL: "yesterday"}, {REFUSAL_LABEL: "2026-01-01 capacity many"}):
        assert Refusal.read(none) is None


@dataclass
class World:
    """Simulates a run, its worker, Jobs and pods. Each public method is an event that may happen to them."""

    now: datetime = NOW
    run: Run | None = field(default_factory=lambda: run("SCHEDULED", job=""))
    jobs: list[Job] = field(default_factory=list)
    pods: list[Pod] = field(default_factory=list)
    claims: list[tuple[datetime, str]] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)
    """The claims of the Jobs of warm pods, by Job."""
    waiting: set[str] = field(default_factory=set)
    """The taken Jobs whose warm pods have not got the run yet."""
    stalled: list[str] = field(default_factory=list)
    """Jobs that the Kubernetes API was asked to create and may yet create."""
    states: list[dict[str, str]] = field(default_factory=list)
    checked: dict[str, bool] = field(default_factory=dict)
    """Whether a pod may execute the run, as answered when the pod asked, by the pod's name."""
    made: str = ""
    read: Run | None = None
    steady: Run | None = None
    due: datetime = NOW
    is_deployment_deleted: bool = False
    sidecars: bool = False
    """Whether a sidecar of each pod runs until the pod is deleted."""
    started: set[str] = field(default_factory=set)
    """The Jobs of which a pod has started the run: one run attempt each."""
    lost: dict[str, datetime | None] = field(default_factory=dict)
    """The Jobs whose lost pods are still executing, with the time of their fencing."""

    def set(self, type_: str, name: str = "") -> None:
        assert self.run
        if self.run.type in FINAL_STATES:
            expected = [("CRASHED", "SCHEDULED"), ("CRASHED", "FAILED")]
            assert (self.run.type, type_) in expected, f"a run that is {self.run.type} became {type_}"
        self.run = replace(self.run, type=type_, state=name or type_, state_id=uuid4().hex, since=self.now)
        self.states.append({"id": self.run.state_id, "name": self.run.state, "type": type_})

    def deployment_is_deleted(self) -> None:
        """Delete the deployment. The server cancels its Scheduled runs, and its other runs stay."""
        self.is_deployment_deleted = True
        if self.run and self.run.type == "SCHEDULED":
            self.set("CANCELLED")

    def worker_claims(self) -> None:
        if self.run and self.run.type == "SCHEDULED" and self.now >= self.due:
            self.set("PENDING", "Pending")
            self.claims.append((self.now, f"job-{self.states[-1]['id'][-12:]}"))

    def worker_makes_the_job(self) -> None:
        """Create the Job of the oldest claim, unless the claim has timed out."""
        if self.claims:
            claimed, name = self.claims.pop(0)
            if (self.now - claimed).total_seconds() < Policy().claim_seconds:
                self.made = name
                self._create(name)

    def worker_takes_a_warm_pod(self) -> None:
        """Label the Job of a warm pod with the run of the oldest claim. The pod is older and has no label yet."""
        if self.claims:
            claimed, name = self.claims.pop(0)
            if (self.now - claimed).total_seconds() < Policy().claim_seconds:
                self.made = f"warm-{len(self.taken)}"
                self.taken[self.made] = claim_of(name)
                self.waiting.add(self.made)
                self.jobs.append(Job(self.made, "r", self.now, warm_claim=claim_of(name)))

    def worker_hands_the_run_over(self) -> None:
        """Label the warm pod with the run. The request may be late."""
        for name in sorted(self.waiting):
            self.pods.append(Pod(name, "r", name, self.now - timedelta(minutes=5)))
        self.waiting.clear()

    def warm_pod_dies_before_it_has_the_run(self) -> None:
        self.waiting.clear()

    def request_for_a_job_stalls(self) -> None:
        if self.claims:
            self.stalled.append(self.claims.pop(0)[1])

    def stalled_request_arrives(self) -> None:
        """Create the Job of a stalled request. Its worker no longer waits for the Job and does not record it."""
        if self.stalled and self.run:
            self._create(self.stalled.pop(0))

    def _create(self, name: str) -> None:
        created = self.now.replace(microsecond=0)
        self.jobs.append(Job(name, "r", created))
        self.pods.append(Pod(name, "r", name, created))

    def pod_asks_whether_it_may_begin(self) -> None:
        for pod_ in self.pods:
            if pod_.is_live and not pod_.has_started and pod_.name not in self.checked:
                self.checked[pod_.name] = not self._is_given_away(pod_.job)
                return

    def kubernetes_makes_another_pod(self) -> None:
        """Replace a pod, as Kubernetes does for a Job with a backoffLimit.

        A Job with a lost pod gets no replacement here: the new pod would belong to the same Job.
        """
        living = {pod_.job for pod_ in self.pods if pod_.is_live or pod_.has_live_sidecar}
        for job_ in self.jobs:
            if not job_.is_finished and job_.name not in {*living, *self.lost, *self.taken}:
                self.pods.append(Pod(f"{job_.name}-{uuid4().hex}", "r", job_.name, self.now.replace(microsecond=0)))
                return

    def pod_reports_a_crash(self) -> None:
        """Let the supervisor report that the flow's process died. The pod lives for another moment."""
        if self.run and self.run.type == "RUNNING" and any(pod_.is_live and pod_.has_started for pod_ in self.pods):
            self.set("CRASHED")

    def worker_records_it(self) -> None:
        if self.run and self.made:
            self.run = replace(self.run, job=self.made)

    def worker_dies(self) -> None:
        self.claims, self.made = [], ""

    def pod_starts(self) -> None:
        """Prefect's engine begins a run that is Pending, and one that is Running as well."""
        for number, pod_ in enumerate(self.pods):
            if pod_.is_live and not pod_.has_started:
                may_begin = self.checked.get(pod_.name, not self._is_given_away(pod_.job))
                if may_begin and self.run and self.run.type in ("PENDING", "RUNNING"):
                    assert not any(other.is_live and other.has_started for other in self.pods), (
                        "a second live run attempt"
                    )
                    for fenced in self.lost.values():
                        assert fenced, "a second run attempt while an unfenced one may be executing"
                        assert self.now - fenced > timedelta(seconds=CHECK_INTERVAL_SECONDS + CHECK_TIMEOUT_SECONDS), (
                            "the lost run attempt may not have stopped yet"
                        )
                    self.set("RUNNING")
                    self.started.add(pod_.job)
                    self.pods[number] = replace(pod_, has_started=True)
                else:
                    self._end(number, 0)
                return

    def _end(self, number: int, code: int, **more: object) -> None:
        end = End(self.now, code, "Error", **more)  # type: ignore[arg-type]
        self.pods[number] = replace(self.pods[number], end=end, has_live_sidecar=self.sidecars)

    def engine_retries(self) -> None:
        """Retry the flow within its run attempt."""
        if self.run and self.run.type == "RUNNING" and any(pod_.is_live and pod_.has_started for pod_ in self.pods):
            self.set("RUNNING")

    def pod_completes(self) -> None:
        for number, pod_ in enumerate(self.pods):
            if pod_.is_live and pod_.has_started:
                if self.run and self.run.type == "RUNNING":
                    self.set("COMPLETED")
                self._end(number, 0)

    def pod_is_killed(self, **more: object) -> None:
        for number, pod_ in enumerate(self.pods):
            if pod_.is_live:
                self._end(number, 137, **more)
                return

    def pod_is_asked_to_end(self) -> None:
        """Send SIGTERM to a pod. Its supervisor sets the state of the run."""
        for number, pod_ in enumerate(self.pods):
            if pod_.is_live and pod_.has_started:
                if self.run and self.run.type == "RUNNING":
                    used = int(self.run.labels.get(DISRUPTIONS_LABEL) or 0)
                    state = after_sigterm(used + 1, RetryBudget().disruption_retries, self.now)
                    is_left = state["type"] == "SCHEDULED"
                    labels: dict[str, object] = (
                        {DISRUPTIONS_LABEL: used + 1} if is_left else {CAUSE_LABEL: "disruption"}
                    )
                    self.run = replace(self.run, labels={**self.run.labels, **labels})
                    self.set(state["type"], state["name"])
                    self.due = self.now
                self._end(number, 0)
                # The supervisor sets no state if Kubernetes will replace the pod.
                self.jobs = [replace(job, is_finished=job.is_finished or job.name == pod_.job) for job in self.jobs]
                return

    def deadline_passes(self) -> None:
        """Send SIGTERM to the pods of a Job past its deadline. The supervisor sets no state."""
        for number, pod_ in enumerate(self.pods):
            if pod_.is_live:
                self.jobs = [
                    replace(job, is_finished=True, exceeded_deadline=20) if job.name == pod_.job else job
                    for job in self.jobs
                ]
                self._end(number, 143)
                return

    def pod_is_evicted(self) -> None:
        self.pod_is_killed(disruption="EvictionByEvictionAPI")

    def pod_runs_out_of_memory(self) -> None:
        self.pod_is_killed(oom=True)

    def pod_is_deleted(self) -> None:
        self.pods = self.pods[1:]

    def node_is_cut_off(self) -> None:
        """Remove a pod from Kubernetes that is still executing. A Job with another ended pod is left alone."""
        for pod_ in self.pods:
            if pod_.is_live and pod_.has_started and not any(other.end for other in self.pods if other.job == pod_.job):
                self.pods.remove(pod_)
                if self.run and self.run.type not in FINAL_STATES:  # otherwise its process has reported the end
                    self.lost[pod_.job] = None
                return

    def node_is_given_up(self) -> None:
        """Cut off a node, with its pod still in Kubernetes as Failed."""
        before = [*self.pods]
        self.node_is_cut_off()
        for pod_ in before:
            if pod_ not in self.pods:
                ended = End(self.now, None, "Failed", disruption="DeletionByPodGC", is_confirmed=False)
                self.pods.append(replace(pod_, end=ended))

    def finished_jobs_are_removed(self) -> None:
        """Remove finished Jobs, as Kubernetes does after `ttlSecondsAfterFinished`."""
        over = {job_.name for job_ in self.jobs if job_.is_finished}
        over -= {pod_.job for pod_ in self.pods if pod_.is_live or pod_.has_live_sidecar}
        self.jobs = [job_ for job_ in self.jobs if job_.name not in over]
        self.pods = [pod_ for pod_ in self.pods if pod_.job not in over]

    def job_is_deleted(self) -> None:
        if self.jobs:
            self.stop(self.jobs[0].name)

    def sidecar_ends(self) -> None:
        self.pods = [replace(pod_, has_live_sidecar=False) for pod_ in self.pods]

    def controller_counts(self) -> None:
        living = {pod_.job for pod_ in self.pods if pod_.is_live or pod_.has_live_sidecar} | self.waiting
        self.jobs = [replace(job_, is_finished=job_.is_finished or job_.name not in living) for job_ in self.jobs]

    def cancelled_in_the_ui(self) -> None:
        if self.run and self.run.type in ("PENDING", "RUNNING"):
            self.set("CANCELLING")

    def a_second_passes(self) -> None:
        self.now += timedelta(seconds=1)

    def a_minute_passes(self) -> None:
        self.now += timedelta(seconds=61)

    def reconciler_reads_the_run(self) -> None:
        """Read the run. A steady run that is still Running is only counted and stays as it was read before."""
        known = self.steady if self.run and self.run.type == "RUNNING" else None
        self.read = self.run and replace(known or self.run, is_deployment_deleted=self.is_deployment_deleted)

    def reconciler_acts(self) -> None:
        if self.read is None:
            return
        jobs = [
            replace(
                job_,
                is_given_away=not job_.is_finished and job_.name != self.read.job and self._is_given_away(job_.name),
            )
            for job_ in self.jobs
        ]
        decided = decide(self.read, jobs, self.pods, self.now, Policy())
        self.steady = self.read if is_steady(self.read, jobs, self.pods) else None
        assert not (self.steady and decided), "an action for a steady run"
        for action in decided:
            self.carry_out(action)
        self.read = None

    def _is_given_away(self, job: str) -> bool:
        return is_given_away(self.taken.get(job, claim_of(job)), self.states)

    def stop(self, name: str) -> None:
        self.jobs = [job_ for job_ in self.jobs if job_.name != name]
        self.pods = [pod_ for pod_ in self.pods if pod_.job != name]
        self.waiting.discard(name)

    def carry_out(self, action: Action) -> None:
        if isinstance(action, Stop):
            self.stop(action.job)
        elif self.run is None or self.run.state_id != action.run.state_id:
            return
        elif isinstance(action, Adopt):
            self.run = replace(self.run, job=action.job)
        elif isinstance(action, GiveAway):
            self.set("PENDING", CLAIM_LOST)
        elif isinstance(action, Unclaim):
            if all(job_.is_finished for job_ in self.jobs):
                self.set("SCHEDULED")
        elif isinstance(action, Cancel):
            self.set("CANCELLING")
        elif isinstance(action, TimeOut):
            self.set("FAILED", "TimedOut")
            for lost_job in action.lost:
                if lost_job in self.lost:
                    self.lost[lost_job] = self.now
        elif isinstance(action, Cancelled | Crash):
            self.run = replace(self.run, labels={**self.run.labels, **action.labels})
            for lost_job in self.lost:
                if action.labels.get(FENCED_LABEL_PREFIX + lost_job):
                    self.lost[lost_job] = self.now
            self.set("CRASHED" if isinstance(action, Crash) else "CANCELLED")
        elif isinstance(action, Retry):
            decision = decide_retry(self.run, action.cause, None if self.is_deployment_deleted else RetryBudget())
            self.run = replace(self.run, labels={**self.run.labels, **(decision.labels or {})})
            if decision.is_retried:
                assert not any(pod_.is_live for pod_ in self.pods), "a retry while a pod is live"
                self.set("SCHEDULED", "AwaitingRetry")
                self.due = self.now + timedelta(seconds=decision.delay_seconds)
        elif isinstance(action, Explain):
            self.set("PENDING", action.state)


NO_EVENTS = {"set", "stop", "carry_out"}
EVENTS = [name for name, value in vars(World).items() if callable(value) and name not in NO_EVENTS and name[0] != "_"]
SECONDS = ["a_second_passes"] * 4
ROUND = ["reconciler_reads_the_run", "reconciler_acts"]
USUAL = [
    ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts"],
    ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts", *ROUND],
    ["worker_claims", "worker_takes_a_warm_pod", "worker_hands_the_run_over", "worker_records_it", "pod_starts"],
    ["worker_claims", "worker_takes_a_warm_pod", *SECONDS, *ROUND],
    ["worker_hands_the_run_over", "pod_starts", *ROUND],
    ["engine_retries", *ROUND],
    ["deployment_is_deleted", *ROUND],
    ["worker_claims", "worker_makes_the_job"],
    ["worker_claims", "request_for_a_job_stalls", "a_minute_passes", *ROUND, *ROUND],
    ["stalled_request_arrives", "pod_starts", *ROUND],
    ["stalled_request_arrives", "pod_asks_whether_it_may_begin", *ROUND],
    ["pod_is_deleted", *SECONDS, *ROUND, "kubernetes_makes_another_pod", *ROUND],
    ["pod_reports_a_crash", *ROUND],
    ["pod_is_deleted", *SECONDS, *ROUND, *ROUND, "worker_claims", "kubernetes_makes_another_pod", "pod_starts"],
    [*SECONDS, "controller_counts", *ROUND],
    ["pod_is_killed", "controller_counts", *SECONDS, *ROUND],
    ["pod_is_killed", "controller_counts", *SECONDS, *ROUND, *ROUND, "worker_claims", *SECONDS],
    ["pod_completes", "a_minute_passes"],
    ["node_is_cut_off", "controller_counts", *SECONDS, *ROUND, *ROUND],
    ["node_is_given_up", "controller_counts", *SECONDS, *ROUND, *ROUND],
    ["cancelled_in_the_ui", "node_is_cut_off", "controller_counts", *SECONDS, *ROUND],
]
"""Usual sequences of events. Most histories of random single events would do nothing."""


GIVEN_AWAY_CLAIM = ["worker_claims", "request_for_a_job_stalls", "a_minute_passes", *ROUND]
EXECUTES = ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts"]
WARM = ["worker_claims", "worker_takes_a_warm_pod", "worker_hands_the_run_over", "worker_records_it", "pod_starts"]
ASKS = ["stalled_request_arrives", "pod_asks_whether_it_may_begin"]


@given(st.lists(st.sampled_from([*([event_name] for event_name in EVENTS), *USUAL * 3]), max_size=25), st.booleans())
@example([GIVEN_AWAY_CLAIM, ROUND, EXECUTES, ["stalled_request_arrives", "pod_starts"], ROUND], False)
@example([GIVEN_AWAY_CLAIM, ["stalled_request_arrives"], ROUND, ROUND, EXECUTES], False)
@example(
    [GIVEN_AWAY_CLAIM, ROUND, ["worker_claims", *ASKS], ["worker_makes_the_job", "pod_starts"], ["pod_starts"]], False
)
@example([GIVEN_AWAY_CLAIM[:3], [ROUND[0]], ASKS, [ROUND[1]], ROUND, EXECUTES, ["pod_starts"]], False)
@example([["worker_claims", "worker_makes_the_job"], ["pod_is_evicted"], ["a_minute_passes"]], True)
@example([["worker_claims", "worker_takes_a_warm_pod", "worker_dies", "a_minute_passes"]], False)
@example([["worker_claims", "worker_takes_a_warm_pod", "warm_pod_dies_before_it_has_the_run", *SECONDS]], False)
@example([["worker_claims", "worker_takes_a_warm_pod", "a_minute_passes", *ROUND, "worker_hands_the_run_over"]], False)
@example([EXECUTES, ["pod_is_killed", "controller_counts", *SECONDS, *ROUND, *ROUND], WARM[:2], SECONDS, ROUND], True)
@settings(max_examples=examples(8))
def test_no_history_loses_blocks_or_duplicates_run(history: list[list[str]], sidecars: bool) -> None:
    world = World(sidecars=sidecars)
    for event in (step for some in history for step in some):
        getattr(world, event)()
    # From here on nothing fails.
    for _ in range(120):
        for event in (
            "controller_counts", "reconciler_reads_the_run", "reconciler_acts", "worker_claims",
            "worker_makes_the_job", "worker_records_it", "pod_starts", "a_second_passes", "pod_completes",
            "controller_counts", "a_second_passes",
        ):  # fmt: skip
            getattr(world, event)()
        if world.run and world.run.type == "PENDING" and not world.claims:
            world.a_minute_passes()
    assert world.run
    assert world.run.type in FINAL_STATES, world
    assert not [pod_ for pod_ in world.pods if pod_.is_live or pod_.has_live_sidecar], world
    assert all(world.lost.values()), f"an unfenced run attempt may still be executing: {world}"
    if world.run.type == "CRASHED":
        assert protocol.SETTLED_LABEL in world.run.labels


ENDS = [
    ["pod_is_killed"],
    ["pod_is_evicted"],
    ["pod_runs_out_of_memory"],
    ["pod_is_deleted"],
    ["node_is_cut_off"],
    ["node_is_given_up"],
    ["job_is_deleted"],
    ["pod_reports_a_crash", "pod_is_killed"],
    ["pod_is_asked_to_end"],
    ["pod_is_asked_to_end", "sidecar_ends"],
    ["engine_retries", "pod_is_asked_to_end"],
]
"""The ways in which a run attempt can end without finishing the run."""


@given(st.lists(st.sampled_from(ENDS), min_size=20, max_size=20), st.booleans(), st.sampled_from([EXECUTES, WARM]))
@settings(max_examples=examples(2))
def test_number_of_run_attempts_is_within_budgets(ends: list[list[str]], sidecars: bool, starts: list[str]) -> None:
    world = World(sidecars=sidecars)
    start_events = [*starts, *ROUND]
    for events in ends:
        for event in [*start_events, *events]:
            getattr(world, event)()
        waits = ["controller_counts", *SECONDS, *SECONDS, *ROUND] * 3 + ["a_minute_passes"] * 22
        for event in [*waits, "finished_jobs_are_removed"]:
            getattr(world, event)()
    for event in ["controller_counts", *SECONDS, *ROUND] * 10:
        getattr(world, event)()
    assert world.run
    retries = RetryBudget()
    assert world.run.type == "CRASHED", "20 ends exceed every budget"
    assert len(world.started) <= 1 + retries.crash_retries + retries.disruption_retries
    assert protocol.SETTLED_LABEL in world.run.labels


def test_exceeded_deadline_times_run_out_without_retry() -> None:
    expired = job(is_finished=True, exceeded_deadline=20)
    for pods in ([], [pod(end=end(code=143))], [pod(end=end(code=137))]):
        [action] = decided(run("RUNNING"), [expired], pods)
        assert isinstance(action, TimeOut)
        assert action.sentence == "Job job-1 ran for longer than its activeDeadlineSeconds of 20"
        assert action.lost == (() if pods else ("job-1",))
        [action] = decided(run("CRASHED", 5), [expired], pods)
        assert isinstance(action, TimeOut), "its process reported a crash first"
    waited = run("PENDING", 5, state="Unschedulable")
    assert [type(decided_action) for decided_action in decided(waited, [expired], [])] == [TimeOut], (
        "the pod never had a node"
    )
    in_its_pod = pod(end=end(code=137, reason="DeadlineExceeded", message="Pod was active longer"))
    assert [
        type(decided_action) for decided_action in decided(run("RUNNING"), [job(is_finished=True)], [in_its_pod])
    ] == [TimeOut]
    again = run("RUNNING", job="job-2")
    assert decided(again, [replace(expired, created_at=ago(500)), job("job-2")], [pod("job-2", has_started=True)]) == []


@pytest.mark.parametrize("type_", ["Failed", "FailureTarget"])
def test_exceeded_deadline_is_read_from_job_condition(type_: str) -> None:
    condition = {"type": type_, "status": "True", "reason": "DeadlineExceeded"}
    raw = {
        "metadata": {"name": "j", "creationTimestamp": NOW, "labels": {RUN_LABEL: "r"}},
        "spec": {"activeDeadlineSeconds": 20},
        "status": {"conditions": [condition]},
    }
    assert Job.read(JobObject.model_validate(raw)).exceeded_deadline == 20
    raw["status"] = {"conditions": [condition | {"reason": "BackoffLimitExceeded"}]}
    assert Job.read(JobObject.model_validate(raw)).exceeded_deadline is None
