"""What the files want: prefect.yaml in Prefect's own format, and beside it the keys that Prefect lacks.

name: shop                          # the owner, unless --owner says another
include: [teams/*.yaml]             # files of the same form
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
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from orchestration.deployments import files, placeholders, schedules
from orchestration.deployments.files import YamlMapping
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    LIMIT,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    automation,
    fires_on_everything,
    runs_one_deployment,
    spoken,
    trigger,
)
from orchestration.errors import DeploymentsError
from orchestration.prefect_compat.server_internals import validate_automation

UNKNOWN = {"__prefect_kind": "workspace_variable"}
"""Stands for a value that is known with the server alone, which thus fits every parameter."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


def _text(value: Any) -> Any:
    """A tag may be a number."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _truth(value: Any) -> Any:
    """A schedule's truth may come from the environment, as text."""
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


class _Schedule(_Model):
    cron: Any = None
    interval: Any = None
    rrule: Any = None
    timezone: str | None = None
    anchor_date: Any = None
    day_or: Any = None
    active: Annotated[StrictBool | None, BeforeValidator(_truth)] = None
    parameters: dict[str, Any] = {}
    slug: str | None = Field(default=None, min_length=1)
    replaces: str | None = None


class _WorkPoolOf(_Model):
    name: str | None = None
    work_queue_name: str | None = None
    job_variables: dict[str, Any] | None = None


class _Limit(_Model):
    limit: StrictInt | None = Field(default=None, ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] | None = None
    grace_period_seconds: StrictInt | None = Field(default=None, ge=60, le=86400)


def _name(value: str) -> str:
    """A name that the server takes.

    Raises:
        ValueError: why it does not.
    """
    if not value.strip("' \""):
        raise ValueError("is blank: choose another")
    if found := sorted({*value} & {*"/%&<>"}):
        raise ValueError(f"has {' '.join(found)}, which the server takes in no name: choose another")
    if value.endswith(".py"):
        raise ValueError("ends with .py, which `prefect deploy` takes off: choose another")
    return value


_VersionType = Literal[
    "prefect:simple", "vcs:github", "vcs:gitlab", "vcs:bitbucket", "vcs:azuredevops", "vcs:git"
]  # fmt: skip


class _Deployment(_Model):
    name: str = Field(min_length=1)
    version: str | None = None
    version_type: _VersionType | None = None
    description: str | None = None
    tags: list[Annotated[str, BeforeValidator(_text)]] | None = None
    entrypoint: str
    path: str | None = None
    flow_name: str | None = None
    parameters: dict[str, Any] | None = None
    enforce_parameter_schema: StrictBool | None = None
    work_pool: _WorkPoolOf | None = None
    schedule: _Schedule | None = None
    schedules: list[_Schedule] | None = None
    paused: StrictBool | None = None
    concurrency_limit: _Limit | None = None
    triggers: list[dict[str, Any]] | None = None
    build: Any = None
    push: Any = None
    pull: list[dict[str, Any]] | None = None

    @field_validator("name")
    @classmethod
    def _takes(cls, value: str) -> str:
        if "/" in value:
            raise ValueError("a deployment's name has no slash: FLOW/NAME is said with it")
        return _name(value)

    @field_validator("schedule", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == {} else value  # as `prefect init` writes it

    @field_validator("concurrency_limit", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"limit": value} if isinstance(value, int) else value

    @field_validator("pull", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return None if value == {} else [value] if isinstance(value, dict) else value


class _Queue(_Model):
    name: str = Field(min_length=1)
    priority: StrictInt | None = Field(default=None, ge=1)
    concurrency_limit: StrictInt | None = Field(default=None, ge=0)
    description: str | None = None


class _Pool(_Model):
    name: str = Field(min_length=1)
    type: str
    description: str | None = None
    concurrency_limit: StrictInt | None = Field(default=None, ge=0)
    base_job_template: dict[str, Any] | None = None
    queues: list[_Queue] | None = None

    @field_validator("name")
    @classmethod
    def _not_prefects(cls, value: str) -> str:
        if value.lower().startswith("prefect"):
            raise ValueError("the server keeps names that begin with prefect to itself: choose another")
        return value


class _Variable(_Model):
    name: str = Field(pattern="^[a-z0-9_-]+$", max_length=255)
    value: Any
    tags: list[str] = []


class _FileSystem(_Model):
    name: str = Field(pattern="^[a-z0-9-]+$")
    basepath: str = Field(pattern="^[a-z0-9+]+://.")
    settings: dict[str, Any] = {}


class _GlobalLimit(_Model):
    name: str = Field(min_length=1)
    limit: StrictInt = Field(ge=0)
    slot_decay_per_second: StrictFloat | StrictInt = 0
    active: StrictBool | None = None

    @field_validator("name")
    @classmethod
    def _not_prefects(cls, value: str) -> str:
        if value.startswith(("tag:", "deployment:")):
            raise ValueError("the server keeps such names to itself: see tag_concurrency_limits and concurrency_limit")
        return value


class _TagLimit(_Model):
    tag: str = Field(min_length=1)
    limit: StrictInt = Field(ge=0)


class _Automation(_Model):
    name: str = Field(min_length=1)
    description: str = ""
    enabled: StrictBool | None = None
    tags: list[str] = []
    trigger: dict[str, Any]
    actions: list[dict[str, Any]]
    actions_on_trigger: list[dict[str, Any]] = []
    actions_on_resolve: list[dict[str, Any]] = []


class _File(_Model):
    prefect_version: Any = Field(default=None, alias="prefect-version")
    name: str | None = None
    include: Any = None
    build: Any = None
    push: Any = None
    pull: list[dict[str, Any]] | None = None
    definitions: Any = None
    deployments: list[_Deployment] | None = None
    work_pools: list[_Pool] | None = None
    variables: list[_Variable] | None = None
    remote_file_systems: list[_FileSystem] | None = None
    concurrency_limits: list[_GlobalLimit] | None = None
    tag_concurrency_limits: list[_TagLimit] | None = None
    automations: list[_Automation] | None = None

    @field_validator("pull", mode="before")
    @classmethod
    def _one_step(cls, value: Any) -> Any:
        return None if value == {} else [value] if isinstance(value, dict) else value


@dataclass
class Desired:
    """What the files want.

    Args:
        owner: whose it is.
        objects: by kind and key.
        notes: what to know of it, a line each.
    """

    owner: str
    objects: dict[Name, Object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of(self, kind: str) -> list[Object]:
        """The objects of a kind."""
        return [each for each in self.objects.values() if each.kind == kind]


def read(
    paths: Sequence[str | Path],
    *,
    owner: str = "",
    directory: Path | None = None,
    default_pool: str = "",
    offline: bool = False,
) -> Desired:
    """Read the files, import their flows and check all that needs no server.

    Args:
        paths: files of desired state.
        owner: whose it is; by default the `name` of the first file that has one.
        directory: what a run's working directory will be, where no `pull` says it; by default the present one.
        default_pool: of deployments that name none.
        offline: what the environment does not have is noted and no error.

    Raises:
        DeploymentsError: the first mistake: what, where (FILE:LINE) and the cure.
    """
    return of(files.read(paths), owner=owner, directory=directory, default_pool=default_pool, offline=offline)


def of(
    documents: Sequence[YamlMapping],
    *,
    owner: str = "",
    directory: Path | None = None,
    default_pool: str = "",
    offline: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> Desired:
    """Import the flows of the documents of files and check all that needs no server.

    Args:
        documents: filled in where they have placeholders.
        owner: as for :func:`read`.
        directory: as for :func:`read`.
        default_pool: as for :func:`read`.
        offline: as for :func:`read`.
        variables: those of the server that deployments name, by name.

    Raises:
        DeploymentsError: the first mistake: what, where (FILE:LINE) and the cure.
    """
    missing: list[str] | None = [] if offline else None
    placeholders.resolve(documents, variables or {}, missing)
    if offline:
        placeholders.drop_unresolved_keys(documents)
    checked = [_checked(document) for document in documents]
    name = owner or next((each.name for each in checked if each.name), None)
    if not name:
        raise DeploymentsError(
            f"{documents[0].location()}: whose this is, is not said. Add `name: my-project` at the top, or say --owner"
        )
    desired = Desired(name, notes=list(missing or ()))
    for document, model in zip(documents, checked, strict=True):
        _Reader(desired, document, model, directory, default_pool).all()
    return desired


def _checked(document: YamlMapping) -> _File:
    try:
        return _File.model_validate(document)
    except ValidationError as error:
        raise DeploymentsError(_mistake(document, error, _File)) from None


def _unknown_key(where: str, key: str, known: Sequence[str]) -> str:
    """Say that there is no such key, and which one is meant."""
    near = difflib.get_close_matches(key, known, 1)
    cure = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}"
    return f"{where}: {key} is no key here. {cure}"


def _mistake(
    document: YamlMapping, error: ValidationError, model: type[BaseModel], prefix: tuple[str | int, ...] = ()
) -> str:
    """The first mistake that pydantic found, in one sentence."""
    found = error.errors(include_url=False)
    # A key that is misspelt is missing too.
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    path = (*prefix, *(step for step in first["loc"] if isinstance(step, str | int)))
    where = files.locate(document, path)
    key = next((str(step) for step in reversed(path) if isinstance(step, str)), "")
    if first["type"] == "extra_forbidden":
        return _unknown_key(where, key, _keys(model, path))
    if first["type"] == "missing":
        return f"{where}: {key} is missing"
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    wanted = f"should be {said}" if first["msg"].startswith("Input should be") else said
    if first["type"] in ("model_type", "dict_type"):
        known = _keys(model, (*path, ""))
        also = "a number or " if key == "concurrency_limit" else ""
        wanted = f"should be {also}a mapping" + (f" of {', '.join(known)}" if known else "")
    got = first.get("input")
    shown = f", not {got!r}" if isinstance(got, str | int | float | bool) or got is None else ""
    return f"{where}: {'.'.join(map(str, path[-2:])) if isinstance(path[-1], int) else key} {wanted}{shown}"


def _keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The keys that a model has where a path ends."""
    for step in path[:-1]:
        if isinstance(step, int):
            continue
        info = next((each for name, each in model.model_fields.items() if step in (name, each.alias)), None)
        if info is None:
            return []
        inner = [each for each in _types(info.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return [each.alias or name for name, each in model.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [found for each in inner for found in _types(each)] if inner else [annotation]


@dataclass
class _Reader:
    """Makes the objects of one file."""

    desired: Desired
    document: YamlMapping
    model: _File
    directory: Path | None
    default_pool: str

    def all(self) -> None:
        model = self.model
        self.refuse_steps(model)
        for index, variable in enumerate(model.variables or []):
            self.add(VARIABLE, variable.name, variable.model_dump(exclude={"name"}), "variables", index)
        for index, system in enumerate(model.remote_file_systems or []):
            self.add(FILE_SYSTEM, system.name, system.model_dump(exclude={"name"}), "remote_file_systems", index)
        for index, limit in enumerate(model.concurrency_limits or []):
            fields = limit.model_dump(exclude={"name"})
            fields["slot_decay_per_second"] = float(fields["slot_decay_per_second"])
            self.add(LIMIT, limit.name, fields, "concurrency_limits", index)
        for index, tag in enumerate(model.tag_concurrency_limits or []):
            self.add(TAG_LIMIT, tag.tag, {"concurrency_limit": tag.limit}, "tag_concurrency_limits", index)
        for index, pool in enumerate(model.work_pools or []):
            self.pool(pool, index)
        for index, wanted in enumerate(model.automations or []):
            self.automation(wanted, index)
        for index, deployment in enumerate(model.deployments or []):
            self.deployment(deployment, index)

    def at(self, *path: str | int) -> str:
        return files.locate(self.document, path)

    def add(self, kind: str, key: str, fields: dict[str, Any], *path: str | int) -> None:
        made = Object(kind, key, fields, self.at(*path))
        if other := self.desired.objects.get(made.name):
            raise DeploymentsError(
                f"{made.where}: {spoken(made.name)} is here again, first in {other.where}. Rename or remove one"
            )
        self.desired.objects[made.name] = made

    def refuse_steps(self, model: _File | _Deployment, *path: str | int) -> None:
        for key in ("build", "push"):
            if getattr(model, key):
                raise DeploymentsError(
                    f"{self.at(*path, key)}: {key} steps are not run here. Build and push the image "
                    f"before, and set `{key}: null`"
                )

    def pool(self, pool: _Pool, index: int) -> None:
        path = ("work_pools", index)
        fields = _plain(pool.model_dump(exclude={"name", "queues"})) | {"description": pool.description or None}
        self.add(POOL, pool.name, fields, *path)
        for number, queue in enumerate(pool.queues or []):
            # Not said, the server's own description of the queue `default` stays.
            left = {"name"} if queue.description else {"name", "description"}
            fields = queue.model_dump(exclude=left)
            self.add(QUEUE, f"{pool.name}/{queue.name}", fields, *path, "queues", number)

    def automation(self, wanted: _Automation, index: int) -> None:
        from prefect.events.schemas.automations import AutomationCore

        path = ("automations", index)
        raw = wanted.model_dump()
        if runs_one_deployment(raw):
            raise DeploymentsError(
                f"{self.at(*path, 'actions')}: automation {wanted.name} only runs a deployment: "
                "write it there, in triggers"
            )
        fields = self.understood(automation, AutomationCore, raw | {"enabled": wanted.enabled is not False}, *path)
        self.add(AUTOMATION, wanted.name, fields | {"enabled": wanted.enabled}, *path)

    def understood(
        self, read: Callable[[Mapping[str, Any]], dict[str, Any]], model: Any, raw: Mapping[str, Any], *path: str | int
    ) -> dict[str, Any]:
        """Return what Prefect reads in an automation or a trigger; `model` is Prefect's type of it."""
        try:
            fields = read(raw)
            # Prefect's client knows triggers that only Prefect Cloud has.
            validate_automation(deepcopy(fields) | {"name": raw.get("name") or "automation"})
            for below, known in _unread(raw, TypeAdapter(model).validate_python(dict(raw))):
                # Prefect leaves the key out: without its filter an automation fires at other events.
                where = files.locate(self.document, (*path, *below))
                raise DeploymentsError(_unknown_key(where, str(below[-1]), known))
            return fields
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            steps = [step for step in first["loc"] if step in raw or isinstance(step, int) or str(step).islower()]
            named = ".".join(map(str, steps))
            raise DeploymentsError(
                f"{files.locate(self.document, (*path, *steps))}: {named}: {first['msg']}. "
                "What an automation may say: docs.prefect.io, Automations"
            ) from None

    def deployment(self, wanted: _Deployment, index: int) -> None:
        from orchestration.deployments import flows
        from orchestration.deployments.parameters import find_problems

        path = ("deployments", index)
        self.refuse_steps(wanted, *path)
        try:
            flow = flows.load(wanted.entrypoint, Path.cwd())
        except DeploymentsError as error:
            raise DeploymentsError(f"{self.at(*path, 'entrypoint')}: {error}") from None
        if wanted.flow_name and wanted.flow_name != flow.name:
            raise DeploymentsError(
                f"{self.at(*path, 'flow_name')}: the flow of {wanted.entrypoint} is called {flow.name}, not "
                f"{wanted.flow_name}. Correct or remove flow_name"
            )
        parameters = wanted.parameters or {}
        for given in (parameters, *(each.parameters for each in wanted.schedules or [])):
            if name := next(
                (name for name, value in given.items() if placeholders.is_resolved_at_run_start(value)), ""
            ):
                raise DeploymentsError(
                    f"{self.at(*path, 'parameters')}: deployment {wanted.name}: parameter {name} has a __prefect_kind, "
                    "which the server fills in for a run that somebody starts, not in a deployment. Write the value, "
                    "or {{ prefect.variables.NAME }}"
                )
        listed = self.schedules(wanted, *path)
        if wanted.enforce_parameter_schema is not False:
            # What starts by itself has nobody to ask for what is missing.
            started = [(each.parameters, below) for each, below in _scheduled(wanted)] or [({}, ())]
            for own, below in started:
                each = parameters | own
                where = self.at(*path, *(below if own else ()), "parameters")
                known = {
                    key: UNKNOWN if placeholders.has_unresolved_variable(value) else value
                    for key, value in each.items()
                }
                for problem in find_problems(known, flow.schema, complete=bool(listed)):
                    raise DeploymentsError(f"{where}: deployment {wanted.name}: {problem}")
        limit = wanted.concurrency_limit or _Limit()
        options = None
        if limit.collision_strategy or limit.grace_period_seconds:
            options = {
                "collision_strategy": limit.collision_strategy or "ENQUEUE",
                "grace_period_seconds": limit.grace_period_seconds,
            }
        pool = wanted.work_pool or _WorkPoolOf()
        pool_name = pool.name or self.default_pool
        if not pool_name:
            raise DeploymentsError(
                f"{self.at(*path)}: deployment {wanted.name} names no work pool. Add `work_pool: {{name: ...}}`"
            )
        pull = wanted.pull if "pull" in wanted.model_fields_set else self.model.pull
        if pull is None and self.model.pull:
            pull = self.model.pull
        if pull is None:
            if (pool.job_variables or {}).get("image") and not self.directory:
                raise DeploymentsError(
                    f"{self.at(*path)}: deployment {wanted.name} has an image of its own, and no `pull` says where its "
                    "flow is there. Add `pull: [{prefect.deployments.steps.set_working_directory: {directory: ...}}]`, "
                    "for example /opt/prefect"
                )
            step = {"directory": str(self.directory or Path.cwd())}
            pull = [{"prefect.deployments.steps.set_working_directory": step}]
        fields = {
            "description": wanted.description or flow.description,
            "version": wanted.version or flow.version,
            "tags": sorted({each for each in wanted.tags or [] if each.strip()}),
            "entrypoint": wanted.entrypoint,
            "path": wanted.path,
            "pull_steps": _plain(pull),
            "work_pool_name": pool_name,
            "work_queue_name": pool.work_queue_name or "default",
            "job_variables": _plain(pool.job_variables or {}),
            "parameters": _plain(parameters),
            "parameter_openapi_schema": flow.schema,
            "enforce_parameter_schema": wanted.enforce_parameter_schema is not False,
            "concurrency_limit": limit.limit,
            "concurrency_options": options,
            "paused": wanted.paused,
            "schedules": listed,
            "triggers": self.triggers(wanted, *path),
        }
        self.add(DEPLOYMENT, f"{flow.name}/{wanted.name}", fields, *path)

    def schedules(self, wanted: _Deployment, *path: str | int) -> dict[str, dict[str, Any]]:
        if wanted.schedule and "schedules" in wanted.model_fields_set:
            raise DeploymentsError(
                f"{self.at(*path, 'schedule')}: deployment {wanted.name} has schedule and schedules. Write all of "
                "them under schedules"
            )
        listed: list[dict[str, Any]] = []
        slugs: dict[str, str] = {}
        for each, below in _scheduled(wanted):
            raw = each.model_dump()
            where = self.at(*path, *below)
            if placeholders.has_unresolved_variable(raw):  # noted
                continue
            if problem := schedules.find_problem(raw):
                key = next((key for key in ("timezone", "anchor_date") if problem.startswith(key)), "")
                raise DeploymentsError(
                    f"{self.at(*path, *below, key) if key else where}: deployment {wanted.name}: {problem}"
                )
            if each.slug and each.slug in slugs:
                raise DeploymentsError(
                    f"{where}: deployment {wanted.name} has two schedules with the slug {each.slug}, the first in "
                    f"{slugs[each.slug]}. Rename one"
                )
            slugs[each.slug or ""] = where
            form = schedules.normalize(raw)
            known = {
                "schedule": form,
                "active": each.active,
                "parameters": _plain(each.parameters),
                "slug": each.slug,
                "replaces": each.replaces,
                "zoned": each.timezone is not None,
            }
            fires = (form, each.active is not False, known["parameters"])
            if each.slug is None and any(
                fires == (other["schedule"], other["active"] is not False, other["parameters"])
                for other in listed
                if other["slug"] is None
            ):
                raise DeploymentsError(f"{where}: deployment {wanted.name} has this schedule twice. Remove one")
            listed.append(known)
        return schedules.by_name(listed)

    def triggers(self, wanted: _Deployment, *path: str | int) -> dict[str, dict[str, Any]]:
        if not wanted.triggers:
            return {}
        from prefect.events import DeploymentTriggerTypes

        made: dict[str, dict[str, Any]] = {}
        for number, raw in enumerate(wanted.triggers):
            below = (*path, "triggers", number)
            name = raw.get("name") or f"{wanted.name}__automation_{number + 1}"
            if name in made:
                raise DeploymentsError(
                    f"{self.at(*below)}: deployment {wanted.name} has two triggers {name}. Rename one"
                )
            fields = self.understood(trigger, DeploymentTriggerTypes, raw, *below)
            if fires_on_everything(fields["trigger"]):
                raise DeploymentsError(
                    f"{self.at(*below)}: deployment {wanted.name}: trigger {name} names no event, so that every event "
                    "starts a run, also those of its own runs. Name them, like expect: [orders.landed], or a match"
                )
            made[str(name)] = fields | {"enabled": fields["enabled"] if raw.get("enabled") is not None else None}
        return made


def _scheduled(wanted: _Deployment) -> list[tuple[_Schedule, tuple[str | int, ...]]]:
    """The schedules of a deployment, each with where it is in there."""
    listed: list[tuple[_Schedule, tuple[str | int, ...]]] = [
        (each, ("schedules", number)) for number, each in enumerate(wanted.schedules or [])
    ]
    return [*listed, (wanted.schedule, ("schedule",))] if wanted.schedule else listed


def _unread(raw: Any, read: Any) -> Iterator[tuple[tuple[str | int, ...], list[str]]]:
    """The path of each key that pydantic left out, and the keys that there are.

    Args:
        raw: of a file.
        read: the model that pydantic made of it.
    """
    if isinstance(raw, list) and isinstance(read, list):
        for index, (each, made) in enumerate(zip(raw, read, strict=False)):
            yield from (((index, *below), known) for below, known in _unread(each, made))
    if not isinstance(raw, dict) or not isinstance(read, BaseModel) or isinstance(read, RootModel):
        return
    known = [each.alias or name for name, each in type(read).model_fields.items()]
    for key, value in raw.items():
        if key not in known:
            yield (key,), known
        yield from (((key, *below), inner) for below, inner in _unread(value, getattr(read, key, None)))


def _plain(value: Any) -> Any:
    """A copy without what a file knows of its lines."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def default_pool() -> str:
    """The work pool of deployments that name none, as Prefect's settings say."""
    from prefect.settings import get_current_settings

    return get_current_settings().deployments.default_work_pool_name or os.environ.get("PREFECT_DEFAULT_WORK_POOL", "")
