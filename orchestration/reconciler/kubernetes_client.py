"""The Kubernetes API, as the reconciler needs it: one namespace's Jobs, pods, events and logs.

Plain requests: a client's models of a thousand pods take longer and more memory than all the rest of a round.
"""

import asyncio
import hashlib
import logging
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from orchestration.errors import ClusterError
from orchestration.prefect_api import ahead
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

TIMEOUT = 5.0
"""Seconds for a request."""

LISTEN = 120
"""Seconds after which what is listened to is asked for anew: whatever it was, a connection may be dead."""

PAGE = 500

STUCK = ("FailedCreatePodSandBox", "FailedAttachVolume", "FailedMount")
"""Reasons of events of pods that wait for their containers to be created, the more telling one last."""

REPEATED = timedelta(minutes=4)
"""How old such an event is at most, where the cause lasts: the kubelet says it every two minutes."""

Object = dict[str, Any]


def certificate_hash() -> str:
    """Return the hash of this pod's certificate authority, by which older versions told clusters apart; empty outside.

    It changes when the authority does, so it is the identity only where the UID may not be read.
    """
    try:
        return hashlib.sha256((ACCOUNT / "ca.crt").read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _authorization() -> dict[str, str]:
    token = ACCOUNT / "token"
    # It changes every hour.
    return {"Authorization": f"Bearer {token.read_text()}"} if token.exists() else {}


class Cluster:
    """A namespace; made by `connected`."""

    def __init__(self, client: httpx.AsyncClient, namespace: str) -> None:
        self.client = client
        self.namespace = namespace
        self._identity: str | None = None
        self.ahead = timedelta()
        """By how much the clock of the Kubernetes API is ahead of this one."""

    async def identity(self) -> str:
        """Return what tells this cluster from others: the UID of its namespace kube-system, which never changes.

        Without the right to read that namespace it is the hash of the certificate authority.

        Raises:
            ClusterError: the API does not answer.
        """
        if self._identity is None:
            found = await self.ask("GET", "/api/v1/namespaces/kube-system", absent=(403, 404))
            if found is None:
                logger.warning("The namespace kube-system may not be read: the cluster's CA is its identity.")
            self._identity = str(found["metadata"]["uid"]) if found else certificate_hash()
        return self._identity

    async def identities(self) -> frozenset[str]:
        """Return all by which a worker of this cluster may have marked its runs, be it of an older version.

        Raises:
            ClusterError: the API does not answer.
        """
        return frozenset({await self.identity(), certificate_hash()})

    async def ask(
        self, method: str, path: str, body: Any = None, *, query: Object | None = None, absent: Sequence[int] = ()
    ) -> Any:
        """One request; the answer's JSON, None for the statuses of `absent`.

        Raises:
            ClusterError: it does not answer, or refuses. Never read as absence.
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
        self.ahead = ahead(response)
        if response.status_code in absent:
            return None
        if response.status_code >= 300:
            said = response.text[:300]
            with suppress(ValueError):
                said = response.json().get("message", said)
            raise ClusterError(f"The Kubernetes API answers {response.status_code} to {method} {path}: {said}")
        return response

    async def _all(self, kind: type[Page[Listed]], path: str, **query: Any) -> AsyncIterator[Listed]:
        """All objects of a list, a page of them at a time."""
        more = ""
        while True:
            response = await self._answer("GET", path, None, query | {"limit": PAGE, "continue": more}, ())
            assert response
            try:
                page = kind.model_validate_json(response.content)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"]))
                raise ClusterError(f"The Kubernetes API's answer to {path} is none: {where} {first['msg']}") from None
            for each in page.items:
                yield each
            more = page.metadata.more
            if not more:
                return

    async def jobs(self, pool: str, clock: timedelta) -> list[Job]:
        """The Jobs of a work pool's runs, by its id: other pools and other servers may have theirs beside them.

        Args:
            pool: its id.
            clock: by how much the clock on which their times are to be is ahead of this one.
        """
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        found = self._all(Page[JobObject], path, labelSelector=f"{RUN_LABEL},{POOL_LABEL}={pool}")
        jobs = [Job.read(each, clock - self.ahead) async for each in found]
        return [each for each in jobs if is_run_id(each.run)]

    async def has_job(self, run: str) -> bool:
        """Return whether a run has a Job now that is not over."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        found = self._all(Page[JobObject], path, labelSelector=f"{RUN_LABEL}={run}")
        return not all([Job.read(each).over async for each in found])

    async def pods(self, pool: str, clock: timedelta) -> list[Pod]:
        """The pods of a work pool's runs; as `jobs`."""
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        selector = f"{RUN_LABEL},{POOL_LABEL}={pool}"
        lean = [each async for each in self._all(Page[LeanPodObject], path, labelSelector=selector)]
        if all(each.is_named for each in lean):
            pods = [Pod.read(each, clock - self.ahead) for each in lean]
        else:
            whole = self._all(Page[PodObject], path, labelSelector=selector)
            pods = [Pod.read(each, clock - self.ahead) async for each in whole]
        return [each for each in pods if is_run_id(each.run)]

    async def listen(self, heard: asyncio.Event) -> None:
        """Set `heard` as soon as a run's main container has ended or its pod is gone, and when it begins to listen.

        It hastens who looks every few seconds anyway, so what cannot be heard is no error.
        """
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        # Of what leaves its selection a watch says that it was deleted, and how it was before: not how it ended.
        query: dict[str, str | int] = {
            "watch": 1,
            "timeoutSeconds": LISTEN,
            "labelSelector": RUN_LABEL,
            "fieldSelector": "status.phase=Running",
        }
        patience = httpx.Timeout(TIMEOUT, read=LISTEN + TIMEOUT)
        while True:
            with suppress(httpx.TransportError, ValueError):
                async with self.client.stream(
                    "GET", path, params=query, headers=_authorization(), timeout=patience
                ) as response:
                    if response.is_success:
                        heard.set()  # what was before nobody has heard
                    async for line in response.aiter_lines():
                        change = Change.model_validate_json(line)
                        if change.type == "DELETED" or (change.type == "MODIFIED" and Pod.read(change.object).lingers):
                            heard.set()
            await asyncio.sleep(1)

    async def refused(self, job: str) -> str:
        """Why a Job cannot make its pod, of its newest event; empty if nothing is said."""
        selector = f"involvedObject.kind=Job,involvedObject.name={job},reason=FailedCreate"
        events = self._all(Page[EventObject], f"/api/v1/namespaces/{self.namespace}/events", fieldSelector=selector)
        found = [each async for each in events]
        found.sort(key=lambda each: each.last_timestamp or each.metadata.creation_timestamp)
        return found[-1].message if found else ""

    async def stuck(self) -> dict[str, tuple[str, str]]:
        """Why pods that have a node do not start, by name: words and messages of events that are repeated now."""
        found: dict[str, tuple[str, str]] = {}
        for reason in STUCK:
            selector = f"involvedObject.kind=Pod,reason={reason}"
            path = f"/api/v1/namespaces/{self.namespace}/events"
            async for each in self._all(Page[EventObject], path, fieldSelector=selector):
                last = each.last_timestamp or each.metadata.creation_timestamp
                if datetime.now(UTC) + self.ahead - last < REPEATED:
                    found[each.involved_object.name] = (each.reason, each.message)
        return found

    async def last_lines(self, pod: Pod, lines: int = 5) -> str:
        """The end of the log of a pod's main container; empty if there is none any more."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod.name}/log"
        query = {"tailLines": lines, "container": pod.container}
        found = await self.ask("GET", path, query=query, absent=(400, 404))
        return str(found or "").strip()

    async def annotate(self, job: str, annotations: dict[str, str]) -> None:
        """Give a Job these annotations; one that is gone needs none."""
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job}"
        await self.ask("PATCH", path, {"metadata": {"annotations": annotations}}, absent=(404,))

    async def stop(self, job: str, grace: int | None) -> None:
        """Delete a Job and its pods.

        Args:
            job: its name.
            grace: seconds between SIGTERM and SIGKILL; None is what the pods say.
        """
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs/{job}"
        await self.ask("DELETE", path, {"propagationPolicy": "Background"}, absent=(404,))
        if grace is not None:
            path = f"/api/v1/namespaces/{self.namespace}/pods"
            await self.ask("DELETE", path, {"gracePeriodSeconds": grace}, query={"labelSelector": f"job-name={job}"})


@asynccontextmanager
async def connected(namespace: str, url: str = "") -> AsyncIterator[Cluster]:
    """The cluster that this pod is in.

    Args:
        namespace: whose Jobs and pods.
        url: of another API, one that asks for no credentials: that of `kubectl proxy`.

    Raises:
        ClusterError: this is no pod with a token.
    """
    verify: Any = True
    if not url:
        host = os.environ.get("KUBERNETES_SERVICE_HOST")
        if not host or not (ACCOUNT / "token").exists():
            raise ClusterError(
                "This is no pod with a token of Kubernetes. Run it in one, or name a `kubectl proxy`: "
                "--kubernetes http://127.0.0.1:8001"
            )
        host = f"[{host}]" if ":" in host else host
        url = f"https://{host}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
        verify = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    async with httpx.AsyncClient(base_url=url, verify=verify, timeout=TIMEOUT) as client:
        yield Cluster(client, namespace)
