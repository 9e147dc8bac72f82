"""The policy for a worker's requests to the Docker daemon: allowed calls, containers and images.

The rules are allow-lists. The proxy never forwards a request: it builds a new request from the parts that passed the
checks. So it does not matter how the daemon parses a repeated or oddly spelled key or path.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from orchestration.errors import PipelineError, SettingsError

PROXY_LABEL = "prefect-orchestration.docker-proxy"
"""The label of each container that was created through the proxy."""

RUN_LABEL = "io.prefect.flow-run-id"
"""The label that prefect-docker gives to the container of a flow run. Its value is the run's id."""

LONGEST_BODY_BYTES = 2**20

_NAME_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)*(?::[0-9]+)?/)?{_NAME_PART}(?:/{_NAME_PART})*"
    r"(?::[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_LONGEST_REFERENCE = 512

# The API since Docker 20.10. Versions before 1.24 accept a host configuration when a container starts.
_PATH = re.compile(r"(?P<version>/v1\.(?:4[1-9]|[5-9][0-9]|[1-9][0-9]{2}))?(?P<call>/[a-zA-Z0-9_.:@/-]+)")

_SWITCH, _NUMBER = "[01]", "[0-9]{1,9}"
_TIME = r"[0-9]{1,12}(?:\.[0-9]{1,9})?"


@dataclass(frozen=True)
class _Route:
    """A call of the Docker API that prefect-docker's worker makes."""

    method: str
    path: str
    """A pattern. Its group `container` matches a container's id, and its group `image` an image reference."""
    query: Mapping[str, str] = field(default_factory=dict)
    """The pattern of each parameter's value."""


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
    """A request that the policy does not allow. The message names the reason."""


@dataclass(frozen=True)
class Call:
    """A request that the proxy sends to the daemon.

    Args:
        method: the HTTP method.
        target: path and query.
        container: the id of the container that the call is about, if any.
        body: the JSON body, if any.
    """

    method: str
    target: str
    container: str | None = None
    body: bytes | None = None


@dataclass(frozen=True)
class Policy:
    """Decides which requests of a worker the Docker daemon receives.

    Args:
        images: the image references that flow runs may have; `*` stands for any characters.
        network: the only network that containers may join.
        binds: the volumes that containers may mount, as `NAME:PATH:OPTIONS`.
        tmpfs: the tmpfs mounts that containers may have: their options by path.
        reserved_names: names of services. DNS would send a service's traffic to a container of that name.
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
        """Return the policy that allows the network, volumes and tmpfs mounts of a base job template.

        Raises:
            SettingsError: the template has placeholders for them, or does not name exactly one network.
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
            raise SettingsError("No image is allowed: --images is empty. Name at least one image")
        return cls(tuple(images), networks[0], frozenset(binds), tmpfs, frozenset(map(str.lower, reserved_names)))

    def call(self, method: str, target: str, body: bytes = b"") -> Call:
        """Return the request to send to the daemon for a request of the worker.

        Args:
            method: the HTTP method.
            target: path and query with their escapes, as the worker sent them.
            body: the body, as the worker sent it.

        Raises:
            RefusedRequestError: the policy does not allow the request.
        """
        path, _, query = target.partition("?")
        # docker-py escapes the @ of an image's digest. The worker's paths have no other escape.
        matched = _PATH.fullmatch(path.replace("%40", "@"))
        version, call = (matched["version"] or "", matched["call"]) if matched else ("", "")
        for route in ROUTES:
            parts = re.fullmatch(route.path, call)
            if parts and route.method == method:
                break
        else:
            raise RefusedRequestError(f"the call {method} {path[:200]} is not allowed")
        if not version and route.path != _VERSION:
            raise RefusedRequestError(f"{path[:200]} must begin with an API version from 1.41 on")
        parameters = _parameters(query, route)
        checked_body = None
        if image := parts.groupdict().get("image"):
            self._check_image(image)
        elif route.path == _PULL:
            self._check_pull(parameters)
        elif route.path == _CREATE:
            self._check_name(parameters.get("name", ""))
            checked_body = json.dumps(self.container(body)).encode()
        encoded = f"?{urlencode(parameters)}" if parameters else ""
        target = f"{version}{quote(call, safe='/:')}{encoded}"
        return Call(method, target, parts.groupdict().get("container"), checked_body)

    def container(self, body: bytes) -> dict[str, Any]:
        """Return the container to create, with the allowed keys of a request's body.

        Raises:
            RefusedRequestError: a key or a value is not allowed, or the body is not a JSON object.
        """
        given = _parse(body)
        host = given.pop("HostConfig", None)
        host = _checked({} if host is None else host, self._host_checks(), "HostConfig.")
        container = _checked(given, self._config_checks(), "") | {"HostConfig": host}
        for name in ("CapDrop", "SecurityOpt", "ReadonlyRootfs", "NetworkMode"):
            if name not in container["HostConfig"]:
                raise RefusedRequestError(f"HostConfig.{name} is missing. Set it in docker/pool.yaml")
        if "Image" not in container:
            raise RefusedRequestError("Image is missing")
        if RUN_LABEL not in container.get("Labels", {}):
            raise RefusedRequestError(f"the label {RUN_LABEL} is missing: the container is not that of a flow run")
        # HostConfig has the network, and the volumes with their sources.
        for name in ("NetworkingConfig", "Volumes"):
            container.pop(name, None)
        container["Labels"][PROXY_LABEL] = "true"
        return container

    def _config_checks(self) -> "dict[str, _Check]":
        return {
            "Image": lambda _, value: self._check_image(value),
            "Labels": _check_labels,
            "Volumes": self._check_mount_points,
            "NetworkingConfig": self._check_networks,
            **dict.fromkeys(("Cmd", "Entrypoint", "Env"), _check_strings),
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
            "LogConfig": _check_log_driver,
            **dict.fromkeys(_LIMITS, _check_number),
        }

    def _check_name(self, name: str) -> None:
        if name.lower().rstrip(".") in self.reserved_names:
            raise RefusedRequestError(f"the name {name!r} is reserved for a service. Rename the flow run")

    def _check_image(self, image: Any) -> None:
        if not isinstance(image, str) or len(image) > _LONGEST_REFERENCE or not _REFERENCE.fullmatch(image):
            raise RefusedRequestError(f"{str(image)[:80]!r} is not an image reference")
        patterns = (re.escape(allowed).replace(r"\*", ".*") for allowed in self.images)
        if not any(re.fullmatch(pattern, image) for pattern in patterns):
            raise RefusedRequestError(f"the image {image!r} is not allowed. Allow it in RUN_IMAGES of make up-docker")

    def _check_pull(self, parameters: Mapping[str, str]) -> None:
        name, tag = parameters.get("fromImage", ""), parameters.get("tag", "")
        if not tag:
            raise RefusedRequestError("a pull without a tag is not allowed")
        self._check_image(f"{name}{'@' if tag.startswith('sha256:') else ':'}{tag}")
        # Without a registry, Docker pulls from Docker Hub: a stranger's image of this name would replace the local one.
        registry, slash, _ = name.partition("/")
        if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
            raise RefusedRequestError(f"the image {name!r} names no registry. Begin it with one, such as docker.io/")

    def _check_binds(self, where: str, value: Any) -> None:
        _check_strings(where, value)
        for bind in value:
            if bind not in self.binds:
                raise RefusedRequestError(f"{where}: {bind[:80]!r} is not a volume of docker/pool.yaml")

    def _check_mount_points(self, where: str, value: Any) -> None:
        points = {[*bind.split(":"), bind][1] for bind in self.binds}
        if not isinstance(value, dict) or not set(value) <= points or any(value.values()):
            raise RefusedRequestError(f"{where}: only the volumes of docker/pool.yaml are allowed")

    def _check_tmpfs(self, where: str, value: Any) -> None:
        if not isinstance(value, dict) or not value.items() <= self.tmpfs.items():
            raise RefusedRequestError(f"{where}: only the tmpfs mounts of docker/pool.yaml are allowed")

    def _check_networks(self, where: str, value: Any) -> None:
        """Check the networks, in docker-py's form and in the form that the API documents."""
        named = value.get("EndpointsConfig", value) if isinstance(value, dict) else None
        if not isinstance(named, dict) or not set(named) <= {self.network} or any(named.values()):
            raise RefusedRequestError(f"{where}: only the network {self.network!r} is allowed, without options")


_Check = Callable[[str, Any], None]

_LIMITS = (
    "Memory", "MemorySwap", "MemoryReservation", "ShmSize", "PidsLimit",
    "NanoCpus", "CpuShares", "CpuQuota", "CpuPeriod",
)  # fmt: skip


def _checked(given: Any, checks: Mapping[str, _Check], prefix: str) -> dict[str, Any]:
    """Return an object without its null values. Every other key must have a check, and its value must pass."""
    if not isinstance(given, dict):
        raise RefusedRequestError(f"{prefix.rstrip('.') or 'the body'} must be an object")
    present = {name: value for name, value in given.items() if value is not None}
    for name, value in present.items():
        if name not in checks:
            raise RefusedRequestError(f"{prefix}{name[:80]} is not allowed")
        checks[name](f"{prefix}{name}", value)
    return present


def _one(*allowed: Any) -> _Check:
    def check(where: str, value: Any) -> None:
        # Python's True equals 1.
        if not any(type(value) is type(option) and value == option for option in allowed):
            names = " or ".join(map(json.dumps, allowed))
            raise RefusedRequestError(f"{where}: {json.dumps(value)[:80]} is not allowed, only {names}")

    return check


def _check_strings(where: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RefusedRequestError(f"{where} must be a list of strings")


def _check_number(where: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise RefusedRequestError(f"{where} must be an integer from 0 on")


def _check_labels(where: str, value: Any) -> None:
    """Check labels. Compose and other programs act on labels, whose names have dots by convention."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise RefusedRequestError(f"{where} must be an object of strings")
    for name in value:
        if "." in name and not name.startswith("io.prefect."):
            raise RefusedRequestError(f"{where}: {name[:80]!r} is not allowed. Use a name without dots and slashes")


def _check_log_driver(where: str, value: Any) -> None:
    """Check the log driver. With other drivers the daemon connects to any address of the machine's network."""
    options = value.get("Config") or {} if isinstance(value, dict) else None
    if (
        not isinstance(options, dict)
        or not set(value) <= {"Type", "Config"}
        or value.get("Type") not in ("json-file", "local")
        or not set(options) <= {"max-size", "max-file", "compress"}
        or not all(isinstance(option, str) for option in options.values())
    ):
        raise RefusedRequestError(f"{where}: only the drivers json-file and local, with limits, are allowed")


def _parameters(query: str, route: _Route) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=20)
    except ValueError:
        raise RefusedRequestError("the query is malformed") from None
    parameters = dict(pairs)
    if len(parameters) < len(pairs):
        raise RefusedRequestError("a parameter of the query occurs twice")
    for name, value in parameters.items():
        if name not in route.query:
            raise RefusedRequestError(f"the parameter {name[:80]!r} is not allowed")
        if not re.fullmatch(route.query[name], value):
            raise RefusedRequestError(f"the parameter {name} cannot be {value[:80]!r}")
    return parameters


def _parse(body: bytes) -> dict[str, Any]:
    """Return the object of a request's body.

    Raises:
        RefusedRequestError: the body is not a strict JSON object, or has a key twice.
    """
    try:
        parsed = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RefusedRequestError(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(parsed, dict):
        raise RefusedRequestError("the body must be an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RefusedRequestError("a key occurs twice in the body")
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
