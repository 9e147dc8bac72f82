"""Rotate credentials of the Prefect API: the administrator's, and those of the roles.

The API's pods read the credentials of the roles from a mounted Secret, without a restart. They accept those of KEY,
KEY.next and KEY.previous. The administrator's credential is a variable of each pod. So while it is rotated, both of its
values are also operators' credentials in the Secret of the roles.
"""

import json
import time
from base64 import b64encode
from collections.abc import Iterable
from uuid import UUID, uuid4

from orchestration.access.credentials import (
    AUTH_VARIABLE,
    NEXT_SUFFIX,
    OIDC_KEY_FILE,
    PREVIOUS_SUFFIX,
    RUN_KEY_FILE,
    credential_hash,
    sign_run,
)
from orchestration.api_tls import KEY_VARIABLE
from orchestration.errors import ClusterError
from orchestration.operations import namespace_of_runs
from orchestration.operations.environment import SERVER, Environment, Object
from orchestration.operations.release_diagnosis import release_selector
from orchestration.operations.rotation import readers
from orchestration.operations.rotation.rotated_secret import PAGE, ROTATION_ANNOTATION, RotatedSecret
from orchestration.operations.rotation.rotation import (
    Rotation,
    new_password,
    read_deployment,
    referenced_secret,
    require_generated,
)
from orchestration.protocol import CREDENTIAL_ANNOTATION, RUN_LABEL

ROLES = ("worker", "reconciler", "sync", "viewer")
"""The roles whose credentials the chart generates, each with a user of the role's name."""

OPERATOR = "operator"

KEYS = (RUN_KEY_FILE, OIDC_KEY_FILE)
"""The keys of the Secret that are random characters. The key of oauth2-proxy exists only with `oidc.enabled`."""

KEY_CHARACTERS = 48

MOUNT_SECONDS = 300.0
"""How long all pods of the API may take to read a changed Secret. The kubelet takes up to two minutes."""

SUPPORTED = "import orchestration.access.credentials as module; module.NEXT_SUFFIX"
"""Code that fails in an image of an older release."""

PROBE = f"""
import json, os, ssl, sys, urllib.error, urllib.request
ca = os.environ.get({KEY_VARIABLE!r}) and os.environ["PREFECT_API_SSL_CERT_FILE"]
context = ssl.create_default_context(cafile=ca) if ca else None
host = "https://localhost:" if ca else "http://127.0.0.1:"
base = host + os.environ["PREFECT_SERVER_API_PORT"] + os.environ["PREFECT_SERVER_API_BASE_PATH"]
found = []
for header in json.load(sys.stdin):
    request = urllib.request.Request(base + "/hello", headers=dict(Authorization=header))
    try:
        found.append(urllib.request.urlopen(request, timeout=10, context=context).status)
    except urllib.error.HTTPError as error:
        found.append(error.code)
    except OSError:
        found.append(0)
print(json.dumps(found))
"""
"""Prints the status of the API's answer to each credential on standard input."""


class _ApiRotation(Rotation):
    """Waits until all pods of the API accept or refuse credentials."""

    def _pods(self) -> list[str]:
        selector = f"{release_selector(SERVER)},{readers.COMPONENT_LABEL}=api"
        return [
            pod["metadata"]["name"]
            for pod in self.environment.objects("pods", "--selector", selector)
            if pod["metadata"]["namespace"] == self.environment.namespace
            if pod["status"].get("phase") == "Running" and not pod["metadata"].get("deletionTimestamp")
        ]

    def require_support(self) -> None:
        """Check that the image of the API knows keys with the suffix `.next`. An older one would not start with them.

        Raises:
            ClusterError: a pod has an older image, or there is no pod.
        """
        pods = self._pods()
        if not pods:
            raise ClusterError(f"No pod of the API runs. Look at the pods: make status ENV={self.environment.name}")
        for pod in pods:
            try:
                self._execute(pod, SUPPORTED)
            except ClusterError as error:
                if "AttributeError" not in str(error):
                    raise
                raise ClusterError(
                    f"Pod {pod} has an image of an older release, which knows no next credentials. Deploy first: make "
                    f"deploy ENV={self.environment.name}"
                ) from None

    def _execute(self, pod: str, code: str, text: str = "") -> str:
        return self.environment.kubectl(
            "exec", "--stdin", pod, "--container=api", "--", "python", "-c", code, text=text
        )

    def wait_for(self, credentials: Iterable[str], *, accepted: bool) -> None:
        """Wait until each pod of the API accepts, or refuses, all of the credentials.

        Raises:
            ClusterError: a pod does not within `MOUNT_SECONDS`.
        """
        headers = json.dumps([f"Basic {b64encode(credential.encode()).decode()}" for credential in credentials])
        deadline = time.monotonic() + MOUNT_SECONDS
        for pod in self._pods():
            # The kubelet updates the volumes of a changed pod immediately.
            mark = f"{ROTATION_ANNOTATION}-read={self.secret.rotation}-{'next' if accepted else 'end'}"
            self.environment.kubectl("annotate", "pod", pod, mark, "--overwrite")
        while True:
            answers = {pod: json.loads(self._execute(pod, PROBE, headers)) for pod in self._pods()}
            unready = [pod for pod, found in answers.items() if any((status != 401) != accepted for status in found)]
            unready += [pod for pod, found in answers.items() if accepted and 0 in found]
            if answers and not unready:
                return
            if time.monotonic() > deadline:
                verb = "accept the new" if accepted else "refuse the old"
                raise ClusterError(
                    f"Pods of the API do not {verb} credential after {MOUNT_SECONDS:.0f} s: "
                    f"{', '.join(unready) or 'none runs'}. See their logs, and run the command again"
                )
            time.sleep(readers.POLL_SECONDS)


class Administrator(_ApiRotation):
    """Rotates the credential of the administrator, which is the server's, too.

    Args:
        environment: the environment.
        secret: the Secret with the credential.
        roles: the Secret with the credentials of the roles.
    """

    KEY = "auth-string"

    def __init__(self, environment: Environment, secret: RotatedSecret, roles: RotatedSecret) -> None:
        super().__init__(environment, secret, "the API")
        self._roles = roles

    def new_values(self) -> dict[str, str]:
        """Return the user with a new password."""
        self.require_support()
        if left := [key for key in (OPERATOR + NEXT_SUFFIX, OPERATOR + PREVIOUS_SUFFIX) if key in self._roles.data]:
            raise ClusterError(
                f"Secret {self._roles.name} has the key {left[0]}, of a rotation by hand. Complete that rotation: "
                "delete the key"
            )
        return {self.KEY: f"{self.secret.values[self.KEY].partition(':')[0]}:{new_password()}"}

    def accept_next(self) -> None:
        """Make both values operators' credentials, so that pods with either value accept the other one."""
        both = (self.secret.values[self.KEY], self.secret.next[self.KEY])
        self._roles.write(dict(zip((OPERATOR + PREVIOUS_SUFFIX, OPERATOR + NEXT_SUFFIX), both, strict=True)))
        self.wait_for(both, accepted=True)

    def copy(self) -> None:
        """Update the copy in the namespace of the runs, if they share the administrator's credential."""
        if self.environment.runs_namespace != self.environment.namespace:
            namespace_of_runs.copy_api_credential(self.environment)
            self.secret.note_copies()

    def end_previous(self) -> None:
        """Delete both values from the credentials of the roles. The pods accept the new one as the server's."""
        self._roles.write({OPERATOR + PREVIOUS_SUFFIX: None, OPERATOR + NEXT_SUFFIX: None})
        self.wait_for([self.secret.previous[self.KEY]], accepted=False)


class Roles(_ApiRotation):
    """Rotates the generated credentials of the roles, the key of the credentials of runs, and that of oauth2-proxy."""

    def new_values(self) -> dict[str, str]:
        """Return new credentials of the roles' own users, and new keys. Logins of people stay."""
        self.require_support()
        values = {key: new_password(KEY_CHARACTERS) for key in KEYS if key in self.secret.values}
        for role in ROLES:
            lines = self.secret.values[role].splitlines()
            own = f"{role}:{new_password()}"
            values[role] = "\n".join([own, *(line for line in lines if not line.startswith(f"{role}:"))])
        return values

    def accept_next(self) -> None:
        """Wait until the API has read the next credentials."""
        present = {key: value for key, value in self.secret.next.items() if key in self.secret.values}
        self.wait_for(_credentials(present), accepted=True)

    def holders(self) -> list[str]:
        """Return pods with the old credentials of a role, and Jobs of runs with a credential of the old key."""
        key = self.secret.previous[RUN_KEY_FILE]
        return super().holders() + [
            job["metadata"]["name"] for job in readers.unfinished_jobs_of_runs(self.environment) if _is_signed(job, key)
        ]

    def end_previous(self) -> None:
        """Hide the previous credentials from the API, and wait until the API refuses them."""
        kept = set(_credentials(self.secret.values))
        ended = [credential for credential in _credentials(self.secret.previous) if credential not in kept]
        self.secret.hide_previous()
        self.wait_for(ended, accepted=False)


def _credentials(values: dict[str, str]) -> list[str]:
    """Return the credentials in values of the Secret; for the keys, those of a run and of a person."""
    lines = [line for key, value in values.items() if key not in KEYS for line in value.splitlines() if line.strip()]
    if values.get(RUN_KEY_FILE):
        lines.append(sign_run(values[RUN_KEY_FILE], uuid4()))
    if values.get(OIDC_KEY_FILE):
        lines.append(f"rotation:{values[OIDC_KEY_FILE]}")
    return lines


def _is_signed(job: Object, key: str) -> bool:
    """Return whether the Job of a run has a credential that a key has signed."""
    run = job["metadata"]["labels"][RUN_LABEL]
    variables = [
        entry for container in job["spec"]["template"]["spec"]["containers"] for entry in container.get("env", [])
    ]
    try:
        signed = sign_run(key, UUID(run))
    except ValueError:
        return False
    # In a warm pod the credential is encrypted.
    of_warm_pod = job["metadata"].get("annotations", {}).get(CREDENTIAL_ANNOTATION)
    return {"name": AUTH_VARIABLE, "value": signed} in variables or of_warm_pod == credential_hash(signed)


def _roles_secret(environment: Environment, kind: str) -> RotatedSecret:
    deployment = read_deployment(environment, f"{SERVER}-api")
    for volume in deployment["spec"]["template"]["spec"].get("volumes", []):
        if volume["name"] == "credentials" and "secret" in volume:
            secret = RotatedSecret(environment, kind, volume["secret"]["secretName"])
            require_generated(environment, secret)
            return secret
    raise ClusterError(
        f"The server of {environment.name} has no API roles, and accepts one password at a time. Set "
        f"auth.roles.enabled, or rotate by hand, as {PAGE} describes"
    )


def administrator(environment: Environment) -> Administrator:
    """Return the rotation of the administrator's credential.

    Raises:
        ClusterError: a Secret is not generated, or the server has no API roles.
    """
    name = referenced_secret(read_deployment(environment, f"{SERVER}-api"), "PREFECT_SERVER_API_AUTH_STRING")
    if not name:
        raise ClusterError(
            f"The API of {environment.name} has no password (auth.enabled: false). There is none to rotate"
        )
    secret = RotatedSecret(environment, "api", name)
    require_generated(environment, secret)
    return Administrator(environment, secret, _roles_secret(environment, "roles"))


def roles(environment: Environment) -> Roles:
    """Return the rotation of the roles' credentials.

    Raises:
        ClusterError: the Secret is not generated, or the server has no API roles.
    """
    return Roles(environment, _roles_secret(environment, "roles"), "the API")
