"""The settings of Prefect by which a client reaches the Prefect API.

python -m orchestration.api_settings     # prints them as JSON, secrets included, for the process that starts it
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from orchestration.errors import SettingsError


@dataclass(frozen=True)
class ApiSettings:
    """How a client reaches the Prefect API.

    Args:
        url: the URL of the API; empty if the settings name none.
        user: USER:PASSWORD; empty for an API without authentication.
        headers: headers of each request.
        is_verified: whether the client verifies the certificate of the API.
        authority_file: the file with the certificate of its CA; empty for the usual authorities.
    """

    url: str
    user: str
    headers: dict[str, str]
    is_verified: bool
    authority_file: str


def read() -> ApiSettings:
    """Return the settings of this process, which imports Prefect."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    headers = {name: value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
               for name, value in (settings.client.custom_headers or {}).items()}  # fmt: skip
    if settings.api.key:
        headers["Authorization"] = f"Bearer {settings.api.key.get_secret_value()}"
    return ApiSettings(
        (settings.api.url or "").rstrip("/"),
        settings.api.auth_string.get_secret_value() if settings.api.auth_string else "",
        headers,
        not settings.api.tls_insecure_skip_verify,
        str(settings.api.ssl_cert_file or ""),
    )


def read_in_child() -> ApiSettings:
    """Return the settings that a child process reads: Prefect's import takes 40 MiB, as much as all the others.

    A process that has imported Prefect reads the settings itself.

    Raises:
        SettingsError: the settings are not valid. The child has written why to stderr.
    """
    if "prefect" in sys.modules:
        return read()
    command = [sys.executable, "-m", __name__]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise SettingsError(
            "Prefect's settings cannot be read: the lines above say why. Correct the PREFECT_ variables"
        )
    return ApiSettings(**json.loads(child.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(asdict(read())))
