"""Roll back the newest deploy of an environment: both releases, with the pool and the deployments."""

from orchestration.errors import ClusterError
from orchestration.operations import helm_release, namespace_of_runs, rollout
from orchestration.operations.deploy_history import DeployHistory
from orchestration.operations.environment import POOL, RELEASES, Environment
from orchestration.progress import step


def rollback(environment: Environment, *, force: bool = False) -> None:
    """Roll back what the newest deploy changed. The next rollback takes back the deploy before.

    Args:
        environment: the environment to roll back.
        force: set aside a deploy that may still be in progress.

    Raises:
        ClusterError: there is no earlier deploy, runs in progress would be left behind, Helm no longer keeps its
            revision, or it does not become ready.
    """
    history = DeployHistory(environment)
    if not history.deploys:
        raise ClusterError(f"There is nothing to roll back: no deploy is recorded in {environment.namespace}")
    revisions = {release: helm_release.revisions(environment, release) for release in RELEASES}
    newest = history.deploys[-1]
    for release, number in newest.before.items():
        if number and number not in [revision["revision"] for revision in revisions[release]]:
            raise ClusterError(
                f"{release}: revision {number}, which ran before the deploy of {newest.at}, is not kept. "
                f"Check out what was deployed before, and: make deploy ENV={environment.name}"
            )
    if newest.before.get(POOL):
        namespace_of_runs.check_rollback(environment, newest.before[POOL])
    target = history.begin_rollback()
    for release in RELEASES:
        if release not in target.before:
            continue
        number = target.before[release]
        if not number:
            print(f"{release} was installed by that deploy, and stays.")
            continue
        helm_release.set_aside_interrupted(environment, release, revisions[release], force)
        with step(f"Rolling {release} back to revision {number}", "20 s"):
            try:
                environment.helm("rollback", release, str(number), "--timeout", "10m", "--history-max", "20")
                rollout.wait_until_ready(environment, release)
            except ClusterError as error:
                raise ClusterError(rollout.explain_failure(environment, release, str(error), [])) from None
        inputs = history.inputs.get(release, {}).get(str(number), "")
        history.record_inputs(release, helm_release.newest_revision(environment, release), inputs)
    history.complete_rollback()
    print(f"The deploy of {target.at} is taken back.")
