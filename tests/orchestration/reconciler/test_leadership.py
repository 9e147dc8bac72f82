"""Who acts: an action of several requests is not carried on once another reconciler may act."""

import asyncio
import time

import httpx
import pytest

from orchestration.api import Server
from orchestration.errors import PipelineError
from orchestration.reconciler import cluster, loop
from orchestration.reconciler.decide import Action, Stop
from orchestration.reconciler.facts import Policy
from orchestration.serving import Pulse


def test_an_action_ends_with_leadership(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "TIMEOUT", 0.1)
    asked = 0

    async def carry_out(*_: object) -> str:
        nonlocal asked
        while True:
            asked += 1
            await asyncio.sleep(0.02)

    monkeypatch.setattr(loop, "carry_out", carry_out)
    action: Action = Stop("job", None, "nobody wants it")

    async def act() -> int:
        async with httpx.AsyncClient() as client:
            place = cluster.Cluster(client, "namespace")
            lead = cluster.Leadership(place, "lease", "this one")
            tested = loop.Reconciler(Server(client, "http://nowhere/api"), place, "pool", Policy(), lead, Pulse(60))
            lead._until = time.monotonic() + 0.5
            assert lead.held
            with pytest.raises(PipelineError, match="Stop took longer than leadership lasts"):
                await tested._act(action, [])
            assert time.monotonic() >= lead.ends
            requests = asked
            # From here on it does not begin one.
            assert await tested._act(action, []) == ""
            return requests

    assert 0 < asyncio.run(act()) == asked
