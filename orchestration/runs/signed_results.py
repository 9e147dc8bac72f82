"""Signed results in the process of a flow run, if the worker gave the run a key."""

import functools
import os

from orchestration.protocol import SIGNING_KEY_VARIABLE


@functools.cache
def require_signatures() -> None:
    """Let this process and its process pools store and load only signed results, if the environment has a key.

    Raises:
        SettingsError: the key is invalid.
    """
    if key := os.environ.get(SIGNING_KEY_VARIABLE):
        # Imported late: a run without a key does not need these modules.
        from orchestration.prefect_compat import results
        from orchestration.runs.result_signing import ResultSigner, UntrustedResultError

        results.sign_records(ResultSigner(key), UntrustedResultError)
        results.prepare_child_processes(require_signatures)
