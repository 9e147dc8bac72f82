"""Rotate the password of a bundled Postgres. The rotation alternates between two logins of one user.

Postgres has one password for each login. With a new password for the login in use, pods with the old password could
open no connection until they have restarted. So the other login gets the new password. What the second login creates
belongs to the first, because each of its sessions takes the first login's role.
"""

import base64
import hashlib
import hmac
import json
import secrets
from urllib.parse import urlsplit

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER, Environment
from orchestration.operations.rotation.rotated_secret import PAGE, RotatedSecret
from orchestration.operations.rotation.rotation import (
    Rotation,
    new_password,
    read_deployment,
    referenced_secret,
    require_generated,
)

WAREHOUSE = "warehouse"
"""The name of the warehouse's objects, user and database in k8s/overlays/local."""

ITERATIONS = 4096
"""The iterations of a verifier, as Postgres makes it."""

SECOND_LOGIN = """
select format('create role %I login', :'second') where to_regrole(:'second') is null \\gexec
grant :"name" to :"second";
alter role :"second" set role to :"name";
"""


def scram_verifier(password: str) -> str:
    """Return the SCRAM-SHA-256 verifier of an ASCII password, so that Postgres and its log never see the password."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt_text, stored_text, server_text = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"SCRAM-SHA-256${ITERATIONS}:{salt_text}${stored_text}:{server_text}"


class PostgresLogins(Rotation):
    """Rotates the login of a bundled Postgres.

    Args:
        environment: the environment.
        secret: the Secret with the login.
        subject: the database, for messages.
        pod: the pod of Postgres.
        user: the first login, which owns the database of the same name.
    """

    restarted_before = ("pgbouncer",)

    def __init__(self, environment: Environment, secret: RotatedSecret, subject: str, pod: str, user: str) -> None:
        super().__init__(environment, secret, subject)
        self._pod = pod
        self._user = user

    def new_values(self) -> dict[str, str]:
        """Return the name and a new password of the login that is not in use."""
        return {"username": self._other(self.secret.values["username"]), "password": new_password()}

    def _other(self, login: str) -> str:
        return f"{self._user}_2" if login == self._user else self._user

    def accept_next(self) -> None:
        """Give the other login the new password. The login in use keeps its password."""
        self._set_password(self.login(self.secret.next), self.secret.next["password"])

    def end_previous(self) -> None:
        """Give the former login the new password, too, for whoever knows only the name of the first login."""
        self._set_password(self.login(self.secret.previous), self.secret.values["password"])

    def login(self, values: dict[str, str]) -> str:
        """Return the name of the login in values of the Secret."""
        return values["username"]

    def _set_password(self, login: str, password: str) -> None:
        script = f"{SECOND_LOGIN}alter role \"{login}\" password '{scram_verifier(password)}';\n"
        command = [
            "psql",
            "--no-psqlrc",
            "--quiet",
            "--set=ON_ERROR_STOP=1",
            "--username=postgres",
            "--dbname=postgres",
        ]
        command += [f"--set=name={self._user}", f"--set=second={self._user}_2"]
        try:
            self.environment.kubectl("exec", "--stdin", self._pod, "--container=postgres", "--", *command, text=script)
        except ClusterError as error:
            raise ClusterError(
                f"The password of {login} in pod {self._pod} cannot be set: {str(error).splitlines()[-1]}. "
                "Check that the pod runs; on a volume of an older release see docs/upgrading.md"
            ) from None


def server_database(environment: Environment) -> PostgresLogins:
    """Return the rotation of the server's bundled database.

    Raises:
        ClusterError: the database is external, its Secret is not generated, or the release is older.
    """
    deployment = read_deployment(environment, f"{SERVER}-api")
    name = referenced_secret(deployment, "PREFECT_SERVER_DATABASE_PASSWORD")
    if not name:
        raise ClusterError(
            f"The database of {environment.name} is external, and make cannot change its password. Add a login there, "
            f"and change the URL in the Secret, as {PAGE} describes"
        )
    secret = RotatedSecret(environment, "database", name)
    require_generated(environment, secret)
    if not referenced_secret(deployment, "PREFECT_SERVER_DATABASE_USER"):
        raise ClusterError(
            f"The release {SERVER} is older than this checkout: its pods have one login. Deploy first: make deploy "
            f"ENV={environment.name}"
        )
    return PostgresLogins(environment, secret, "the database", f"{SERVER}-database-0", "prefect")


class WarehouseLogin(PostgresLogins):
    """Rotates the login of the warehouse of `local`, which flow runs have as a URL."""

    def new_values(self) -> dict[str, str]:
        """Return the URL of the login that is not in use, with a new password."""
        login, password = self._other(self.login(self.secret.values)), new_password()
        return {"password": password, "url": _with_login(self.secret.values["url"], login, password)}

    def login(self, values: dict[str, str]) -> str:
        """Return the name of the login in the URL."""
        return urlsplit(values["url"]).username or self._user

    def copy(self) -> None:
        """Update the URL of the copy in the namespace of the runs, once a deploy has made the copy."""
        place = self.environment.runs_namespace
        if place == self.environment.namespace:
            return
        where = ("--namespace", place)
        read = ("get", "secret", WAREHOUSE, "--ignore-not-found", "--output", "go-template={{.data.url}}")
        found = self.environment.kubectl(*read, *where)
        if not found:
            return
        login = self.login(self.secret.values)
        url = _with_login(base64.b64decode(found).decode(), login, self.secret.values["password"])
        patch = json.dumps({"stringData": {"url": url}})
        self.environment.kubectl("patch", "secret", WAREHOUSE, "--patch-file=/dev/stdin", *where, text=patch)
        self.secret.note_copies()


def _with_login(url: str, login: str, password: str) -> str:
    place = urlsplit(url).netloc
    return url.replace(place, f"{login}:{password}@{place.rpartition('@')[2]}", 1)


def local_warehouse(environment: Environment) -> WarehouseLogin:
    """Return the rotation of the warehouse of k8s/overlays/local.

    Raises:
        ClusterError: the warehouse is not that of the overlay.
    """
    if not environment.kubectl("get", "statefulset", WAREHOUSE, "--ignore-not-found", "--output", "name"):
        raise ClusterError(
            f"The warehouse of {environment.name} is external, and make cannot change its password. Add a login there, "
            f"and change the URL in the Secret {WAREHOUSE}, as {PAGE} describes"
        )
    secret = RotatedSecret(environment, "warehouse", WAREHOUSE)
    return WarehouseLogin(environment, secret, "the warehouse", f"{WAREHOUSE}-0", WAREHOUSE)
