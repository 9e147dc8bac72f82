"""Errors whose message is all a person needs: what is wrong, where, and the cure."""

import logging
from typing import Any


class PipelineError(Exception):
    """A failure that is explained in one sentence and needs no traceback.

    Raise it for what an operator can cure (a wrong setting, a day without data, a model that
    does not compile). `__repr__` is the message because Prefect's engine logs `repr(exception)`.
    """

    def __repr__(self) -> str:
        return str(self)


class DayError(PipelineError, ValueError):
    """A value that is no day, or a day the landing zone does not have."""


class SettingsError(PipelineError):
    """A setting that is missing or wrong."""


class DeploymentsError(PipelineError):
    """A file, a flow or a server from which or on which deployments cannot be made: what, where, and the cure."""


class ApiError(PipelineError):
    """A Prefect API that does not answer, does not know us, or does not take what it is sent."""


class ClusterError(PipelineError):
    """A cluster that cannot be made, reached or deployed to: what, where, and the cure."""


class DiagnosisError(PipelineError):
    """A word that is the name of no diagnosis's page, or of several."""


class WarehouseError(PipelineError):
    """The warehouse cannot be started, reached or written to.

    Args:
        message: what is wrong, where, and the cure.
        transient: whether another attempt may cure it: a lost connection, a deadlock, a restart.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class DbtError(PipelineError):
    """A dbt command that could not run, matched nothing, or had nodes that failed.

    Args:
        message: the failures in one sentence.
        result: every node's outcome (`orchestration.dbt.DbtResult`), if dbt came that far.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def explains_itself(error: BaseException) -> bool:
    """Whether `error` says all a person needs: this project's errors and refused parameters."""
    from prefect.exceptions import ParameterTypeError

    return isinstance(error, PipelineError | ParameterTypeError)


class _WithoutTraceback(logging.Filter):
    """Takes the traceback off a log record whose exception explains itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] and explains_itself(record.exc_info[1]):
            record.exc_info = record.exc_text = None
        return True


def hide_explained_tracebacks() -> None:
    """Make Prefect log an explained error in one line; every other error keeps its traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, _WithoutTraceback) for f in logger.filters):
            logger.addFilter(_WithoutTraceback())
