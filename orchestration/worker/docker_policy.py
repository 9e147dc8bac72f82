"""What a worker may ask of the Docker daemon: which calls, which containers, which images.

The rules are allow-lists. A request is not passed on as it came: the proxy sends a request of its own, made of the
parts that were checked. So it does not matter how the daemon reads a doubled or oddly written key or path.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from orchestration.errors import PipelineError, SettingsError

PROXY_LABEL = "prefect-orchestration.docker-proxy"
"""The label of containers that were created through the proxy."""

RUN_LABEL = "io.prefect.flow-run-id"
"""The label by which prefect-docker marks the container of a flow run."""

LONGEST_BODY_BYTES = 2**20

_NAME_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*(?::[0-9]+)?/)?{_NAME_PART}(?:/{_NAME_PART})*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_LONGEST_REFERENCE = 512

# The API since Docker 20.10. Versions before 1.24 take a container's host configuration at its start.
_PATH = re.compile(r"(?P<version>/v1\.(?:4[1-9]|[5-9][0-9]|[1-9][0-9]{2}))?(?P<call>/[a-zA-Z0-9_.:@/-]+)")

_SWITCH, _NUMBER = "[01]", "[0-9]{1,9}"
_TIME = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"


@dataclass(frozen=True)
class _Route:
    """A call that the worker of prefect-docker makes."""

    method: str
    path: str
    """A pattern. Its group `container` is a container's id, and its group `image` the reference of an image."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Patterns of the values, by parameter."""


_CONTAINER = "/containers/(?P<container>[0-9a-f]{64})"
_VERSION, _CREATE, _PULL = "/version", "/containers/create", "/images/create"
ROUTES = (
    _Route("GET", _VERSION),
    _Route("POST", _CREATE, {"name": "[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}"}),
    _Route("GET", f"{_CONTAINER}/json"),
    _Route("POST", f"{_CONTAINER}/start"),
    _Route("POST", f"{_CONTAINER}/wait", {"condition": "not-running|next-exit|removed"}),
    _Route("POST", f"{_CONTAINER}/stop", {"t": _NUMBER}),
    _Route(
        "GET",
        f"{_CONTAINER}/logs",
        {"stdout": _SWITCH, "stderr": _SWITCH, "timestamps": _SWITCH, "follow": _SWITCH}
        | {"tail": f"all|{_NUMBER}", "since": _TIME, "until": _TIME},
    ),
    _Route("GET", "/images/(?P<image>.+)/json"),
    _Route("POST", _PULL, {"fromImage": _REFERENCE.pattern, "tag": r"[a-zA-Z0-9_][a-zA-Z0-9_.:-]{0,127}"}),
)


class RefusedRequestError(PipelineError):
    """A request to the daemon that the policy does not allow: what, and why."""


@dataclass(frozen=True)
class Call:
    """A request that the proxy sends to the daemon.

    Args:
        method: of HTTP.
        target: path and query.
        container: the id of the container that it concerns; None if it concerns none.
        body: JSON; None if it has none.
    """

    method: str
    target: str
    container: str | None = None
    body: bytes | None = None


@dataclass(frozen=True)
class Policy:
    """Decides about requests of a worker to the Docker daemon.

    Args:
        images: references of images of flow runs; `*` stands for any characters.
        network: the one network that containers may join.
        binds: the volumes that they may mount, as `NAME:PATH:OPTIONS`.
        tmpfs: the options of the memory file systems that they may have, by path.
        reserved_names: names that no container may have: DNS would lead the services' traffic to it.
    """

    images: tuple[str, ...]
    network: str
    binds: frozenset[str] = frozenset()
    tmpfs: Mapping[str, str] = field(default_factory=dict)
    reserved_names: frozenset[str] = frozenset()

    @classmethod
    def from_template(
        cls, template: Mapping[str, Any], images: Sequence[str], reserved_names: Sequence[str] = ()
    ) -> "Policy":
        """Return the policy that allows the network, volumes and memory file systems of a base job template.

        Raises:
            SettingsError: the template leaves one of them to job variables, or names no network or several.
        """
        configuration = template["job_configuration"]
        networks = configuration.get("networks") or []
        binds = configuration.get("volumes") or []
        tmpfs = (configuration.get("container_create_kwargs") or {}).get("tmpfs") or {}
        for name, value in {"networks": networks, "volumes": binds, "tmpfs": tmpfs}.items():
            if "{{" in json.dumps(value) or not isinstance(value, dict if name == "tmpfs" else list):
                kind = "mapping" if name == "tmpfs" else "list"
                raise SettingsError(
                    f"job_configuration: {name} must be a {kind} without placeholders, "
                    "so that no job variable decides what a container may reach"
                )
        if len(networks) != 1:
            raise SettingsError(f"job_configuration: networks must have one name, and has {len(networks)}")
        if not images:
            raise SettingsError("no image is allowed: name at least one")
        return cls(tuple(images), networks[0], frozenset(binds), tmpfs, frozenset(map(str.lower, reserved_names)))

    def call(self, method: str, target: str, body: bytes = b"") -> Call:
        """Return the request to send to the daemon for a request of the worker.

        Args:
            method: of HTTP.
            target: as it was sent, path and query with their escapes.
            body: as it was sent.

        Raises:
            RefusedRequestError: the policy does not allow it.
        """
        path, _, query = target.partition("?")
        # docker-py escapes the @ of an image's digest. No other escape occurs in a path of the worker.
        matched = _PATH.fullmatch(path.replace("%40", "@"))
        version, asked = (matched["version"] or "", matched["call"]) if matched else ("", "")
        for route in ROUTES:
            parts = re.fullmatch(route.path, asked)
            if parts and route.method == method:
                break
        else:
            raise RefusedRequestError(f"{method} {path[:200]} is no call of the worker")
        if not version and route.path != _VERSION:
            raise RefusedRequestError(f"{path[:200]} must name a version of the API from 1.41 on")
        parameters = _parameters(query, route)
        made = None
        if image := parts.groupdict().get("image"):
            self._check_image(image)
        elif route.path == _PULL:
            self._check_pull(parameters)
        elif route.path == _CREATE:
            self._check_name(parameters.get("name", ""))
            made = json.dumps(self.container(body)).encode()
        encoded = f"?{urlencode(parameters)}" if parameters else ""
        return Call(method, f"{version}{quote(asked, safe='/:')}{encoded}", parts.groupdict().get("container"), made)

    def container(self, body: bytes) -> dict[str, Any]:
        """Return the container to create, made of the allowed keys of a request's body.

        Raises:
            RefusedRequestError: a key or a value is not allowed, or the body is no JSON object.
        """
        given = _parse(body)
        host = given.pop("HostConfig", None)
        host = _checked({} if host is None else host, self._host_checks(), "HostConfig.")
        made = _checked(given, self._config_checks(), "") | {"HostConfig": host}
        for name in ("CapDrop", "SecurityOpt", "ReadonlyRootfs", "NetworkMode"):
            if name not in made["HostConfig"]:
                raise RefusedRequestError(f"HostConfig.{name} is missing. docker/pool.yaml has to set it")
        if "Image" not in made:
            raise RefusedRequestError("Image is missing")
        if RUN_LABEL not in made.get("Labels", {}):
            raise RefusedRequestError(f"the label {RUN_LABEL} is missing: the container is not that of a flow run")
        # The host configuration names the network, and lists the volumes with what they are mounted from.
        for name in ("NetworkingConfig", "Volumes"):
            made.pop(name, None)
        made["Labels"][PROXY_LABEL] = "true"
        return made

    def _config_checks(self) -> "dict[str, _Check]":
        return {
            "Image": lambda _, value: self._check_image(value),
            "Labels": _check_labels,
            "Volumes": self._check_mount_points,
            "NetworkingConfig": self._check_networks,
            **dict.fromkeys(("Cmd", "Entrypoint", "Env"), _check_texts),
            **dict.fromkeys(("AttachStdout", "AttachStderr"), _one(True, False)),
            **dict.fromkeys(("AttachStdin", "Tty", "OpenStdin", "StdinOnce", "NetworkDisabled"), _one(False)),
        }

    def _host_checks(self) -> "dict[str, _Check]":
        return {
            "NetworkMode": _one(self.network),
            "Binds": self._check_binds,
            "Tmpfs": self._check_tmpfs,
            "CapDrop": _one(["ALL"]),
            "SecurityOpt": _one(["no-new-privileges:true"], ["no-new-privileges"]),
            "ReadonlyRootfs": _one(True),
            "Privileged": _one(False),
            "AutoRemove": _one(True, False),
            "LogConfig": _check_logs,
            **dict.fromkeys(_LIMITS, _check_number),
        }

    def _check_name(self, name: str) -> None:
        if name.lower().rstrip(".") in self.reserved_names:
            raise RefusedRequestError(f"the name {name!r} is that of a service. Rename the flow run")

    def _check_image(self, image: Any) -> None:
        if not isinstance(image, str) or len(image) > _LONGEST_REFERENCE or not _REFERENCE.fullmatch(image):
            raise RefusedRequestError(f"the image {str(image)[:80]!r} is no reference of an image")
        patterns = (re.escape(each).replace(r"\*", ".*") for each in self.images)
        if not any(re.fullmatch(pattern, image) for pattern in patterns):
            raise RefusedRequestError(f"the image {image!r} is not allowed. Allow it in RUN_IMAGES of make up-docker")

    def _check_pull(self, parameters: Mapping[str, str]) -> None:
        name, tag = parameters.get("fromImage", ""), parameters.get("tag", "")
        if not tag:
            raise RefusedRequestError("a pull without a tag is not allowed")
        self._check_image(f"{name}{'@' if tag.startswith('sha256:') else ':'}{tag}")
        # Without a registry, the name is one of Docker Hub, where a stranger may have it, and replaces the image here.
        registry, slash, _ = name.partition("/")
        if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
            raise RefusedRequestError(f"the image {name!r} names no registry, so it is not pulled")

    def _check_binds(self, where: str, value: Any) -> None:
        _check_texts(where, value)
        for each in value:
            if each not in self.binds:
                raise RefusedRequestError(f"{where}: {each[:80]!r} is no volume of docker/pool.yaml")

    def _check_mount_points(self, where: str, value: Any) -> None:
        points = {[*each.split(":"), each][1] for each in self.binds}
        if not isinstance(value, dict) or not set(value) <= points or any(value.values()):
            raise RefusedRequestError(f"{where}: only the volumes of docker/pool.yaml are allowed")

    def _check_tmpfs(self, where: str, value: Any) -> None:
        if not isinstance(value, dict) or not value.items() <= self.tmpfs.items():
            raise RefusedRequestError(f"{where}: only what docker/pool.yaml has is allowed")

    def _check_networks(self, where: str, value: Any) -> None:
        """Check the networks as docker-py writes them, and as the API documents them."""
        named = value.get("EndpointsConfig", value) if isinstance(value, dict) else None
        if not isinstance(named, dict) or not set(named) <= {self.network} or any(named.values()):
            raise RefusedRequestError(f"{where}: only the network {self.network!r} is allowed, without options")


_Check = Callable[[str, Any], None]

_LIMITS = (
    "Memory", "MemorySwap", "MemoryReservation", "ShmSize", "PidsLimit",
    "NanoCpus", "CpuShares", "CpuQuota", "CpuPeriod",
)  # fmt: skip


def _checked(given: Any, checks: Mapping[str, _Check], prefix: str) -> dict[str, Any]:
    """Return the keys of an object that have a value, each one allowed and checked."""
    if not isinstance(given, dict):
        raise RefusedRequestError(f"{prefix.rstrip('.') or 'the body'} is no object")
    made = {name: value for name, value in given.items() if value is not None}
    for name, value in made.items():
        if name not in checks:
            raise RefusedRequestError(f"{prefix}{name[:80]} is not allowed")
        checks[name](f"{prefix}{name}", value)
    return made


def _one(*allowed: Any) -> _Check:
    def check(where: str, value: Any) -> None:
        # Python's True equals 1.
        if not any(type(value) is type(each) and value == each for each in allowed):
            names = " or ".join(json.dumps(each) for each in allowed)
            raise RefusedRequestError(f"{where}: {json.dumps(value)[:80]} is not allowed, only {names}")

    return check


def _check_texts(where: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise RefusedRequestError(f"{where} is no list of texts")


def _check_number(where: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise RefusedRequestError(f"{where} is no number from 0 on")


def _check_labels(where: str, value: Any) -> None:
    """Check labels. Compose and other programs of the machine obey labels, whose names have dots by convention."""
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise RefusedRequestError(f"{where} is no object of texts")
    for name in value:
        if "." in name and not name.startswith("io.prefect."):
            raise RefusedRequestError(f"{where}: {name[:80]!r} is not allowed. Use a name without dots and slashes")


def _check_logs(where: str, value: Any) -> None:
    """Check the log driver: others than these two have the daemon connect to addresses of the machine's network."""
    options = value.get("Config") or {} if isinstance(value, dict) else None
    if (
        not isinstance(options, dict)
        or not set(value) <= {"Type", "Config"}
        or value.get("Type") not in ("json-file", "local")
        or not set(options) <= {"max-size", "max-file", "compress"}
        or not all(isinstance(each, str) for each in options.values())
    ):
        raise RefusedRequestError(f"{where}: only json-file and local with limits are allowed")


def _parameters(query: str, route: _Route) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=20)
    except ValueError:
        raise RefusedRequestError("the query is malformed") from None
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RefusedRequestError("a parameter of the query occurs twice")
    for name, value in made.items():
        if name not in route.query:
            raise RefusedRequestError(f"the parameter {name[:80]!r} is not allowed")
        if not re.fullmatch(route.query[name], value):
            raise RefusedRequestError(f"the parameter {name} cannot be {value[:80]!r}")
    return made


def _parse(body: bytes) -> dict[str, Any]:
    """Return the object of a request's body.

    Raises:
        RefusedRequestError: it is no strict JSON object, or has a key twice.
    """
    try:
        made = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedRequestError(f"the body is no JSON: {str(error)[:200]}") from None
    if not isinstance(made, dict):
        raise RefusedRequestError("the body is no object")
    return made


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RefusedRequestError("a key occurs twice in the body")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
