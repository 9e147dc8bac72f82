"""Start the Prefect server with access control: `python -m orchestration.access server start --no-services`.

The command takes the arguments of `prefect`. `API_CREDENTIALS` names the folder with the credentials of the roles. With
`OIDC_GROUPS`, people log in through oauth2-proxy.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from orchestration.access.control import AccessControl, audit_log, expected_state
from orchestration.access.credentials import Credentials
from orchestration.access.people import GROUPS_VARIABLE, PasswordlessUi, People, read_groups
from orchestration.errors import PipelineError, SettingsError, sentence
from orchestration.prefect_compat.server_internals import check_expected_states, wrap_server_ui
from orchestration.server_process import start_server

CREDENTIALS_VARIABLE = "API_CREDENTIALS"


def main(arguments: Sequence[str]) -> int:
    """Run the command `prefect` with access control; return the exit status."""
    from prefect.settings import get_current_settings

    try:
        if any(argument.startswith("--workers") for argument in arguments):
            raise SettingsError("Access control covers one server process: use api.replicas instead of --workers")
        folder = os.environ.get(CREDENTIALS_VARIABLE)
        if not folder:
            raise SettingsError(f"No credentials: set {CREDENTIALS_VARIABLE} to the folder with a file for each role")
        server = get_current_settings().server.api.auth_string
        if not server:
            raise SettingsError("The server has no credential: set PREFECT_SERVER_API_AUTH_STRING to USER:PASSWORD")
        secret = server.get_secret_value()
        credentials = Credentials(folder, secret)
        groups = read_groups(os.environ.get(GROUPS_VARIABLE, ""))
    except PipelineError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    _write_audit_log_to_stdout()

    people = People(credentials, groups)

    def wrap(api: Any) -> AccessControl:
        return AccessControl(api, credentials, secret, people)

    if groups:
        wrap_server_ui(lambda ui: PasswordlessUi(ui, people))
    check_expected_states(expected_state)
    return start_server(arguments, wrap)


def _write_audit_log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit_log.addHandler(handler)
    audit_log.setLevel(logging.INFO)
    audit_log.propagate = False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
