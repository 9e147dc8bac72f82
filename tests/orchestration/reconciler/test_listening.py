"""Tests of the watch on pods, on a real cluster."""

import asyncio
from functools import partial

import httpx

from orchestration.operations.local_cluster import images
from orchestration.protocol import RUN_LABEL
from orchestration.reconciler.kubernetes_client import Cluster
from tests.cluster.namespace import RESTRICTED, Namespace, proxied

UNTIL_END_FILE = """
import os, time
while not os.path.exists("/tmp/end"):
    time.sleep(0.1)
raise SystemExit(int(open("/tmp/end").read()))
"""


def test_watch_reports_pods_of_runs_that_end_or_are_deleted(namespace: Namespace) -> None:
    for name in ("completes", "fails", "goes"):
        labels = {RUN_LABEL: name}
        namespace.pod(name, "python3", "-c", UNTIL_END_FILE, labels=labels, restartPolicy="Never")
    sidecar = {"name": "zzz", "image": images.BASE, "command": ["sleep", "600"], "securityContext": RESTRICTED}
    main = sidecar | {"name": "prefect-job", "command": ["python3", "-c", UNTIL_END_FILE]}
    namespace.pod("held", labels={RUN_LABEL: "held"}, restartPolicy="Never", containers=[sidecar, main])
    namespace.pod("other", "python3", "-c", UNTIL_END_FILE, restartPolicy="Never")

    def end_main() -> None:
        command = ("sh", "-c", "echo 1 > /tmp/new && mv /tmp/new /tmp/end")
        namespace.kubectl("exec", "held", "-c", "prefect-job", "--", *command)

    def end(pod: str, code: int) -> None:
        namespace.kubectl("exec", pod, "--", "sh", "-c", f"echo {code} > /tmp/new && mv /tmp/new /tmp/end")
        phase = "Failed" if code else "Succeeded"
        namespace.kubectl("wait", f"pod/{pod}", f"--for=jsonpath={{.status.phase}}={phase}", "--timeout=300s")

    async def watch(url: str) -> None:
        pod_ended = asyncio.Event()
        watches: list[httpx.Request] = []

        async def note(request: httpx.Request) -> None:
            watches.append(request)

        async with httpx.AsyncClient(base_url=url, timeout=30, event_hooks={"request": [note]}) as client:
            watching = asyncio.create_task(Cluster(client, namespace.name).watch_pods(pod_ended))
            await asyncio.wait_for(pod_ended.wait(), 180)
            pod_ended.clear()
            await asyncio.to_thread(end, "other", 1)
            await asyncio.sleep(1)
            # A watch that was cut off, as on a busy machine, sets the event when it starts again.
            assert not pod_ended.is_set() or len(watches) > 1, "a pod of no run"
            pod_ended.clear()
            for end_pod in (
                partial(end, "completes", 0),
                partial(end, "fails", 1),
                partial(namespace.kubectl, "delete", "pod", "goes", "--force", "--grace-period=0"),
            ):
                await asyncio.to_thread(end_pod)
                await asyncio.wait_for(pod_ended.wait(), 180)
                pod_ended.clear()
            await asyncio.to_thread(end_main)
            await asyncio.wait_for(pod_ended.wait(), 180)
            watching.cancel()
            await asyncio.wait([watching])

    with proxied(namespace.context) as url:
        asyncio.run(watch(url))


def test_refused_watch_reports_no_pod() -> None:
    async def reports_refusal() -> bool:
        pod_ended, asked = asyncio.Event(), asyncio.Event()

        def refuse(_: httpx.Request) -> httpx.Response:
            asked.set()
            return httpx.Response(429, json={"kind": "Status", "code": 429})

        async with httpx.AsyncClient(base_url="http://kubernetes", transport=httpx.MockTransport(refuse)) as client:
            watching = asyncio.create_task(Cluster(client, "prefect").watch_pods(pod_ended))
            await asked.wait()
            await asyncio.sleep(0.1)
            watching.cancel()
            await asyncio.wait([watching])
        return pod_ended.is_set()

    assert not asyncio.run(reports_refusal())
