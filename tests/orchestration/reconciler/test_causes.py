"""Tests of causes: each way that a pod can end or wait has a diagnosis, and each diagnosis has a page."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from orchestration import diagnoses, diagnosis_table
from orchestration.diagnosis_table import (
    JOB_REFUSED,
    POD_REFUSED,
    STARTING_STATES,
    STATE_DIAGNOSES,
    WAITING_REASONS,
    Diagnosis,
)
from orchestration.reconciler import causes
from orchestration.reconciler.model import End, Job, Pod
from orchestration.reconciler.state_messages import diagnosis_of
from orchestration.settings import ROOT

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POD = Pod("heron-1-pod", "r", "heron-1", NOW, has_started=True, memory="700Mi", node="node-1")
DIAGNOSES = set(get_args(Diagnosis))


def page(diagnosis: str) -> Path:
    return ROOT / diagnoses.path(diagnosis)


def test_each_diagnosis_has_a_page_and_each_page_a_diagnosis() -> None:
    folder = page("crash").parent
    assert {file.stem for file in folder.iterdir()} == DIAGNOSES | {diagnoses.INDEX}
    for diagnosis in DIAGNOSES:
        assert f"(../diagnoses/{diagnosis}.md)" in (ROOT / "docs/explanation/how-runs-survive.md").read_text(), (
            f"the table has no {diagnosis}"
        )


def test_each_waiting_state_is_named_on_page_of_its_diagnosis() -> None:
    assert STATE_DIAGNOSES.keys() == STARTING_STATES - {"InfrastructurePending"} | {JOB_REFUSED}
    for state, diagnosis in STATE_DIAGNOSES.items():
        assert state in page(diagnosis).read_text()


@pytest.mark.parametrize("diagnosis", sorted(DIAGNOSES))
def test_page_of_diagnosis_has_all_parts(diagnosis: str) -> None:
    text = page(diagnosis).read_text()
    parts = ["What you see.", "What it means.", "How to confirm.", "The cure.", "What the reconciler does."]
    assert [part for part in parts if f"**{part}**" in text] == parts


@pytest.mark.parametrize(
    "reason", sorted({*diagnosis_table.DISRUPTIONS, "Evicted", "Preempting", "NodeLost", "Shutdown"})
)
def test_pod_that_the_cluster_ended_is_disrupted(reason: str) -> None:
    by_condition = reason in diagnosis_table.DISRUPTIONS
    end = End(NOW, 143, "Error", disruption=reason) if by_condition else End(NOW, None, reason)
    assert diagnosis_of(causes.cause_of_end([replace(POD, end=end)]).sentence) == "disruption"


@pytest.mark.parametrize(
    ("end", "diagnosis"),
    [
        (End(NOW, 137, "Error"), "crash"),
        (End(NOW, None, "StartError", "exec: no such file"), "crash"),
        # The kubelet evicts a pod that writes more than its limits. The next pod would do the same.
        *[
            (End(NOW, 137, "Evicted", message, disruption="TerminationByKubelet"), "crash")
            for message in (
                'Usage of EmptyDir volume "tmp" exceeds the limit "10Gi". ',
                'Container prefect-job exceeded its local ephemeral storage limit "12Gi". ',
                "Pod ephemeral local storage usage exceeds the total limit of containers 12Gi. ",
            )
        ],
        (End(NOW, 137, "OOMKilled", oom=True), "oom"),
        (End(NOW, 1, "Error", oom=True, peak=700 * 2**20), "oom"),
    ],
)
def test_sentence_of_end_has_diagnosis(end: End, diagnosis: Diagnosis) -> None:
    sentence = causes.cause_of_end([replace(POD, end=end)]).sentence
    assert diagnosis_of(sentence) == diagnosis
    assert diagnosis_of(f"Retry 1 of 2 after a crash. {sentence}") == diagnosis


def test_deleted_pod_is_diagnosed_by_condition_of_job() -> None:
    job = Job("heron-1", "r", NOW, is_finished=True)
    assert diagnosis_of(causes.cause_of_end([], [job]).sentence) == "pod-gone"
    assert diagnosis_of(causes.cause_of_end([], [replace(job, is_disrupted=True)]).sentence) == "disruption"


@pytest.mark.parametrize("reason", sorted(WAITING_REASONS))
def test_waiting_pod_is_diagnosed_by_its_reason_also_after_giving_up(reason: str) -> None:
    found = causes.waiting_state(
        Job("heron-1", "r", NOW), [replace(POD, waiting=(reason, "OOMKilled: in the message"))]
    )
    assert found
    assert diagnosis_of(f"{found[1]}. Given up after 601 s") == STATE_DIAGNOSES[found[0]]


def test_refused_pod_is_diagnosed() -> None:
    found = causes.waiting_state(Job("heron-1", "r", NOW, refusal="exceeded quota"), [])
    assert found
    assert found[0] == POD_REFUSED
    assert diagnosis_of(found[1]) == STATE_DIAGNOSES[POD_REFUSED] == "refused"


def test_other_messages_are_diagnosed_as_crash() -> None:
    assert diagnosis_of("") == diagnosis_of("Execution was cancelled by the runtime environment.") == "crash"


QUOTA = 'pods "heron-1" is forbidden: exceeded quota: runs, requested: {}, used: {}, limited: {}'
NODES = "0/3 nodes are available: {}. preemption: 0/3 nodes are available: 3 Preemption is not helpful for scheduling."


@pytest.mark.parametrize(
    ("state", "message", "waits"),
    [
        (POD_REFUSED, QUOTA.format("limits.memory=1Gi", "limits.memory=16Gi", "limits.memory=16Gi"), True),
        (
            POD_REFUSED,
            QUOTA.format("cpu=1,limits.memory=1Gi", "cpu=3,limits.memory=1Gi", "cpu=4,limits.memory=16Gi"),
            True,
        ),
        (POD_REFUSED, QUOTA.format("limits.memory=99Gi", "limits.memory=0", "limits.memory=90Gi"), False),
        (POD_REFUSED, QUOTA.format("cpu=100m,pods=1", "cpu=0,pods=0", "cpu=2,pods=0"), False),
        (POD_REFUSED, "failed quota: runs: must specify limits.memory for: prefect-job", False),
        (POD_REFUSED, "status unknown for quota: runs, resources: pods", True),
        (POD_REFUSED, "maximum memory usage per Container is 4Gi, but limit is 99Gi", False),
        (POD_REFUSED, 'error looking up service account ns/runs: serviceaccount "runs" not found', False),
        (POD_REFUSED, 'violates PodSecurity "restricted:latest": runAsNonRoot != true', False),
        (POD_REFUSED, 'admission webhook "queue.example.com" denied the request: come back later', True),
        (
            POD_REFUSED,
            'Internal error occurred: failed calling webhook "mesh.example.com": context deadline exceeded',
            True,
        ),
        (JOB_REFUSED, QUOTA.format("count/jobs.batch=1", "count/jobs.batch=2", "count/jobs.batch=2. Hint: more"), True),
        (JOB_REFUSED, QUOTA.format("count/jobs.batch=1", "count/jobs.batch=0", "count/jobs.batch=0"), False),
        ("Unschedulable", NODES.format("3 Insufficient cpu"), True),
        (
            "Unschedulable",
            NODES.format("1 Insufficient memory, 2 node(s) had untolerated taint {dedicated: gpu}"),
            True,
        ),
        ("Unschedulable", NODES.format("3 Insufficient nvidia.com/gpu"), True),
        ("Unschedulable", NODES.format("3 Too many pods"), True),
        ("Unschedulable", NODES.format("3 node(s) were unschedulable"), True),
        ("Unschedulable", NODES.format("3 node(s) had untolerated taint {node.kubernetes.io/unreachable: }"), True),
        ("Unschedulable", "no nodes available to schedule pods", True),
        ("Unschedulable", NODES.format("3 node(s) didn't match Pod's node affinity/selector"), False),
        ("Unschedulable", NODES.format("3 node(s) had untolerated taint {dedicated: gpu}"), False),
        ("Unschedulable", "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims", False),
        ("SchedulingGated", "Scheduling is blocked due to non-empty scheduling gates", True),
        ("ImagePullBackOff", "timed out", False),
        ("CreateContainerConfigError", 'secret "Insufficient " not found', False),
        ("CreateContainerConfigError", "failed to sync secret cache: timed out waiting for the condition", True),
        (
            "FailedMount",
            'MountVolume.SetUp failed for volume "v": failed to sync configmap cache: timed out waiting for the ...',
            True,
        ),
        ("FailedMount", 'MountVolume.SetUp failed for volume "v": secret "absent" not found', False),
    ],
)
def test_waiting_for_capacity_differs_from_waiting_for_cure(state: str, message: str, waits: bool) -> None:
    assert causes.waits_for_capacity(state, message) == waits


@pytest.mark.parametrize(
    ("status", "is_transient"), [(500, True), (503, True), (429, True), (0, True), (422, False), (403, False)]
)
def test_server_error_is_transient_and_refusal_is_not(status: int, is_transient: bool) -> None:
    assert (
        causes.is_transient(status, 'jobs.batch is forbidden: User "worker" cannot create resource "jobs"')
        == is_transient
    )
