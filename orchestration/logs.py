"""Logging of the components that run in a cluster: time, level, message and, where there is one, the flow run's id.

    configure()
    logging.getLogger("orchestration.example").info("Run %s is retried.", name, extra={RUN_ID: id})

`LOG_FORMAT` chooses the form of a line on stderr: `text`, the default, or `json`.
"""

import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime

from orchestration.errors import PipelineError, SettingsError, sentence
from orchestration.terminal import json_text, one_line, printable

FORMAT_VARIABLE = "LOG_FORMAT"

RUN_ID = "flow_run_id"
"""The name in `extra` of the id of the flow run that a record concerns. Prefect's loggers use the same name."""


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _run_id(record: logging.LogRecord) -> str:
    return str(getattr(record, RUN_ID, None) or "")


class TextFormatter(logging.Formatter):
    """Writes a record as `TIME LEVEL message flow_run_id=ID`, and below that the traceback of its error."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text. The message stays on one line, and control characters are escaped."""
        line = f"{_time(record)} {record.levelname} {one_line(record.getMessage())}"
        if run := _run_id(record):
            line += f" {RUN_ID}={run}"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return printable(line)


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's JSON: `time`, `level`, `logger` and `message`; `flow_run_id` and `traceback` if any."""
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if run := _run_id(record):
            fields[RUN_ID] = run
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_text(fields, indent=None)


FORMATTERS = {"text": TextFormatter, "json": JsonFormatter}


# Prefect configures logging when it is imported. It keeps a handler of the root logger whose class has a public name.
class StderrHandler(logging.Handler):
    """Writes each record to the present `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure(*, is_strict: bool = True) -> None:
    """Log this process to stderr: this package from INFO on, and all libraries from WARNING on.

    Call this once, where a process starts. Prefect's loggers use the same format and keep the levels of their settings,
    whether Prefect was imported before or is imported later.

    Args:
        is_strict: whether an unknown format is an error. Otherwise the format is `text`: in the container of a flow run
            the variable may belong to the flow.

    Raises:
        SettingsError: `LOG_FORMAT` names no format, and `is_strict`.
    """
    name = os.environ.get(FORMAT_VARIABLE) or "text"
    if name not in FORMATTERS and not is_strict:
        name = "text"
    if name not in FORMATTERS:
        raise SettingsError(f"{FORMAT_VARIABLE}={name!r} is wrong: no such format. Set it to text or json")
    handler = StderrHandler()
    handler.setFormatter(FORMATTERS[name]())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("orchestration").setLevel(logging.INFO)


def run_component(name: str, component: Callable[[], object]) -> int:
    """Configure logging and run a component to its end; return the exit status.

    An error that explains itself ends the component with status 1 and one line in the log.

    Args:
        name: the component's logger.
        component: the component, without arguments.
    """
    try:
        configure()
    except SettingsError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    try:
        component()
    except PipelineError as error:
        logging.getLogger(name).error("%s", sentence(error))
        return 1
    return 0
