"""Prints timelines and runs for `orchestrate why` and `orchestrate runs`."""

import sys
from collections.abc import Sequence
from datetime import UTC

from orchestration import diagnoses
from orchestration.inspection.run_diagnosis import RunDiagnosis
from orchestration.inspection.timeline import TimelineEntry
from orchestration.prefect_api import JSON
from orchestration.terminal import cut, json_text, one_line

_COLOURS = {"state": "1", "log": "2"}
_OTHER_COLOUR = "36"


def print_runs(runs: Sequence[JSON], *, as_json: bool) -> None:
    """Print one line for each run, or JSON."""
    if as_json:
        print(json_text(runs))
        return
    rows = [tuple(one_line(cut(run[column])) for column in ("name", "state", "why")) for run in runs]
    name_width, state_width = (max((len(row[column]) for row in rows), default=0) for column in (0, 1))
    for name, state, why in rows:
        print(f"{name:<{name_width}}  {state:<{state_width}}  {why}")
    if not runs:
        print("None.")


def print_timeline(entries: Sequence[TimelineEntry], diagnosis: RunDiagnosis, *, as_json: bool) -> None:
    """Print a timeline, and below it the diagnosis and the title and path of each page about it; or JSON."""
    if as_json:
        timeline = [entry.as_json() for entry in entries]
        print(json_text({"timeline": timeline, "diagnosis": diagnosis.sentence, "see": diagnosis.pages}))
        return
    is_coloured = sys.stdout.isatty()
    width = max(len(entry.source) for entry in entries)
    for entry in entries:
        first, *further = cut(entry.text).split("\n")
        line = f"{entry.time.astimezone(UTC):%Y-%m-%d %H:%M:%S}  {entry.source:<{width}}  {first}"
        colour = _COLOURS.get(entry.source, _OTHER_COLOUR)
        print(f"\033[{colour}m{line}\033[0m" if is_coloured else line)
        for text in further:
            print(f"{'':<{width + 23}}{text}")
    print(f"\n{one_line(cut(diagnosis.sentence))}")
    for name in diagnosis.diagnoses:
        print(f"{diagnoses.title(name)}. See {diagnoses.path(name)}, or run: orchestrate explain {name}")
