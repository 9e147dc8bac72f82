"""The component backup of the server's chart: its objects, its permissions and refused values."""

import copy
import re
from typing import Any

import pytest

from orchestration.errors import ClusterError
from orchestration.settings import ROOT
from tests.helm.rendering import Object, added, assert_restricted, environment, one, one_in_four, render
from tests.helm.test_cloudnative_pg import ARCHIVE
from tests.helm.test_prefect_server import MAXIMAL, TAG
from tests.helm.test_prefect_work_pool import MAXIMAL as POOL_MAXIMAL

NAME = "test-prefect-server-backup"
RECIPIENT = "age1" + "q" * 58
S3: Object = {
    "enabled": True,
    "storage": "s3",
    "s3": {"bucket": "backups", "endpoint": "http://minio:9000", "region": "eu-central-1", "existingSecret": "keys"},
    "encryption": {"recipients": [RECIPIENT]},
    "alert": {"enabled": True, "labels": {"release": "prometheus"}},
}


def _render(**backup: Any) -> list[Object]:
    return render("prefect-server", TAG | {"backup": {"enabled": True} | backup})


def _pod(objects: list[Object]) -> Object:
    spec: Object = one(objects, "CronJob", NAME)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return spec


def test_backup_adds_these_objects() -> None:
    assert added(_render(), render("prefect-server", TAG)) == [
        f"ConfigMap/{NAME}",
        f"CronJob/{NAME}",
        f"Job/{NAME}-volume-1",
        f"NetworkPolicy/{NAME}",
        f"PersistentVolumeClaim/{NAME}s",
        f"ServiceAccount/{NAME}",
    ]
    assert_restricted(_render())
    assert_restricted(render("prefect-server", MAXIMAL | {"backup": S3}))


def test_page_names_every_secret_that_an_installation_makes() -> None:
    """The page's command saves Secrets of the type Opaque. cert-manager issues a lost certificate again."""
    cnpg: Object = {"database": {"mode": "cnpg", "cnpg": {"archive": ARCHIVE}}}
    objects = [
        *render("prefect-server", MAXIMAL | {"fullnameOverride": ""}, "prefect-server"),
        *render("prefect-server", TAG | cnpg, "prefect-server"),
        *render("prefect-work-pool", POOL_MAXIMAL | {"fullnameOverride": ""}, "prefect-work-pool"),
    ]
    secrets = [manifest for manifest in objects if manifest["kind"] == "Secret"]
    assert {secret.get("type", "Opaque") for secret in secrets} == {"Opaque"}
    made = {secret["metadata"]["name"] for secret in secrets}
    made |= {manifest["spec"]["secretName"] for manifest in objects if manifest["kind"] == "Certificate"}
    [cluster] = [manifest for manifest in objects if manifest["kind"] == "Cluster"]
    made |= {f"{cluster['metadata']['name']}-{part}" for part in ("app", "ca")}
    assert "{name: warehouse, " in (ROOT / "k8s/overlays/local/warehouse/secret").read_text()
    page = (ROOT / "docs/how-to/back-up.md").read_text()
    table = page[page.index("## What is stored where") : page.index("## Before you start")]
    lists = re.findall(r"Secrets? ((?:`[^`]+`(?:, (?:and )?| and )?)+)", table)
    named = set(re.findall(r"`([^`]+)`", "".join(lists)))
    assert named == made | {"warehouse", "sh.helm.release.v1.*"}


def test_pod_has_no_token_and_reaches_the_database_alone() -> None:
    objects = _render()
    pod = _pod(objects)
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == (NAME, False)
    assert one(objects, "ServiceAccount", NAME)["automountServiceAccountToken"] is False
    assert not [manifest for manifest in objects if "Role" in manifest["kind"]]
    policy = one(objects, "NetworkPolicy", NAME)["spec"]
    assert "ingress" not in policy
    _, database = policy["egress"]
    assert database["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "database"
    [ingress] = one(objects, "NetworkPolicy", "test-prefect-server-database")["spec"]["ingress"]
    admitted = {peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in ingress["from"]}
    assert "backup" in admitted
    [closed] = one(render("prefect-server", TAG), "NetworkPolicy", "test-prefect-server-database")["spec"]["ingress"]
    assert len(closed["from"]) == len(ingress["from"]) - 1


def test_dump_is_made_by_the_image_of_the_database() -> None:
    [dump] = _pod(_render())["initContainers"]
    assert dump["image"] == "postgres:17.6"
    assert environment(dump)["PGPASSWORD"]["secretKeyRef"]["name"] == "test-prefect-server-database"
    external = {"bundled": {"enabled": False}, "external": {"existingSecret": "db"}}
    image = {"repository": "registry.example.com/postgres", "tag": "18.1"}
    values = TAG | {"database": external, "backup": {"enabled": True, "image": image}}
    [dump] = _pod(render("prefect-server", values))["initContainers"]
    assert dump["image"] == "registry.example.com/postgres:18.1"
    assert environment(dump)["CONNECTION_URL"] == {"secretKeyRef": {"name": "db", "key": "connection-url"}}


def test_claim_is_bound_by_a_job_of_the_release() -> None:
    """`helm --wait` waits for claims, which most storage classes bind when a pod uses them."""
    objects = _render()
    spec = one(objects, "Job", f"{NAME}-volume-1")["spec"]["template"]["spec"]
    claim = {"claimName": f"{NAME}s"}
    assert {"name": "backups", "persistentVolumeClaim": claim} in spec["volumes"]
    assert spec["automountServiceAccountToken"] is False
    kept = _render(volume={"existingClaim": "mine"})
    assert not [manifest for manifest in kept if manifest["kind"] == "PersistentVolumeClaim"]
    assert {"name": "backups", "persistentVolumeClaim": {"claimName": "mine"}} in _pod(kept)["volumes"]


def test_script_is_that_of_the_chart() -> None:
    script = one(_render(), "ConfigMap", NAME)["data"]["backup"]
    assert script == (ROOT / "helm/prefect-server/files/backup").read_text()


def test_s3_needs_no_volume_and_its_addresses_are_reachable() -> None:
    objects = _render(**S3)
    [store] = _pod(objects)["containers"]
    assert store["args"][3:] == [
        "store", "--to=s3://backups/prefect/test", "--endpoint=http://minio:9000", "--region=eu-central-1",
        "--keep-last=7", "--keep-days=30", f"--recipient={RECIPIENT}",
    ]  # fmt: skip
    assert {"secretRef": {"name": "keys"}} in store["envFrom"]
    assert not [
        manifest
        for manifest in objects
        if manifest["kind"] == "PersistentVolumeClaim" or "-volume-" in str(manifest["metadata"])
    ]
    assert len(one(objects, "NetworkPolicy", NAME)["spec"]["egress"]) == 3


def test_alert_counts_the_age_of_the_last_successful_job() -> None:
    rule = one(_render(**S3), "PrometheusRule", NAME)
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    [alert] = rule["spec"]["groups"][0]["rules"]
    selector = f'{{namespace="prefect",cronjob="{NAME}"}}'
    assert f"kube_cronjob_status_last_successful_time{selector}" in alert["expr"]
    assert f"kube_cronjob_created{selector}" in alert["expr"]
    assert alert["expr"].rstrip().endswith(f"> {26 * 3600}")
    assert "{{ $value | humanizeDuration }}" in alert["annotations"]["description"]
    page, _, heading = alert["annotations"]["runbook_url"].partition("#")
    assert f"## alert {alert['alert']}".lower() in (ROOT / page).read_text().lower()
    assert heading == f"alert-{alert['alert']}".lower()


@pytest.mark.parametrize(
    ("values", "message"),
    one_in_four([
        ({"storage": "s3"}, "backup.storage=s3 needs backup.s3.bucket"),
        ({"image": {"repository": "postgres"}}, "backup.image.repository is set without backup.image.tag"),
        ({"image": {"repository": "postgres", "tag": "latest"}}, "backup.image.tag is `latest`"),
        ({"enabled": False, "alert": {"enabled": True}}, "backup.alert.enabled=true needs backup.enabled=true"),
        ({"encryption": {"recipients": ["AGE-SECRET-KEY-1"]}}, "/backup/encryption/recipients/0"),
        ({"keep": {"last": 0}}, "/backup/keep/last"),
        ({"pod": {"sidecars": [{"name": "a", "image": "a"}]}}, "backup.pod.sidecars is set"),
    ]),
)  # fmt: skip
def test_wrong_values_are_refused(values: Object, message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        _render(**copy.deepcopy(values))
    assert message in str(caught.value)
