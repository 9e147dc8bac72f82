"""Deploy the releases of an environment, and uninstall them."""

import itertools

from orchestration.errors import ClusterError
from orchestration.operations import helm_release, namespace_of_runs, release_inputs, rollout, sync_dry_run
from orchestration.operations.deploy_history import DeployHistory
from orchestration.operations.environment import OVERLAYS, POOL, RELEASES, Environment, run_program
from orchestration.operations.release_inputs import Image
from orchestration.progress import step

NEEDED_RIGHTS = (
    ("create", "deployments.apps"),
    ("create", "secrets"),
    ("create", "configmaps"),
    ("create", "roles.rbac.authorization.k8s.io"),
)
"""Verbs and kinds that a deploy needs in its namespaces. One of each sort stands for the others."""


def check_preconditions(environment: Environment) -> None:
    """Check that the checkout and the cluster's user allow a deploy.

    Raises:
        ClusterError: the checkout has uncommitted changes and the environment is shared, or the user lacks a right.
    """
    if environment.name != "local":
        changed = run_program(["git", "status", "--porcelain"]).splitlines()
        if changed:
            raise ClusterError(
                f"ENV={environment.name} deploys only committed files: the checkout has {len(changed)} uncommitted "
                f"changes ({changed[0].split()[-1]}). Commit or stash them"
            )
    for namespace, (verb, kind) in itertools.product(environment.namespaces, NEEDED_RIGHTS):
        if not _is_allowed(environment, namespace, verb, kind):
            raise ClusterError(
                f"The user of {environment.context} may not {verb} {kind} in namespace {namespace}. "
                "Ask for a Role with this right, or name another KUBE_CONTEXT"
            )


def _is_allowed(environment: Environment, namespace: str, verb: str, kind: str) -> bool:
    try:
        return environment.kubectl("auth", "can-i", verb, kind, "--namespace", namespace).strip() == "yes"
    except ClusterError as error:  # kubectl exits with 1 to say no
        if str(error).strip() == "no":
            return False
        raise


def deploy(environment: Environment, *, force: bool = False) -> None:
    """Deploy the checkout to the environment. Idempotent: a release with the same inputs is skipped.

    Args:
        environment: the environment to deploy.
        force: upgrade a release that is up to date, too, and set aside a deploy that may still be in progress.

    Raises:
        ClusterError: with the object, event and log line that show the cause, and how to roll back.
    """
    check_preconditions(environment)
    image = release_inputs.checkout_image(environment)
    with step(f"Applying k8s/overlays/{environment.name}", "1 s"):
        apply_surroundings(environment)
    history = DeployHistory(environment)
    history.begin_deploy()
    for release in RELEASES:
        if release == POOL:
            namespace_of_runs.copy_api_credential(environment)
            namespace_of_runs.copy_ca(environment)
        _deploy_release(environment, release, image, history, force)
    history.complete_deploy()


def apply_surroundings(environment: Environment) -> None:
    """Apply what surrounds the releases in their namespace and in that of the runs."""
    with release_inputs.surroundings(environment) as folders:
        for namespace, folder in zip(environment.namespaces, folders, strict=True):
            environment.kubectl("apply", "--kustomize", str(folder), "--namespace", namespace)
    secret = OVERLAYS / environment.name / "warehouse" / "secret"
    if secret.exists():
        names = ("--context", environment.context, "--namespace", environment.namespace)
        run_program(["env", f"RUNS_NAMESPACE={environment.runs_namespace}", str(secret), *names])


def _deploy_release(environment: Environment, release: str, image: Image, history: DeployHistory, force: bool) -> None:
    former = namespace_of_runs.former_namespaces(environment) if release == POOL else []
    inputs = release_inputs.input_hash(environment, release, image, *former)
    revisions = helm_release.revisions(environment, release)
    if not force and history.is_current(release, revisions, inputs):
        print(f"{release} is up to date: revision {revisions[-1]['revision']}.")
        return
    helm_release.set_aside_interrupted(environment, release, revisions, force)
    with release_inputs.values_options(environment, release, image) as options:
        if release == POOL:
            sync_dry_run.check(environment, sync_dry_run.render_sync(environment, options))
        verb, usual = ("Upgrading", "20 s") if revisions else ("Installing", "30 s")
        with step(f"{verb} {release}", usual):
            description = f"deploy {history.deploys[-1].at}, inputs {inputs}, image {image.digest}"
            history.record_before(release, revisions)
            try:
                environment.helm(
                    "upgrade", "--install", release, str(release_inputs.CHARTS / release), *options,
                    "--description", description, "--timeout", "10m", "--history-max", "20",
                )  # fmt: skip
                rollout.wait_until_ready(environment, release)
            except ClusterError as error:
                raise ClusterError(rollout.explain_failure(environment, release, str(error), revisions)) from None
            history.record_inputs(release, helm_release.newest_revision(environment, release), inputs)


def undeploy(environment: Environment) -> None:
    """Uninstall the releases. The namespaces, the volumes and their passwords stay."""
    for release in reversed(RELEASES):
        if helm_release.revisions(environment, release):
            with step(f"Uninstalling {release}", "5 s"):
                environment.helm("uninstall", release, "--wait", "--timeout", "5m")
        else:
            print(f"{release} is not installed.")
    namespace_of_runs.delete_copies(environment)
    DeployHistory(environment).delete()
    print(
        f"{' and '.join(environment.namespaces)}: volumes and passwords stay. To remove all of it:\n"
        f"  kubectl --context {environment.context} delete namespace {' '.join(environment.namespaces)}"
    )
