"""Each diagnosis has its page and its words, on every way that a pod may end or wait."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import pytest

from orchestration.reconciler import causes
from orchestration.reconciler.causes import HOPELESS, OF_STATE, PAGES, REFUSED, STARTING, Diagnosis, of_sentence
from orchestration.reconciler.facts import End, Job, Pod
from orchestration.settings import ROOT

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POD = Pod("heron-1-pod", "r", "heron-1", NOW, started=True, memory="700Mi", node="node-1")
DIAGNOSES = set(get_args(Diagnosis))


def page(diagnosis: str) -> Path:
    return ROOT / PAGES.format(diagnosis)


def test_each_diagnosis_has_its_page_and_each_page_its_diagnosis() -> None:
    folder = page("crash").parent
    assert {each.stem for each in folder.iterdir()} == DIAGNOSES
    for each in DIAGNOSES:
        assert f"(diagnoses/{each}.md)" in (ROOT / "docs/runs.md").read_text(), f"the table leaves out {each}"


def test_each_state_of_a_pod_that_waits_has_a_page_that_names_it() -> None:
    assert OF_STATE.keys() == STARTING - {"InfrastructurePending"}
    for state, diagnosis in OF_STATE.items():
        assert state in page(diagnosis).read_text()


@pytest.mark.parametrize("diagnosis", sorted(DIAGNOSES))
def test_a_page_says_what_to_see_to_confirm_to_cure_and_what_happens_by_itself(diagnosis: str) -> None:
    text = page(diagnosis).read_text()
    parts = ["What you see.", "What it means.", "How to confirm.", "The cure.", "What the reconciler does."]
    assert [each for each in parts if f"**{each}**" in text] == parts


@pytest.mark.parametrize("reason", sorted({*causes.DISRUPTIONS, "Evicted", "Preempting", "NodeLost", "Shutdown"}))
def test_each_end_by_the_cluster_is_a_disruption(reason: str) -> None:
    by_condition = reason in causes.DISRUPTIONS
    end = End(NOW, 143, "Error", disruption=reason) if by_condition else End(NOW, None, reason)
    assert of_sentence(causes.of_end([replace(POD, end=end)]).sentence) == "disruption"


@pytest.mark.parametrize(
    ("end", "diagnosis"),
    [
        (End(NOW, 137, "Error"), "crash"),
        (End(NOW, None, "StartError", "exec: no such file"), "crash"),
        (End(NOW, 137, "OOMKilled", oom=True), "oom"),
        (End(NOW, 1, "Error", oom=True, peak=700 * 2**20), "oom"),
    ],
)
def test_the_sentence_of_an_end_is_diagnosed_as_that(end: End, diagnosis: Diagnosis) -> None:
    sentence = causes.of_end([replace(POD, end=end)]).sentence
    assert of_sentence(sentence) == diagnosis
    assert of_sentence(f"Retry 1 of 2 after a crash. {sentence}") == diagnosis


def test_a_pod_that_is_gone_is_diagnosed_by_what_its_job_says() -> None:
    job = Job("heron-1", "r", NOW, over=True)
    assert of_sentence(causes.of_end([], [job]).sentence) == "pod-gone"
    assert of_sentence(causes.of_end([], [replace(job, disrupted=True)]).sentence) == "disruption"


@pytest.mark.parametrize("word", sorted(HOPELESS))
def test_a_pod_that_waits_is_diagnosed_by_its_word_also_when_given_up(word: str) -> None:
    found = causes.of_wait(Job("heron-1", "r", NOW), [replace(POD, waiting=(word, "OOMKilled: said by somebody"))])
    assert found
    assert of_sentence(f"{found[1]}. Given up after 601 s") == OF_STATE[found[0]]


def test_a_refusal_is_diagnosed() -> None:
    found = causes.of_wait(Job("heron-1", "r", NOW, refused="exceeded quota"), [])
    assert found
    assert found[0] == REFUSED
    assert of_sentence(found[1]) == OF_STATE[REFUSED] == "refused"


def test_what_others_say_of_a_crash_is_a_crash() -> None:
    assert of_sentence("") == of_sentence("Execution was cancelled by the runtime environment.") == "crash"
