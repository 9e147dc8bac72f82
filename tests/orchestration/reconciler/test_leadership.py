"""Leader election: only the holder of the Lease acts, and only for as long as no other reconciler may."""

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
    """By a clock that only its requests move, a second each."""
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
    action: Action = Stop("job", None, "nobody wants it")

    async def act() -> None:
        async with httpx.AsyncClient() as client:
            place = kubernetes_client.Cluster(client, "namespace")
            lead = leader_election.LeaderElection(place, "lease", "this one")
            tested = loop.Reconciler(Server(client, "http://nowhere/api"), place, "pool", Policy(), lead, Pulse(60))
            lead._until = now + 5
            with pytest.raises(PipelineError, match="Stop took longer than leadership lasts"):
                await tested._act(action, [])
            # The request that was next in the loop's queue when the time was over is made too.
            assert 1005 + 2 * kubernetes_client.TIMEOUT_SECONDS <= now <= lead.deadline + 1
            requests = asked
            # From here on it does not begin one.
            assert await tested._act(action, []) == ""
            assert requests == asked > 0

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(act())


def test_one_of_many_candidates_leads_and_the_next_one_after_release_or_expiry(namespace: Namespace) -> None:
    async def compete(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            place = kubernetes_client.Cluster(client, namespace.name)
            candidates = [leader_election.LeaderElection(place, "lease", str(number)) for number in range(8)]

            async def leaders() -> list[leader_election.LeaderElection]:
                """All try at once; those who lead then."""
                took = await asyncio.gather(*(each.acquire_or_renew() for each in candidates))
                return [each for each, leads in zip(candidates, took, strict=True) if leads]

            # Two read the Lease before either has written it, and the API server refuses one of them.
            [first] = await leaders()
            assert [each for each in candidates if each.is_leader] == [first]
            assert await leaders() == [first]
            await first.release()
            [second] = await leaders()
            candidates.remove(second)  # it dies
            for each in candidates:
                each.duration = 2
            # The others have just seen its renewal.
            assert await leaders() == []
            began = time.monotonic()
            while not (found := await leaders()):
                await asyncio.sleep(0.1)
            assert len(found) == 1
            assert time.monotonic() - began > 1

    with proxied(namespace.context) as url:
        asyncio.run(asyncio.wait_for(compete(url), 60))
