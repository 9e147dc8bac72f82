"""The dry run of the sync has the arguments of the release's Job, and the files of the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestration.operations import sync_dry_run
from orchestration.operations.environment import POOL, Environment
from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT
from tests.helm.rendering import Object
from tests.helm.test_prefect_work_pool import TAG


def _rendered(folder: Path, **values: Object) -> sync_dry_run.Sync:
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(TAG | values))
    return sync_dry_run.parse_sync(
        binaries.helm("template", "test", str(ROOT / "helm" / POOL), "-n", "prefect", "-f", str(file))
    )


@pytest.mark.parametrize(
    ("values", "owner", "options", "files"),
    [
        ({}, "default of test in prefect", ("--adopt", "--prune"), ("prefect.yaml",)),
        ({"owner": "me", "adopt": False, "files": []}, "me", ("--prune",), ()),
        ({"adopt": False, "prune": False}, "default of test in prefect", (), ("prefect.yaml",)),
    ],
)
def test_sync_has_the_arguments_of_the_job(
    tmp_path: Path, values: Object, owner: str, options: tuple[str, ...], files: tuple[str, ...]
) -> None:
    found = _rendered(tmp_path, sync=values)
    assert (found.owner, found.options, found.files) == (owner, options, files)
    assert yaml.safe_load(found.pool)["work_pools"][0]["name"] == "default"


def test_sync_of_a_pool_with_warm_pods_is_rendered_without_its_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm pods need admission policies, and `helm template` does not know whether the cluster has them."""
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(TAG | {"runs": {"warm": {"replicas": 1}}}))
    monkeypatch.setenv("PATH", ":".join([*map(str, binaries.folders()), os.environ["PATH"]]))
    found = sync_dry_run.render_sync(Environment("local", "absent", "prefect"), ["--values", str(file)])
    assert found.owner.startswith("default of ")


def test_sync_separates_files_of_the_checkout_from_files_of_volumes(tmp_path: Path) -> None:
    found = _rendered(tmp_path, sync={"files": ["prefect.yaml", "/app/more.yaml", "/teams/one.yaml"]})
    assert found.volume_files == ["/teams/one.yaml"]
    with found.checkout_files() as files:
        assert files[:-1] == ["prefect.yaml", "more.yaml"]
        assert Path(files[-1]).read_text() == found.pool


@pytest.mark.parametrize(
    "environment",
    [
        "production",
        *(
            pytest.param(folder.name, marks=pytest.mark.further)
            for folder in sorted((ROOT / "helm" / "environments").iterdir())
            if folder.name != "production" and (folder / f"{POOL}.yaml").exists()
        ),
    ],
)
def test_pool_and_deployments_of_each_environment_pass_the_check(tmp_path: Path, environment: str) -> None:
    values = ROOT / "helm" / "environments" / environment / f"{POOL}.yaml"
    found = _rendered(tmp_path, **yaml.safe_load(values.read_text()))
    with found.checkout_files() as files:
        done = subprocess.run(
            [sys.executable, "-m", "orchestration", "check", *files, "--owner", found.owner],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
