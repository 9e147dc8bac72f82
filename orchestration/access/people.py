"""People who log in by OIDC: oauth2-proxy forwards their requests, and the groups of a person have a role.

oauth2-proxy calls the API with the credential `E-MAIL:KEY`. Only oauth2-proxy and the API have the key, which is in the
file `oidc-key` of the credentials. With any other credential, the header with the groups has no effect.
"""

import json
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from orchestration.access.asgi import Application, Message, Receive, Scope, Send
from orchestration.access.credentials import Credentials, Identity, basic_credential
from orchestration.access.routes import Role
from orchestration.errors import SettingsError

GROUPS_VARIABLE = "OIDC_GROUPS"
"""The groups of the identity provider by role, as JSON: `{"operator": ["data-platform"], "viewer": ["data"]}`."""

GROUPS_HEADER = b"x-forwarded-groups"
"""The person's groups, separated by commas, as oauth2-proxy sends them."""

UI_SETTINGS_PATH = "/ui-settings"

ROLES = (Role.OPERATOR, Role.VIEWER)
"""The roles of people. The first role wins for a person with groups of both."""


def read_groups(text: str) -> dict[Role, frozenset[str]]:
    """Return the groups of each role; empty if the text is empty.

    Raises:
        SettingsError: the text is not a JSON object with lists of groups by role, or names no group.
    """
    if not text:
        return {}
    known = [role.value for role in ROLES]
    form = f"{GROUPS_VARIABLE} is not a JSON object with a list of groups for each of {', '.join(known)}"
    try:
        content = json.loads(text)
    except ValueError:
        raise SettingsError(form) from None
    if not isinstance(content, dict) or not set(content) <= set(known):
        raise SettingsError(form)
    for listed in content.values():
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise SettingsError(form)
    if not any(content.values()):
        raise SettingsError(
            f"{GROUPS_VARIABLE} names no group, so no person could log in. Name a group of the role operator"
        )
    if split := [name for listed in content.values() for name in listed if "," in name]:
        raise SettingsError(f"{GROUPS_VARIABLE} names the group {split[0]!r}: oauth2-proxy separates groups by commas")
    return {role: frozenset(content.get(role.value, ())) for role in ROLES}


class People:
    """Identifies the people whose requests oauth2-proxy forwards.

    Args:
        credentials: the credentials of all callers, with the key of oauth2-proxy.
        groups: the identity provider's groups of each role; empty if people cannot log in by OIDC.
    """

    def __init__(self, credentials: Credentials, groups: Mapping[Role, frozenset[str]]) -> None:
        self._credentials = credentials
        self._groups = groups

    def identify(self, scope: Scope) -> Identity | None:
        """Return the person for whom oauth2-proxy sends a request; None for any other request.

        The identity has no role if none of the person's groups has one.
        """
        credential = basic_credential(scope["headers"]) if self._groups else None
        user = self._credentials.forwarded_user(credential) if credential else None
        return Identity(user, self._find_role(_groups(scope["headers"])), is_person=True) if user else None

    def _find_role(self, groups: frozenset[str]) -> Role | None:
        return next((role for role in ROLES if groups & self._groups.get(role, frozenset())), None)


def _groups(headers: Iterable[tuple[bytes, bytes]]) -> frozenset[str]:
    lines = [value.decode(errors="replace") for name, value in headers if name == GROUPS_HEADER]
    return frozenset(filter(None, (group for line in lines for group in line.split(","))))


def is_cross_origin(scope: Scope) -> bool:
    """Return whether a page of another origin has made a browser send a request, with the cookie of a person.

    Source: `CrossOriginProtection` of Go's net/http, but for every method. Prefect lets any origin read its answers.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    if site := headers.get(b"sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get(b"origin")
    return bool(origin) and urlsplit(origin).netloc != headers.get(b"host")


class PasswordlessUi:
    """Serves the UI, and tells a person whom oauth2-proxy has logged in that the UI needs no password.

    Args:
        application: Prefect's UI.
        people: identifies the people.
    """

    def __init__(self, application: Application, people: People) -> None:
        self._application = application
        self._people = people

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request to the UI, and change the settings of the UI for a person."""
        if not (scope["type"] == "http" and scope["path"].endswith(UI_SETTINGS_PATH) and self._people.identify(scope)):
            await self._application(scope, receive, send)
            return
        start: Message = {}
        body = bytearray()

        async def change(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            content = bytes(body)
            if start["status"] == 200:
                content = json.dumps(json.loads(content) | {"auth": None}).encode()
            headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            await send({**start, "headers": [*headers, (b"content-length", str(len(content)).encode())]})
            await send({"type": "http.response.body", "body": content})

        # A compressed answer could not be changed.
        headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self._application({**scope, "headers": headers}, receive, change)
