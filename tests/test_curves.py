"""The pictures of recorded benchmarks, and their place in the docs. The figures here are invented."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs import generate
from tests.benchmarks import curves
from tests.benchmarks.table import Figure

POINTS = [
    {"clients": 4, "requests_per_second": 40.0, "runs_per_minute": 126, "p50_ms": 90, "p99_ms": 200},
    {"clients": 8, "requests_per_second": 50.0, "runs_per_minute": 158, "p50_ms": 150, "p99_ms": 1400},
]
PHASES = [
    Figure("a request while replicas are killed", "ms", [80.0, 90.0, 1500.0], "2 ConnectError"),
    Figure("runs that failed", "", [0.0], "goal 0"),
]
LOAD = {
    "requests_of_a_run": 19,
    "replicas": {"1": {"knee_clients": 8, "points": POINTS}, "2": {"knee_clients": 4, "points": POINTS}},
    "phases": [figure.record for figure in PHASES],
}
ROWS_OF_LOAD = (
    "| 1 | 158 | 50 | 8 | 150 | 1,400 |",
    "| a request while replicas are killed | ms | 3 | 90 | 1,500 | 1,500 | 2 ConnectError |",
    "| runs that failed |  | 1 | 0 |  |  | goal 0 |",
)
PAGE = {"name": "runs", "p50_ms": 300, "complete_p95_ms": 2500}
SLOWEST = {"slowest_request": "POST /task_runs/paginate", "slowest_request_p95_ms": 800}
FIGURES: dict[Path, dict[str, Any]] = {
    curves.LOAD: LOAD,
    curves.PGBOUNCER: LOAD,
    curves.UPGRADE: {"steps": [{"name": "migration 1a2b", "seconds": 12.5, "lock_seconds": 0.75}]},
    curves.RETENTION: {
        "logs": 20_000,
        "events": 10_000,
        "loads": 20,
        "limit_seconds": 240,
        "sizes": [
            {"runs": 100, "megabytes": 90, "pages": [PAGE | SLOWEST | {"p95_ms": 150}]},
            {"runs": 1000, "megabytes": 800, "pages": [PAGE | SLOWEST | {"p95_ms": 1400}]},
        ],
        "deletions": [{"name": "logs", "old": 16_000, "deleted": 2000, "per_second": 15_000}],
        "transaction_seconds": {"during retention": 0.4, "during Prefect's vacuum": 0.07},
        "write_p95_ms": {"without retention": 30, "during retention": 70},
    },
}
SHOWN = {
    curves.LOAD: ("load", ROWS_OF_LOAD, "158 runs/min"),
    curves.PGBOUNCER: ("load-pgbouncer", ROWS_OF_LOAD, "158 runs/min"),
    curves.UPGRADE: ("upgrade", ("| migration 1a2b | 12.50 | 0.75 |",), "12.50 s"),
    curves.RETENTION: (
        "retention",
        (
            "| runs | 150 → 1,400 | 300 | 2,500 | 800: `POST /task_runs/paginate` |",
            "| logs | 16,000 | 2,000 | 15,000 |",
        ),
        "1,400 ms",
    ),
}


@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)
def test_docs_show_a_benchmark_once_it_is_recorded_and_drawn(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, rows, label = SHOWN[file]
    results, reference = tmp_path / file.name, tmp_path / "reference"
    (tmp_path / "images").mkdir()
    for name in ("LOAD", "PGBOUNCER", "UPGRADE", "RETENTION"):
        if getattr(curves, name) == file:
            monkeypatch.setattr(curves, name, results)
    monkeypatch.setattr(curves, "PICTURES", curves.PICTURES | {results: curves.PICTURES[file]})
    monkeypatch.setattr(generate, "REFERENCE", reference)
    page, make = generate.BLOCKS[block]
    assert "No figures yet" in make()
    curves.record(results, FIGURES[file], load_before=0)
    assert "No figures yet" in make(), "a link to a picture that does not exist"
    curves.draw_all(tmp_path / "images")
    assert label in (tmp_path / "images" / curves.PICTURES[file]).read_text()
    assert [row for row in rows if row not in make()] == []
    [image] = re.findall(r"!\[.+\]\((.+)\)", make())
    assert (reference / page).parent.joinpath(image).resolve().exists()


def test_busy_machine_records_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "load.json"
    curves.record(file, {}, load_before=1000)
    assert not file.exists()
    assert "Not recorded for the picture: the load before was 1000.0" in capsys.readouterr().err
    curves.record(file, {"replicas": {}}, load_before=0)
    assert {"date", "commit", "machine", "replicas"} == json.loads(file.read_text()).keys()
