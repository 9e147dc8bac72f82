"""The format of a file of desired state: prefect.yaml in Prefect's own format, with keys that Prefect lacks.

name: shop                          # the owner, unless --owner names another
include: [teams/*.yaml]             # files in the same format
definitions: {...}                  # holds anchors and is ignored, as is a key that begins with x-, a dot or _
deployments: [...]                  # as `prefect deploy` reads them
work_pools:
  - name: default
    type: kubernetes
    description: ""
    concurrency_limit: null
    base_job_template: {job_configuration: {...}, variables: {...}}
    queues: [{name: urgent, priority: 1, concurrency_limit: 5, description: ""}]
variables: [{name: region, value: eu, tags: []}]
remote_file_systems: [{name: results, basepath: s3://bucket/folder, settings: {}}]
concurrency_limits: [{name: database, limit: 5, slot_decay_per_second: 0, active: true}]
tag_concurrency_limits: [{tag: warehouse, limit: 3}]
automations: [{name: ..., trigger: {...}, actions: [...]}]
"""

import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from orchestration.deployments import files, placeholders
from orchestration.deployments.files import YamlMapping, YamlSequence
from orchestration.errors import DeploymentsError


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


def _number_to_text(value: Any) -> Any:
    """Return a tag as text. YAML reads `tags: [2024]` as a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _read_text(kind: Any) -> BeforeValidator:
    """Return a validator that gives a text its type. A variable of the environment is always text."""
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def read(value: Any) -> Any:
        try:
            return adapter.validate_python(value) if isinstance(value, str) else value
        except ValidationError:
            return value

    return BeforeValidator(read)


_Truth = Annotated[StrictBool, _read_text(bool)]
_Integer = Annotated[StrictInt, Field(le=2**31 - 1), _read_text(int)]  # a column of the server has no more
_Number = Annotated[StrictFloat | StrictInt, _read_text(FiniteFloat)]


def _steps_to_list(value: Any) -> Any:
    """Return pull steps as a list. `prefect init` writes `{}` for none, and Prefect takes one step without a list."""
    return None if value == {} else [value] if isinstance(value, dict) else value


_PullSteps = Annotated[list[dict[str, Any]] | None, BeforeValidator(_steps_to_list)]


class ScheduleEntry(_Model):
    """A schedule of a deployment. :mod:`schedules` checks its times."""

    cron: Any = None
    interval: Any = None
    rrule: Any = None
    timezone: str | None = None
    anchor_date: Any = None
    day_or: Any = None
    active: _Truth | None = None
    parameters: dict[str, Any] = {}
    slug: str | None = Field(default=None, min_length=1)
    replaces: str | None = None


class WorkPoolReference(_Model):
    """The work pool and queue of a deployment, with the deployment's job variables."""

    name: str | None = None
    work_queue_name: str | None = None
    job_variables: dict[str, Any] | None = None


class DeploymentLimitEntry(_Model):
    """The `concurrency_limit` of a deployment."""

    limit: _Integer | None = Field(default=None, ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] | None = None
    grace_period_seconds: _Integer | None = Field(default=None, ge=60, le=86400)


_VersionType = Literal[
    "prefect:simple", "vcs:github", "vcs:gitlab", "vcs:bitbucket", "vcs:azuredevops", "vcs:git"
]  # fmt: skip


class DeploymentEntry(_Model):
    """A deployment, in Prefect's own format."""

    name: str = Field(min_length=1)
    version: str | None = None
    version_type: _VersionType | None = None
    description: str | None = None
    tags: list[Annotated[str, BeforeValidator(_number_to_text)]] | None = None
    entrypoint: str
    path: str | None = None
    flow_name: str | None = None
    parameters: dict[str, Any] | None = None
    enforce_parameter_schema: _Truth | None = None
    work_pool: WorkPoolReference | None = None
    schedule: ScheduleEntry | None = None
    schedules: list[ScheduleEntry] | None = None
    paused: _Truth | None = None
    concurrency_limit: DeploymentLimitEntry | None = None
    triggers: list[dict[str, Any]] | None = None
    build: Any = None
    push: Any = None
    pull: _PullSteps = None

    @field_validator("name")
    @classmethod
    def _is_accepted_by_the_server(cls, value: str) -> str:
        if "/" in value:
            raise ValueError("has a slash, which separates flow and deployment in FLOW/NAME: choose another")
        if not value.strip("' \""):
            raise ValueError("is blank: choose another")
        if found := sorted({*value} & {*"/%&<>"}):
            raise ValueError(f"has {' '.join(found)}, which the server refuses in a name: choose another")
        if value.endswith(".py"):
            raise ValueError("ends with .py, which `prefect deploy` removes: choose another")
        return value

    @field_validator("schedule", mode="before")
    @classmethod
    def _empty_schedule_to_none(cls, value: Any) -> Any:
        return None if value == {} else value  # as `prefect init` writes it

    @field_validator("concurrency_limit", mode="before")
    @classmethod
    def _number_to_limit(cls, value: Any) -> Any:
        return {"limit": value} if isinstance(value, int | str) else value


class QueueEntry(_Model):
    """A queue of a work pool."""

    name: str = Field(min_length=1)
    priority: _Integer | None = Field(default=None, ge=1)
    concurrency_limit: _Integer | None = Field(default=None, ge=0)
    description: str | None = None


class PoolEntry(_Model):
    """A work pool with its queues."""

    name: str = Field(min_length=1)
    type: str
    description: str | None = None
    concurrency_limit: _Integer | None = Field(default=None, ge=0)
    base_job_template: dict[str, Any] | None = None
    queues: list[QueueEntry] | None = None

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, value: str) -> str:
        if value.lower().startswith("prefect"):
            raise ValueError("begins with prefect, which the server reserves: choose another")
        return value


class VariableEntry(_Model):
    """A variable of the server."""

    name: str = Field(pattern="^[a-z0-9_-]+$", max_length=255)
    value: Any
    tags: list[str] = []

    @field_validator("value")
    @classmethod
    def _is_accepted_by_the_server(cls, value: Any) -> Any:
        from prefect.types import check_variable_value

        try:
            check_variable_value(value)
        except ValueError as error:
            raise ValueError(f"is refused by the server: {error}") from None
        return value


class FileSystemEntry(_Model):
    """A RemoteFileSystem block."""

    name: str = Field(pattern="^[a-z0-9-]+$")
    basepath: str = Field(pattern="^[a-z0-9+]+://.")
    settings: dict[str, Any] = {}


class LimitEntry(_Model):
    """A global concurrency limit."""

    name: str = Field(min_length=1)
    limit: _Integer = Field(ge=0)
    slot_decay_per_second: _Number = 0
    active: _Truth | None = None

    @field_validator("slot_decay_per_second")
    @classmethod
    def _is_a_rate(cls, value: float) -> float:
        if not 0 <= value <= sys.float_info.max:
            raise ValueError("should be a number of slots from 0 on")
        return float(value)

    @field_validator("name")
    @classmethod
    def _is_not_reserved(cls, value: str) -> str:
        if value.startswith(("tag:", "deployment:")):
            raise ValueError("is reserved: use tag_concurrency_limits or the concurrency_limit of a deployment")
        return value


class TagLimitEntry(_Model):
    """A limit of the task runs that have a tag."""

    tag: str = Field(min_length=1)
    limit: _Integer = Field(ge=0)


class AutomationEntry(_Model):
    """An automation. Prefect itself reads the trigger and the actions."""

    name: str = Field(min_length=1)
    description: str = ""
    enabled: _Truth | None = None
    tags: list[str] = []
    trigger: dict[str, Any]
    actions: list[dict[str, Any]]
    actions_on_trigger: list[dict[str, Any]] = []
    actions_on_resolve: list[dict[str, Any]] = []


class DesiredStateFile(_Model):
    """A whole file."""

    prefect_version: Any = Field(default=None, alias="prefect-version")
    name: str | None = None
    include: Any = None
    build: Any = None
    push: Any = None
    pull: _PullSteps = None
    definitions: Any = None
    deployments: list[DeploymentEntry] | None = None
    work_pools: list[PoolEntry] | None = None
    variables: list[VariableEntry] | None = None
    remote_file_systems: list[FileSystemEntry] | None = None
    concurrency_limits: list[LimitEntry] | None = None
    tag_concurrency_limits: list[TagLimitEntry] | None = None
    automations: list[AutomationEntry] | None = None


def drop_anchors(document: YamlMapping) -> None:
    """Remove the keys that only hold anchors. What they hold need not be valid: the format applies where it is used."""
    for key in [key for key in document if key == "definitions" or key.startswith(("x-", ".", "_"))]:
        del document[key]


def validate(document: YamlMapping, *, offline: bool = False) -> DesiredStateFile:
    """Return a document as a file of desired state.

    Args:
        document: the file, whose placeholders have been resolved.
        offline: accept a placeholder in the place of any value. Such a value is removed from the document: only the
            server, or the environment of a sync, knows its type.

    Raises:
        DeploymentsError: the first mistake, with FILE:LINE and the cure.
    """
    while True:
        try:
            return DesiredStateFile.model_validate(document)
        except ValidationError as error:
            unresolved = [mistake for mistake in error.errors() if offline and _is_unresolved(mistake)]
            if not unresolved:
                raise DeploymentsError(_first_mistake(document, error)) from None
            # Pydantic may refuse one value for several reasons, and several values of one entry.
            places = dict.fromkeys(_find_unresolved(document, mistake["loc"]) for mistake in unresolved)
            for place in reversed(places):
                _drop_unresolved(document, place)


def _is_unresolved(mistake: Mapping[str, Any]) -> bool:
    """Return whether pydantic refused a placeholder that a sync resolves."""
    section, *path = mistake["loc"]
    if not path or "pull" in path or mistake["type"] in ("extra_forbidden", "value_error"):
        return False
    kinds = ("$", placeholders.VARIABLE) if section == "deployments" and path[1:] else ("$",)
    return isinstance(mistake["input"], str) and placeholders.has_unresolved(mistake["input"], kinds)


def _find_unresolved(document: YamlMapping, location: Sequence[Any]) -> tuple[Any, ...]:
    """Return the place of a value of a deployment, or of the whole entry of another section.

    What the other entry requires may be unknown. A text on the way stands for a mapping (`concurrency_limit`).
    """
    section, index, *path = location
    place: tuple[Any, ...] = (section, index)
    value = document[section][index]
    for step in path if section == "deployments" else ():
        if isinstance(value, str):
            break
        place, value = (*place, step), value[step]
    return place


def _drop_unresolved(document: YamlMapping, place: Sequence[Any]) -> None:
    """Remove what is at a place of `_find_unresolved`."""
    section, index, *path = place
    if not path:
        _drop(document[section], [index])
        return
    deployment = document[section][index]
    if path == ["work_pool"]:
        deployment["work_pool"] = {"name": deployment["work_pool"]}
        return
    if path[-1] == "parameters":
        deployment["enforce_parameter_schema"] = False
    _drop(deployment, path)


def _drop(value: Any, path: Sequence[str | int]) -> None:
    """Remove what is at a path in a value."""
    *parents, last = path
    for step in parents:
        value = value[step]
    del value[last]
    if isinstance(value, YamlSequence):
        del value.lines[int(last)]


def unknown_key(where: str, key: str, known: Sequence[str]) -> str:
    """Return the message for an unknown key, with the nearest known key.

    Args:
        where: FILE:LINE.
        key: the unknown key.
        known: the keys that the format has there.
    """
    nearest = difflib.get_close_matches(key, known, 1)
    cure = f"Did you mean {nearest[0]}?" if nearest else f"Known keys: {', '.join(known)}"
    return f"{where}: unknown key {key}. {cure}"


def _first_mistake(document: YamlMapping, error: ValidationError) -> str:
    """Return the message for the first mistake that pydantic found."""
    found = error.errors(include_url=False)
    # A misspelt key is also a missing key. The unknown key explains both.
    first = next((mistake for mistake in found if mistake["type"] == "extra_forbidden"), found[0])
    path = tuple(step for step in first["loc"] if isinstance(step, str | int))
    where = files.locate(document, path)
    key = next((str(step) for step in reversed(path) if isinstance(step, str)), "")
    if first["type"] == "extra_forbidden":
        message = unknown_key(where, key, _known_keys(path))
        return (
            message if path[1:] else f"{message}{'' if message.endswith('?') else '.'} To hold anchors, name it x-{key}"
        )
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    rule = f"should be {reason}" if first["msg"].startswith("Input should be") else reason
    if first["type"] in ("model_type", "dict_type"):
        known = _known_keys((*path, ""))
        number = "a number or " if key == "concurrency_limit" else ""
        rule = f"should be {number}a mapping" + (f" of {', '.join(known)}" if known else "")
    elif first["type"] == "list_type":
        rule += ", such as [a, b]"
    value = first.get("input")
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    shown = f", not {shown}" if isinstance(value, str | int | float | bool) or value is None else ""
    return f"{where}: {'.'.join(map(str, path[-2:])) if isinstance(path[-1], int) else key} {rule}{shown}"


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """Return the keys that the format has next to the last step of a path; none where any key is allowed."""
    model: type[BaseModel] = DesiredStateFile
    for step in path[:-1]:
        if isinstance(step, int):
            continue
        info = next((info for name, info in model.model_fields.items() if step in (name, info.alias)), None)
        if info is None:
            return []
        inner = [kind for kind in _types(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return [info.alias or name for name, info in model.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    """Return the types inside an annotation, such as `int` and `None` of `int | None`."""
    inner = get_args(annotation)
    return [found for argument in inner for found in _types(argument)] if inner else [annotation]
