"""A pod that dies is heard of at once, on a real cluster."""

import asyncio

import httpx

from orchestration.reconciler.cluster import Cluster
from orchestration.reconciler.facts import RUN_LABEL
from tests.cluster.namespace import Namespace, proxied

UNTIL_TOLD = """
import os, time
while not os.path.exists("/tmp/end"):
    time.sleep(0.1)
raise SystemExit(int(open("/tmp/end").read()))
"""


class Counted(asyncio.Event):
    """How often it was set."""

    times = 0

    def set(self) -> None:
        self.times += 1
        super().set()


def test_pods_that_fail_or_are_deleted_are_heard_and_those_that_complete_are_not(namespace: Namespace) -> None:
    for name in ("completes", "fails", "goes"):
        labels = {RUN_LABEL: name}
        namespace.pod(name, "python3", "-c", UNTIL_TOLD, labels=labels, restartPolicy="Never")
    namespace.pod("other", "python3", "-c", UNTIL_TOLD, restartPolicy="Never")

    def end(pod: str, code: int) -> None:
        namespace.kubectl("exec", pod, "--", "sh", "-c", f"echo {code} > /tmp/new && mv /tmp/new /tmp/end")
        namespace.kubectl("wait", f"pod/{pod}", "--for=condition=Ready=false", "--timeout=30s")

    async def listen(url: str) -> int:
        heard = Counted()
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            listening = asyncio.create_task(Cluster(client, namespace.name).listen(heard))
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            await asyncio.to_thread(end, "completes", 0)
            await asyncio.to_thread(end, "other", 1)
            await asyncio.to_thread(end, "fails", 1)
            await asyncio.wait_for(heard.wait(), 10)
            heard.clear()
            await asyncio.to_thread(namespace.kubectl, "delete", "pod", "goes", "--force", "--grace-period=0")
            await asyncio.wait_for(heard.wait(), 10)
            listening.cancel()
            await asyncio.wait([listening])
        return heard.times

    with proxied(namespace.context) as url:
        assert asyncio.run(listen(url)) == 3, "that it listens, and what fails and goes"
