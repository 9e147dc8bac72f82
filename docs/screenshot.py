"""Take the README's picture of the UI with a real browser on a real cluster.

    python -m docs.screenshot URL USER:PASSWORD /v2/runs/flow-run/ID "Finished in state Completed()"

It steers a headless Chromium by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol).
"""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import connect

from docs.picture import IMAGES

SIZE = "1280,1180"

Send = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def browser() -> Iterator[Send]:
    """Start a browser and yield a function that sends a DevTools method with its parameters to a page.

    Raises:
        AssertionError: chromium is not installed or does not start.
    """
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "chromium is not installed"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={SIZE}"]
    options += ["--no-first-run", "--disable-background-networking", "--remote-debugging-port=0"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [program, *options, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stderr
            for line in process.stderr:
                if found := re.search(r"ws://([0-9.:]+)/", line):
                    break
            else:
                raise AssertionError("chromium does not start")
            with urlopen(f"http://{found[1]}/json", timeout=10) as answer:
                [page] = [target for target in json.load(answer) if target["type"] == "page"]
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                yield _sender(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _sender(socket: Any) -> Send:
    numbers = itertools.count(1)

    def send(method: str, **parameters: Any) -> dict[str, Any]:
        number = next(numbers)
        socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer: dict[str, Any] = json.loads(socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    return send


def screenshot(url: str, user: str, page: str, until: str, path: Path) -> str:
    """Log in to the UI, save a picture of a page, and return the page's text.

    Args:
        url: URL of the UI.
        user: USER:PASSWORD.
        page: path of the page below `url`.
        until: a text that the loaded page shows.
        path: the PNG file to write.

    Raises:
        AssertionError: the page does not show the text within 5 minutes, or does not settle.
    """
    with browser() as send:

        def text() -> str:
            answer = send("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
            return str(answer["result"].get("value", ""))

        def shown_at(page: str, until: str) -> None:
            """Load a page until it shows a text. Reload it every minute, as a port-forward may have been closed."""
            ends = time.monotonic() + 300
            while time.monotonic() < ends:
                send("Page.navigate", url=url + page)
                with contextlib.suppress(AssertionError):
                    _wait(lambda: until in text(), until, 60)
                    return
            raise AssertionError(f"{until!r} is not on {page or '/'}. There is: {text()[:500]}")

        shown_at("", "Login")
        key = json.dumps(base64.b64encode(user.encode()).decode())
        send("Runtime.evaluate", expression=f"localStorage.setItem('prefect-password', {key})")
        shown_at(page, until)
        shown = ["", send("Page.captureScreenshot", format="png")["data"]]

        def settled() -> bool:
            """Return whether no placeholder is shown and two consecutive pictures are the same."""
            shown.append(send("Page.captureScreenshot", format="png")["data"])
            pulsing = "document.querySelectorAll('.animate-pulse').length"
            placeholders = send("Runtime.evaluate", expression=pulsing)["result"]["value"]
            return bool(placeholders == 0 and shown[-1] == shown[-2])

        _wait(settled, "the page to settle")
        path.write_bytes(base64.b64decode(shown[-1]))
        return text()


def _wait(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.5)


if __name__ == "__main__":
    url, user, page, until = sys.argv[1:]
    screenshot(url, user, page, until, IMAGES / "ui.png")
