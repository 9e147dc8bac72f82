"""What `make restore` reads of the cluster. A cluster that forbids something, or has too many runs, is a fake."""

import gzip
import json
from pathlib import Path
from uuid import uuid4

import pytest

from orchestration.errors import ClusterError
from orchestration.operations import restore
from orchestration.operations.environment import Environment, Object
from orchestration.protocol import MAIN_CONTAINER, POOL_LABEL, RUN_LABEL
from orchestration.recovery import executions

POOL = str(uuid4())


class Cluster(Environment):
    """Has runs in the namespace of runs alone, and forbids what the tests name.

    Args:
        forbidden: what the user must not read.
        objects: Jobs and pods.
    """

    forbidden: tuple[str, ...] = ()
    objects_of_runs: tuple[Object, ...] = ()

    @property
    def runs_namespace(self) -> str:
        return "runs"

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        assert arguments[0] == "get", text
        if forbidden := [word for word in self.forbidden if word in arguments]:
            raise ClusterError(f"Error from server (Forbidden): {forbidden[0]} is forbidden")
        if arguments[1] == "namespace":
            return json.dumps({"metadata": {"uid": "uid"}})
        if arguments[1] == "configmap":
            return json.dumps({"data": {"ca.crt": "certificate"}})
        is_shown = "--all-namespaces" in arguments or arguments[-1] == "runs"
        return json.dumps({"items": self.objects_of_runs if is_shown else []})


def _cluster(forbidden: tuple[str, ...] = (), runs: int = 1) -> Cluster:
    cluster = Cluster("test", "test", "prefect")
    objects = [manifest for number in range(runs) for manifest in _objects(number)]
    for name, value in (("forbidden", forbidden), ("objects_of_runs", tuple(objects))):
        object.__setattr__(cluster, name, value)
    return cluster


def _objects(number: int) -> list[Object]:
    labels = {RUN_LABEL: str(uuid4()), POOL_LABEL: POOL}
    meta = {
        "namespace": "runs", "uid": str(uuid4()), "creationTimestamp": "2026-11-29T12:00:00Z",
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": str(uuid4())},
    }  # fmt: skip
    ended = {"exitCode": 1, "finishedAt": "2026-11-29T12:10:00Z", "message": "".join(str(uuid4()) for _ in range(10))}
    status = {
        "phase": "Failed", "containerStatuses": [{"name": MAIN_CONTAINER, "state": {"terminated": ended}}],
    }  # fmt: skip
    job, pod_labels = f"run-{number}", labels | {"job-name": f"run-{number}"}
    return [
        {"kind": "Job", "metadata": meta | {"name": job, "labels": labels}, "spec": {}, "status": {}},
        {
            "kind": "Pod",
            "metadata": meta | {"name": f"{job}-x", "uid": str(uuid4()), "labels": pod_labels},
            "spec": {"containers": [{"name": MAIN_CONTAINER}]},
            "status": status,
        },
    ]


@pytest.mark.parametrize(
    ("forbidden", "clusters"),
    [
        ((), ["uid", "03d66dd08835c1ca"]),
        (("--all-namespaces",), ["uid", "03d66dd08835c1ca"]),
        (("--all-namespaces", "kube-system"), ["03d66dd08835c1ca"]),
        (("--all-namespaces", "kube-system", "kube-root-ca.crt"), []),
    ],
)
def test_user_of_the_own_namespaces_alone_reads_runs_and_identities(
    tmp_path: Path, forbidden: tuple[str, ...], clusters: list[str]
) -> None:
    file = tmp_path / "executions"
    file.write_bytes(restore._pack_executions(_cluster(forbidden)))
    evidence = executions.read(file, [POOL])
    assert (len(evidence.executions), evidence.clusters) == (1, clusters)


def test_nothing_is_done_if_the_own_namespaces_cannot_be_read() -> None:
    with pytest.raises(ClusterError, match="Forbidden"):
        restore._pack_executions(_cluster(("jobs,pods",)))


def test_thousands_of_runs_fit_and_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = restore._pack_executions(_cluster(runs=1000))
    assert len(packed) < restore.MAX_CONFIG_MAP_BYTES / 8, f"{len(packed)} bytes for 1000 runs"
    assert b"uid" not in gzip.decompress(packed).split(b"objects")[1]
    monkeypatch.setattr(restore, "MAX_CONFIG_MAP_BYTES", 10_000)
    with pytest.raises(ClusterError, match=r"2000 Jobs and pods of runs do not fit into a ConfigMap: .*Wait until"):
        restore._pack_executions(_cluster(runs=1000))
