"""The installation that the tests of the checks share."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from orchestration.operations.local_cluster import binaries
from tests.cluster import apiserver
from tests.orchestration.operations.doctor.patient import Patient, furnish, install


@pytest.fixture(scope="session")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patient]:
    """Install both charts on a Kubernetes API server of its own, and yield them."""
    folder = tmp_path_factory.mktemp("kubernetes")
    binaries.kube()
    binaries.program("helm")
    path = os.pathsep.join([*map(str, binaries.folders()), os.environ["PATH"]])
    with (
        apiserver.alone(folder, authorization="RBAC") as api,
        patch.dict(os.environ, PATH=path, KUBECONFIG=str(Path(folder) / "kubeconfig")),
    ):
        furnish(api)
        yield Patient(api, install(api, folder))
