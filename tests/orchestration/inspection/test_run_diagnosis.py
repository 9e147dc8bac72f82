"""Tests of the diagnoses that `orchestrate why` prints, on a real server."""

from datetime import UTC, datetime, timedelta

import pytest

from orchestration.__main__ import main
from orchestration.diagnoses import title
from orchestration.protocol import CAUSE_LABEL, LOST_LABEL, SETTLED_LABEL
from orchestration.reconciler.state_messages import DEADLINE_EXCEEDED, JOB_NOT_CREATED, NO_JOB_FOR_CLAIM, NODE_LOST
from orchestration.runs.supervisor import after_sigterm
from tests.orchestration.inspection.work_pool import Json, WorkPool, why


@pytest.mark.parametrize(
    ("states", "text"),
    [
        ([{"type": "PENDING"}], "was claimed"),
        ([{"type": "PENDING", "name": "ImagePullBackOff", "message": "Pod x does not start"}], "Pod x does not start"),
        ([{"type": "RUNNING"}], "It has been running for"),
        ([{"type": "RUNNING"}, {"type": "CANCELLING"}], "It has been Cancelling for"),
        ([{"type": "CRASHED", "message": "OOMKilled: pod x"}], "It is Crashed: OOMKilled: pod x."),
        ([{"type": "COMPLETED"}], "It is Completed."),
    ],
)
def test_diagnosis_explains_state(
    pool: WorkPool, capsys: pytest.CaptureFixture[str], states: list[Json], text: str
) -> None:
    assert text in why(pool.run(*states), capsys)["diagnosis"]


def test_late_run_names_obstacle(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    due = {"state_details": {"scheduled_time": (datetime.now(UTC) - timedelta(minutes=5)).isoformat()}}
    late = pool.run(state={"type": "SCHEDULED"} | due)
    found = why(late, capsys)
    assert f"It is late by 5 min: work pool {pool.name} has no worker" in found["diagnosis"]
    assert found["see"] == ["docs/diagnoses/late.md"]
    pool.ask("PATCH", f"/work_pools/{pool.name}", {"is_paused": True})
    assert f"prefect work-pool resume {pool.name}" in why(late, capsys)["diagnosis"]


KILLED = "Pod x on n ended with exit code 137 (SIGKILL). The end of its log:\nOOMKilled: as a line of a log"
GIVEN_UP = "the id of the run's state"
TOMORROW = {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}


@pytest.mark.parametrize(
    ("state", "labels", "diagnoses"),
    [
        ({"type": "CRASHED", "message": KILLED}, {}, ["crash"]),
        ({"type": "CRASHED", "message": "Execution was interrupted"}, {CAUSE_LABEL: "disruption"}, ["disruption"]),
        (
            {"type": "CRASHED", "message": "OOMKilled: pod x exceeded"},
            {CAUSE_LABEL: "oom", SETTLED_LABEL: "-"},
            ["oom"],
        ),
        ({"type": "CRASHED", "message": KILLED}, {SETTLED_LABEL: GIVEN_UP}, ["crash", "given-up"]),
        (
            {"type": "CRASHED", "message": "Its pod is gone: somebody deleted it"},
            {CAUSE_LABEL: "crash", LOST_LABEL: True},
            ["pod-gone", "fenced"],
        ),
        (
            {
                "type": "SCHEDULED",
                "name": "AwaitingRetry",
                "message": f"Retry 1 of 10 after a disruption. {NODE_LOST}",
                "state_details": TOMORROW,
            },
            {LOST_LABEL: True},
            ["disruption", "fenced"],
        ),
        ({"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": TOMORROW}, {}, []),
        ({"type": "PENDING", "name": "ClaimLost", "message": f"{NO_JOB_FOR_CLAIM} within 61 s"}, {}, ["claim-lost"]),
        (
            {"type": "SCHEDULED", "message": f"{NO_JOB_FOR_CLAIM} within 61 s", "state_details": TOMORROW},
            {},
            ["claim-lost"],
        ),
        ({"type": "PENDING", "name": "ErrImageNeverPull", "message": "Pod x does not start"}, {}, ["image"]),
        ({"type": "PENDING", "name": "PodRefused", "message": "Job x cannot make its pod"}, {}, ["refused"]),
        ({"type": "PENDING", "name": "JobRefused", "message": f"{JOB_NOT_CREATED}Forbidden"}, {}, ["refused"]),
        ({"type": "SCHEDULED", "message": f"{JOB_NOT_CREATED}Forbidden", "state_details": TOMORROW}, {}, ["refused"]),
        (
            {"type": "FAILED", "name": "TimedOut", "message": f"Job x{DEADLINE_EXCEEDED}its deadline"},
            {},
            ["deadline"],
        ),
        ({"type": "FAILED", "message": "Flow run encountered an exception"}, {}, []),
        (after_sigterm(1, 10, datetime.now(UTC) + timedelta(days=1)), {}, ["disruption"]),
        (after_sigterm(11, 10, datetime.now(UTC)), {CAUSE_LABEL: "disruption"}, ["disruption"]),
        ({"type": "PENDING"}, {}, []),
        ({"type": "CANCELLING"}, {}, ["cancelling"]),
        ({"type": "COMPLETED", "message": "OOMKilled: no"}, {}, []),
    ],
)
def test_why_prints_pages_of_diagnoses(
    pool: WorkPool, capsys: pytest.CaptureFixture[str], state: Json, labels: Json, diagnoses: list[str]
) -> None:
    run = pool.run({"type": "RUNNING"}, state)
    if labels.get(SETTLED_LABEL) == GIVEN_UP:
        labels = {SETTLED_LABEL: pool.ask("GET", f"/flow_runs/{run['id']}")["state_id"]}
    pool.ask("PATCH", f"/flow_runs/{run['id']}/labels", labels)
    pages = [f"docs/diagnoses/{diagnosis}.md" for diagnosis in diagnoses]
    assert why(run, capsys)["see"] == pages
    main(["why", run["id"]])
    shown = capsys.readouterr().out
    lines = [
        f"{title(diagnosis)}. See docs/diagnoses/{diagnosis}.md, or run: orchestrate explain {diagnosis}"
        for diagnosis in diagnoses
    ]
    assert shown.splitlines()[len(shown.splitlines()) - len(lines) :] == lines
    assert shown.count("orchestrate explain") == len(lines)
