"""Rotate the password of the bundled Valkey, whose users may have two passwords."""

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

DEPLOYMENT = f"{SERVER}-redis"

CLIENT = (
    "read -r REDISCLI_AUTH; export REDISCLI_AUTH; ca=/etc/prefect-tls/ca.crt; "
    '[ ! -e $ca ] || set -- --tls --cacert $ca; exec valkey-cli "$@"'
)
"""Executes the commands of standard input, whose first line is the password: arguments can be read on the node."""


class ValkeyPassword(Rotation):
    """Rotates the password of the user `default`. Connections stay open."""

    def new_values(self) -> dict[str, str]:
        """Return a new password."""
        return {"password": new_password()}

    def accept_next(self) -> None:
        """Add the new password."""
        self._execute(f"ACL SETUSER default >{self.secret.next['password']}")

    def end_previous(self) -> None:
        """Leave the user the new password alone."""
        self._execute(f"ACL SETUSER default resetpass >{self.secret.values['password']}")

    def _execute(self, command: str) -> None:
        text = f"{self.secret.values['password']}\n{command}\n"
        arguments = ("exec", "--stdin", f"deployment/{DEPLOYMENT}", "--container=valkey", "--", "sh", "-c", CLIENT)
        answer = self.environment.kubectl(*arguments, text=text).strip()
        if answer != "OK":
            raise ClusterError(
                f"Valkey refuses the password of Secret {self.secret.name}: {answer or 'no answer'}. Restart "
                f"deployment/{DEPLOYMENT}, which then has the Secret's password, and run the command again"
            )


def server_redis(environment: Environment) -> ValkeyPassword:
    """Return the rotation of the bundled Valkey's password.

    Raises:
        ClusterError: Redis is external or absent, its Secret is not generated, or the release is older.
    """
    name = referenced_secret(read_deployment(environment, f"{SERVER}-api"), "REDIS_PASSWORD")
    if not name:
        raise ClusterError(
            f"{environment.name} has no bundled Valkey, and make cannot change the password of an external one. Add a "
            f"password there, and change the URL in the Secret, as {PAGE} describes"
        )
    secret = RotatedSecret(environment, "redis", name)
    require_generated(environment, secret)
    [container] = read_deployment(environment, DEPLOYMENT)["spec"]["template"]["spec"]["containers"][:1]
    if "REDIS_PASSWORD" in str(container.get("readinessProbe")):
        raise ClusterError(
            f"The release {SERVER} is older than this checkout: Valkey's pod would not be ready without its first "
            f"password. Deploy first: make deploy ENV={environment.name}"
        )
    return ValkeyPassword(environment, secret, "Valkey")
