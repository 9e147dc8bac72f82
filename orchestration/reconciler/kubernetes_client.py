"""A client of the Kubernetes API for the Jobs, pods, events and logs of one namespace.

It sends plain requests. A client library's models of a thousand pods take more time and memory than all the rest of a
round.
"""

import asyncio
import hashlib
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from orchestration.errors import ClusterError, ClusterRefusalError
from orchestration.prefect_api import clock_offset
from orchestration.protocol import POOL_LABEL, RUN_LABEL
from orchestration.reconciler.kubernetes_objects import (
    Change,
    EventObject,
    JobObject,
    LeanPodObject,
    Listed,
    Page,
    PodObject,
)
from orchestration.reconciler.model import Job, Pod, is_run_id

logger = logging.getLogger(__name__)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The folder with the token and the certificate authority of the pod's service account."""

TIMEOUT_SECONDS = 5.0
"""The timeout of a request."""

WATCH_SECONDS = 120
"""How long one watch lasts. Its connection may be dead, so the watch is then started again."""

PAGE = 500
"""How many objects of a list one request returns at most."""

STUCK_EVENT_REASONS = ("FailedCreatePodSandBox", "FailedAttachVolume", "FailedMount")
"""The reasons of events of pods whose containers cannot be created, the most specific last."""

STUCK_EVENT_AGE = timedelta(minutes=4)
"""The maximum age of such an event. While the cause lasts, the kubelet repeats the event every two minutes."""

Object = dict[str, Any]


def certificate_hash() -> str:
    """Return the hash of the certificate authority, the identity of a cluster in older versions; empty outside a pod.

    The hash changes with the authority. So it is the identity only if the namespace kube-system is not readable.
    """
    try:
        return hash_certificate((ACCOUNT / "ca.crt").read_bytes())
    except OSError:
        return ""


def hash_certificate(authority: bytes) -> str:
    """Return the hash of a certificate authority, as labels of runs have it."""
    return hashlib.sha256(authority).hexdigest()[:16]


def _authorization() -> dict[str, str]:
    token = ACCOUNT / "token"
    # The kubelet renews the token every hour.
    return {"Authorization": f"Bearer {token.read_text()}"} if token.exists() else {}


class Cluster:
    """A namespace of a Kubernetes cluster. `connected` creates it.

    Args:
        client: the HTTP client of the Kubernetes API.
        namespace: the name of the namespace.
    """

    def __init__(self, client: httpx.AsyncClient, namespace: str) -> None:
        self.client = client
        self.namespace = namespace
        self._identity: str | None = None
        self.ahead = timedelta()
        """By how much the clock of the Kubernetes API is ahead of the local clock."""

    def in_namespace(self, namespace: str) -> "Cluster":
        """Return another namespace of the same cluster."""
        return Cluster(self.client, namespace)

    async def identity(self) -> str:
        """Return the identity of the cluster: the UID of its namespace kube-system, which never changes.

        Without permission to read that namespace, return the hash of the certificate authority.

        Raises:
            ClusterError: the API does not answer.
        """
        if self._identity is None:
            found = await self.ask("GET", "/api/v1/namespaces/kube-system", absent=(403, 404))
            if found is None:
                logger.warning("Reading the namespace kube-system is not allowed. The cluster's CA is its identity.")
            self._identity = str(found["metadata"]["uid"]) if found else certificate_hash()
        return self._identity

    async def identities(self) -> frozenset[str]:
        """Return all identities with which workers of this cluster, older versions included, may have labelled runs.

        Raises:
            ClusterError: the API does not answer.
        """
        return frozenset({await self.identity(), certificate_hash()})

    async def ask(
        self, method: str, path: str, body: Any = None, *, query: Object | None = None, absent: Sequence[int] = ()
    ) -> Any:
        """Send a request, and return the JSON or text of the answer; None for a status in `absent`.

        Args:
            method: the HTTP method.
            path: the path and, without `query`, the query.
            body: the body, for JSON.
            query: the query parameters.
            absent: the statuses that mean that the object does not exist.

        Raises:
            ClusterRefusalError: the API refuses the request.
            ClusterError: the API does not answer.
        """
        response = await self._answer(method, path, body, query, absent)
        if response is None:
            return None
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else response.text

    async def _answer(
        self, method: str, path: str, body: Any, query: Object | None, absent: Sequence[int]
    ) -> httpx.Response | None:
        headers = _authorization()
        if method == "PATCH":
            headers["Content-Type"] = "application/merge-patch+json"
        try:
            response = await self.client.request(method, path, json=body, params=query, headers=headers)
        except httpx.TransportError as error:
            raise ClusterError(f"The Kubernetes API does not answer: {error or type(error).__name__}") from None
        self.ahead = clock_offset(response)
        if response.status_code in absent:
            return None
        if response.status_code >= 300:
            message = response.text[:300]
            with suppress(ValueError):
                message = response.json().get("message", message)
            kind = ClusterRefusalError if response.status_code < 500 else ClusterError
            raise kind(f"The Kubernetes API answers {response.status_code} to {method} {path}: {message}")
        return response

    async def _list(self, kind: type[Page[Listed]], path: str, **query: Any) -> AsyncIterator[Listed]:
        """Yield all objects of a list. Each request reads one page.

        Raises:
            ClusterError: the API does not answer, refuses the request, or answers with other JSON.
        """
        continue_token = ""
        while True:
            response = await self._answer("GET", path, None, query | {"limit": PAGE, "continue": continue_token}, ())
            assert response
            try:
                page = kind.model_validate_json(response.content)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise ClusterError(
                    f"The Kubernetes API's answer to {path} is not valid: {where} {first['msg']}"
                ) from None
            for item in page.items:
                yield item
            continue_token = page.metadata.continue_token
            if not continue_token:
                return

    async def list_jobs(self, pool: str, clock_ahead: timedelta) -> list[Job]:
        """Return the Jobs of a work pool's runs. Jobs of other pools and servers may be in the same namespace.

        Args:
            pool: the id of the work pool.
            clock_ahead: by how much the clock of the returned times is ahead of the local clock.
        """
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        found = self._list(Page[JobObject], path, labelSelector=f"{RUN_LABEL},{POOL_LABEL}={pool}")
        jobs = [Job.read(raw, clock_ahead - self.ahead) async for raw in found]
        return [job for job in jobs if is_run_id(job.run)]

    async def has_unfinished_job(self, run: str) -> bool:
        """Return whether a run has a Job now that is not finished."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        found = self._list(Page[JobObject], path, labelSelector=f"{RUN_LABEL}={run}")
        return not all([Job.read(raw).is_finished async for raw in found])

    async def list_pods(self, pool: str, clock_ahead: timedelta) -> list[Pod]:
        """Return the pods of a work pool's runs.

        Args:
            pool: the id of the work pool.
            clock_ahead: by how much the clock of the returned times is ahead of the local clock.
        """
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        selector = f"{RUN_LABEL},{POOL_LABEL}={pool}"
        lean = [raw async for raw in self._list(Page[LeanPodObject], path, labelSelector=selector)]
        if all(raw.has_usual_main_container for raw in lean):
            pods = [Pod.read(raw, clock_ahead - self.ahead) for raw in lean]
        else:
            whole = self._list(Page[PodObject], path, labelSelector=selector)
            pods = [Pod.read(raw, clock_ahead - self.ahead) async for raw in whole]
        return [pod for pod in pods if is_run_id(pod.run)]

    async def watch_pods(self, pod_ended: asyncio.Event) -> None:
        """Set an event when a run's main container has ended or its pod is gone, and whenever the watch starts.

        The rounds poll anyway, and the watch only starts a round early. So a watch that fails is no error.

        Args:
            pod_ended: the event to set.
        """
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        while True:
            with suppress(ValueError):
                # A watch reports a pod that no longer matches its selectors as deleted, in its earlier state.
                async with aclosing(self._watch(path, fieldSelector="status.phase=Running")) as lines:
                    async for line in lines:
                        if not line or _has_pod_ended(Change.model_validate_json(line)):
                            pod_ended.set()  # also at the begin: pods may have ended before
            await asyncio.sleep(1)

    async def watch_jobs(self, job_changed: asyncio.Event) -> None:
        """Set an event when a run's Job is created, changed or deleted, and again and again while the watch fails.

        Args:
            job_changed: the event to set.
        """
        while True:
            async with aclosing(self._watch(f"/apis/batch/v1/namespaces/{self.namespace}/jobs")) as lines:
                async for _ in lines:
                    job_changed.set()
            job_changed.set()
            await asyncio.sleep(1)

    async def _watch(self, path: str, **query: str) -> AsyncGenerator[str, None]:
        """Yield the lines of one watch on objects of runs; first an empty line, once the watch has begun."""
        parameters: dict[str, str | int] = {
            "watch": 1,
            "timeoutSeconds": WATCH_SECONDS,
            "labelSelector": RUN_LABEL,
            # Begin with what the API has cached. With etcd 3.4 the API cannot bring a cache up to date in which nothing
            # changes, and ends the watch after 3 s.
            "resourceVersion": "0",
            **query,
        }
        timeout = httpx.Timeout(TIMEOUT_SECONDS, read=WATCH_SECONDS + TIMEOUT_SECONDS)
        with suppress(httpx.TransportError):
            async with self.client.stream(
                "GET", path, params=parameters, headers=_authorization(), timeout=timeout
            ) as response:
                if response.is_success:
                    yield ""
                async for line in response.aiter_lines():
                    yield line

    async def read_refusal(self, job: str) -> str:
        """Return why the API refuses the pod of a Job, from the Job's newest event; empty without such an event."""
        selector = f"involvedObject.kind=Job,involvedObject.name={job},reason=FailedCreate"
        events = self._list(Page[EventObject], f"/api/v1/namespaces/{self.namespace}/events", fieldSelector=selector)
        found = [event async for event in events]
        found.sort(key=lambda event: event.last_timestamp or event.metadata.creation_timestamp)
        return found[-1].message if found else ""

    async def read_stuck_pods(self) -> dict[str, tuple[str, str]]:
        """Return why scheduled pods do not start: reason and message of a recent event, by the pod's name."""
        found: dict[str, tuple[str, str]] = {}
        for reason in STUCK_EVENT_REASONS:
            selector = f"involvedObject.kind=Pod,reason={reason}"
            path = f"/api/v1/namespaces/{self.namespace}/events"
            async for event in self._list(Page[EventObject], path, fieldSelector=selector):
                last = event.last_timestamp or event.metadata.creation_timestamp
                if datetime.now(UTC) + self.ahead - last < STUCK_EVENT_AGE:
                    found[event.involved_object.name] = (event.reason, event.message)
        return found

    async def read_log_tail(self, pod: Pod, lines: int) -> str:
        """Return the last lines of the log of a pod's main container; empty if the log is gone."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod.name}/log"
        query = {"tailLines": lines, "container": pod.container}
        found = await self.ask("GET", path, query=query, absent=(400, 404))
        return str(found or "").strip()

    async def annotate(self, job: str, annotations: dict[str, str]) -> None:
        """Annotate a Job, if it still exists."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job}"
        await self.ask("PATCH", path, {"metadata": {"annotations": annotations}}, absent=(404,))

    async def delete_job(self, job: str, grace: int | None) -> None:
        """Delete a Job and its pods.

        Args:
            job: the name of the Job.
            grace: seconds between SIGTERM and SIGKILL; None for the grace period of the pods.
        """
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job}"
        await self.ask("DELETE", path, {"propagationPolicy": "Background"}, absent=(404,))
        if grace is not None:
            path = f"/api/v1/namespaces/{self.namespace}/pods"
            await self.ask("DELETE", path, {"gracePeriodSeconds": grace}, query={"labelSelector": f"job-name={job}"})


def _has_pod_ended(change: Change) -> bool:
    """Return whether a running pod is gone or has ended, or its main container has, while a sidecar is alive."""
    is_modified = change.type == "MODIFIED"
    return change.type == "DELETED" or (is_modified and Pod.read(change.object).has_live_sidecar)


@asynccontextmanager
async def connected(namespace: str, url: str = "") -> AsyncIterator[Cluster]:
    """Yield a client of this pod's cluster, or of the cluster behind a URL.

    Args:
        namespace: the namespace with the Jobs and pods.
        url: the URL of an API that needs no credentials, such as `kubectl proxy`; empty for this pod's cluster.

    Raises:
        ClusterError: without a URL, this process is not in a pod with a token.
    """
    verify: Any = True
    if not url:
        host = os.environ.get("KUBERNETES_SERVICE_HOST")
        if not host or not (ACCOUNT / "token").exists():
            raise ClusterError(
                "This process is not in a pod with a service account token. Run it in such a pod, or name a "
                "`kubectl proxy`: --kubernetes http://127.0.0.1:8001"
            )
        host = f"[{host}]" if ":" in host else host
        url = f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        verify = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    async with httpx.AsyncClient(base_url=url, verify=verify, timeout=TIMEOUT_SECONDS) as client:
        yield Cluster(client, namespace)
