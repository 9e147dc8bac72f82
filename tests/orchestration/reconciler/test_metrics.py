"""Tests that the reconciler's `/metrics` and the reference page agree."""

import asyncio
import re
from urllib.request import urlopen

import httpx

from orchestration.health import Pulse, served
from orchestration.prefect_api import Server
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from orchestration.settings import ROOT
from tests.parts import free_port


def test_metrics_endpoint_exposes_documented_metrics() -> None:
    pulse, port = Pulse(60), free_port()

    async def exposed() -> str:
        async with httpx.AsyncClient() as client:
            Reconciler(Server(client, "http://nowhere/api"), [Cluster(client, "ns")], "pool", Policy(), None, pulse)
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return str(answer.read().decode())

    with served(pulse, port):
        text = asyncio.run(exposed())
    names = {name for name in re.findall(r"^# TYPE (\w+)", text, flags=re.M) if not name.endswith("_created")}
    assert names == set(re.findall(r"`(reconciler_\w+)", (ROOT / "docs/reference/metrics.md").read_text()))
