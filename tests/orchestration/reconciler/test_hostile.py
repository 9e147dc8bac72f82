"""Tests that no label, annotation, message or name that a flow run or a user writes stops the reconciler."""

import json
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestration.inspection.memory import memory_need
from orchestration.protocol import (
    CAUSE_LABEL,
    CLUSTER_LABEL,
    CRASHES_LABEL,
    DISRUPTIONS_LABEL,
    EXCEEDED_LABEL,
    LOST_LABEL,
    NAMESPACE_LABEL,
    NOTED_ANNOTATION,
    PEAK_LABEL,
    REFUSAL_LABEL,
    RETRIED_LABEL,
    RUN_LABEL,
    SETTLED_LABEL,
)
from orchestration.reconciler.budget import RetryBudget, decide_retry
from orchestration.reconciler.decide import Retry, decide
from orchestration.reconciler.kubernetes_objects import JobObject, PodObject
from orchestration.reconciler.model import Job, Pod, Policy, Refusal, Run, is_run_id
from orchestration.reconciler.pod_events import build_pod_events
from orchestration.reconciler.pod_records import build_pod_records, unrecorded_pods
from tests.orchestration.reconciler.test_decide import NOW, ago
from tests.parts import examples

RUN = "01234567-89ab-4cde-8f01-23456789abcd"

TEXTS = st.sampled_from(
    ["", "x", "-1", "1e400", "NaN", "1.2.3", "9" * 400, "9" * 5000, "1_0", "[" * 3000, "{", "\n", "\x00", "a[/]b",
     '{"peak": "x"}', '{"peak": NaN, "oom_kills": "y"}', '{"peak": 1e999}', '{"peak": -7}', '{"leases": {"a": 1}}',
     '{"peak": [1]}', '{"peak": true}', '[{"peak": 1}]', "2026-01-01T00:00:00 capacity 1",
     "2026-01-01T00:00:00+00:00 capacity 99999999999999999999", "0001-01-01T00:00:00+14:00 cure 0"]
)  # fmt: skip
VALUES = TEXTS | st.booleans() | st.floats() | st.integers() | st.text(max_size=20) | st.integers(10**9, 10**400)
LABELS = st.dictionaries(
    st.sampled_from(
        [
            PEAK_LABEL,
            EXCEEDED_LABEL,
            CRASHES_LABEL,
            DISRUPTIONS_LABEL,
            LOST_LABEL,
            RETRIED_LABEL,
            SETTLED_LABEL,
            CAUSE_LABEL,
            REFUSAL_LABEL,
            CLUSTER_LABEL,
            NAMESPACE_LABEL,
        ]
    ),
    VALUES,
)
VARIABLES = st.dictionaries(
    st.sampled_from(["crash_retries", "disruption_retries", "crash_backoff", "memory_growth", "memory_max"]), VALUES
)


def _run(state: str, labels: dict[str, Any], text: str) -> Run:
    raw = {
        "id": RUN, "name": text, "deployment_id": str(uuid4()), "infrastructure_pid": f"ns:{text}", "labels": labels,
        "state": {"id": "s", "type": state, "name": text, "message": text, "timestamp": ago(100).isoformat()},
    }  # fmt: skip
    return Run.read(raw)


def _job(annotation: str) -> Job:
    metadata = {
        "name": "job-1", "uid": "u", "creationTimestamp": ago(100).isoformat(), "labels": {RUN_LABEL: RUN},
        "annotations": {NOTED_ANNOTATION: annotation},
    }  # fmt: skip
    return Job.read(JobObject.model_validate({"metadata": metadata, "spec": {"backoffLimit": 0}}))


def _pod(message: str, memory: str, reason: str) -> Pod:
    metadata = {
        "name": "pod-1", "uid": "u", "creationTimestamp": ago(90).isoformat(),
        "labels": {RUN_LABEL: RUN, "job-name": "job-1", "prefect.io/worker-name": "_"},
    }  # fmt: skip
    ended = {"exitCode": 1, "reason": reason, "message": message, "finishedAt": ago(20).isoformat()}
    container = {"name": "prefect-job", "resources": {"limits": {"memory": memory}}}
    statuses = [{"name": "prefect-job", "state": {"terminated": ended}}]
    status = {"phase": "Failed", "message": message, "containerStatuses": statuses}
    raw = {"metadata": metadata, "spec": {"containers": [container]}, "status": status}
    return Pod.read(PodObject.model_validate(raw))


@settings(max_examples=examples(3))
@given(
    st.sampled_from(["PENDING", "RUNNING", "CANCELLING", "CRASHED", "COMPLETED", "PAUSED"]),
    LABELS, VARIABLES, TEXTS, TEXTS, TEXTS, st.sampled_from(["OOMKilled", "Error", "Evicted"]),
)  # fmt: skip
@example("CRASHED", {CRASHES_LABEL: 10**9}, {"crash_retries": 10**10}, "x", "0", "1Mi", "Error")
def test_hostile_labels_annotations_and_messages_raise_nothing(
    state: str, labels: dict[str, Any], variables: dict[str, Any], text: str, annotation: str, memory: str, reason: str
) -> None:
    run, job, pod = _run(state, labels, text), _job(annotation), _pod(text, memory, reason)
    actions = decide(run, [job], [pod], NOW, Policy())
    for action in actions:
        if isinstance(action, Retry):
            found = decide_retry(run, action.cause, RetryBudget.from_job_variables(variables))
            assert NOW + timedelta(seconds=found.delay_seconds * 1.25) > NOW - timedelta(seconds=1)
            json.dumps(found.labels, allow_nan=False)
    for record in build_pod_records(run, [job], [pod]):
        assert all(0 < size < 2**63 for size in record.labels.values())
    unrecorded_pods([job], [pod])
    json.dumps(build_pod_events(pod, "ns"), allow_nan=False)
    assert memory_need(labels, RetryBudget.from_job_variables(variables).memory_growth) >= 0
    refusal = Refusal.read(labels)
    assert refusal is None or NOW - refusal.since


@pytest.mark.parametrize(
    ("label", "is_id"), [(RUN, True), ("x", False), ("", False), (RUN.upper(), False), (RUN.replace("-", ""), False)]
)
def test_run_label_of_other_form_is_not_a_run_id(label: str, is_id: bool) -> None:
    assert is_run_id(label) == is_id
