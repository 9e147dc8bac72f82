"""The certificate with which an API of the Prefect server serves HTTPS."""

import ssl
from collections.abc import Mapping

from orchestration.errors import SettingsError

CERTIFICATE_VARIABLE, KEY_VARIABLE = "API_TLS_CERTIFICATE", "API_TLS_KEY"
"""The environment variables of an API with the files of its certificate and key, in PEM."""


def use_certificate(environment: Mapping[str, str]) -> None:
    """Have the API serve HTTPS if the variables name a certificate and its key.

    Raises:
        SettingsError: only one of the variables is set, or the files are no certificate and its key.
    """
    certificate, key = environment.get(CERTIFICATE_VARIABLE, ""), environment.get(KEY_VARIABLE, "")
    if not certificate and not key:
        return
    # Here, as commands that only need the names import no Prefect.
    from orchestration.prefect_compat.server_internals import serve_https

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise SettingsError(
            f"The API cannot serve HTTPS with {CERTIFICATE_VARIABLE}={certificate} and {KEY_VARIABLE}={key}: "
            f"{error.strerror or error}. Check that the Secret has a certificate and its key in PEM"
        ) from None
    serve_https(certificate, key)
