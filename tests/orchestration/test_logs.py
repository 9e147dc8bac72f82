"""The log format of long-running components. Each test starts a process, as logging is configured per process."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from orchestration.settings import ROOT

LOG = """
import logging
from orchestration import logs

logs.configure()
logger = logging.getLogger("orchestration.example")
"""


def _log(script: str, log_format: str = "") -> str:
    """Run a script, and return what it writes to stderr."""
    command = [sys.executable, "-c", script]
    prefect = {"PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_LOGGING_TO_API_ENABLED": "false"}
    environment = os.environ | {"LOG_FORMAT": log_format} | prefect
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def _is_now(time: str) -> bool:
    return abs(datetime.now(UTC) - datetime.fromisoformat(time)) < timedelta(minutes=5)


def test_text_line_has_time_level_message_and_run_id() -> None:
    script = LOG + 'logger.info("Run %s is retried.", "etl", extra={logs.RUN_ID: "5f0c"})'
    (line,) = _log(script).splitlines()
    time, _, rest = line.partition(" ")
    assert rest == "INFO Run etl is retried. flow_run_id=5f0c"
    assert time.endswith("Z")
    assert _is_now(time)


def test_json_line_has_time_level_logger_message_and_run_id() -> None:
    script = LOG + 'logger.warning("a\\nb\\x1b[2J\\x7fé", extra={logs.RUN_ID: "5f0c"})'
    (line,) = _log(script, "json").splitlines()
    found = json.loads(line)
    assert _is_now(found.pop("time"))
    assert found == {
        "level": "WARNING",
        "logger": "orchestration.example",
        "message": "a\nb\x1b[2J\x7fé",
        "flow_run_id": "5f0c",
    }
    assert line.isascii()
    assert line.isprintable()


def test_text_message_stays_on_one_line_without_control_characters() -> None:
    (line,) = _log(LOG + 'logger.info("a\\nb\\x1b[2J\\x7f")').splitlines()
    assert line.endswith(" INFO a\\nb\\x1b[2J\\x7f")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_traceback_of_an_error_is_logged(log_format: str) -> None:
    script = LOG + 'try:\n    1 / 0\nexcept ZeroDivisionError:\n    logger.exception("Failed.")'
    output = _log(script, log_format)
    traceback = json.loads(output)["traceback"] if log_format == "json" else output.partition("\n")[2]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert traceback.rstrip().endswith("ZeroDivisionError: division by zero")


def test_libraries_are_logged_from_warning_on() -> None:
    script = LOG + 'other = logging.getLogger("other")\nother.info("no")\nother.warning("yes")\nlogger.debug("no")'
    (line,) = _log(script).splitlines()
    assert line.endswith(" WARNING yes")


@pytest.mark.parametrize("is_prefect_first", [True, pytest.param(False, marks=pytest.mark.further)])
def test_prefect_logs_each_record_once_in_the_same_format(is_prefect_first: bool) -> None:
    prefect = "import prefect.main\n"
    log = 'logging.getLogger("prefect.flow_runs.worker").info("hello", extra={"flow_run_id": "5f0c"})'
    script = prefect + LOG + log if is_prefect_first else LOG + prefect + log
    (line,) = _log(script, "json").splitlines()
    found = json.loads(line)
    assert (found["logger"], found["message"], found["flow_run_id"]) == ("prefect.flow_runs.worker", "hello", "5f0c")


def test_unknown_format_is_an_error_that_names_the_setting() -> None:
    script = """
from orchestration import errors, logs

try:
    logs.configure()
except errors.SettingsError as error:
    assert str(error) == "LOG_FORMAT='xml' is wrong: no such format. Set it to text or json"
"""
    assert _log(script, "xml") == ""


COMPONENT = """
from orchestration import errors, logs

def component():
    raise errors.SettingsError("The template is wrong: {}. Correct it")

assert logs.run_component("orchestration.example", component) == 1
"""


def test_error_that_explains_itself_ends_a_component_with_one_log_line() -> None:
    (line,) = _log(COMPONENT, "json").splitlines()
    found = json.loads(line)
    assert (found["level"], found["logger"]) == ("ERROR", "orchestration.example")
    assert found["message"] == "The template is wrong: {}. Correct it."
    assert "traceback" not in found


def test_component_with_an_unknown_log_format_ends_with_a_plain_error() -> None:
    assert _log(COMPONENT, "xml") == "LOG_FORMAT='xml' is wrong: no such format. Set it to text or json.\n"
