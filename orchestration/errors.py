"""Errors whose message explains them: what failed, the cause and the cure."""

import logging
from typing import Any


class PipelineError(Exception):
    """A failure that one sentence explains, without a traceback.

    Raise it for what an operator can cure: a wrong setting, a day without data, a model that does not compile.
    `__repr__` is the message because Prefect's engine logs `repr(exception)`.
    """

    def __repr__(self) -> str:
        return str(self)


class DayError(PipelineError, ValueError):
    """A value that is not a day, or a day that is missing in the landing zone."""


class SettingsError(PipelineError):
    """A setting that is missing or wrong."""


class DeploymentsError(PipelineError):
    """Deployments that cannot be made, because of a file, a flow or the server."""


class ApiError(PipelineError):
    """The Prefect API does not answer, or refuses the authentication or the request."""


class ClusterError(PipelineError):
    """A cluster that cannot be created, reached or deployed to."""


class ClusterRefusalError(ClusterError):
    """A request that the Kubernetes API has refused, so that it has no effect."""


class DiagnosisError(PipelineError):
    """A word that means no diagnosis, or several."""


class WarehouseError(PipelineError):
    """The warehouse cannot be started, reached or written to.

    Args:
        message: what failed, the cause and the cure.
        transient: whether a retry may succeed: after a lost connection, a deadlock, a restart.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class DbtError(PipelineError):
    """A dbt command that could not run, selected nothing, or had nodes that failed.

    Args:
        message: the failures in one sentence.
        result: the outcome of each node (`orchestration.dbt.DbtResult`), if dbt has begun to execute nodes.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


def sentence(error: PipelineError) -> str:
    """Return an error's message with a full stop at its end."""
    return f"{str(error).removesuffix('.')}."


def explains_itself(error: BaseException) -> bool:
    """Return whether the message of an error suffices: for this project's errors and refused parameters."""
    from prefect.exceptions import ParameterTypeError

    return isinstance(error, PipelineError | ParameterTypeError)


class _WithoutTraceback(logging.Filter):
    """Removes the traceback from a log record whose exception explains itself."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] and explains_itself(record.exc_info[1]):
            record.exc_info = record.exc_text = None
        return True


def hide_explained_tracebacks() -> None:
    """Let Prefect log an error that explains itself in one line. All other errors keep their traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, _WithoutTraceback) for f in logger.filters):
            logger.addFilter(_WithoutTraceback())
