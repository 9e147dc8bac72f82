"""Whether deployments can run, before they ship and without a server."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.deployments import desired as wanted
from orchestration.deployments import schedules
from orchestration.deployments.desired import Desired
from orchestration.deployments.resources import DEPLOYMENT, POOL, QUEUE
from orchestration.deployments.schedules import title
from orchestration.errors import DeploymentsError

TIMES = 5
"""How many of a schedule's next times are shown."""


def check(paths: Sequence[str | Path], *, owner: str = "", pool: str = "", quota: Path | None = None) -> Desired:
    """Read the files as a sync does, and see that every run would fit its namespace.

    Args:
        paths: files of desired state.
        owner: as for a sync.
        pool: of deployments that name none.
        quota: a file with the namespace's ResourceQuota and LimitRange objects.

    Raises:
        DeploymentsError: the first mistake.
    """
    desired = wanted.read(paths, owner=owner, default_pool=pool, offline=True)
    pools = {each.key: each for each in desired.of(POOL)}
    queues = {each.key for each in desired.of(QUEUE)}
    elsewhere: set[str] = set()
    for each in desired.of(DEPLOYMENT):
        name, queue = each.fields["work_pool_name"], each.fields["work_queue_name"]
        if name not in pools:
            elsewhere.add(name)
        elif queue != "default" and f"{name}/{queue}" not in queues:
            raise DeploymentsError(
                f"{each.where}: deployment {each.key} wants the queue {queue}, which the work pool {name} does not "
                f"have. Add it in {pools[name].where}"
            )
    if elsewhere:
        desired.notes.append(
            f"work pool {', '.join(sorted(elsewhere))} is not in these files: that it exists is seen by plan and sync"
        )
    if quota:
        _fits(desired, quota)
    return desired


def _fits(desired: Desired, quota: Path) -> None:
    from orchestration.deployments import quota_file
    from orchestration.deployments.quota import find_problems

    namespace = quota_file.read(quota)
    pools = {each.key: each for each in desired.of(POOL)}
    for each in desired.of(DEPLOYMENT):
        pool = pools.get(each.fields["work_pool_name"])
        if pool is None or pool.fields["type"] != "kubernetes":
            continue
        template: dict[str, Any] = pool.fields["base_job_template"] or {}
        for problem in find_problems(template, each.fields["job_variables"], namespace):
            raise DeploymentsError(f"{each.where}: deployment {each.key}: {problem}")


def show(desired: Desired) -> None:
    """Print each deployment with the next times of its schedules."""
    for each in desired.of(DEPLOYMENT):
        print(f"{each.key}  {each.fields['entrypoint']}  {each.fields['work_pool_name']}")
        for schedule in each.fields["schedules"].values():
            times = schedules.next_times(schedule["schedule"], TIMES)
            print(f"    {title(schedule['schedule'])}: {', '.join(map(_said, times))}")
    for note in desired.notes:
        print(f"! {note}")
    number = len(desired.of(DEPLOYMENT))
    print(f"{desired.owner}: {number} deployment{'' if number == 1 else 's'} can ship.")


def _said(moment: datetime) -> str:
    return f"{moment:%a %Y-%m-%d %H:%M}" + (f":{moment:%S}" if moment.second else "")
