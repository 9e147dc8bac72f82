"""Store, list and fetch backups of the server's database, and finish a restore, in the pods of the server's chart.

python -m orchestration.recovery store --to s3://BUCKET/PREFIX --folder /work
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from botocore.exceptions import BotoCoreError

from orchestration.errors import PipelineError
from orchestration.recovery.store import NEWEST, Backup, BackupError, Store, time_of
from orchestration.terminal import printable_output


def _store(store: Store, options: argparse.Namespace) -> int:
    _prune(store, options)  # before, too: a full volume has no space for the next backup
    backup = store.put(options.folder, options.recipient)
    print(f"Backup {backup.name} is in {store.url}: {backup.size} bytes, {backup.rows} rows, schema {backup.revision}.")
    _prune(store, options)
    return 0


def _prune(store: Store, options: argparse.Namespace) -> None:
    for name in store.prune(options.keep_last, options.keep_days, datetime.now(UTC)):
        print(f"Backup {name} was deleted: it was older than {options.keep_days} days.")


def _list(store: Store, options: argparse.Namespace) -> int:
    backups = store.backups()
    if options.json:
        facts = [{key: value for key, value in asdict(backup).items() if key != "counts"} for backup in backups]
        print(json.dumps(facts, indent=2))
        return 0
    for backup in backups:
        print(_line(backup))
    if not backups:
        print(f"There is no backup in {store.url}.")
    return 0


def _line(backup: Backup) -> str:
    kind = "encrypted" if backup.is_encrypted else "plain"
    return f"{backup.name}  {backup.size / 2**20:9.1f} MiB  {backup.rows:>12} rows  schema {backup.revision}  {kind}"


def _fetch(store: Store, options: argparse.Namespace) -> int:
    backup = store.fetch(options.name, options.folder, options.identity)
    print(_line(backup))
    return 0


def _finish(_: Store, options: argparse.Namespace) -> int:
    from orchestration.recovery import restored_database

    restored_database.finish(
        time_of(options.name), options.stopped, options.executions, start_unknown=options.start_unknown
    )
    return 0


COMMANDS: dict[str, tuple[Callable[[Store, argparse.Namespace], int], str]] = {
    "store": (_store, "store the verified dump in a folder, and delete old backups"),
    "list": (_list, "list the backups, the newest first"),
    "fetch": (_fetch, "copy a backup into a folder"),
    "finish": (_finish, "migrate and settle the restored database, and put it in the place of the server's database"),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. All commands take the same options, as one pod template has them."""
    made = argparse.ArgumentParser(prog="python -m orchestration.recovery", description=__doc__.splitlines()[0])
    texts = "; ".join(f"{name}: {text}" for name, (_, text) in COMMANDS.items())
    made.add_argument("command", choices=COMMANDS, help=texts)
    made.add_argument("--to", required=True, metavar="URL", help="file:///PATH or s3://BUCKET/PREFIX")
    made.add_argument("--endpoint", default="", metavar="URL", help="an S3 service that is not Amazon's")
    made.add_argument("--region", default="", help="the region of the bucket")
    made.add_argument("--folder", type=Path, default=Path("/work"), help="the folder with the dump")
    made.add_argument("--recipient", action="append", default=[], metavar="KEY", help="encrypt for this key of age")
    made.add_argument("--keep-last", type=int, default=7, help="how many of the newest backups stay")
    made.add_argument("--keep-days", type=int, default=30, help="for how many days backups stay")
    made.add_argument("--name", default=NEWEST, help="the backup to fetch, or that was restored")
    made.add_argument("--identity", type=Path, metavar="FILE", help="age's secret keys, for an encrypted backup")
    made.add_argument("--stopped", default="", metavar="TIME", help="since when no worker claims runs")
    made.add_argument("--executions", type=Path, metavar="FILE", help="the Jobs and pods of runs")
    made.add_argument("--start-unknown", action="store_true", help="start due runs that may have been executed before")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


@printable_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        store = Store(options.to, options.endpoint, options.region)
        try:
            return COMMANDS[options.command][0](store, options)
        except (OSError, BotoCoreError) as error:
            raise BackupError(f"{store.url} cannot be used: {error}. Check its permissions and its space") from None
    except PipelineError as error:
        print(f"{error}{'' if str(error).endswith('.') else '.'}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
