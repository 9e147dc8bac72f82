"""The fields of Kubernetes objects that the reconciler reads. Parsing skips all other fields.

Half of a pod's 7 kB say who wrote which field. Python objects of all fields take longer than the rest of a round.

Names and meanings: https://kubernetes.io/docs/reference/kubernetes-api/
"""

from datetime import datetime
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.protocol import MAIN_CONTAINER, MAIN_CONTAINER_ANNOTATION


class Part(BaseModel):
    """A part of a Kubernetes object. Its fields have Python names; a time is None if the event has not happened."""

    model_config = ConfigDict(
        alias_generator=to_camel, frozen=True
    )  # frozen: defaults are not copied for each instance


class Meta(Part):
    """The metadata of an object."""

    name: str
    uid: str = ""
    creation_timestamp: datetime
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Condition(Part):
    """A condition of a pod or a Job."""

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
    """The state of a container: one of the three fields is set."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(Part):
    """The status of a container."""

    name: str = ""
    state: ContainerState = ContainerState()
    restart_count: int = 0


class PodStatus(Part):
    """The status of a pod."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    conditions: tuple[Condition, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()


class Resources(Part):
    """The resources of a container."""

    limits: dict[str, str | float] = Field(default_factory=dict)


class Variable(Part):
    """An environment variable of a container."""

    name: str = ""


class Container(Part):
    """A container in the specification of a pod."""

    name: str = ""
    env: tuple[Variable, ...] = ()
    resources: Resources = Resources()
    restart_policy: str = ""


class PodSpec(Part):
    """The specification of a pod."""

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
        """Return the container that executes the run. An injector may add, reorder and rename containers.

        The main container is, in this order: the container `prefect-job`; the container with the run's id in its
        environment; the container that the worker names in an annotation; the first container.
        """
        annotated = self.metadata.annotations.get(MAIN_CONTAINER_ANNOTATION)
        containers = self.spec.containers
        by_name = [container for container in containers if container.name == MAIN_CONTAINER]
        by_run = [
            container
            for container in containers
            if any(variable.name == FLOW_RUN_ID_VARIABLE for variable in container.env)
        ]
        by_annotation = [container for container in containers if container.name == annotated]
        return [*by_name, *by_run, *by_annotation, *containers][0]


class LeanContainer(Container):
    """A container without its environment. Parsing all environments takes as long as all the rest of the pods."""

    env: tuple[Variable, ...] = Field((), alias="not-read")


class LeanPodSpec(PodSpec):
    """A pod's specification without environments."""

    containers: tuple[LeanContainer, ...]


class LeanPodObject(PodObject):
    """A pod without environments. These fields suffice if the main container has the usual name."""

    spec: LeanPodSpec

    @property
    def has_usual_main_container(self) -> bool:
        """Whether the main container has the usual name."""
        return any(container.name == MAIN_CONTAINER for container in self.spec.containers)


class Rule(Part):
    """A rule of a Job's podFailurePolicy."""

    action: str


class PodFailurePolicy(Part):
    """The podFailurePolicy of a Job."""

    rules: tuple[Rule, ...] = ()


class JobSpec(Part):
    """The specification of a Job."""

    backoff_limit: int | None = None
    active_deadline_seconds: int | None = None
    pod_failure_policy: PodFailurePolicy = PodFailurePolicy()


class JobStatus(Part):
    """The status of a Job."""

    conditions: tuple[Condition, ...] = ()


class JobObject(Part):
    """A Job."""

    metadata: Meta
    spec: JobSpec
    status: JobStatus = JobStatus()


class Reference(Part):
    """The object of an event."""

    name: str = ""


class EventObject(Part):
    """An event about an object."""

    metadata: Meta
    involved_object: Reference = Reference()
    reason: str = ""
    message: str = ""
    last_timestamp: datetime | None = None


Listed = TypeVar("Listed", PodObject, LeanPodObject, JobObject, EventObject)


class PageMeta(Part):
    """The metadata of a page of a list."""

    continue_token: str = Field("", alias="continue")


class Page(Part, Generic[Listed]):
    """A page of a list."""

    metadata: PageMeta
    items: tuple[Listed, ...]


class Change(Part):
    """A line of a watch: the kind of change, and the pod after it."""

    type: str
    object: PodObject
