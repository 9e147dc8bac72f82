"""The worker's trusted base job template, and the check of job variables against it."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_KEY,
    PREFECT_CLIENT_CUSTOM_HEADERS,
    PREFECT_LOGGING_LEVEL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Scheduled
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration, KubernetesWorkerResult

from orchestration.errors import SettingsError
from orchestration.protocol import CAUSE_LABEL, FORMER_SIGNING_KEYS_VARIABLE, SIGNING_KEY_VARIABLE
from orchestration.runs.result_signing import derive_key
from orchestration.settings import ROOT
from orchestration.worker import job_template, kubernetes_worker
from orchestration.worker.job_template import RefusedVariableError
from tests.helm.rendering import one, render
from tests.parts import examples

pytestmark = pytest.mark.usefixtures("closed_worker_channels")

ALLOWED = {"serviceAccounts": ["reader"], "images": ["registry.example.com/data/*"]}
VALUES: dict[str, Any] = {
    "image": {"repository": "registry.example.com/flows", "tag": "1"},
    "runs": {"allowed": ALLOWED},
}


@pytest.fixture(scope="module")
def template() -> dict[str, Any]:
    """Return the template that the chart gives to the worker."""
    made = one(render("prefect-work-pool", VALUES), "ConfigMap", "test-prefect-work-pool-worker")
    return dict(json.loads(made["data"]["base-job-template.json"]))


def test_worker_and_server_get_the_same_template(template: dict[str, Any]) -> None:
    synced = yaml.safe_load(
        one(render("prefect-work-pool", VALUES), "ConfigMap", "test-prefect-work-pool-sync")["data"]["pool.yaml"]
    )
    assert synced["work_pools"][0]["base_job_template"] == template


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"image": "registry.example.com/flows:2", "cpu_limit": "1", "env": {"A": "b"}, "env.C": "d"},
        {"image": "registry.example.com/data/etl@sha256:0123", "service_account_name": "reader"},
        {"labels": {"team": "a"}, "annotations": {"sidecar.istio.io/inject": "false"}},
        {"unknown": 1},
    ],
)
def test_variables_that_the_template_allows_pass(template: dict[str, Any], variables: dict[str, Any]) -> None:
    job_template.check(variables, template["variables"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"service_account_name": "prefect-work-pool-worker"},
            "service_account_name: 'prefect-work-pool-worker' is none of",
        ),
        ({"service_account_name": "{{ prefect.variables.account }}"}, "service_account_name: '{{ prefect"),
        ({"image": "evil.example.com/flows:1"}, "image: 'evil.example.com/flows:1' is not allowed by"),
        ({"image": "registry.example.com/flows.evil.com/x"}, "image: "),
        ({"image": "{{ prefect.variables.image }}"}, "image: "),
        ({"image": None}, "image: None is not of type 'string'"),
        (
            {"labels": {"app.kubernetes.io/name": "prefect-server"}},
            "labels: the key 'app.kubernetes.io/name' is reserved",
        ),
        ({"labels": {"prefect.io/flow-run-id": "x"}}, "labels: the key 'prefect.io/flow-run-id' is reserved"),
        ({"annotations": {"reconciler.noted": "x"}}, "annotations: the key 'reconciler.noted' is reserved"),
        ({"labels": {"_prefect.io/role": "x"}}, "labels: the key '_prefect.io/role' does not match ^"),
        ({"labels": "{{ prefect.blocks.json.labels }}"}, "labels: "),
        ({"labels.app": "x", "labels": {"prefect.io/role": "y"}}, "labels: the key 'prefect.io/role' is reserved"),
        ({"env": {"PASSWORD": ["s3cret"]}}, "job variable env.PASSWORD is not a string"),
        ({"env": {SIGNING_KEY_VARIABLE: "s3cret"}}, "env: the key 'RESULTS_SIGNING_KEY' is reserved"),
        ({"env.RESULTS_SIGNING_KEY": "s3cret"}, "env: the key 'RESULTS_SIGNING_KEY' is reserved"),
        ({"env": {FORMER_SIGNING_KEYS_VARIABLE: "s3cret"}}, "the key 'RESULTS_FORMER_SIGNING_KEYS' is reserved"),
        ({"finished_job_ttl": "never"}, "finished_job_ttl: "),
    ],
)
def test_variable_that_the_template_does_not_allow_is_refused_by_name(
    template: dict[str, Any], variables: dict[str, Any], message: str
) -> None:
    with pytest.raises(RefusedVariableError) as refused:
        job_template.check(variables, template["variables"])
    assert message in str(refused.value)
    assert "s3cret" not in str(refused.value)


RESERVED = [
    "app.kubernetes.io/name",
    "prefect.io/flow-run-id",
    "reconciler.fenced",
    "kubectl.kubernetes.io/x",
    "job-name",
]
# Prefect removes, replaces or decodes these parts of a label's key.
CHANGES = ["", "_", ".", "-", "--", " ", "\n", "/", "\uff0e", "&#46;", "a", "A", "a" * 64]
KEYS = st.tuples(
    st.sampled_from(CHANGES), st.sampled_from([*RESERVED, "team", "example.com/team"]), st.sampled_from(CHANGES)
).map("".join)


@settings(max_examples=examples(0.1))
@given(KEYS, st.integers(0, 30), st.sampled_from(CHANGES))
@example("team\n", 0, "")
def test_key_of_a_label_is_reserved_also_as_prefect_writes_it(
    template: dict[str, Any], key: str, position: int, change: str
) -> None:
    """Prefect makes `prefect.io/role` of `_prefect.io/role`: a run could replace the labels of its Job."""
    labels = {key[:position] + change + key[position:]: "mine"}
    run = FlowRun(flow_id=uuid4(), name="run")
    container = {"name": "prefect-job", "image": "image"}
    pod = {"parallelism": 1, "completions": 1, "restartPolicy": "Never", "containers": [container]}
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"labels": {}, "generateName": "run-"},
        "spec": {"parallelism": 1, "completions": 1, "template": {"spec": pod}},
    }
    configuration = KubernetesWorkerJobConfiguration(job_manifest=manifest, labels=labels, command="true")
    configuration.prepare_for_flow_run(run)
    written = [key for key, value in configuration.job_manifest["metadata"]["labels"].items() if value == "mine"]
    try:
        job_template.check({"labels": labels}, template["variables"])
    except RefusedVariableError:
        reserved = ("app.kubernetes.io/", "prefect.io/", "reconciler.", "kubectl.", "job-name", "controller-uid")
        assert written != list(labels) or written[0].startswith(reserved) or not _is_label_key(written[0])
    else:
        assert written == list(labels)
        assert not set(written) & set(RESERVED)


def _is_label_key(key: str) -> bool:
    """Return whether Kubernetes takes this as the key of a label."""
    prefix, slash, name = key.rpartition("/")
    part = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
    is_prefix = not slash or (len(prefix) <= 253 and re.fullmatch(rf"{part}(\.{part})*", prefix))
    return bool(is_prefix and re.fullmatch("[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", name))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"variables": {"type": 1}, "job_configuration": {}}'])
def test_file_without_a_template_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "template.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match="is not a base job template"):
        job_template.read(file)


def test_worker_logs_a_wrong_template_and_exits(tmp_path: Path) -> None:
    file = tmp_path / "absent.json"
    command = [sys.executable, "-m", "orchestration.worker", "--pool", "default", "--template", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"LOG_FORMAT": "json"}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    [line] = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["logger"]) == ("ERROR", "orchestration.worker")
    assert line["message"].startswith(f"{file} is not a base job template: [Errno 2] No such file or directory")
    assert line["message"].endswith(". Name the file of the release in --template.")


@flow
def nothing() -> None:
    """Do nothing: no run of this flow is executed."""


@pytest.fixture
def without_cluster() -> Iterator[None]:
    """Let workers watch no cluster, and keep their logs off the Prefect API."""
    with (
        patch.dict("os.environ", PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED="false"),
        temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        yield


async def _submit(
    template: dict[str, Any],
    variables: dict[str, Any],
    *signing_keys: bytes,
    trusted: bool = True,
    deployed: dict[str, Any] | None = None,
) -> tuple[list[Any], Any]:
    """Submit a run while the server's template is an attacker's; return the manifests of the Jobs, and the run."""
    made: list[Any] = []

    async def make(_: Any, run: Any, configuration: Any, task_status: Any) -> KubernetesWorkerResult:
        made.append(configuration.job_manifest)
        task_status.started("namespace:job")
        return KubernetesWorkerResult(identifier="namespace:job", status_code=0)

    stolen = json.loads(json.dumps(template))
    stolen["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["serviceAccountName"] = "worker"
    stolen["variables"]["properties"] = {name: {} for name in template["variables"]["properties"]}
    pool = f"stolen-{uuid4().hex[:6]}"
    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", base_job_template=stolen))
        deployment = await client.create_deployment(
            flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool, job_variables=deployed
        )
        with patch.object(KubernetesWorker, "run", make):
            options: dict[str, Any] = {"work_pool_name": pool, "create_pool_if_not_found": False}
            own = template if trusted else None
            async with kubernetes_worker.Worker(template=own, signing_keys=signing_keys, **options) as tested:
                await tested.sync_with_backend()
                run = await client.create_flow_run_from_deployment(
                    deployment, state=Scheduled(), job_variables=variables
                )
                for _ in range(3):
                    await tested.get_and_submit_flow_runs()
                    while tested.submitting:
                        await asyncio.sleep(0.05)
        return made, await client.read_flow_run(run.id)


@pytest.mark.usefixtures("prefect_server", "without_cluster")
def test_job_uses_the_template_of_the_release(template: dict[str, Any]) -> None:
    [manifest], run = asyncio.run(_submit(template, {"labels": {"team": "a"}}))
    assert manifest["spec"]["template"]["spec"]["serviceAccountName"] == "test-prefect-work-pool-runs"
    assert manifest["metadata"]["labels"]["team"] == "a"
    assert run.state_name == "Submitting"


@pytest.mark.usefixtures("prefect_server", "without_cluster")
def test_run_with_a_refused_variable_crashes_without_a_job_or_a_retry(template: dict[str, Any]) -> None:
    made, run = asyncio.run(_submit(template, {"service_account_name": "worker"}))
    assert made == []
    assert run.state_name == "Crashed"
    assert "job variable service_account_name: 'worker' is none of" in run.state.message
    assert "runs.allowed" in run.state.message
    assert run.labels[CAUSE_LABEL] == "start"


@pytest.mark.usefixtures("prefect_server", "without_cluster")
def test_job_shows_no_secret_of_the_worker(template: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's worker refers to a Secret that has a name. All other secrets are removed, also headers for a proxy."""
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    for suffix, value in (("NAME", "prefect-server-auth"), ("KEY", "auth-string")):
        monkeypatch.setenv(f"{prefix}_{suffix}", value)
    secrets = {PREFECT_API_KEY: "s3cret-key", PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Access": "s3cret-header"}}
    with temporary_settings(secrets | {PREFECT_API_AUTH_STRING: "admin:s3cret", PREFECT_LOGGING_LEVEL: "WARNING"}):
        [manifest], _ = asyncio.run(_submit(template, {}))
    names = {variable["name"] for variable in manifest["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert names.isdisjoint({"PREFECT_API_KEY", "PREFECT_CLIENT_CUSTOM_HEADERS"})
    assert {"PREFECT_API_AUTH_STRING", "PREFECT_LOGGING_LEVEL"} <= names
    assert "s3cret-" not in json.dumps(manifest)


MASTER = b"m" * 32


def _signing_keys(manifest: Any) -> list[Any]:
    environment = manifest["spec"]["template"]["spec"]["containers"][0]["env"]
    names = (SIGNING_KEY_VARIABLE, FORMER_SIGNING_KEYS_VARIABLE)
    return [variable for variable in environment if variable["name"] in names]


@pytest.mark.usefixtures("prefect_server", "without_cluster")
def test_job_has_the_signing_key_of_its_deployment(template: dict[str, Any]) -> None:
    variables = {"memory_limit": "2Gi", "labels": {"a": "b"}}
    former = (b"n" * 32, b"o" * 32)
    [manifest], run = asyncio.run(_submit(template, variables, MASTER, *former, deployed={"env": {"A": "b"}}))
    key, *others = (derive_key(master, f"deployment/{run.deployment_id}") for master in (MASTER, *former))
    assert _signing_keys(manifest) == [
        {"name": SIGNING_KEY_VARIABLE, "value": key},
        {"name": FORMER_SIGNING_KEYS_VARIABLE, "value": " ".join(others)},
    ]
    assert MASTER.decode() not in json.dumps(manifest)


@pytest.mark.further
@pytest.mark.usefixtures("prefect_server", "without_cluster")
def test_job_variable_does_not_choose_the_signing_key(template: dict[str, Any]) -> None:
    """Also with the server's template, which has no schema that refuses the variable."""
    chosen = {"env": {SIGNING_KEY_VARIABLE: "00" * 32, FORMER_SIGNING_KEYS_VARIABLE: "00" * 32}}
    [manifest], run = asyncio.run(_submit(template, chosen, MASTER, trusted=False))
    key = derive_key(MASTER, f"flow-run/{run.id}")
    assert _signing_keys(manifest) == [
        {"name": SIGNING_KEY_VARIABLE, "value": key},
        {"name": FORMER_SIGNING_KEYS_VARIABLE, "value": ""},
    ]
    [manifest], _ = asyncio.run(_submit(template, chosen, trusted=False))
    assert _signing_keys(manifest) == []


@pytest.mark.usefixtures("prefect_server", "without_cluster")
@pytest.mark.parametrize("deployed", [None, pytest.param({"env": {"A": "b"}}, marks=pytest.mark.further)])
def test_run_with_an_environment_of_its_own_has_no_key_of_its_deployment(
    template: dict[str, Any], deployed: dict[str, Any] | None
) -> None:
    variables = {"env": {"PYTHONPATH": "/results"}}
    [manifest], run = asyncio.run(_submit(template, variables, MASTER, deployed=deployed))
    key = derive_key(MASTER, f"flow-run/{run.id}")
    assert _signing_keys(manifest) == [
        {"name": SIGNING_KEY_VARIABLE, "value": key},
        {"name": FORMER_SIGNING_KEYS_VARIABLE, "value": ""},
    ]


@pytest.mark.parametrize(
    ("variables", "scope"),
    [
        ({}, "deployment"),
        (None, "deployment"),
        ({"memory_limit": "2Gi", "crash_retries": 1, "labels.a": "b"}, "deployment"),
        ({"command": "python -c 1"}, "flow-run"),
        ({"env": {"PYTHONPATH": "/results"}}, "flow-run"),
        ({"env.A": "b"}, "flow-run"),
        ({"image": "mine:1"}, "flow-run"),
        ({"gpu": 1}, "flow-run"),
    ],
)
def test_run_that_chooses_what_it_executes_has_a_key_for_itself(variables: Any, scope: str) -> None:
    run = FlowRun(flow_id=uuid4(), deployment_id=uuid4(), job_variables=variables)
    ids = {"deployment": run.deployment_id, "flow-run": run.id}
    assert job_template.signing_scope(run) == f"{scope}/{ids[scope]}"
    if scope == "deployment":
        run.deployment_id = None
        assert job_template.signing_scope(run) == f"flow/{run.flow_id}"


def test_variables_that_keep_the_deployment_s_key_are_those_of_the_template(template: dict[str, Any]) -> None:
    others = {"command", "env", "image", "service_account_name"}
    assert set(template["variables"]["properties"]) - others == job_template.SAME_CODE_VARIABLES
