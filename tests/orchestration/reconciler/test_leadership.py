"""Who acts: an action of several requests is not carried on once another reconciler may act."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest

from orchestration.api import Server
from orchestration.errors import PipelineError
from orchestration.reconciler import cluster, loop
from orchestration.reconciler.decide import Action, Stop
from orchestration.reconciler.facts import Policy
from orchestration.serving import Pulse


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
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now))
    action: Action = Stop("job", None, "nobody wants it")

    async def act() -> None:
        async with httpx.AsyncClient() as client:
            place = cluster.Cluster(client, "namespace")
            lead = cluster.Leadership(place, "lease", "this one")
            tested = loop.Reconciler(Server(client, "http://nowhere/api"), place, "pool", Policy(), lead, Pulse(60))
            lead._until = now + 5
            with pytest.raises(PipelineError, match="Stop took longer than leadership lasts"):
                await tested._act(action, [])
            # The request that was next in the loop's queue when the time was over is made too.
            assert 1005 + 2 * cluster.TIMEOUT <= now <= lead.ends + 1
            requests = asked
            # From here on it does not begin one.
            assert await tested._act(action, []) == ""
            assert requests == asked > 0

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(act())
