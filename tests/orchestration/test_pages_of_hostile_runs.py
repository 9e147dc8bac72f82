"""A run of hostile texts on the UI's pages, in a real browser: the texts are shown, and nothing in them is executed."""

from collections.abc import Iterator

import httpx
import pytest

from docs.screenshot import browser
from orchestration.operations.local_cluster import binaries
from tests.orchestration.inspection.work_pool import WorkPool
from tests.orchestration.test_bad_input import TRICKS
from tests.parts import client_of, wait_until

MARKUP = (
    "<img src=x onerror=window.executed=1>",
    "<script>window.executed=1</script>",
    "<svg onload=window.executed=1>",
    "<a href=javascript:window.executed=1 autofocus onfocus=window.executed=1>a</a>",
    "{{ constructor.constructor('window.executed=1')() }}",
)
"""Texts that a page without escaping would execute."""

HOSTILE = " ".join((*MARKUP, *TRICKS))
LINES = (HOSTILE, "word " * 200_000, "the last line")
"""The lines of the run's log. The second has a megabyte."""

SHOWN_SECONDS = 240
"""Limit for a busy machine."""


@pytest.fixture(scope="module")
def api(prefect_server: str) -> Iterator[httpx.Client]:
    with client_of(prefect_server) as client:
        yield client


@pytest.fixture(scope="module")
def run(api: httpx.Client) -> str:
    """Create a failed run whose texts are all hostile; return its id."""
    pool = WorkPool(api)
    flow = pool.post("/flows/", name=pool.name)["id"]
    texts = {"name": HOSTILE, "tags": list(MARKUP), "parameters": {HOSTILE: HOSTILE}}
    id_ = str(pool.post("/flow_runs/", flow_id=flow, **texts)["id"])
    state = {"type": "FAILED", "name": HOSTILE, "message": HOSTILE}
    pool.post(f"/flow_runs/{id_}/set_state", state=state, force=True)
    line = {"name": HOSTILE, "level": 20, "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": id_}
    api.post("/logs/", json=[line | {"message": message} for message in LINES]).raise_for_status()
    return id_


PAGES = {
    "/v2/runs/flow-run/{run}": LINES[-1],
    "/runs/flow-run/{run}": LINES[-1],  # of the older UI
    "/v2/runs": HOSTILE[:20],
}
"""Pages with the run, and what each shows last."""


@pytest.mark.parametrize("path", PAGES)
def test_hostile_texts_are_shown_and_not_executed(api: httpx.Client, run: str, path: str) -> None:
    binaries.install_packages({"chromium": "chromium"}, "30 s")
    with browser() as send:

        def value(expression: str) -> str:
            return str(send("Runtime.evaluate", expression=expression)["result"].get("value", ""))

        def text() -> str:
            return value("document.body ? document.body.innerText : ''")

        send("Page.navigate", url=str(api.base_url).removesuffix("/api/") + path.format(run=run))
        wait_until(lambda: PAGES[path] in text() and MARKUP[0] in text(), f"{path} to show the run", SHOWN_SECONDS)
        assert value("String(window.executed)") == "undefined"
        assert value("document.querySelectorAll('[onerror], [onload], [onfocus]').length") == "0"
