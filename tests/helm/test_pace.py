"""The shipped pace of the tests on the cluster is that of the charts' values."""

import re
from functools import reduce
from importlib import util

import pytest
import yaml

from orchestration.settings import ROOT
from tests.e2e import pace

VALUES = {
    "PENDING_TIMEOUT_SECONDS": "prefect-work-pool reconciler.pendingTimeoutSeconds",
    "GRACE_SECONDS": "prefect-work-pool runs.terminationGracePeriodSeconds",
    "ROUND_SECONDS": "prefect-work-pool reconciler.everySeconds",
    "HEARTBEAT_SECONDS": "prefect-work-pool worker.heartbeatSeconds",
    "PREFETCH_SECONDS": "prefect-work-pool worker.prefetchSeconds",
    "QUERY_SECONDS": "prefect-work-pool worker.querySeconds",
    "DRIFT_SECONDS": "prefect-work-pool drift.everySeconds",
    "STALL_SECONDS": "prefect-server services.stallSeconds",
}
"""The chart and its value, by constant."""

NO_VALUES = {
    "CAPACITY_TIMEOUT_SECONDS": "the default is a day",
    "SERVER_OUTAGE_SECONDS": "an outage",
    "KUBERNETES_OUTAGE_SECONDS": "an outage",
    "KUBELET_OUTAGE_SECONDS": "an outage",
    "LATE_LOOP_SECONDS": "an interval of Prefect",
}
"""Constants without a value of a chart, with the reason."""


@pytest.mark.parametrize("constant", VALUES)
def test_shipped_pace_is_the_default_of_the_chart(monkeypatch: pytest.MonkeyPatch, constant: str) -> None:
    monkeypatch.setenv("PACE", "shipped")
    spec = util.spec_from_file_location("shipped_pace", pace.__file__)
    assert spec
    assert spec.loader
    shipped = util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    chart, _, path = VALUES[constant].partition(" ")
    values = yaml.safe_load((ROOT / "helm" / chart / "values.yaml").read_text())
    assert getattr(shipped, constant) == reduce(lambda value, key: value[key], path.split("."), values)


def test_each_scaled_constant_is_compared_or_has_no_value() -> None:
    scaled = re.findall(r"^(\w+) = _pick\(", (ROOT / "tests/e2e/pace.py").read_text(), re.MULTILINE)
    assert set(scaled) == VALUES.keys() | NO_VALUES.keys()
