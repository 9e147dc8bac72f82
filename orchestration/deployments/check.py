"""Check without a server, before the deploy, whether deployments can run."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.deployments import desired_state, schedules
from orchestration.deployments.desired_state import DesiredState
from orchestration.deployments.resources import DEPLOYMENT, POOL, QUEUE
from orchestration.deployments.schedules import title
from orchestration.errors import DeploymentsError

SHOWN_TIMES = 5
"""How many of a schedule's next times are shown."""


def check(paths: Sequence[str | Path], *, owner: str = "", pool: str = "", quota: Path | None = None) -> DesiredState:
    """Read the files as a sync does, and check that every run fits its namespace.

    Args:
        paths: files of desired state.
        owner: by default the `name` of the first file that has one.
        pool: the work pool of deployments that name none.
        quota: a file with the namespace's ResourceQuota and LimitRange objects.

    Raises:
        DeploymentsError: the first mistake, with FILE:LINE and the cure.
    """
    desired = desired_state.read(paths, owner=owner, default_pool=pool, offline=True)
    pools = {item.key: item for item in desired.of_kind(POOL)}
    queues = {item.key for item in desired.of_kind(QUEUE)}
    undeclared: set[str] = set()
    for deployment in desired.of_kind(DEPLOYMENT):
        name, queue = deployment.fields["work_pool_name"], deployment.fields["work_queue_name"]
        if name not in pools:
            undeclared.add(name)
        elif queue != "default" and f"{name}/{queue}" not in queues:
            raise DeploymentsError(
                f"{deployment.where}: deployment {deployment.key} uses the queue {queue}, which the work pool {name} "
                f"does not have. Add it in {pools[name].where}"
            )
    if undeclared:
        desired.notes.append(
            f"work pool {', '.join(sorted(undeclared))} is not in these files: plan and sync check that it exists"
        )
    if quota:
        _check_quota(desired, quota)
    return desired


def _check_quota(desired: DesiredState, quota: Path) -> None:
    from orchestration.deployments import quota_file
    from orchestration.deployments.quota import find_problems

    namespace = quota_file.read(quota)
    pools = {item.key: item for item in desired.of_kind(POOL)}
    for deployment in desired.of_kind(DEPLOYMENT):
        pool = pools.get(deployment.fields["work_pool_name"])
        if pool is None or pool.fields["type"] != "kubernetes":
            continue
        template: dict[str, Any] = pool.fields["base_job_template"] or {}
        for problem in find_problems(template, deployment.fields["job_variables"], namespace):
            raise DeploymentsError(f"{deployment.where}: deployment {deployment.key}: {problem}")


def show(desired: DesiredState) -> None:
    """Print each deployment with the next times of its schedules."""
    deployments = desired.of_kind(DEPLOYMENT)
    for deployment in deployments:
        fields = deployment.fields
        print(f"{deployment.key}  {fields['entrypoint']}  {fields['work_pool_name']}")
        for schedule in fields["schedules"].values():
            times = schedules.next_times(schedule["schedule"], SHOWN_TIMES)
            print(f"    {title(schedule['schedule'])}: {', '.join(map(_format_time, times))}")
    for note in desired.notes:
        print(f"! {note}")
    print(f"{desired.owner}: {len(deployments)} deployment{'' if len(deployments) == 1 else 's'} can ship.")


def _format_time(moment: datetime) -> str:
    return f"{moment:%a %Y-%m-%d %H:%M}" + (f":{moment:%S}" if moment.second else "")
