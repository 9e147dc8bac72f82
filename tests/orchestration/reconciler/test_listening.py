"""A pod that ends is heard of at once, on a real cluster."""

import asyncio
from functools import partial

import httpx

from orchestration.operations.local_cluster import images
from orchestration.protocol import RUN_LABEL
from orchestration.reconciler.kubernetes_client import Cluster
from tests.cluster.namespace import RESTRICTED, Namespace, proxied

UNTIL_TOLD = """
import os, time
while not os.path.exists("/tmp/end"):
    time.sleep(0.1)
raise SystemExit(int(open("/tmp/end").read()))
"""


def test_pods_of_runs_are_heard_when_they_end_or_are_deleted_and_others_are_not(namespace: Namespace) -> None:
    for name in ("completes", "fails", "goes"):
        labels = {RUN_LABEL: name}
        namespace.pod(name, "python3", "-c", UNTIL_TOLD, labels=labels, restartPolicy="Never")
    beside = {"name": "zzz", "image": images.BASE, "command": ["sleep", "600"], "securityContext": RESTRICTED}
    main = beside | {"name": "prefect-job", "command": ["python3", "-c", UNTIL_TOLD]}
    namespace.pod("held", labels={RUN_LABEL: "held"}, restartPolicy="Never", containers=[beside, main])
    namespace.pod("other", "python3", "-c", UNTIL_TOLD, restartPolicy="Never")

    def end_main() -> None:
        command = ("sh", "-c", "echo 1 > /tmp/new && mv /tmp/new /tmp/end")
        namespace.kubectl("exec", "held", "-c", "prefect-job", "--", *command)

    def end(pod: str, code: int) -> None:
        namespace.kubectl("exec", pod, "--", "sh", "-c", f"echo {code} > /tmp/new && mv /tmp/new /tmp/end")
        phase = "Failed" if code else "Succeeded"
        namespace.kubectl("wait", f"pod/{pod}", f"--for=jsonpath={{.status.phase}}={phase}", "--timeout=30s")

    async def listen(url: str) -> None:
        heard = asyncio.Event()
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            listening = asyncio.create_task(Cluster(client, namespace.name).watch_pods(heard))
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            await asyncio.to_thread(end, "other", 1)
            await asyncio.sleep(1)
            assert not heard.is_set(), "a pod of no run"
            for happens in (
                partial(end, "completes", 0),
                partial(end, "fails", 1),
                partial(namespace.kubectl, "delete", "pod", "goes", "--force", "--grace-period=0"),
            ):
                await asyncio.to_thread(happens)
                await asyncio.wait_for(heard.wait(), 10)
                heard.clear()
            await asyncio.to_thread(end_main)
            await asyncio.wait_for(heard.wait(), 10)
            listening.cancel()
            await asyncio.wait([listening])

    with proxied(namespace.context) as url:
        asyncio.run(listen(url))


def test_kubernetes_api_that_refuses_to_be_listened_to_says_nothing_of_pods() -> None:
    async def heard_of_a_refusal() -> bool:
        heard, asked = asyncio.Event(), asyncio.Event()

        def refuse(_: httpx.Request) -> httpx.Response:
            asked.set()
            return httpx.Response(429, json={"kind": "Status", "code": 429})

        async with httpx.AsyncClient(base_url="http://kubernetes", transport=httpx.MockTransport(refuse)) as client:
            listening = asyncio.create_task(Cluster(client, "prefect").watch_pods(heard))
            await asked.wait()
            await asyncio.sleep(0.1)
            listening.cancel()
            await asyncio.wait([listening])
        return heard.is_set()

    assert not asyncio.run(heard_of_a_refusal())
