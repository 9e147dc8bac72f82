"""The decision, on single cases and on random histories of a run, its worker, its Jobs and its pods."""

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


def test_a_run_in_its_pod_is_left_alone() -> None:
    assert decided(run("RUNNING"), [job()], [pod(has_started=True)]) == []
    assert decided(run("PENDING", 5), [job(seconds=4)], [pod(seconds=3)]) == []
    assert decided(run("SCHEDULED"), [], []) == []
    assert decided(run("PAUSED"), [job(is_finished=True)], [pod(end=end(code=0))]) == []


@pytest.mark.parametrize(
    ("ended", "kind", "said"),
    [
        (end(code=137), "crash", "exit code 137 (SIGKILL)"),
        (end(code=0, reason="Completed"), "crash", "exit code 0"),
        (end(reason="OOMKilled", oom=True, peak=700 * 2**20), "oom", "memory limit of 700Mi; it used at most 700 MiB"),
        (end(code=0, reason="Completed", oom=True), "oom", "OOMKilled"),
        (end(code=143, disruption="EvictionByEvictionAPI"), "disruption", "evicted by the API"),
        (end(code=None, reason="Evicted", message="The node was low on memory"), "disruption", "low on memory"),
    ],
)
def test_a_dead_run_crashes_with_its_cause(ended: End, kind: str, said: str) -> None:
    (action,) = decided(run("RUNNING"), [job(is_finished=True)], [pod(has_started=True, memory="700Mi", end=ended)])
    assert kind_of(action) == kind
    assert isinstance(action, Crash)
    assert said in action.cause.sentence


def test_whose_a_run_is() -> None:
    """Its worker has said where it is; a hand that executes one makes no Job and is left alone."""
    ours = {CLUSTER_LABEL: "one"}
    one, two = {"one", "as one was marked before"}, {"two"}
    assert run("RUNNING", labels=ours).belongs_to(one, "ns")
    assert run("RUNNING", labels={CLUSTER_LABEL: "as one was marked before"}).belongs_to(one, "ns"), (
        "by an older version"
    )
    assert not run("RUNNING", labels=ours).belongs_to(one, "other")
    elsewhere = ours | {NAMESPACE_LABEL: "other"}
    assert not run("PENDING", labels=elsewhere, job="", namespace="").belongs_to(one, "ns"), "its Job is to be there"
    assert not run("RUNNING", labels=ours).belongs_to(two, "ns"), "another cluster's namespace has the same name"
    assert not run("RUNNING", labels={}).belongs_to(one, "ns"), "by a worker that marks none"
    assert not run("RUNNING", labels={}, job="", namespace="").belongs_to(one, "ns"), "executed by hand"
    assert run("PENDING", labels={}, job="", namespace="").belongs_to(one, "ns"), "a claim that nobody has gone on with"
    assert run("RUNNING", labels=ours, job="", namespace="").belongs_to(one, "ns"), (
        "its worker died before it said more"
    )


def test_which_runs_are_steady() -> None:
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


def test_a_run_whose_end_nobody_saw_may_still_report_it() -> None:
    assert decided(run("RUNNING", 1), [job(is_finished=True)], []) == []
    assert decided(run("RUNNING", 1), [job(is_finished=True)], [pod(end=end(seconds=2))]) == [], "by another clock"
    [crash] = decided(run("RUNNING", 1), [job(is_finished=True)], [pod(end=end(seconds=0.1))])
    assert isinstance(crash, Crash)


def test_a_run_whose_pod_was_deleted_crashes_once_its_job_is_over() -> None:
    assert decided(run("RUNNING"), [job()], []) == [], "Kubernetes has not counted it yet"
    assert [kind_of(each) for each in decided(run("RUNNING"), [job(is_finished=True)], [])] == ["crash"]
    assert [kind_of(each) for each in decided(run("RUNNING"), [], [])] == ["crash"], "the Job is gone too"


def test_a_claim_without_a_job_goes_back_and_a_job_without_a_claimant_is_recorded() -> None:
    lost = run("PENDING", 61, job="")
    assert [type(each) for each in decided(lost, [], [])] == [GiveAway]
    given_away = replace(lost, state=CLAIM_LOST, since=NOW)
    assert [type(each) for each in decided(given_away, [job("job-0", is_finished=True)], [])] == [Unclaim]
    assert [type(each) for each in decided(given_away, [job()], [pod()])] == [Stop], "it was created meanwhile"
    assert decided(given_away, [], [pod(deleted_at=NOW)]) == [], "its pod has yet to end"
    assert decided(run("PENDING", 59, job=""), [], []) == []
    assert decided(lost, [job(seconds=60)], []) == [Adopt(lost, "job-1")]
    # Claimed again after a crash: the Job that is recorded is the old one.
    again = run("PENDING", 10)
    assert decided(again, [job(is_finished=True)], [pod(end=end(seconds=30))]) == []
    assert decided(again, [job(is_finished=True), job("job-2", seconds=5)], [pod("job-2", seconds=4)]) == [
        Adopt(again, "job-2")
    ]


def test_what_keeps_a_pod_from_starting_is_said_at_once_and_ends_the_run_after_a_time() -> None:
    stuck = pod(seconds=5, waiting=("ErrImagePull", "not found"))
    (action,) = decided(run("PENDING", 6), [job(seconds=6)], [stuck])
    assert isinstance(action, Explain)
    assert action.state == "ImagePullBackOff"
    assert "not found" in action.sentence
    told = run("PENDING", 3, state="ImagePullBackOff", message=action.sentence)
    assert decided(told, [job(seconds=6)], [replace(stuck, waiting=("ImagePullBackOff", "back-off"))]) == []
    (action,) = decided(replace(told, since=ago(1)), [job(seconds=601)], [replace(stuck, created_at=ago(601))])
    assert kind_of(action) == "start"
    (action,) = decided(run("PENDING", 6), [job(seconds=5, refusal="exceeded quota")], [])
    assert isinstance(action, Explain)
    assert "exceeded quota" in action.sentence


def test_cancelling_ends_the_pod_and_then_the_run() -> None:
    assert decided(run("CANCELLING", 2), [job()], [pod(has_started=True)]) == []
    (action,) = decided(run("CANCELLING", 4), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace is None
    assert decided(run("CANCELLING", 4), [job(is_deleted=True)], [pod(has_started=True, deleted_at=ago(1))]) == []
    cancelling = run("CANCELLING", 4)
    for ended, lost in (([], ("job-1",)), ([pod(end=end())], ())):
        assert decided(cancelling, [job(is_deleted=True)], ended) == [
            Cancelled(cancelling, "Nothing of it is left in the cluster", lost)
        ], "what nobody saw end may execute on"


def test_a_run_whose_deployment_was_deleted_is_ended_at_once() -> None:
    for type_ in ("PENDING", "RUNNING"):
        alone = run(type_, 1, is_deployment_deleted=True)
        assert decided(alone, [job()], [pod(has_started=True)]) == [Cancel(alone, "Its deployment was deleted")]
    (action,) = decided(run("CANCELLING", 1, is_deployment_deleted=True), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace is None
    told = decide_retry(run("CRASHED"), Cause("crash", ""), None)
    assert (told.is_retried, told.labels) == (False, {SETTLED_LABEL: "s"}), "nobody could claim it"


def test_nothing_outlives_its_run() -> None:
    assert [type(each) for each in decided(None, [job()], [pod(has_started=True)])] == [Stop]
    assert decided(run("COMPLETED", 30), [job()], [pod(has_started=True)]) == []
    assert [type(each) for each in decided(run("COMPLETED", 61), [job()], [pod(has_started=True)])] == [Stop]
    assert decided(run("CRASHED", 10), [job()], [pod(has_started=True)]) == [], "it may yet tell why"
    (action,) = decided(run("CRASHED", 16), [job()], [pod(has_started=True)])
    assert isinstance(action, Stop)
    assert action.grace == 0
    older = [job("job-0", seconds=200), job()]
    stopped = decided(run("RUNNING"), older, [pod("job-0", has_started=True), pod(has_started=True)])
    assert [each.job for each in stopped if isinstance(each, Stop)] == ["job-0"]


def test_a_crash_is_tried_again_within_its_budget() -> None:
    crashed = run("CRASHED", 5)
    (action,) = decided(crashed, [job(is_finished=True)], [pod(end=end())])
    assert isinstance(action, Retry)
    first = decide_retry(crashed, action.cause, RetryBudget())
    assert (first.is_retried, first.delay_seconds) == (True, 0)
    assert first.labels == {CRASHES_LABEL: 1, RETRIED_LABEL: "s crash", CAUSE_LABEL: ""}
    # Cut off after it was counted: the same again.
    assert decide_retry(replace(crashed, labels=first.labels or {}), action.cause, RetryBudget()) == first
    second = decide_retry(replace(crashed, labels={CRASHES_LABEL: 1}), action.cause, RetryBudget())
    assert (second.is_retried, second.delay_seconds) == (True, 10)
    third = decide_retry(replace(crashed, labels={CRASHES_LABEL: 2}), action.cause, RetryBudget())
    assert (third.is_retried, third.labels) == (False, {SETTLED_LABEL: "s"})
    assert decided(replace(crashed, labels=third.labels or {}), [], []) == []
    assert decided(replace(crashed, deployment=""), [], []) == []


def test_an_execution_that_was_lost_from_sight_is_fenced_before_another_begins() -> None:
    jobs = [job("job-1", 200, is_finished=True), job("job-2", is_finished=True)]
    for recorded, ended, lost in (
        ("job-2", [], ("job-2",)),
        ("job-2", [pod("job-2", end=end())], ()),
        ("job-1", [pod("job-1", 200, end=end())], ("job-2",)),  # its worker died before it recorded the newer one
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


def test_a_disruption_has_a_budget_of_its_own_and_a_hopeless_start_none() -> None:
    noted = run("CRASHED", 5, labels={CAUSE_LABEL: "disruption", CRASHES_LABEL: 2}, message="Drained")
    (action,) = decided(noted, [], [])
    assert kind_of(action) == "disruption"
    gone = decided(run("RUNNING"), [job(is_finished=True, is_disrupted=True)], [])
    assert [kind_of(each) for each in gone] == ["disruption"], "its Job knows more than its pod, which is gone"
    assert isinstance(action, Retry)
    assert decide_retry(noted, action.cause, RetryBudget()).labels == {
        DISRUPTIONS_LABEL: 1,
        RETRIED_LABEL: "s disruption",
        CAUSE_LABEL: "",
    }
    assert not decide_retry(noted, Cause("start", ""), RetryBudget()).is_retried


@pytest.mark.parametrize(
    ("limit", "most", "grown"),
    [("700Mi", "", "1050Mi"), ("1Gi", "1.2Gi", "1228Mi"), ("2Gi", "1Gi", ""), ("", "", ""), ("1e9", "", "1430Mi")],
)
def test_memory_grows_after_it_was_exceeded(limit: str, most: str, grown: str) -> None:
    found = decide_retry(run("CRASHED"), Cause("oom", "", limit), RetryBudget(memory_max=most))
    assert found.memory_limit == grown
    assert found.is_retried


def test_a_budget_that_is_none_is_the_default() -> None:
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
def test_what_waits_for_room_waits_longer_than_what_needs_a_cure(
    waiting: tuple[str, str] | None, refused: str, patience: float
) -> None:
    state = waiting[0] if waiting else "PodRefused"
    waits = run("PENDING", 5, state=state)
    for age in (patience - 1, patience + 1):
        made = [pod(seconds=age, waiting=waiting)] if waiting else []
        found = decided(waits, [job(seconds=age, refusal=refused)], made)
        assert [kind_of(each) for each in found] == ([] if age < patience else ["start"])


@pytest.mark.parametrize(
    ("capacity", "patience"), [(True, Policy().capacity_seconds), (False, Policy().pending_seconds)]
)
def test_refused_job_is_asked_for_again_until_the_run_is_given_up(capacity: bool, patience: float) -> None:
    """It costs no retry: nothing has started. Whatever older Job of the run is there is none of this claim."""
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
    assert crash.labels[REFUSAL_LABEL] == "", "a retry by hand waits as long again"
    assert not decide_retry(
        replace(refused(1, 1), type="CRASHED"), crash.cause, RetryBudget(crash_retries=0)
    ).is_retried
    created = job(seconds=3)
    assert [type(each) for each in decided(refused(61, 5), [created], [])] == [Adopt], "its answer was lost, not it"


def test_refusal_is_read_as_it_was_written() -> None:
    made = Refusal(ago(5), True, 3)
    assert Refusal.read({REFUSAL_LABEL: made.label}) == made
    for none in ({}, {REFUSAL_LABEL: ""}, {REFUSAL_LABEL: "yesterday"}, {REFUSAL_LABEL: "2026-01-01 capacity many"}):
        assert Refusal.read(none) is None


@dataclass
class World:
    """A run, its worker, Jobs and pods, as the real ones behave."""

    now: datetime = NOW
    run: Run | None = field(default_factory=lambda: run("SCHEDULED", job=""))
    jobs: list[Job] = field(default_factory=list)
    pods: list[Pod] = field(default_factory=list)
    claims: list[tuple[datetime, str]] = field(default_factory=list)
    stalled: list[str] = field(default_factory=list)
    """Jobs that the Kubernetes API was asked to create and may yet create."""
    states: list[dict[str, str]] = field(default_factory=list)
    checked: dict[str, bool] = field(default_factory=dict)
    """What pods have heard when they asked whether they may execute the run."""
    made: str = ""
    read: Run | None = None
    steady: Run | None = None
    due: datetime = NOW
    abandoned: bool = False
    sidecars: bool = False
    """Whether a sidecar runs on in each pod until somebody deletes it."""
    started: set[str] = field(default_factory=set)
    """Jobs of which a pod has begun the run: its run attempts."""
    lost: dict[str, datetime | None] = field(default_factory=dict)
    """Jobs whose pods execute on unseen, and when they were fenced."""

    def set(self, type_: str, name: str = "") -> None:
        assert self.run
        if self.run.type in FINAL_STATES:
            expected = [("CRASHED", "SCHEDULED"), ("CRASHED", "FAILED")]
            assert (self.run.type, type_) in expected, f"a run that is {self.run.type} became {type_}"
        self.run = replace(self.run, type=type_, state=name or type_, state_id=uuid4().hex, since=self.now)
        self.states.append({"id": self.run.state_id, "name": self.run.state, "type": type_})

    def deployment_is_deleted(self) -> None:
        """The server deletes what is scheduled with it; what was scheduled before stays what it was."""
        self.abandoned = True
        if self.run and self.run.type == "SCHEDULED":
            self.set("CANCELLED")

    def worker_claims(self) -> None:
        if self.run and self.run.type == "SCHEDULED" and self.now >= self.due:
            self.set("PENDING", "Pending")
            self.claims.append((self.now, f"job-{self.states[-1]['id'][-12:]}"))

    def worker_makes_the_job(self) -> None:
        """Each claim in its turn, at the latest after as long as the policy allows."""
        if self.claims:
            claimed, name = self.claims.pop(0)
            if (self.now - claimed).total_seconds() < Policy().claim_seconds:
                self.made = name
                self._create(name)

    def request_for_a_job_stalls(self) -> None:
        if self.claims:
            self.stalled.append(self.claims.pop(0)[1])

    def stalled_request_arrives(self) -> None:
        """However late: its worker has let the claim go, and does not record the Job."""
        if self.stalled and self.run:
            self._create(self.stalled.pop(0))

    def _create(self, name: str) -> None:
        created = self.now.replace(microsecond=0)
        self.jobs.append(Job(name, "r", created))
        self.pods.append(Pod(name, "r", name, created))

    def pod_asks_whether_it_may_begin(self) -> None:
        for each in self.pods:
            if each.is_live and not each.has_started and each.name not in self.checked:
                self.checked[each.name] = not is_given_away(each.job, self.states)
                return

    def kubernetes_makes_another_pod(self) -> None:
        """As it does of a Job with a backoffLimit, until that is over. Whose node is cut off has none here: the new pod
        would be of the same Job.
        """
        living = {each.job for each in self.pods if each.is_live or each.has_live_sidecar}
        for each in self.jobs:
            if not each.is_finished and each.name not in {*living, *self.lost}:
                self.pods.append(Pod(f"{each.name}-{uuid4().hex}", "r", each.name, self.now.replace(microsecond=0)))
                return

    def pod_reports_a_crash(self) -> None:
        """What executes the flow's process says that it died, and lives on for a moment."""
        if self.run and self.run.type == "RUNNING" and any(each.is_live and each.has_started for each in self.pods):
            self.set("CRASHED")

    def worker_records_it(self) -> None:
        if self.run and self.made:
            self.run = replace(self.run, job=self.made)

    def worker_dies(self) -> None:
        self.claims, self.made = [], ""

    def pod_starts(self) -> None:
        """Prefect's engine begins a run that is Pending, and one that is Running as well."""
        for number, each in enumerate(self.pods):
            if each.is_live and not each.has_started:
                may_begin = self.checked.get(each.name, not is_given_away(each.job, self.states))
                if may_begin and self.run and self.run.type in ("PENDING", "RUNNING"):
                    assert not any(other.is_live and other.has_started for other in self.pods), (
                        "a second living execution"
                    )
                    for fenced in self.lost.values():
                        assert fenced, "a second execution beside one that nobody has fenced"
                        assert self.now - fenced > timedelta(seconds=CHECK_INTERVAL_SECONDS + CHECK_TIMEOUT_SECONDS), (
                            "it may not have stopped yet"
                        )
                    self.set("RUNNING")
                    self.started.add(each.job)
                    self.pods[number] = replace(each, has_started=True)
                else:
                    self._end(number, 0)
                return

    def _end(self, number: int, code: int, **more: object) -> None:
        end = End(self.now, code, "Error", **more)  # type: ignore[arg-type]
        self.pods[number] = replace(self.pods[number], end=end, has_live_sidecar=self.sidecars)

    def engine_retries(self) -> None:
        """The flow, within its execution."""
        if self.run and self.run.type == "RUNNING" and any(each.is_live and each.has_started for each in self.pods):
            self.set("RUNNING")

    def pod_completes(self) -> None:
        for number, each in enumerate(self.pods):
            if each.is_live and each.has_started:
                if self.run and self.run.type == "RUNNING":
                    self.set("COMPLETED")
                self._end(number, 0)

    def pod_is_killed(self, **more: object) -> None:
        for number, each in enumerate(self.pods):
            if each.is_live:
                self._end(number, 137, **more)
                return

    def pod_is_asked_to_end(self) -> None:
        """By SIGTERM, whoever sent it: the supervisor in the pod says what becomes of the run."""
        for number, each in enumerate(self.pods):
            if each.is_live and each.has_started:
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
                # Of a Job for which Kubernetes makes another pod the supervisor says nothing.
                self.jobs = [replace(job, is_finished=job.is_finished or job.name == each.job) for job in self.jobs]
                return

    def deadline_passes(self) -> None:
        """Its Job's pods get SIGTERM, and the supervisor says nothing."""
        for number, each in enumerate(self.pods):
            if each.is_live:
                self.jobs = [
                    replace(job, is_finished=True, exceeded_deadline=20) if job.name == each.job else job
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
        """Its pod is gone for Kubernetes, and executes on. Not one of several of its Job, which are not told apart."""
        for each in self.pods:
            if each.is_live and each.has_started and not any(other.end for other in self.pods if other.job == each.job):
                self.pods.remove(each)
                if self.run and self.run.type not in FINAL_STATES:  # else it has said that it ends
                    self.lost[each.job] = None
                return

    def node_is_given_up(self) -> None:
        """The same, and Kubernetes has yet to remove the pod, of which it says that it has ended."""
        before = [*self.pods]
        self.node_is_cut_off()
        for each in before:
            if each not in self.pods:
                ended = End(self.now, None, "Failed", disruption="DeletionByPodGC", is_confirmed=False)
                self.pods.append(replace(each, end=ended))

    def finished_jobs_are_removed(self) -> None:
        """As they are after `ttlSecondsAfterFinished`."""
        over = {each.name for each in self.jobs if each.is_finished}
        over -= {each.job for each in self.pods if each.is_live or each.has_live_sidecar}
        self.jobs = [each for each in self.jobs if each.name not in over]
        self.pods = [each for each in self.pods if each.job not in over]

    def job_is_deleted(self) -> None:
        if self.jobs:
            self.stop(self.jobs[0].name)

    def sidecar_ends(self) -> None:
        self.pods = [replace(each, has_live_sidecar=False) for each in self.pods]

    def controller_counts(self) -> None:
        living = {each.job for each in self.pods if each.is_live or each.has_live_sidecar}
        self.jobs = [replace(each, is_finished=each.is_finished or each.name not in living) for each in self.jobs]

    def cancelled_in_the_ui(self) -> None:
        if self.run and self.run.type in ("PENDING", "RUNNING"):
            self.set("CANCELLING")

    def a_second_passes(self) -> None:
        self.now += timedelta(seconds=1)

    def a_minute_passes(self) -> None:
        self.now += timedelta(seconds=61)

    def reconciler_reads_the_run(self) -> None:
        """Or counts it, where it was steady: then it is known as it was, whatever has happened since."""
        known = self.steady if self.run and self.run.type == "RUNNING" else None
        self.read = self.run and replace(known or self.run, is_deployment_deleted=self.abandoned)

    def reconciler_acts(self) -> None:
        if self.read is None:
            return
        jobs = [
            replace(
                each,
                is_given_away=not each.is_finished and each.name != self.read.job and self._is_given_away(each.name),
            )
            for each in self.jobs
        ]
        decided = decide(self.read, jobs, self.pods, self.now, Policy())
        self.steady = self.read if is_steady(self.read, jobs, self.pods) else None
        assert not (self.steady and decided), "decided about a steady run"
        for action in decided:
            self.carry_out(action)
        self.read = None

    def _is_given_away(self, job: str) -> bool:
        return is_given_away(job, self.states)

    def stop(self, name: str) -> None:
        self.jobs = [each for each in self.jobs if each.name != name]
        self.pods = [each for each in self.pods if each.job != name]

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
            if all(each.is_finished for each in self.jobs):
                self.set("SCHEDULED")
        elif isinstance(action, Cancel):
            self.set("CANCELLING")
        elif isinstance(action, TimeOut):
            self.set("FAILED", "TimedOut")
            for each in action.lost:
                if each in self.lost:
                    self.lost[each] = self.now
        elif isinstance(action, Cancelled | Crash):
            self.run = replace(self.run, labels={**self.run.labels, **action.labels})
            for each in self.lost:
                if action.labels.get(FENCED_LABEL_PREFIX + each):
                    self.lost[each] = self.now
            self.set("CRASHED" if isinstance(action, Crash) else "CANCELLED")
        elif isinstance(action, Retry):
            told = decide_retry(self.run, action.cause, None if self.abandoned else RetryBudget())
            self.run = replace(self.run, labels={**self.run.labels, **(told.labels or {})})
            if told.is_retried:
                assert not any(each.is_live for each in self.pods), "tried again beside a living pod"
                self.set("SCHEDULED", "AwaitingRetry")
                self.due = self.now + timedelta(seconds=told.delay_seconds)
        elif isinstance(action, Explain):
            self.set("PENDING", action.state)


NO_EVENTS = {"set", "stop", "carry_out"}
EVENTS = [name for name, value in vars(World).items() if callable(value) and name not in NO_EVENTS and name[0] != "_"]
SECONDS = ["a_second_passes"] * 4
ROUND = ["reconciler_reads_the_run", "reconciler_acts"]
USUAL = [
    ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts"],
    ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts", *ROUND],
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
"""What often comes one after the other: of single events most histories would come to nothing."""


GIVEN_AWAY_CLAIM = ["worker_claims", "request_for_a_job_stalls", "a_minute_passes", *ROUND]
EXECUTES = ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts"]
ASKS = ["stalled_request_arrives", "pod_asks_whether_it_may_begin"]


@given(st.lists(st.sampled_from([*([each] for each in EVENTS), *USUAL * 3]), max_size=25), st.booleans())
@example([GIVEN_AWAY_CLAIM, ROUND, EXECUTES, ["stalled_request_arrives", "pod_starts"], ROUND], False)
@example([GIVEN_AWAY_CLAIM, ["stalled_request_arrives"], ROUND, ROUND, EXECUTES], False)
@example(
    [GIVEN_AWAY_CLAIM, ROUND, ["worker_claims", *ASKS], ["worker_makes_the_job", "pod_starts"], ["pod_starts"]], False
)
@example([GIVEN_AWAY_CLAIM[:3], [ROUND[0]], ASKS, [ROUND[1]], ROUND, EXECUTES, ["pod_starts"]], False)
@settings(max_examples=examples(8))
def test_any_history_ends_with_nothing_lost_stuck_or_twice(history: list[list[str]], sidecars: bool) -> None:
    world = World(sidecars=sidecars)
    for event in (each for some in history for each in some):
        getattr(world, event)()
    # From here on nothing goes wrong any more.
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
    assert not [each for each in world.pods if each.is_live or each.has_live_sidecar], world
    assert all(world.lost.values()), f"an execution goes on that nobody has fenced: {world}"
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
"""How a run attempt may end without the run being over."""


@given(st.lists(st.sampled_from(ENDS), min_size=20, max_size=20), st.booleans())
@settings(max_examples=examples(2))
def test_any_history_of_ends_has_no_more_run_attempts_than_its_budgets(ends: list[list[str]], sidecars: bool) -> None:
    world = World(sidecars=sidecars)
    beginning = ["worker_claims", "worker_makes_the_job", "worker_records_it", "pod_starts", *ROUND]
    for events in ends:
        for event in [*beginning, *events]:
            getattr(world, event)()
        waits = ["controller_counts", *SECONDS, *SECONDS, *ROUND] * 3 + ["a_minute_passes"] * 22
        for event in [*waits, "finished_jobs_are_removed"]:
            getattr(world, event)()
    for event in ["controller_counts", *SECONDS, *ROUND] * 10:
        getattr(world, event)()
    assert world.run
    retries = RetryBudget()
    assert world.run.type == "CRASHED", "20 ends are more than any budget"
    assert len(world.started) <= 1 + retries.crash_retries + retries.disruption_retries
    assert protocol.SETTLED_LABEL in world.run.labels


def test_deadline_ends_the_run_without_a_retry() -> None:
    expired = job(is_finished=True, exceeded_deadline=20)
    for pods in ([], [pod(end=end(code=143))], [pod(end=end(code=137))]):
        [action] = decided(run("RUNNING"), [expired], pods)
        assert isinstance(action, TimeOut)
        assert action.sentence == "Job job-1 ran for longer than its activeDeadlineSeconds of 20"
        assert action.lost == (() if pods else ("job-1",))
        [action] = decided(run("CRASHED", 5), [expired], pods)
        assert isinstance(action, TimeOut), "its process said something of itself first"
    waited = run("PENDING", 5, state="Unschedulable")
    assert [type(each) for each in decided(waited, [expired], [])] == [TimeOut], "it never had a node"
    in_its_pod = pod(end=end(code=137, reason="DeadlineExceeded", message="Pod was active longer"))
    assert [type(each) for each in decided(run("RUNNING"), [job(is_finished=True)], [in_its_pod])] == [TimeOut]
    again = run("RUNNING", job="job-2")
    assert decided(again, [replace(expired, created_at=ago(500)), job("job-2")], [pod("job-2", has_started=True)]) == []


@pytest.mark.parametrize("type_", ["Failed", "FailureTarget"])
def test_deadline_is_read_of_the_job(type_: str) -> None:
    condition = {"type": type_, "status": "True", "reason": "DeadlineExceeded"}
    raw = {
        "metadata": {"name": "j", "creationTimestamp": NOW, "labels": {RUN_LABEL: "r"}},
        "spec": {"activeDeadlineSeconds": 20},
        "status": {"conditions": [condition]},
    }
    assert Job.read(JobObject.model_validate(raw)).exceeded_deadline == 20
    raw["status"] = {"conditions": [condition | {"reason": "BackoffLimitExceeded"}]}
    assert Job.read(JobObject.model_validate(raw)).exceeded_deadline is None
