"""The Makefile's targets on a real cluster: up, deploy, run, rollback and undeploy, in order."""

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from docs.screenshot import screenshot
from orchestration.errors import ClusterError
from orchestration.operations.__main__ import main
from orchestration.operations.environment import POOL
from orchestration.operations.follow_run import find_run
from orchestration.operations.local_cluster import binaries
from orchestration.operations.port_forward import api_client, read_credentials
from orchestration.operations.release_diagnosis import explain_pod, explain_release
from orchestration.operations.start_run import start
from tests.cluster.namespace import Namespace, network_policy
from tests.e2e.checkout import CRON, DAILY, MAKE, TOOLS_ON_PATH, Checkout, environment_without_prefect
from tests.e2e.pace import IS_SHIPPED
from tests.e2e.runs import get_run, start_run, wait_until_ended
from tests.parts import answers, free_port, wait_until

POOL_VALUES = "helm/environments/local/prefect-work-pool.yaml"


@pytest.fixture(scope="module")
def checkout(checkout: Checkout) -> Checkout:
    """Return the checkout with longer intervals: looks at the cluster take the processor from other tests."""
    if IS_SHIPPED:
        return checkout
    operations = "orchestration/operations"  # not in the image
    checkout.edit(f"{operations}/rollout.py", "POLL_SECONDS = 0.5", "POLL_SECONDS = 3.0")
    checkout.edit(f"{operations}/follow_run.py", "POLL_SECONDS = 1.0", "POLL_SECONDS = 3.0")
    checkout.edit(POOL_VALUES, "reconciler: {replicas: 1}", "reconciler: {replicas: 1, everySeconds: 10}")
    checkout.commit()
    return checkout


@pytest.fixture(scope="module")
def up(checkout: Checkout) -> str:
    """Deploy everything by `make up`, and return what it printed. The tests that are not `further` run after it."""
    return checkout.make("up")


def _read_daily_deployment(api: httpx.Client) -> dict[str, object]:
    found: dict[str, object] = api.get(f"/deployments/name/{DAILY}").raise_for_status().json()
    return found


MACHINES_OWN = {"kubernetes version", "api latency", "database latency"}
"""Checks of doctor that depend on the machine: the version of its kubectl, and how busy it is."""


def _examine(checkout: Checkout) -> dict[str, dict[str, str]]:
    """Return what `make doctor` finds, by the name of the check."""
    command = [*MAKE, TOOLS_ON_PATH, "doctor", "JSON=1"]
    command += [f"KUBE_CONTEXT={checkout.target.context}", f"NAMESPACE={checkout.target.namespace}"]
    done = subprocess.run(
        command, cwd=checkout.folder, env=environment_without_prefect(), capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    return {found["check"]: found for found in json.loads(done.stdout)}


@pytest.mark.further
def test_doctor_finds_no_problem_before_the_install(checkout: Checkout) -> None:
    found = _examine(checkout)
    assert {name: finding for name, finding in found.items() if finding["status"] not in ("ok", "not checked")} == {
        name: found[name] for name in MACHINES_OWN if found[name]["status"] == "warning"
    }
    assert {"secrets", "quota", "storage class", "dns", "chart values", "rights of the installer"} <= {
        name for name, finding in found.items() if finding["status"] == "ok"
    }


def _namespaces(checkout: Checkout) -> tuple[Namespace, Namespace]:
    """Return the namespace of the releases and that of the runs."""
    of_releases, of_runs = (Namespace(checkout.target.context, name) for name in checkout.target.namespaces)
    return of_releases, of_runs


def test_make_up_deploys_everything_and_runs_the_daily_job(checkout: Checkout, up: str) -> None:
    """The job runs as a pod in the namespace of the runs, which has no Secret but that of the warehouse."""
    assert "is Completed" in up
    assert re.search(r"^worker +[01]/1 ", up, flags=re.M), up
    assert re.search(rf"{DAILY} +\S+ +Completed", up), up
    assert "\x1b" not in up, "colours without a terminal"
    assert "Open the UI: make ui" in up
    query = "select count(*) from raw.flights; select count(*) from analytics.carrier_daily_punctuality"
    rows = checkout.target.kubectl(
        "exec", "warehouse-0", "--", "psql", "-U", "warehouse", "-d", "warehouse", "-Atc", query
    ).split()
    assert rows[0] == "842"
    assert int(rows[1]) > 5
    pods = checkout.target.objects("pods", "--selector", "prefect.io/role=flow-run")
    _, of_runs = _namespaces(checkout)
    assert {pod["metadata"]["namespace"] for pod in pods} == {of_runs.name}
    secrets = of_runs.kubectl("get", "secrets", "--output", "jsonpath={.items[*].metadata.name}").split()
    assert secrets == ["warehouse"], "the Jobs of runs have a credential each"
    url = of_runs.kubectl("get", "secret", "warehouse", "-o", "go-template={{.data.url | base64decode}}")
    jobs = json.dumps(checkout.target.objects("jobs"))
    assert url not in jobs
    assert url.split(":")[2].split("@")[0] not in jobs
    assert all(pod["spec"]["priorityClassName"] == "prefect-runs" for pod in pods)


def _refuse(capsys: pytest.CaptureFixture[str], checkout: Checkout, command: str, *arguments: str) -> str:
    """Return the message of a command that fails. It runs in this process and reads no changed file of the checkout."""
    target = ("--context", checkout.target.context, "--namespace", checkout.target.namespace)
    assert main([command, *target, *arguments]) == 1
    return capsys.readouterr().err


def test_status_and_logs_show_components_and_runs(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkout.wait_until_ready()
    components = {"api", "services", "database", "redis", "worker", "results", "drift", "reconciler"}
    assert {component["name"] for component in found["components"]} == components
    assert all(component["ready"] == component["wanted"] == 1 for component in found["components"])
    assert found["pools"] == [{"name": "default", "status": "READY", "limit": 10, "workers": 1}]
    [daily] = [deployment for deployment in found["deployments"] if deployment["name"] == DAILY]
    assert daily["last"]["state"] == "COMPLETED"
    assert daily["next"]
    log = checkout.make("logs", RUN=daily["last"]["name"])
    assert "Beginning subflow run" in log
    assert f"{daily['last']['name']} is Completed" in log
    assert "There is no run absent" in _refuse(capsys, checkout, "logs", "absent")


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_doctor_checks_the_whole_installation(checkout: Checkout) -> None:
    """All checks pass. Faults are then found all at once."""
    unchecked = {"retention", "backup", "replicas"}
    for _ in range(3):
        problems = {name: finding for name, finding in _examine(checkout).items() if finding["status"] != "ok"}
        if problems.keys() - MACHINES_OWN == unchecked:
            break
        checkout.wait_until_ready()  # on a busy node a probe may be late, and then a pod is not ready for a while
    assert {name: finding for name, finding in problems.items() if name not in MACHINES_OWN | unchecked} == {}
    assert {name for name, finding in problems.items() if finding["status"] == "not checked"} == unchecked

    target = checkout.target
    namespace, of_runs = _namespaces(checkout)
    faults = {"network policies", "secrets", "rights of the worker", "work pools"}
    selector = {"matchLabels": {"app.kubernetes.io/component": "drift"}}
    opening = network_policy("open", egress=[{}])
    opening["spec"]["podSelector"] = selector
    label = "pod-security.kubernetes.io/enforce={}"
    namespace.apply(opening)
    namespace.kubectl("label", "--overwrite", "namespace", target.namespace, label.format("baseline"))
    with api_client(target) as api:
        api.patch("/work_pools/default", json={"is_paused": True}).raise_for_status()
    try:
        with of_runs.without("secret", "warehouse"), of_runs.without("rolebinding", f"{POOL}-worker"):
            for _ in range(3):  # as above
                shown = checkout.make("doctor", status=2)
                failed, warned = (
                    set(re.findall(rf"^  {status} +(\S+(?: \S+)*)  ", shown, flags=re.M))
                    for status in ("failed", "warning")
                )
                if failed - MACHINES_OWN == faults and "pod security" in warned:
                    break
    finally:
        namespace.kubectl("delete", "networkpolicy", "open")
        namespace.kubectl("label", "--overwrite", "namespace", target.namespace, label.format("restricted"))
        with api_client(target) as api:
            api.patch("/work_pools/default", json={"is_paused": False}).raise_for_status()
    assert failed - MACHINES_OWN == faults
    assert "pod security" in warned
    assert "drift reaches the Kubernetes API" in shown
    assert "Secret warehouse" in shown
    assert "default is paused" in shown
    assert "-> prefect work-pool resume 'default'" in shown


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_run_takes_valid_parameters_alone(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    output = checkout.make("run-on-cluster", PARAMETERS='{"day": "2013-02-08"}')
    # These are the rows of the day. An earlier run has loaded the reference tables.
    assert "Completed to 2013-02-08: 1,002 rows loaded, 12 models built, 26/26 tests passed" in output
    refused = checkout.make("run-on-cluster", PARAMETERS='{"dya": "2013-02-08"}', status=2)
    assert f"{DAILY} has no parameter dya. It has: day" in refused
    assert "Traceback" not in refused
    assert "is not JSON" in _refuse(capsys, checkout, "run", DAILY, "--parameters", "day")
    with api_client(checkout.target) as api:
        with pytest.raises(ClusterError, match=f"{DAILY} refuses the parameters"):
            start(api, DAILY, {"full_refresh": "perhaps"})
        with pytest.raises(ClusterError, match=f"no deployment no/such. There are: backfill/backfill, {DAILY}"):
            start(api, "no/such", {})


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_ui_shows_the_run_in_a_browser(checkout: Checkout, tmp_path: Path) -> None:
    """The browser connects through the port that `make ui` opens. The port survives the end of the server's pod."""
    binaries.install_packages({"chromium": "chromium"}, "30 s")
    port = free_port()
    command = [*MAKE, "ui", f"PORT={port}"]
    command += [f"KUBE_CONTEXT={checkout.target.context}", f"NAMESPACE={checkout.target.namespace}"]
    with subprocess.Popen(
        command,
        cwd=checkout.folder,
        env=environment_without_prefect(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout
            assert f"http://127.0.0.1:{port}" in process.stdout.readline()
            with api_client(checkout.target) as api:
                run = find_run(api, "")
            page = f"/v2/runs/flow-run/{run['id']}"
            url = f"http://127.0.0.1:{port}"
            text = screenshot(
                url, read_credentials(checkout.target), page, "Finished in state Completed()", tmp_path / "ui.png"
            )
            assert run["name"] in text
            assert (tmp_path / "ui.png").stat().st_size > 20_000
            checkout.target.kubectl("delete", "pods", "--selector", "app.kubernetes.io/component=api")
            checkout.target.kubectl("rollout", "status", "deployment/prefect-server-api", "--timeout=300s")
            wait_until(lambda: answers(f"{url}/api/health"), "the port to reach the next pod")
            lines = [process.stdout.readline() for _ in range(4)][2:]
            assert lines == ["The server's pod is gone. Opening the port to the next one\n", "It is open again.\n"]
        finally:
            os.killpg(process.pid, signal.SIGTERM)


PSQL = ("exec", "warehouse-0", "--", "psql", "-U", "warehouse", "-d", "warehouse", "-Atc")

OTHERS = "from pg_stat_activity where pid <> pg_backend_pid() and"
"""Selects the other sessions of the warehouse."""


def _count_waiting(checkout: Checkout) -> int:
    """Return how many sessions of the warehouse wait for a lock."""
    return int(checkout.target.kubectl(*PSQL, f"select count(*) {OTHERS} wait_event_type = 'Lock'"))


@contextlib.contextmanager
def _locked_table(checkout: Checkout) -> Iterator[None]:
    """Hold a lock on a table of the daily job while the block lasts."""
    target = checkout.target

    def sql(statement: str) -> str:
        return target.kubectl(*PSQL, statement).strip()

    table = "analytics.carrier_daily_punctuality"
    # Not in the background of the pod: Postgres, as the pod's first process, takes the end of an orphan for a crash.
    lock = ["kubectl", "--context", target.context, "--namespace", target.namespace, *PSQL]
    holder = subprocess.Popen(
        [*lock, f"begin; lock table {table}; select pg_sleep(3600)"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: sql(f"select count(*) {OTHERS} query like '%pg_sleep%'") == "1", "the lock")
        yield
    finally:
        sql(f"select pg_terminate_backend(pid) {OTHERS} query like '%pg_sleep%'")
        holder.wait(180)


def _start_waiting_run(checkout: Checkout, api: httpx.Client, **parameters: str) -> str:
    """Start a run of the daily job, and return the run when dbt waits for the lock of `_locked_table`."""
    run = start_run(api, str(_read_daily_deployment(api)["id"]), parameters=parameters)
    wait_until(lambda: get_run(api, run)["state_type"] == "RUNNING", "the run to begin", 300)
    wait_until(lambda: _count_waiting(checkout), "dbt to wait for the lock", 300)
    return run


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_cancelled_run_ends_its_sql(checkout: Checkout) -> None:
    """The SQL waits for a lock that another session holds."""
    target = checkout.target
    with _locked_table(checkout):
        with api_client(target) as api:
            run = _start_waiting_run(checkout, api, select="carrier_daily_punctuality")
            api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
            assert wait_until_ended(api, run)["state_type"] == "CANCELLED"
            wait_until(lambda: not _count_waiting(checkout), "the run's SQL to end")
        selector = f"prefect.io/flow-run-id={run}"
        wait_until(
            lambda: all(
                pod["status"]["phase"] in ("Succeeded", "Failed")
                for pod in target.objects("pods", "--selector", selector)
            ),
            "the run's pod to end",
        )


def _api_pods(checkout: Checkout) -> set[str]:
    """Return the names of the API's pods."""
    pods = checkout.target.objects("pods", "--selector", "app.kubernetes.io/component=api")
    return {pod["metadata"]["name"] for pod in pods}


def _image_of_runs(api: httpx.Client) -> str:
    """Return the image of runs in the pool's template."""
    template = api.get("/work_pools/default").raise_for_status().json()["base_job_template"]
    return str(template["variables"]["properties"]["image"]["default"])


def test_changed_flow_schedule_and_namespace_of_runs_are_deployed_and_rolled_back(checkout: Checkout) -> None:
    """A run in progress stays where it is. When its pod is killed there, the run is retried with all changes.

    The server's pods are not replaced. A rollback is refused while runs are in progress in the
    namespace that it would take back.
    """
    after, before = _namespaces(checkout)
    server = _api_pods(checkout)
    roles = {
        component: ("get", "role", f"{POOL}-{component}", "--ignore-not-found", "--output", "name")
        for component in ("worker", "reconciler")
    }
    changed = CRON.replace("0", "30", 1)
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(api_client(checkout.target))
        former_image = _image_of_runs(api)
        with _locked_table(checkout):
            run = _start_waiting_run(checkout, api)
            of_run = ("--selector", f"prefect.io/flow-run-id={run}")
            for path in ("flows/report.py", "prefect.yaml", POOL_VALUES):
                stack.enter_context(checkout.restored(path))
            checkout.edit("flows/report.py", '"""', '"""Changed. ')
            checkout.edit("prefect.yaml", CRON, changed)
            checkout.edit(POOL_VALUES, "{{ .Release.Namespace }}-runs", "")
            plan = checkout.make("plan", status=2)
            assert "prefect-work-pool: Deployment/prefect-work-pool-worker is changed" in plan
            assert f"prefect-work-pool: Role/{POOL}-worker is created" in plan
            assert "prefect-server:" not in plan
            on_server = plan.split("On the server:")[1]
            assert DAILY in on_server
            assert changed in on_server
            assert "prefect-server is up to date" in checkout.make("deploy")
            image = _image_of_runs(api)
            assert image != former_image
            assert changed in json.dumps(_read_daily_deployment(api)["schedules"])
            assert before.kubectl(*roles["reconciler"]), "a run is in progress there"
            assert not before.kubectl(*roles["worker"])

            assert get_run(api, run)["state_type"] == "RUNNING"
            pods = ("get", "pods", *of_run, "--output")
            assert not after.kubectl(*pods, "name")
            before.kubectl("delete", before.kubectl(*pods, "name").strip(), "--force", "--grace-period=0")
            wait_until(lambda: get_run(api, run)["run_count"] == 2, "the second run attempt", 600)
            assert after.kubectl(*pods, "jsonpath={.items[*].spec.containers[*].image}") == image
            refused = checkout.make("rollback", status=2)
            assert f"Runs are in progress in namespace {after.name}, where revision 1" in refused
        assert wait_until_ended(api, run, 300)["state_type"] == "COMPLETED"
        assert find_run(api, run)["id"] == run
        after.kubectl("wait", "job", *of_run, "--for=condition=Complete", "--timeout=300s")
        checkout.make("rollback")
        assert _image_of_runs(api) == former_image
        assert CRON in json.dumps(_read_daily_deployment(api)["schedules"])
        assert before.kubectl(*roles["worker"])
        assert not after.kubectl(*roles["reconciler"])
    assert _api_pods(checkout) == server


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_second_deploy_changes_nothing(checkout: Checkout) -> None:
    """After a rollback, too: it brings back what the first deploy had made from the same inputs."""
    output = checkout.make("deploy")
    assert "prefect-server is up to date: revision 1." in output
    # The third revision is that of the rollback, if the test of it has run.
    assert re.search(r"prefect-work-pool is up to date: revision [13]\.", output), output
    assert "Nothing would change." in checkout.make("plan")


OVERSIZED = {
    "name": "oversized",
    "entrypoint": "flows/example_flow.py:dbt_pipeline",
    "work_pool": {"name": "default", "job_variables": {"memory_limit": "1000Gi"}},
}
"""A deployment whose runs would need more memory than the namespace allows."""


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_deployment_that_exceeds_the_namespace_quota_is_refused(checkout: Checkout) -> None:
    """Its runs would be pending for ever. The deploy names the deployment and does not change the release."""
    history = checkout.target.helm("history", POOL, "--output", "json")
    file = checkout.folder / "oversized.yaml"  # not in the image, which need not be built again
    with checkout.restored(POOL_VALUES):
        checkout.edit(POOL_VALUES, "reconciler:", "sync: {files: [prefect.yaml, oversized.yaml]}\nreconciler:")
        file.write_text(yaml.safe_dump({"deployments": [OVERSIZED]}))
        try:
            refused = checkout.make("deploy", status=2)
        finally:
            file.unlink()
    assert "prefect-work-pool is refused, and nothing was changed: oversized.yaml:" in refused
    assert "1000Gi" in refused
    assert "Traceback" not in refused
    assert checkout.target.helm("history", POOL, "--output", "json") == history


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_run_that_does_not_start_is_not_a_problem_of_the_release(checkout: Checkout) -> None:
    """Otherwise every deploy would fail while the run waits."""
    target = checkout.target
    labels = {"app.kubernetes.io/instance": POOL, "prefect.io/role": "flow-run"}
    _, of_runs = _namespaces(checkout)
    of_runs.pod("stuck", ready=False, labels=labels, container={"image": "localhost:5000/absent:1"})

    def refused() -> bool:
        [pod] = target.objects("pods", "--field-selector", "metadata.name=stuck")
        return any("ErrImagePull" in line or "ImagePullBackOff" in line for line in explain_pod(target, pod))

    try:
        wait_until(refused, "the image to be refused")
        assert not [line for line in explain_release(target, POOL) if "stuck" in line]
    finally:
        of_runs.kubectl("delete", "pod", "stuck")


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_failed_deploy_names_cause_and_rollback(checkout: Checkout) -> None:
    """The message has the object and the line of its log. The previous server keeps running."""
    path, diagnosis = "helm/environments/local/prefect-server.yaml", "orchestration/operations/release_diagnosis.py"
    with checkout.restored(diagnosis), checkout.restored(path) as file:
        if not IS_SHIPPED:
            # Kubernetes waits longer before each restart.
            checkout.edit(diagnosis, "CRASH_LOOP_RESTARTS = 3", "CRASH_LOOP_RESTARTS = 1")
        broken = yaml.safe_load(file.read_text())
        broken["api"]["extraArgs"] = ["--no-such-option"]
        file.write_text(yaml.safe_dump(broken))
        output = checkout.make("deploy", status=2)
    try:
        assert "prefect-server does not become ready: pod/prefect-server-api-" in output
        assert "exit code 1" in output
        assert re.search("log: .*Unknown option: --no-such-option", output)
        assert "make rollback ENV=local" in output
        assert "Traceback" not in output
        with api_client(checkout.target) as api:
            assert _read_daily_deployment(api)
    finally:
        checkout.make("rollback")
    with checkout.restored(path) as file:
        file.write_text(file.read_text() + "replicas: 2\n")
        refused = checkout.make("deploy", status=2)
    assert "prefect-server is refused, and nothing was changed" in refused
    assert "additional properties 'replicas' not allowed" in refused


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_killed_deploy_is_resumed_with_force(checkout: Checkout) -> None:
    """Without FORCE=1 the next deploy is refused, as the first may still be in progress."""
    namespace, _ = _namespaces(checkout)
    checkout.edit(POOL_VALUES, "concurrencyLimit: 10", "concurrencyLimit: 11")
    target = [f"KUBE_CONTEXT={checkout.target.context}", f"NAMESPACE={checkout.target.namespace}"]
    with subprocess.Popen(
        [*MAKE, "deploy", *target], cwd=checkout.folder, env=environment_without_prefect(), stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, start_new_session=True,
    ) as process:  # fmt: skip

        def pending() -> str:
            # Cheaper than `helm history`, which reads all revisions.
            selector = f"owner=helm,name={POOL},status=pending-upgrade"
            return namespace.kubectl("get", "secrets", "--selector", selector, "--output", "name")

        try:
            wait_until(pending, "the pool's release to be pending", 600)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    refused = checkout.make("deploy", status=2)
    assert re.search(r"prefect-work-pool: a deploy began \d+ s ago and has not ended", refused)
    assert "if it was interrupted, use FORCE=1" in refused
    assert "was interrupted; it is set aside" in checkout.make("deploy", FORCE="1")
    assert json.loads(checkout.target.helm("history", POOL, "--output", "json"))[-1]["status"] == "deployed"
    with api_client(checkout.target) as api:
        assert api.get("/work_pools/default").raise_for_status().json()["concurrency_limit"] == 11


@pytest.mark.further
@pytest.mark.usefixtures("up")
def test_deploy_with_wrong_settings_is_refused_with_the_cure(
    checkout: Checkout, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed before. What does not depend on the checkout is refused in this process."""

    def refuse(command: str, env: str, context: str = checkout.target.context) -> str:
        return _refuse(capsys, checkout, command, "--env", env, "--context", context)

    assert "ENV=moon is unknown. There are local, production, staging" in refuse("deploy", "moon")
    contexts = f"There are: {checkout.target.context}"
    assert f"KUBE_CONTEXT=absent is not in the kubeconfig. {contexts}" in refuse("deploy", "local", "absent")
    assert "ENV=production needs the name of its cluster: KUBE_CONTEXT=..." in refuse("deploy", "production", "")
    assert "make undeploy ENV=production CONFIRM=production" in refuse("undeploy", "production")
    with checkout.restored("README.md") as file:
        file.write_text("changed")
        dirty = checkout.make("deploy", ENV="production", status=2)
    assert "uncommitted changes" in dirty
    subprocess.run(["git", "checkout", "-q", "."], cwd=checkout.folder, check=True)
    missing = checkout.make("deploy", ENV="production", IMAGE="localhost:5000/prefect-orchestration:absent", status=2)
    assert "localhost:5000/prefect-orchestration:absent is not in the registry. Push it: make push" in missing
    monkeypatch.setenv("KUBECONFIG", str(_kubeconfig_without_rights(checkout, tmp_path)))
    stranger = refuse("deploy", "local", "stranger")
    assert f"may not create deployments.apps in namespace {checkout.target.namespace}" in stranger
    assert "Traceback" not in dirty + missing + stranger


def _kubeconfig_without_rights(checkout: Checkout, folder: Path) -> Path:
    """Write a kubeconfig whose context `stranger` has a user without rights, and return its path."""
    target = checkout.target
    config = json.loads(target.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    token = target.kubectl("create", "token", "default").strip()
    config["users"] = [{"name": "stranger", "user": {"token": token}}]
    config["contexts"] = [
        {"name": "stranger", "context": {"cluster": config["clusters"][0]["name"], "user": "stranger"}}
    ]
    config["current-context"] = "stranger"
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


def test_undeploy_keeps_volumes_and_passwords(checkout: Checkout) -> None:
    output = checkout.make("undeploy")
    assert f"{checkout.target.namespace} and {checkout.target.namespace}-runs: volumes and passwords stay" in output
    kinds = "deployments,statefulsets,secrets,persistentvolumeclaims,serviceaccounts,roles"
    left = {f"{found['kind']}/{found['metadata']['name']}" for found in checkout.target.objects(kinds)}
    assert left == {
        "PersistentVolumeClaim/data-prefect-server-database-0",
        "PersistentVolumeClaim/data-warehouse-0",
        "PersistentVolumeClaim/prefect-server-backups",
        "PersistentVolumeClaim/results-prefect-work-pool-results-0",
        "Secret/prefect-server-database",
        "Secret/prefect-server-encryption-key",
        "Secret/warehouse",
        "ServiceAccount/default",
        "ServiceAccount/prefect-server-database",
        "ServiceAccount/prefect-server-redis",
        "ServiceAccount/prefect-work-pool-drift",
        "ServiceAccount/prefect-work-pool-results",
        "ServiceAccount/warehouse",
        "StatefulSet/warehouse",
    }
    assert "Nothing is deployed" in checkout.make("status", status=2)
