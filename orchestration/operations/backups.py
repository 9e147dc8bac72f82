"""Back up the server's database, and list its backups: `make backup` and `make backups`."""

import copy
import json
import sys
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER, Environment, Object
from orchestration.operations.release_diagnosis import hopeless_reason, release_selector

CRON_JOB = f"{SERVER}-backup"

POLL_SECONDS = 1.0

POLL_RETRY_SECONDS = 60.0
"""For how long a Job is waited for while kubectl fails."""

END_TIMEOUT_SECONDS = 300
"""How long the pods of a deleted Job may take to end."""

KEPT_SECONDS = 3600
"""How long a Job that these commands make stays after its end, with its log."""


class UnendedJobError(ClusterError):
    """A Job that was given up and may still change the database."""


def read_template(environment: Environment) -> Object:
    """Return the CronJob of the chart, whose Jobs are the template of all other Jobs here.

    Raises:
        ClusterError: the release has no backups.
    """
    try:
        found: Object = json.loads(environment.kubectl("get", "cronjob", CRON_JOB, "--output", "json"))
    except ClusterError as error:
        if "NotFound" not in str(error):
            raise
        raise ClusterError(
            f"{environment.name} has no backups: there is no CronJob {CRON_JOB}. Set backup.enabled=true in "
            f"helm/environments/{environment.name}/prefect-server.yaml, and deploy"
        ) from None
    return found


def back_up(environment: Environment) -> None:
    """Make a backup now, and print what the CronJob's containers print.

    Raises:
        ClusterError: there are no backups, or the backup failed.
    """
    read_template(environment)
    name = job_name("manual")
    environment.kubectl("create", "job", name, f"--from=cronjob/{CRON_JOB}")
    print(wait_for(environment, name), end="")


def list_backups(environment: Environment, *, as_json: bool) -> None:
    """Print the backups of the store, the newest first, and when the last one was verified.

    Raises:
        ClusterError: there are no backups, or the store cannot be read.
    """
    template = read_template(environment)

    def change(pod: Object) -> None:
        pod["initContainers"] = [
            init_container for init_container in pod["initContainers"] if init_container["name"] != "dump"
        ]
        [container] = pod["containers"]
        container["args"] = as_command(container["args"], "list", *(["--json"] if as_json else []))

    print(run_job(environment, template, "list", change), end="")
    if not as_json:
        last = template["status"].get("lastSuccessfulTime")
        print(f"Last verified: {last or 'never'}. Schedule: {template['spec']['schedule']}.")


def as_command(arguments: list[str], command: str, *options: str) -> list[str]:
    """Return the arguments of the container that stores backups, for another command of `orchestration.recovery`."""
    return [command if argument == "store" else argument for argument in arguments] + list(options)


def job_name(purpose: str) -> str:
    """Return a new name of a Job for a purpose."""
    return f"{CRON_JOB}-{purpose}-{datetime.now(UTC):%m%d%H%M%S}"


def run_job(environment: Environment, template: Object, purpose: str, change: Callable[[Object], None]) -> str:
    """Run a Job that is made from the CronJob's template, and return its log.

    Args:
        environment: the environment.
        template: what `read_template` returned.
        purpose: a part of the Job's name.
        change: changes the specification of the pod.

    If anything fails, the Job is deleted, and its pods have ended when this function raises.

    Raises:
        UnendedJobError: the Job was given up, and may still run.
        ClusterError: the Job failed. The message has its log.
    """
    made = copy.deepcopy(template["spec"]["jobTemplate"])
    spec = made["spec"] | {"backoffLimit": 0, "ttlSecondsAfterFinished": KEPT_SECONDS}
    change(spec["template"]["spec"])
    name = job_name(purpose)
    owner = {"apiVersion": "batch/v1", "kind": "CronJob", "name": CRON_JOB, "uid": template["metadata"]["uid"]}
    # The Job is deleted with the release. It is no controller's, so it counts as no backup of the CronJob.
    metadata = {"name": name, "labels": made["metadata"]["labels"], "ownerReferences": [owner]}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    try:
        environment.kubectl("create", "--filename", "-", text=json.dumps(job))
        return wait_for(environment, name)
    except BaseException as error:
        try:
            log = _end(environment, name)
        except BaseException as cause:
            raise UnendedJobError(
                f"Job {name} in namespace {environment.namespace} may still run: {_first_line(cause)}. "
                f"Delete it: kubectl --namespace {environment.namespace} delete job {name} --cascade=foreground"
            ) from error
        if log is None:
            raise
        if not isinstance(error, ClusterError):  # Ctrl-C ends the command, although the Job has succeeded
            print(log, end="", file=sys.stderr)
            raise
        return log


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _end(environment: Environment, job: str) -> str | None:
    """Return the log of a Job that has succeeded. Delete any other Job, and return None once its pods have ended."""
    found = environment.kubectl("get", "job", job, "--ignore-not-found", "--output", "json")
    conditions = _conditions(json.loads(found)) if found else set()
    if "Complete" in conditions:
        return read_log(environment, job)
    pods = environment.objects("pods", "--selector", f"job-name={job}")
    if "Failed" in conditions and all(pod["status"].get("phase") in ("Succeeded", "Failed") for pod in pods):
        return None  # it stays with its log
    # In the foreground: the Job stays until its pods are gone. Absent pods of an absent Job are no error.
    wait = f"--timeout={END_TIMEOUT_SECONDS}s"
    environment.kubectl("delete", "job", job, "--ignore-not-found", "--cascade=foreground", "--wait", wait)
    return None


def _conditions(job: Object) -> set[str]:
    """Return the types of a Job's conditions that are true."""
    conditions = job.get("status", {}).get("conditions", [])
    return {condition["type"] for condition in conditions if condition["status"] == "True"}


def refuse_unended(environment: Environment, purposes: Collection[str]) -> None:
    """Refuse to go on while a Job of an earlier command has not ended.

    Raises:
        ClusterError: such a Job exists. The message names it.
    """
    for job in environment.objects("jobs", "--selector", release_selector(SERVER)):
        name = job["metadata"]["name"]
        is_meant = any(name.startswith(f"{CRON_JOB}-{purpose}-") for purpose in purposes)
        if is_meant and not _conditions(job) & {"Complete", "Failed"}:
            raise ClusterError(
                f"Job {name} of another restore has not ended. Wait until it ends, or delete it: "
                f"kubectl --namespace {environment.namespace} delete job {name} --cascade=foreground"
            )


def wait_for(environment: Environment, job: str) -> str:
    """Wait until a Job has ended, and return its log.

    Raises:
        ClusterError: the Job failed, or its pod cannot start. The message has its log.
    """
    deadline = time.monotonic() + POLL_RETRY_SECONDS
    while True:
        try:
            ended = _conditions(json.loads(environment.kubectl("get", "job", job, "--output", "json")))
            if "Complete" in ended:
                return read_log(environment, job)
            pods = environment.objects("pods", "--selector", f"job-name={job}")
        except ClusterError as error:
            if "NotFound" in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)
            continue
        deadline = time.monotonic() + POLL_RETRY_SECONDS
        reason = next(filter(None, map(hopeless_reason, pods)), "")
        if "Failed" in ended or reason:
            log = read_log(environment, job).strip()
            lines = [f"Job {job} in namespace {environment.namespace} failed{f': {reason}' if reason else ''}"]
            raise ClusterError("\n  ".join(lines + log.splitlines()[-20:]))
        time.sleep(POLL_SECONDS)


def read_log(environment: Environment, job: str) -> str:
    """Return what the containers of a Job's newest pod have printed, in their order."""
    pods = environment.objects("pods", "--selector", f"job-name={job}")
    if not pods:
        return ""
    pod = max(pods, key=lambda candidate: str(candidate["metadata"]["creationTimestamp"]))
    status = pod["status"]
    started = {
        container_status["name"]
        for container_status in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
        if "waiting" not in container_status["state"]
    }
    containers = [
        container["name"] for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    ]
    logs = [
        environment.kubectl("logs", pod["metadata"]["name"], "--container", name)
        for name in containers
        if name in started
    ]
    return "".join(logs)
