"""Let the process of a flow run store signed results, and load no others, if the worker gave the run a key."""

import functools
import os

from orchestration.protocol import SIGNING_KEY_VARIABLE


@functools.cache
def require_signatures() -> None:
    """Sign what this process and its process pools store, if the environment has a key.

    Raises:
        SettingsError: the key is not one.
    """
    if key := os.environ.get(SIGNING_KEY_VARIABLE):
        # A run without a key does not pay for these imports.
        from orchestration.prefect_compat import results
        from orchestration.runs.result_signing import ResultSigner, UntrustedResultError

        results.sign_records(ResultSigner(key), UntrustedResultError)
        results.prepare_child_processes(require_signatures)
