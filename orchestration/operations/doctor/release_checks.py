"""Checks of the releases: values, image, pods, versions, password, backups, retention."""

import asyncio
from datetime import UTC, datetime, timedelta

from orchestration.diagnosis_table import WAITING_REASONS
from orchestration.errors import ClusterError
from orchestration.operations import port_forward, release_diagnosis, release_inputs
from orchestration.operations.doctor.cluster_checks import count, shorten
from orchestration.operations.doctor.findings import Finding, check, failed, ok, warning
from orchestration.operations.doctor.installation import (
    CLUSTERS,
    COMPONENT,
    Installation,
    UncheckedError,
    database_mode,
    is_cluster,
    variables_of,
    version_of,
)
from orchestration.operations.environment import POOL, RELEASES, SERVER, Object

GROUP = "releases"

WEAK_PASSWORDS = frozenset(
    {"admin", "changeme", "change-me", "default", "demo", "example", "password", "prefect", "secret", "test", "user"}
)
"""Passwords that examples have."""

MIN_PASSWORD_LENGTH = 12

BACKUP_AGE = timedelta(days=2)
"""How old the last backup may be."""

NGINX_TIMEOUTS = ("proxy-read-timeout", "proxy-send-timeout")
MIN_TIMEOUT_SECONDS = 600
"""The annotations by which nginx keeps a websocket open, and the shortest time that does not disturb the UI."""

RETENTION, VACUUM = "RETENTION_RUNS_DAYS", "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"
"""The variables by which this project and Prefect's vacuum delete old runs."""


@check(GROUP, "chart values")
async def check_chart_values(installation: Installation) -> Finding:
    """The charts accept the values of the environment."""
    for release in RELEASES:
        try:
            await installation.read_release(release)
        except ClusterError as error:
            reason = " ".join(str(error).partition("execution error at")[2].partition("): ")[2].split())
            return failed(
                f"{release}: {reason or ' '.join(str(error).split())}",
                f"Correct {installation.cluster.values / release}.yaml",
            )
    return ok(f"the values of {shorten(RELEASES)} are accepted")


@check(GROUP, "helm releases")
async def check_helm_releases(installation: Installation) -> Finding:
    """The newest revision of each release is deployed."""
    await installation.ensure_installed()
    shown = []
    for release in RELEASES:
        revisions = await installation.read_revisions(release)
        if not revisions:
            return failed(f"{release} is not installed", f"make deploy ENV={installation.cluster.name}")
        newest = revisions[-1]
        if newest["status"] != "deployed":
            return failed(
                f"revision {newest['revision']} of {release} is {newest['status']}",
                f"make deploy ENV={installation.cluster.name} FORCE=1, or make rollback",
            )
        shown.append(f"{release} {newest['revision']}")
    return ok(f"revisions {', '.join(shown)}")


@check(GROUP, "pods")
async def check_pods(installation: Installation) -> Finding:
    """All pods of the releases are ready."""
    await installation.ensure_installed()
    environment = installation.cluster
    lines = [
        line
        for release in RELEASES
        for line in await asyncio.to_thread(release_diagnosis.explain_release, environment, release)
        if not line.startswith("event")
    ]
    if lines:
        return failed(f"{lines[0]}{f' ({len(lines) - 1} more lines)' if lines[1:] else ''}",
                      f"make status ENV={environment.name}")  # fmt: skip
    pods = [
        pod
        for release in RELEASES
        for pod in await installation.read_objects("pods", "--selector", release_diagnosis.release_selector(release))
    ]
    if not pods:
        return failed("the releases have no pod", f"kubectl -n {environment.namespace} get events")
    return ok(f"{count(pods, 'pod')} ready or completed")


@check(GROUP, "image")
async def check_image(installation: Installation) -> Finding:
    """The images can be pulled."""
    pods = await installation.read_objects("pods")
    for pod in pods:
        for status in release_diagnosis.container_statuses(pod):
            waiting = (status.get("state") or {}).get("waiting") or {}
            reason = WAITING_REASONS.get(waiting.get("reason", ""))
            if reason and reason.diagnosis == "image":
                return failed(
                    f"{status['image']} of pod {pod['metadata']['name']}: {waiting['reason']}",
                    "See docs/diagnoses/image.md, or run: orchestrate explain image",
                )
    if await installation.is_installed():
        return ok("no pod waits for its image")
    if installation.is_local:
        return ok("make deploy builds and pushes it")
    try:
        image = await asyncio.to_thread(release_inputs.checkout_image, installation.cluster)
    except ClusterError as error:
        text, _, cure = " ".join(str(error).split()).partition(". ")
        return failed(text, cure)
    return ok(f"{image.repository} has {image.digest[:19]}")


@check(GROUP, "prefect versions")
async def check_prefect_versions(installation: Installation) -> Finding:
    """Server, charts and this checkout have versions of Prefect that work together."""
    import prefect

    server = await installation.server.ask("GET", "/admin/version")
    found = {"this checkout": prefect.__version__}
    for release in RELEASES if installation.has_cluster else ():
        if await installation.read_revisions(release):
            for manifest in await installation.read_release(release):
                if manifest["kind"] == "Deployment":
                    found[f"chart {release}"] = manifest["metadata"]["labels"]["app.kubernetes.io/version"]
    minor = version_of(server)
    for name, version in found.items():
        lag = minor[1] - version_of(version)[1]
        if version_of(version)[0] != minor[0] or not 0 <= lag <= 1:
            return failed(
                f"the server is {server}, {name} is {version}",
                "Worker, runs and clients may be one minor version older than the server: docs/upgrading.md",
            )
    older = [f"{name} {version}" for name, version in found.items() if version != server]
    if older:
        return warning(
            f"the server is {server}; {', '.join(older)}", "Deploy this checkout, so that versions are equal"
        )
    return ok(f"Prefect {server} everywhere")


@check(GROUP, "password")
async def check_password(installation: Installation) -> Finding:
    """The API has a password that no example has."""
    auth = (await installation.read_values(SERVER))["auth"]
    if not auth["enabled"]:
        return failed("auth.enabled is false: everyone who reaches the API can run code", "Set auth.enabled to true")
    await installation.ensure_installed()
    user, _, password = (await asyncio.to_thread(port_forward.read_credentials, installation.cluster)).partition(":")
    if password.lower() in WEAK_PASSWORDS or password == user or len(password) < MIN_PASSWORD_LENGTH:
        return failed(
            f"the password of {user} is one of an example, or shorter than {MIN_PASSWORD_LENGTH} characters",
            "Change it: docs/how-to/rotate-passwords.md",
        )
    return ok(f"the password of {user} has {len(password)} characters")


@check(GROUP, "ingress timeouts")
async def check_ingress_timeouts(installation: Installation) -> Finding:
    """The proxy in front of the API keeps websockets open: logs and events of the UI, and the worker's channel."""
    shown = []
    for found in await installation.read_release(SERVER):
        if found["kind"] == "HTTPRoute":
            for rule in found["spec"].get("rules") or []:
                request = (rule.get("timeouts") or {}).get("request", "0s")
                if request != "0s":
                    return warning(f"the HTTPRoute ends requests after {request}", "Set httpRoute.timeouts to 0s")
            shown.append("HTTPRoute without a timeout")
        if found["kind"] == "Ingress":
            annotations = found["metadata"].get("annotations") or {}
            class_name = found["spec"].get("ingressClassName") or ""
            times = {name: annotations.get(f"nginx.ingress.kubernetes.io/{name}", "60") for name in NGINX_TIMEOUTS}
            short = [f"{name} {time}" for name, time in times.items() if int(time) < MIN_TIMEOUT_SECONDS]
            if short and "nginx" in class_name:
                return warning(
                    f"nginx closes websockets that are idle: {shorten(short)} s",
                    "Keep the default of ingress.annotations: 3600",
                )
            shown.append(f"Ingress {class_name or 'of the default class'}")
    return ok(", ".join(shown) or "no Ingress or HTTPRoute in the release")


@check(GROUP, "retention")
async def check_retention(installation: Installation) -> Finding:
    """The server deletes old runs."""
    if installation.is_local:
        raise UncheckedError("a local environment keeps nothing that lasts")
    component = "services" if (await installation.read_values(SERVER))["services"]["separate"] else "api"
    variables = variables_of(await installation.read_component(SERVER, component))
    if days := variables.get(RETENTION, {}).get("value"):
        return ok(f"runs are deleted after {days} days")
    if "flow_runs" in str(variables.get(VACUUM, {}).get("value", "")):
        return warning(
            "Prefect's vacuum deletes old runs, also the last successful run of a deployment",
            f"Set retention.days.runs in {SERVER}.yaml, and remove {VACUUM}",
        )
    return warning(
        "runs are kept for ever: the database grows without bound", f"Set retention.days.runs in {SERVER}.yaml"
    )


@check(GROUP, "backup")
async def check_backup(installation: Installation) -> Finding:
    """A backup of the server's database was made within two days, or its WAL is archived."""
    if installation.is_local:
        raise UncheckedError("a local environment keeps nothing that lasts")
    mode = database_mode(await installation.read_values(SERVER))
    if mode == "cnpg":
        return await _check_archive(installation)
    jobs = [job for job in await installation.read_objects("cronjobs") if _is_backup(job)]
    if not jobs:
        if mode == "external":
            raise UncheckedError("the operator of the external database backs it up; no CronJob here does")
        return warning("no CronJob backs the bundled database up", "See docs/how-to/back-up.md")
    newest = max((job.get("status") or {}).get("lastSuccessfulTime") or "" for job in jobs)
    if not newest:
        return warning(f"CronJob {jobs[0]['metadata']['name']} has made no backup yet",
                       f"See its Jobs: kubectl -n {installation.cluster.namespace} get jobs")  # fmt: skip
    age = datetime.now(UTC) - datetime.fromisoformat(newest)
    if age > BACKUP_AGE or all(job["spec"].get("suspend") for job in jobs):
        return failed(
            f"the last backup is {age.total_seconds() / 3600:.0f} h old",
            f"See its Jobs: kubectl -n {installation.cluster.namespace} get jobs",
        )
    return ok(f"the last backup is {age.total_seconds() / 3600:.0f} h old")


async def _check_archive(installation: Installation) -> Finding:
    """Return whether CloudNativePG archives the WAL of the server's Cluster, and has a base backup."""
    page = "See docs/how-to/cloudnative-pg.md"
    wanted = [found["metadata"]["name"] for found in await installation.read_release(SERVER) if is_cluster(found)]
    clusters = await installation.read_objects(CLUSTERS)
    for cluster in clusters:
        if cluster["metadata"]["name"] in wanted:
            conditions = (cluster.get("status") or {}).get("conditions") or []
            states = {condition["type"]: condition for condition in conditions}
            archiving = states.get("ContinuousArchiving") or {}
            if archiving.get("status") != "True":
                return failed(f"the WAL is not archived: {archiving.get('message') or 'no file yet'}", page)
            if (states.get("LastBackupSucceeded") or {}).get("status") != "True":
                return warning("no base backup has succeeded, or the last one failed: nothing can be recovered", page)
            return ok("the WAL is archived, and the last base backup succeeded")
    return failed(f"Cluster {', '.join(wanted)} of CloudNativePG is gone", page)


def _is_backup(job: Object) -> bool:
    component = (job["metadata"].get("labels") or {}).get(COMPONENT, "")
    return "backup" in (component, *job["metadata"]["name"].split("-"))


@check(GROUP, "replicas")
async def check_replicas(installation: Installation) -> Finding:
    """No component that a shared environment needs all the time has a single pod."""
    if installation.is_local:
        raise UncheckedError("a local environment has one pod of each component")
    single = []
    needed = ((SERVER, "api"), (SERVER, "services"), (SERVER, "pgbouncer"), (POOL, "worker"), (POOL, "reconciler"))
    for release, component in needed:
        for found in await installation.read_release(release):
            labels = found["metadata"].get("labels") or {}
            is_meant = found["kind"] == "Deployment" and labels.get(COMPONENT) == component
            if is_meant and found["spec"].get("replicas", 2) < 2:
                single.append(component)
    clusters = [found for found in await installation.read_release(SERVER) if is_cluster(found)]
    single += ["database" for cluster in clusters if cluster["spec"]["instances"] < 2]
    if single:
        return warning(f"one pod of {shorten(single, 6)}: its node's end interrupts it", "See docs/how-to/scale-out.md")
    return ok("two pods or more of each component")
