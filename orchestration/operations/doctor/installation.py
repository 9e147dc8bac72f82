"""Read an installation from outside: its cluster, releases and Prefect server, and what the server's pod reports."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import yaml

from orchestration.errors import ClusterError, PipelineError
from orchestration.operations import helm_release, release_inputs
from orchestration.operations.environment import POOL, RELEASES, SERVER, Environment, Object
from orchestration.operations.release_inputs import CHARTS, Image
from orchestration.prefect_api import Server

UNKNOWN_IMAGE = Image("unknown", f"sha256:{'0' * 64}")
"""The image with which charts are rendered. No check looks at the name of an image that is not installed."""

REPORT = ("python", "-m", "orchestration.inspection.backing_services")
"""The command by which the server's pod reports about database and Redis."""

CLUSTERS = "clusters.postgresql.cnpg.io"
"""CloudNativePG's Clusters, as kubectl takes the kind."""

COMPONENT = "app.kubernetes.io/component"
"""The label with the name of an object's component."""

Found = TypeVar("Found")


class UncheckedError(PipelineError):
    """A check that is not possible, with the reason."""


def database_mode(values: Object) -> str:
    """Return the mode of the server's database by values of the chart, also of an older one without `database.mode`."""
    database = values["database"]
    return str(database.get("mode") or ("bundled" if database["bundled"]["enabled"] else "external"))


def is_cluster(manifest: Object) -> bool:
    """Return whether an object is a Cluster of CloudNativePG."""
    return manifest["kind"] == "Cluster" and str(manifest["apiVersion"]).startswith("postgresql.cnpg.io/")


class Installation:
    """Reads an environment for the checks. Each thing is read once, however many checks look at it.

    Args:
        environment: the environment, or the reason why its cluster cannot be used.
        server: the Prefect API, or the reason why it cannot be reached.
    """

    def __init__(self, environment: Environment | str, server: Server | str) -> None:
        self._environment = environment
        self._server = server
        self._reads: dict[Any, asyncio.Future[Any]] = {}

    @property
    def cluster(self) -> Environment:
        """Return the environment.

        Raises:
            UncheckedError: its cluster cannot be used.
        """
        if isinstance(self._environment, str):
            raise UncheckedError(self._environment)
        return self._environment

    @property
    def has_cluster(self) -> bool:
        """Return whether there is a cluster to look at."""
        return not isinstance(self._environment, str)

    @property
    def server(self) -> Server:
        """Return the Prefect API.

        Raises:
            UncheckedError: it cannot be reached.
        """
        if isinstance(self._server, str):
            raise UncheckedError(self._server)
        return self._server

    @property
    def is_local(self) -> bool:
        """Return whether the environment is on one machine, for trying things out."""
        return self.cluster.name == "local"

    async def _once(self, key: Any, read: Callable[[], Coroutine[Any, Any, Found]]) -> Found:
        if key not in self._reads:
            self._reads[key] = asyncio.ensure_future(read())
        # A check that reaches its limit must not cancel what another check waits for.
        found: Found = await asyncio.shield(self._reads[key])
        return found

    async def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace and return its standard output."""
        return await asyncio.to_thread(self.cluster.kubectl, *arguments, text=text)

    async def read_objects(self, kinds: str, *arguments: str) -> list[Object]:
        """Return objects of the namespace; with `--all-namespaces`, or of kinds without a namespace, of the cluster."""

        async def read() -> list[Object]:
            return await asyncio.to_thread(self.cluster.objects, kinds, *arguments)

        return await self._once((kinds, *arguments), read)

    async def read_names(self, kinds: str) -> list[str]:
        """Return the names of all objects of a kind that has no namespace."""
        return [found["metadata"]["name"] for found in await self.read_objects(kinds)]

    async def read_versions(self) -> Object:
        """Return the versions of kubectl and of the cluster."""

        async def read() -> Object:
            found: Object = json.loads(await self.kubectl("version", "--output", "json"))
            return found

        return await self._once("versions", read)

    async def read_revisions(self, release: str) -> list[Object]:
        """Return the revisions of a release, oldest first; none before its install."""

        async def read() -> list[Object]:
            return await asyncio.to_thread(helm_release.revisions, self.cluster, release)

        return await self._once(("revisions", release), read)

    async def is_installed(self) -> bool:
        """Return whether all releases are installed."""
        return all([await self.read_revisions(release) for release in RELEASES])

    async def ensure_installed(self, release: str = SERVER) -> None:
        """Raise UncheckedError before the install of a release."""
        if not await self.read_revisions(release):
            raise UncheckedError(f"{release} is not installed yet")

    async def ensure_runs_moved(self) -> None:
        """Raise UncheckedError between a change of `runs.namespace` in the values and its deploy."""
        installed = (await self.read_values(POOL))["runs"].get("namespace", "")
        if self.cluster.fill_namespace(installed) != self.cluster.runs_namespace:
            raise UncheckedError(
                f"the values put runs into namespace {self.cluster.runs_namespace}, and the installed {POOL} does not. "
                f"Deploy first: make deploy ENV={self.cluster.name}"
            )

    async def read_release(self, release: str) -> list[Object]:
        """Return the objects of a release, hooks without tests included.

        Before its install these are the objects that `make deploy` would install.
        """

        async def read() -> list[Object]:
            if await self.read_revisions(release):
                parts = [
                    await asyncio.to_thread(self.cluster.helm, "get", part, release) for part in ("manifest", "hooks")
                ]
                return parse_objects("\n---\n".join(parts))
            return parse_objects(await asyncio.to_thread(self._render, release))

        return await self._once(("release", release), read)

    def _render(self, release: str) -> str:
        with release_inputs.values_options(self.cluster, release, UNKNOWN_IMAGE) as options:
            return release_inputs.render(self.cluster, release, *options)

    async def read_values(self, release: str) -> Object:
        """Return the values of a release, with the chart's defaults."""

        async def read() -> Object:
            if await self.read_revisions(release):
                command = ("get", "values", release, "--all", "--output", "json")
                found: Object = json.loads(await asyncio.to_thread(self.cluster.helm, *command))
                return found
            values: Object = yaml.safe_load((CHARTS / release / "values.yaml").read_text())
            own = yaml.safe_load((self.cluster.values / f"{release}.yaml").read_text())
            return merge(values, own or {})

        return await self._once(("values", release), read)

    async def read_roles(self, component: str) -> list[Object]:
        """Return a component's Roles in the work pool's chart, whether or not the release creates them."""

        async def read() -> list[Object]:
            texts = (f"image.digest={UNKNOWN_IMAGE.digest}", f"runs.namespace={self.cluster.runs_namespace}")
            warm = (await self.read_values(POOL))["runs"].get("warm", {}).get("replicas", 0)
            options = ("--set-string", ",".join(texts), "--set", f"runs.warm.replicas={warm}")
            return parse_objects(await asyncio.to_thread(release_inputs.render, self.cluster, POOL, *options))

        objects = await self._once("chart", read)
        return [
            found
            for found in objects
            if (found["kind"], found["metadata"]["labels"].get(COMPONENT)) == ("Role", component)
        ]

    async def read_surroundings(self) -> list[Object]:
        """Return the objects of `k8s/` that `make deploy` applies before the releases."""

        async def read() -> list[Object]:
            return parse_objects(await asyncio.to_thread(self._render_surroundings))

        return await self._once("surroundings", read)

    def _render_surroundings(self) -> str:
        with release_inputs.surroundings(self.cluster) as folders:
            return "\n---\n".join(self.cluster.kubectl("kustomize", str(folder)) for folder in folders)

    async def read_component(self, release: str, component: str) -> Object:
        """Return the pod specification of a component.

        Raises:
            UncheckedError: the release has no such component.
        """
        for found in await self.read_release(release):
            labels = found["metadata"].get("labels") or {}
            is_workload = found["kind"] in ("Deployment", "StatefulSet")
            if is_workload and labels.get(COMPONENT) == component:
                spec: Object = found["spec"]["template"]["spec"]
                return spec
        raise UncheckedError(f"{release} has no component {component}")

    async def read_job_template(self) -> Object:
        """Return the base job template of the release's work pool."""
        for found in await self.read_release(POOL):
            if found["kind"] == "ConfigMap" and "pool.yaml" in (found.get("data") or {}):
                [pool] = yaml.safe_load(found["data"]["pool.yaml"])["work_pools"]
                template: Object = pool["base_job_template"]
                return template
        raise UncheckedError(f"{POOL} has no ConfigMap with its work pool")

    async def read_pod_specs(self) -> list[tuple[str, Object]]:
        """Return the pod specifications of all components and of a run, each with its namespace."""
        specs = []
        for release in RELEASES:
            for found in await self.read_release(release):
                job = found["spec"]["jobTemplate"] if found["kind"] == "CronJob" else found
                if found["kind"] in ("Deployment", "StatefulSet", "Job", "CronJob"):
                    specs.append((self.namespace_of(found), job["spec"]["template"]["spec"]))
        template = await self.read_job_template()
        run = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        return [*specs, (self.cluster.runs_namespace, run)]

    def namespace_of(self, found: Object) -> str:
        """Return the namespace of an object in a release or in its surroundings."""
        return str(found["metadata"].get("namespace") or self.cluster.namespace)

    async def read_report(self) -> Object:
        """Return what a pod of the API reports about its database and Redis."""

        async def read() -> Object:
            await self.ensure_installed()
            try:
                output = await self.kubectl("exec", f"deployment/{SERVER}-api", "--container", "api", "--", *REPORT)
            except ClusterError as error:
                if "No module named" in str(error):
                    raise UncheckedError("the server's image is older than this check. Deploy this checkout") from None
                raise
            found: Object = json.loads(output.splitlines()[-1])
            return found

        return await self._once("report", read)

    async def read_time(self) -> str:
        """Return the time of the Kubernetes API server: that at which it answers who we are."""
        return await self.kubectl("auth", "whoami", "--output", "jsonpath={.metadata.creationTimestamp}")


def parse_objects(text: str) -> list[Object]:
    """Return the objects of a manifest, without those of `helm test`."""
    return [
        found
        for found in yaml.load_all(text, yaml.CSafeLoader)
        if found and (found["metadata"].get("annotations") or {}).get("helm.sh/hook") != "test"
    ]


def parse_documents(text: str) -> list[Object]:
    """Return the JSON objects of a text, one after the other, as kubectl prints the objects that it creates."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        document, length = decoder.raw_decode(text)
        found.append(document)
        text = text[length:]
    return found


def merge(values: Object, change: Object) -> Object:
    """Return values with a change merged in, as Helm merges a second values file."""
    result = dict(values)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def containers_of(spec: Object) -> list[Object]:
    """Return the containers and init containers of a pod specification."""
    return [
        container
        for key in ("initContainers", "containers")
        for container in spec.get(key) or []
        if isinstance(container, dict)  # an entry of a job template may be a variable
    ]


def variables_of(spec: Object) -> dict[str, Object]:
    """Return the environment variables of a pod's containers by name."""
    return {
        variable["name"]: variable
        for container in containers_of(spec)
        for variable in container.get("env") or []
        if isinstance(variable, dict)
    }


def version_of(text: str) -> tuple[int, int]:
    """Return the major and minor version in a text such as `v1.35.4`.

    Raises:
        UncheckedError: the text has no version.
    """
    found = re.search(r"(\d+)\.(\d+)", text)
    if not found:
        raise UncheckedError(f"{text.strip()!r} is no version")
    return int(found[1]), int(found[2])
