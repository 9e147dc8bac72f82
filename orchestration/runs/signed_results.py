"""Signed results in the process of a flow run, if the worker gave the run a key."""

import functools
import os

from orchestration.protocol import FORMER_SIGNING_KEYS_VARIABLE, SIGNING_KEY_VARIABLE


@functools.cache
def require_signatures() -> None:
    """Let this process and its process pools store and load only signed results, if the environment has a key.

    Raises:
        SettingsError: a key is invalid.
    """
    if key := os.environ.get(SIGNING_KEY_VARIABLE):
        # Imported late: a run without a key does not need these modules.
        from orchestration.prefect_compat import results
        from orchestration.runs.result_signing import ResultSigner, UntrustedResultError

        former = os.environ.get(FORMER_SIGNING_KEYS_VARIABLE, "").split()
        results.sign_records(ResultSigner(key, *former), UntrustedResultError)
        results.prepare_child_processes(require_signatures)
