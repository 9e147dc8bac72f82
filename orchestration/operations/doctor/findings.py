"""The registry of the checks, and what they find."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestration.errors import PipelineError
from orchestration.operations.doctor.installation import Installation

Status = Literal["ok", "warning", "failed", "not checked"]

LIMIT_SECONDS = 60.0
"""How long a check may take. Calls of kubectl and helm wait for each other on a small machine."""


@dataclass(frozen=True)
class Finding:
    """Holds the result of a check.

    Args:
        status: the result.
        text: one line: what is there, or why the check was not possible.
        cure: what to do about a warning or failure.
    """

    status: Status
    text: str
    cure: str = ""


def ok(text: str) -> Finding:
    """Return the finding that all is well."""
    return Finding("ok", text)


def warning(text: str, cure: str) -> Finding:
    """Return a finding that works today, or that may be intended."""
    return Finding("warning", text, cure)


def failed(text: str, cure: str) -> Finding:
    """Return a finding that keeps the environment, or its runs, from working."""
    return Finding("failed", text, cure)


@dataclass(frozen=True)
class Check:
    """A check of an installation.

    Args:
        group: the heading under which the table lists the check.
        name: its name.
        find: looks at the installation.
        limit_seconds: how long it may take.
    """

    group: str
    name: str
    find: Callable[[Installation], Awaitable[Finding]]
    limit_seconds: float = LIMIT_SECONDS

    @property
    def purpose(self) -> str:
        """Return the purpose of the check: the first line of its function's docstring."""
        return (inspect.getdoc(self.find) or "").partition("\n")[0]


CHECKS: list[Check] = []
"""All checks, in the order of the table."""


def check(
    group: str, name: str, limit_seconds: float = LIMIT_SECONDS
) -> Callable[[Callable[[Installation], Awaitable[Finding]]], Callable[[Installation], Awaitable[Finding]]]:
    """Register the decorated function as a check."""

    def register(find: Callable[[Installation], Awaitable[Finding]]) -> Callable[[Installation], Awaitable[Finding]]:
        CHECKS.append(Check(group, name, find, limit_seconds))
        return find

    return register


async def run_checks(installation: Installation, checks: Sequence[Check]) -> list[Finding]:
    """Return the finding of each check, in their order. The checks run concurrently, and none stops another."""
    return await asyncio.gather(*(_run(installation, selected_check) for selected_check in checks))


async def _run(installation: Installation, selected_check: Check) -> Finding:
    try:
        async with asyncio.timeout(selected_check.limit_seconds):
            return await selected_check.find(installation)
    except TimeoutError:
        return Finding("not checked", f"no answer within {selected_check.limit_seconds:.0f} s")
    except PipelineError as error:
        return Finding("not checked", " ".join(str(error).split()))
    except Exception as error:
        # A mistake in one check must not cost the findings of the others.
        return Finding("not checked", f"a mistake in the check: {type(error).__name__}: {' '.join(str(error).split())}")
