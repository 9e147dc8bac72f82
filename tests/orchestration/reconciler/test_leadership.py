"""Tests of the leader election: only the leader acts, and its last request ends before another leader may act."""

import asyncio
import time
from types import SimpleNamespace

import httpx
import pytest

from orchestration.errors import PipelineError
from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.reconciler import kubernetes_client, leader_election, loop
from orchestration.reconciler.decide import Action, Stop
from orchestration.reconciler.model import Policy
from tests.cluster.namespace import Namespace, proxied


def test_action_ends_with_leadership(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request advances the clock by one second."""
    now = 1000.0
    asked = 0

    class Loop(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return now

    async def carry_out(*_: object) -> str:
        nonlocal now, asked
        while True:
            asked += 1
            now += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(loop, "carry_out", carry_out)
    monkeypatch.setattr(leader_election, "time", SimpleNamespace(monotonic=lambda: now))
    action: Action = Stop("job", None, "its run was deleted")

    async def act() -> None:
        async with httpx.AsyncClient() as client:
            cluster = kubernetes_client.Cluster(client, "namespace")
            lead = leader_election.LeaderElection(cluster, "lease", "this one")
            reconciler = loop.Reconciler(
                Server(client, "http://nowhere/api"), [cluster], "pool", Policy(), lead, Pulse(60)
            )
            lead._until = now + 5
            with pytest.raises(PipelineError, match="Stop took longer than the Lease is valid"):
                await reconciler._act(cluster, action, [])
            # The request that was already in the loop's queue at the deadline is sent too.
            assert 1005 + 2 * kubernetes_client.TIMEOUT_SECONDS <= now <= lead.deadline + 1
            requests = asked
            # After that no request begins.
            assert await reconciler._act(cluster, action, []) == ""
            assert requests == asked > 0

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(act())


def test_one_candidate_leads_and_another_after_release_or_expiry(namespace: Namespace) -> None:
    async def compete(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            cluster = kubernetes_client.Cluster(client, namespace.name)
            candidates = [leader_election.LeaderElection(cluster, "lease", str(number)) for number in range(8)]

            async def leaders() -> list[leader_election.LeaderElection]:
                """Let all candidates try at once, and return the leaders."""
                took = await asyncio.gather(*(candidate.acquire_or_renew() for candidate in candidates))
                return [candidate for candidate, leads in zip(candidates, took, strict=True) if leads]

            # Several candidates read the Lease before one has written it. The API server accepts one write.
            [first] = await leaders()
            assert [candidate for candidate in candidates if candidate.is_leader] == [first]
            assert await leaders() == [first]
            await first.release()
            [second] = await leaders()
            candidates.remove(second)  # the leader dies
            for candidate in candidates:
                candidate.duration = 10
            # The other candidates have just seen the renewal of the Lease.
            assert await leaders() == []
            began = time.monotonic()
            while not (found := await leaders()):
                await asyncio.sleep(0.5)
            assert len(found) == 1
            assert time.monotonic() - began > 1

    with proxied(namespace.context) as url:
        asyncio.run(asyncio.wait_for(compete(url), 300))
