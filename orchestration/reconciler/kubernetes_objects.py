"""What is read of Kubernetes' objects. All else that they have is passed over as it comes: of a pod's 7 kB half say who
wrote which field, and to make Python objects of them all takes longer than the rest of a round.

The names and their meaning: https://kubernetes.io/docs/reference/kubernetes-api/
"""

from datetime import datetime
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.protocol import MAIN_CONTAINER, MAIN_CONTAINER_ANNOTATION


class Part(BaseModel):
    """Of an object, with the names of its JSON in Python's manner; a time that is null was never."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True)  # else defaults are copied for each


class Meta(Part):
    """Of any object."""

    name: str
    uid: str = ""
    creation_timestamp: datetime
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Condition(Part):
    """Of a pod or a Job."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: datetime | None = None


class Waiting(Part):
    """Why a container does not run yet."""

    reason: str = ""
    message: str = ""


class Running(Part):
    """A container that runs."""

    started_at: datetime | None = None


class Terminated(Part):
    """How a container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    started_at: datetime | None = None
    finished_at: datetime | None = None


class ContainerState(Part):
    """One of three."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(Part):
    """Of a pod's container."""

    name: str = ""
    state: ContainerState = ContainerState()
    restart_count: int = 0


class PodStatus(Part):
    """Where a pod is."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Condition, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class Resources(Part):
    """What a container may use."""

    limits: dict[str, str | float] = Field(default_factory=dict)


class Variable(Part):
    """Of a container's environment."""

    name: str = ""


class Container(Part):
    """Of a pod's specification."""

    name: str = ""
    env: tuple[Variable, ...] = ()
    resources: Resources = Resources()
    restart_policy: str = ""


class PodSpec(Part):
    """What was asked for."""

    containers: tuple[Container, ...]
    node_name: str = ""
    restart_policy: str = ""


class PodObject(Part):
    """A pod."""

    metadata: Meta
    spec: PodSpec
    status: PodStatus = PodStatus()

    @property
    def main_container(self) -> Container:
        """The container that executes the run, whatever an injector has added, reordered or renamed.

        It is the container called `prefect-job`; else the one with the run's id in its environment; else the one that
        the worker names in an annotation; else the first.
        """
        named = self.metadata.annotations.get(MAIN_CONTAINER_ANNOTATION)
        containers = self.spec.containers
        return next(
            (
                each
                for found in (
                    [each for each in containers if each.name == MAIN_CONTAINER],
                    [each for each in containers if any(some.name == FLOW_RUN_ID_VARIABLE for some in each.env)],
                    [each for each in containers if each.name == named],
                )
                for each in found
            ),
            containers[0],
        )


class LeanContainer(Container):
    """A container without its environment: to read that of all takes as long as all else of their pods."""

    env: tuple[Variable, ...] = Field((), alias="not-read")


class LeanPodSpec(PodSpec):
    """A pod's specification without environments."""

    containers: tuple[LeanContainer, ...]


class LeanPodObject(PodObject):
    """A pod without environments: enough where its main container has the usual name."""

    spec: LeanPodSpec

    @property
    def is_named(self) -> bool:
        """Whether the main container has the usual name."""
        return any(each.name == MAIN_CONTAINER for each in self.spec.containers)


class Rule(Part):
    """Of a Job's podFailurePolicy."""

    action: str


class PodFailurePolicy(Part):
    """What a Job makes of how its pods end."""

    rules: tuple[Rule, ...] = ()


class JobSpec(Part):
    """What was asked for."""

    backoff_limit: int | None = None
    active_deadline_seconds: int | None = None
    pod_failure_policy: PodFailurePolicy = PodFailurePolicy()


class JobStatus(Part):
    """Where a Job is."""

    conditions: tuple[Condition, ...] = ()


class JobObject(Part):
    """A Job."""

    metadata: Meta
    spec: JobSpec
    status: JobStatus = JobStatus()


class Reference(Part):
    """What an event is about."""

    name: str = ""


class EventObject(Part):
    """What was said of an object, once or several times."""

    metadata: Meta
    involved_object: Reference = Reference()
    reason: str = ""
    message: str = ""
    last_timestamp: datetime | None = None


Listed = TypeVar("Listed", PodObject, LeanPodObject, JobObject, EventObject)


class PageMeta(Part):
    """Of a part of a list."""

    more: str = Field("", alias="continue")


class Page(Part, Generic[Listed]):
    """A part of a list."""

    metadata: PageMeta
    items: tuple[Listed, ...]


class Change(Part):
    """A line of a watch: what happened to a pod, and what the pod is now."""

    type: str
    object: PodObject
