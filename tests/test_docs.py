"""The docs agree with the code: generated parts are current, commands exist, reference pages are complete."""

import argparse
import importlib
import pkgutil
import re
import shlex
import types
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from docs import generate, site_hooks
from orchestration import __main__ as program
from orchestration import protocol, reconciler
from orchestration.deployments import watch
from orchestration.diagnosis_table import SIGNALS, STARTING_STATES, STATE_DIAGNOSES
from orchestration.inspection import timeline
from orchestration.operations.local_cluster.binaries import MissingProgramError
from orchestration.prefect_compat.events import POD_EVENT_PREFIX
from orchestration.reconciler import causes, decide
from orchestration.reconciler.run_events import GIVEN_UP_EVENT, STATE_EVENT_PREFIX
from orchestration.runs import supervisor
from orchestration.settings import ROOT

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

DROPPED_WORDS = (
    "anew", "any more", "are said", "as it should be", "at the most", "beside", "by itself", "comes from it",
    "for programs", "goes on", "is said", "nobody", "of its own", "said", "somebody", "spoken", "the one that", "told",
    "what becomes of", "wherever", "whose all that is",
)  # fmt: skip
"""Words for which the field has others."""

SHELL = ("bash", "sh", "console", "text", "")
"""Languages of code blocks that have commands."""


@pytest.mark.parametrize("block", [name for name in generate.BLOCKS if name not in generate.NEEDS_HELM])
def test_generated_block_is_current(block: str) -> None:
    made = generate.BLOCKS[block][1]()
    assert generate.current(block) == made, "the page is not current: run make docs"


@pytest.mark.parametrize(
    ("comment", "shown"),
    [
        ("a URL like redis://x, or {a: 1}", "A URL like `redis://x`, or `{a: 1}`."),
        ("`{a}` is   kept.", "`{a}` is kept."),
        ("SELECT=...", "SELECT=..."),
        ("", ""),
    ],
)
def test_comment_is_shown_as_a_sentence(comment: str, shown: str) -> None:
    assert generate.sentence(comment) == shown


def test_values_key_without_a_comment_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"worker\.somethingNew has no comment in values\.yaml.*Add a comment"):
        generate._common_text("worker.somethingNew")


def test_page_of_rbac_stays_unchanged_without_helm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rbac() -> str:
        raise MissingProgramError("helm is not here")

    old = {
        page: f"before\n<!-- begin {page[0]} -->\nold\n<!-- end {page[0]} -->\nafter\n" for page in ("rbac.md", "m.md")
    }
    for page, text in old.items():
        (tmp_path / page).write_text(text)
    blocks = {"r": ("rbac.md", rbac), "m": ("m.md", lambda: "new\n")}
    monkeypatch.setattr(generate, "REFERENCE", tmp_path)
    monkeypatch.setattr(generate, "BLOCKS", blocks)
    assert generate.main() == 0
    assert (tmp_path / "rbac.md").read_text() == old["rbac.md"]
    assert generate.current("m") == "new\n"
    assert capsys.readouterr().err == "docs/reference/rbac.md stays as it is: helm is not here.\n"

    monkeypatch.setattr(generate, "BLOCKS", {"x": ("m.md", lambda: "new\n")})
    assert generate.main() == 1
    error = "docs/reference/m.md cannot be written: it has no block. Add `<!-- begin x -->` and `<!-- end x -->`.\n"
    assert capsys.readouterr().err == error


# Commands


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each line of code in a page's text."""
    blocks = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", text, flags=re.M | re.S)
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    lines = [
        line for language, block in blocks if language in SHELL for line in block.replace("\\\n", " ").splitlines()
    ]
    for line in [*lines, *re.findall(r"`([^`\n]+)`", prose)]:
        for part in re.split(r"&&|\|\||[;|(){}]", re.sub(r"(^|\s)#.*", "", line)):
            try:
                yield shlex.split(part)
            except ValueError:
                yield part.split()


def _unknown(text: str) -> list[str]:
    """Return the targets, variables, subcommands and options that a page names and that do not exist."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))
    variables = set(re.findall(r"^([A-Z_]+) *[?:]?=", makefile, flags=re.M)) | {"REPO_URL"}
    [chosen] = [action for action in program.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    unknown = []
    for words in _commands(text):
        command = [word for word in words if not re.match(r"[A-Z_]+=|sudo$|\$$", word)]
        if command[:1] == ["make"]:
            for word in words[words.index("make") + 1 :]:
                name, is_variable, _ = word.partition("=")
                if re.fullmatch(r"[A-Z_]+", name) and is_variable and name not in variables:
                    unknown.append(f"make {name}=")
                elif re.fullmatch(r"[a-z][a-z-]*", word) and word not in targets:
                    unknown.append(f"make {word}")
        found = [number for number, word in enumerate(words) if re.fullmatch(r"(\S*/)?orchestrate", word)]
        if found and len(words) > found[0] + 1:
            name, *arguments = words[found[0] + 1 :]
            if name.isupper() or name.startswith("-"):
                continue
            if name not in chosen.choices:
                unknown.append(f"orchestrate {name}")
                continue
            options = {flag for action in chosen.choices[name]._actions for flag in action.option_strings}
            for word in arguments:
                option = word.strip("[]").partition("=")[0]
                if option.startswith("--") and option != "--" and option not in options:
                    unknown.append(f"orchestrate {name} {option}")
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_named_in_docs_exist(page: Path) -> None:
    assert _unknown(page.read_text()) == []


def test_commands_that_do_not_exist_are_found() -> None:
    right = (
        "Make sure that it runs: `make`, `make test TESTS=tests/helm`, `CLUSTER=none make test`, `make TARGET`.\n"
        "```bash\nmake run DAY=2013-02-08 && make stop  # make it so\nA=b .venv/bin/orchestrate plan --prune\n"
        "orchestrate export --output prefect.yaml \\\n  --owner 'shop'\n```\n"
        "`orchestrate runs --stuck | grep make`, `orchestrate SUBCOMMAND --flag`\n```yaml\nmake: nonsense\n```\n"
    )
    wrong = (
        "`make tset`, `make run DAZE=1`\n```bash\nmake run && make halt\norchestrate sinc\n"
        "orchestrate plan \\\n  --pruned\n```\n`kubectl exec x -- orchestrate why RUN --quiet`"
    )
    assert _unknown(right) == []
    assert set(_unknown(wrong)) == {
        "make tset", "make DAZE=", "make halt",
        "orchestrate sinc", "orchestrate plan --pruned", "orchestrate why --quiet",
    }  # fmt: skip


# Modules


def _absent_modules(text: str) -> list[str]:
    """Return the files and dotted names of `orchestration` that a page names and that do not exist."""
    files = re.findall(r"(?:(?<=/app/)|(?<![\w/.-]))orchestration/\w+(?:[/.]\w+)*", text)
    absent = [file for file in files if not (ROOT / file).exists()]
    for name in re.findall(r"(?<![\w/.-])orchestration(?:\.\w+)+", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            absent.append(name)
    return absent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_named_in_docs_exist(page: Path) -> None:
    assert _absent_modules(page.read_text()) == []


def test_modules_that_do_not_exist_are_found() -> None:
    right = (
        "`orchestration.dbt`, `orchestration/settings.py`, `orchestration.runs.idempotency.idempotency_key()`. "
        "https://example.com/orchestration.git, `/app/orchestration`, `prefect/orchestration/x.py`"
    )
    wrong = "`orchestration.execute`, `orchestration.dbt.Project` and `/app/orchestration/execute.py`"
    assert _absent_modules(right) == []
    assert _absent_modules(wrong) == [
        "orchestration/execute.py", "orchestration.execute", "orchestration.dbt.Project",
    ]  # fmt: skip


# Words


def dropped_words(text: str) -> list[str]:
    """Return the dropped words in a text."""
    prose = " ".join(text.split()).lower()
    return [word for word in DROPPED_WORDS if re.search(rf"\b{word}\b", prose)]


def _dropped(text: str) -> list[str]:
    """Return the dropped words in a page's prose: in neither code nor generated parts."""
    text = re.sub(r"^ *```.*?^ *```", "", generate.without_blocks(text), flags=re.M | re.S)
    return dropped_words(re.sub(r"`[^`]*`|\]\([^)]*\)", "", text))


def test_pages_use_the_terms_of_the_field() -> None:
    pages = sorted(DOCS.rglob("*.md"))
    found = {str(page.relative_to(ROOT)): words for page in pages if (words := _dropped(page.read_text()))}
    assert pages
    assert found == {}


def test_dropped_words_are_found_in_prose_alone() -> None:
    page = (
        "Nobody starts\nanew. `beside` [x](told.md)\n```\nsomebody\n```\n<!-- begin a -->\ntold\n<!-- end a -->\nretold"
    )
    assert _dropped(page) == ["anew", "nobody"]


def test_every_page_is_reachable_from_the_index() -> None:
    found, left = set(), [DOCS / "index.md"]
    while left:
        page = left.pop()
        if page not in found and page.is_relative_to(DOCS) and page.suffix == ".md" and page.is_file():
            found.add(page)
            left += [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#:]+)", page.read_text())]
    assert sorted(str(page.relative_to(ROOT)) for page in set(DOCS.rglob("*.md")) - found) == []


@pytest.mark.parametrize(
    ("repository", "outside"),
    [("https://example.com/a/b/", "[code](https://example.com/a/b/blob/main/helm/x.yaml#L1)"), ("", "code")],
)
def test_site_links_to_files_outside_of_docs_lead_to_the_repository(repository: str, outside: str) -> None:
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="how-to/a.md"))
    kept = "[b](b.md#c), [d](../dbt.md), [e](#f), [g](https://example.com/../h), "
    config = types.SimpleNamespace(repo_url=repository)
    markdown = site_hooks.on_page_markdown(f"{kept}[code](../../helm/x.yaml#L1)", page, config)
    assert markdown == kept + outside


# Completeness of reference pages


def _page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text()


def _modules() -> list[types.ModuleType]:
    """Return the modules that define what worker, supervisor and reconciler share."""
    names = [module.name for module in pkgutil.iter_modules(reconciler.__path__, f"{reconciler.__name__}.")]
    return [supervisor, watch, *map(importlib.import_module, names)]


def _constants(prefix: str) -> set[str]:
    """Return the texts with a prefix among the modules' constants."""
    return {
        value
        for module in _modules()
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str) and value.startswith(prefix)
    }


def _states_of_actions() -> set[str]:
    """Return the names of states that the reconciler writes as they are in its code."""
    source = "".join(Path(str(module.__file__)).read_text() for module in _modules())
    return set(re.findall(r'_set_state\(server, run, "[A-Z]+", "(\w+)"', source))


def test_page_of_states_has_every_state() -> None:
    written = _states_of_actions()
    assert {"Crashed", "AwaitingRetry"} <= written
    states = {*written, *STATE_DIAGNOSES, *STARTING_STATES, protocol.CLAIM_LOST}
    page = _page("states")
    assert [state for state in sorted(states) if f"`{state}`" not in page] == []
    assert [kind for kind in causes.KINDS if f"| `{kind}` |" not in page] == []
    # Each state of a pod that does not start is in one row with its diagnosis.
    rows = {
        state: next(row for row in page.splitlines() if row.startswith(f"| `{state}` |")) for state in STATE_DIAGNOSES
    }
    assert [s for s, diagnosis in STATE_DIAGNOSES.items() if f"(../diagnoses/{diagnosis}.md)" not in rows[s]] == []


def test_page_of_events_has_every_event() -> None:
    page = _page("events")
    of_states = {*_states_of_actions(), protocol.CLAIM_LOST}
    events = {f"{STATE_EVENT_PREFIX}{state.lower()}" for state in of_states}
    events |= {f"{POD_EVENT_PREFIX}{phase}" for phase in timeline.POD_PHASES}
    events |= {
        GIVEN_UP_EVENT,
        protocol.POD_ENDED_EVENT,
        watch.DRIFTED,
        watch.RESTORED,
        timeline.RUN_SUBMITTED_EVENT,
        timeline.RUN_EXECUTED_EVENT,
    }
    assert [event for event in sorted(events) if f"`{event}`" not in page] == []


def test_page_of_labels_has_every_label() -> None:
    page = _page("labels-and-annotations")
    labels = _constants("reconciler.") - {GIVEN_UP_EVENT, STATE_EVENT_PREFIX, protocol.POD_ENDED_EVENT} | _constants(
        "prefect.io/"
    )
    assert {protocol.FENCED_LABEL_PREFIX, protocol.CAUSE_LABEL} <= labels
    assert [label for label in sorted(labels) if f"`{label}" not in page] == []


def test_page_of_metrics_has_every_action() -> None:
    page = _page("metrics")
    actions = {action.__name__.lower() for action in get_args(decide.Action)}
    assert set(re.findall(r"^\| `([a-z]+)` \| (?!the reconciler)", page, flags=re.M)) == actions


def test_page_of_exit_codes_has_every_code() -> None:
    page = _page("exit-codes")
    of_orchestrate = page.partition("## orchestrate")[2].partition("##")[0]
    codes = {program.SUCCEEDED, program.FAILED, program.DIFFERS, program.CHECK_FAILED, program.INTERRUPTED}
    assert set(map(int, re.findall(r"^\| (\d+) \|", of_orchestrate, flags=re.M))) == codes
    assert [code for code, name in SIGNALS.items() if f"| {code} | {name}" not in page] == []
