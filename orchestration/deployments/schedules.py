"""Schedules of a deployment: one normal form for files and server, validation, and the next times.

The next times come from the server's own classes, not from croniter or cronsim: a preview must show what will run.
Prefect is imported when a schedule is checked, not before: comparing schedules does not need it.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from orchestration.prefect_compat import recurrence, server_internals

KINDS = ("cron", "interval", "rrule")

HORIZON = timedelta(days=40 * 365)
"""How far ahead a date is searched for: leap years and weekdays repeat within this time."""

_DTSTART = re.compile(r"^DTSTART[^\n]*\n", re.IGNORECASE)
_RANDOM = re.compile(r"(?:^|[\s,])[HR]\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(\.\d+)?")


def normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedule in the form in which the server of Prefect 3.9 returns it.

    Args:
        raw: a schedule of a file or of the server: one of cron, interval (seconds, ISO 8601 or HH:MM:SS) and rrule,
            with timezone, day_or and anchor_date. Other keys are ignored.

    Returns:
        cron: cron, timezone, day_or. interval: interval in seconds, timezone, and anchor_date (UTC, ISO 8601) if `raw`
        has one: else the server takes the time at which it receives the schedule. rrule: rrule, timezone; the server
        prepends a DTSTART if there is none.

    Raises:
        ValueError: the schedule has no such form. :func:`find_problem` also checks that the schedule can run.
    """
    given = [kind for kind in KINDS if raw.get(kind) is not None]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else f"has none of {', '.join(KINDS)}"
        raise ValueError(f"a schedule {found}. Give it exactly one")
    timezone = raw.get("timezone") or "UTC"
    if not isinstance(timezone, str):
        raise ValueError(f'timezone {timezone!r} is not text. Write a name such as "Europe/Berlin"')
    kind, value = given[0], raw[given[0]]
    if kind == "interval":
        schedule = {"interval": _seconds(value), "timezone": timezone}
        if raw.get("anchor_date") is not None:
            schedule["anchor_date"] = _anchor(raw["anchor_date"])
        return schedule
    if not isinstance(value, str) or not value.strip():
        example = '"0 6 * * *"' if kind == "cron" else '"FREQ=DAILY;BYHOUR=6"'
        raise ValueError(f"{kind} {value!r} is not text. Write it in quotes, such as {example}")
    if kind == "cron":
        return {"cron": value.strip(), "timezone": timezone, "day_or": _day_or(raw.get("day_or"))}
    rrule = value.strip()
    if rrule.startswith("{"):  # `prefect deploy` also takes the schedule itself, as JSON
        try:
            inner = json.loads(rrule)
            rrule, timezone = str(inner["rrule"]).strip(), raw.get("timezone") or inner.get("timezone") or "UTC"
        except (ValueError, KeyError, RecursionError):
            raise ValueError(
                f'rrule {value!r} is not a rule. As JSON it is {{"rrule": ..., "timezone": ...}}'
            ) from None
        if not isinstance(timezone, str):
            raise ValueError(f'timezone {timezone!r} of the rrule is not text. Write a name such as "Europe/Berlin"')
    return {"rrule": rrule, "timezone": timezone}


def is_same(desired: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Return whether two normalized schedules are the same.

    Args:
        desired: the schedule of a file. What the file leaves to the server (anchor_date, DTSTART) is not compared.
        live: the schedule of the server.
    """
    if "interval" in desired and "anchor_date" not in desired:
        live = {key: value for key, value in live.items() if key != "anchor_date"}
    if "rrule" in desired and "rrule" in live and "DTSTART" not in desired["rrule"].upper():
        live = {**live, "rrule": _DTSTART.sub("", live["rrule"])}
    return desired == live


def title(schedule: Mapping[str, Any]) -> str:
    """Return a normalized schedule in a few words, such as `cron 0 6 * * * UTC`."""
    kind = next(kind for kind in KINDS if kind in schedule)
    value = schedule[kind]
    if kind == "interval":
        value = f"{value:g} s"
    elif kind == "rrule":
        value = str(value).removeprefix("RRULE:").rpartition("\n")[2]
    return f"{kind} {value} {schedule['timezone']}"


def by_name(listed: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return schedules by slug, and those without a slug by title.

    Args:
        listed: schedules with `schedule` in the normal form, `active`, `parameters`, `slug`, perhaps `id`.
    """
    found: dict[str, dict[str, Any]] = {}
    for schedule in listed:
        name = schedule.get("slug") or title(schedule["schedule"])
        number = 2
        while name in found:  # the same times again, with other parameters
            name = f"{name.rsplit(' #', 1)[0]} #{number}"
            number += 1
        found[name] = {key: value for key, value in schedule.items() if key != "slug"} | {"slug": schedule.get("slug")}
    return found


def find_problem(raw: Mapping[str, Any]) -> str | None:
    """Return why a schedule of a file cannot run, with the cure; None if it can.

    Of a rule of hours, minutes or seconds, only an end in the past is found: to walk through all its dates may take
    minutes.
    """
    try:
        schedule = normalize(raw)
    except ValueError as error:
        return str(error)
    return _find_problem(json.dumps(schedule, sort_keys=True))


def next_times(schedule: Mapping[str, Any], n: int = 5, after: datetime | None = None) -> list[datetime]:
    """Return the next times of a valid schedule, as the server computes them.

    Args:
        schedule: as in the file or normalized.
        n: the number of times. There are fewer if the schedule ends.
        after: the first time is not before this; None is now. An interval without an anchor_date starts here.

    Returns:
        Times in the schedule's timezone.
    """
    form = normalize(schedule)
    start = after or datetime.now(UTC)
    if "interval" in form:
        form.setdefault("anchor_date", start.isoformat())
    elif "rrule" in form:
        form["rrule"] = server_internals.anchored_rrule(form["rrule"], form["timezone"])
    zone = ZoneInfo(form["timezone"])
    return [datetime.fromtimestamp(time.timestamp(), zone) for time in server_internals.schedule_dates(form, n, start)]


def is_due_within(schedule: Mapping[str, Any], span: timedelta) -> bool:
    """Return whether the first time of a schedule that starts now is within `span`."""
    form = normalize(schedule)
    if "interval" in form and "anchor_date" not in form:
        return bool(form["interval"] <= span.total_seconds())
    return _is_due_within(json.dumps(form, sort_keys=True), span)


@functools.lru_cache(maxsize=4096)
def _is_due_within(text: str, span: timedelta) -> bool:
    """Take a normalized schedule as JSON, so that the result can be cached: a sync ends within minutes."""
    return any(time - datetime.now(time.tzinfo) <= span for time in next_times(json.loads(text), 1))


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _seconds(value: Any) -> float:
    """Return the seconds of an interval, as `prefect deploy` reads it. A number of the environment is text."""
    cure = 'Write seconds (3600), "PT1H" or "01:00:00"'
    try:
        if isinstance(value, bool):
            raise ValueError
        length = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
        seconds = float(_adapter(timedelta).validate_python(length).total_seconds())
    except (ValueError, OverflowError):
        raise ValueError(f"interval {value!r} is not a length of time. {cure}") from None
    if seconds <= 0:
        raise ValueError(f"interval {value!r} is not greater than zero. {cure}")
    return seconds


def _anchor(value: Any) -> str:
    """Return an anchor date in UTC. One without an offset is UTC, as for `prefect deploy`."""
    try:
        if isinstance(value, date) and not isinstance(value, datetime):  # a date of YAML without quotes
            value = datetime.combine(value, time())
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'anchor_date {value!r} is not a date. Write it as "2026-01-31T06:00:00+00:00"') from None


def _day_or(value: Any) -> bool:
    if value is None:
        return True
    try:
        return bool(_adapter(bool).validate_python(value))
    except ValueError:
        raise ValueError(
            f"day_or {value!r} is neither true nor false. With true, the day or the weekday has to match"
        ) from None


@functools.lru_cache(maxsize=4096)
def _find_problem(text: str) -> str | None:
    """Take a normalized schedule as JSON, so that the result can be cached: a file repeats a few schedules."""
    form = json.loads(text)
    find = {"cron": _cron_problem, "interval": _interval_problem, "rrule": _rrule_problem}
    return _timezone_problem(form["timezone"]) or find[next(kind for kind in KINDS if kind in form)](form)


@functools.cache
def _timezones() -> frozenset[str]:
    return frozenset(available_timezones())


def _timezone_problem(name: str) -> str | None:
    if name in _timezones():
        return None
    import difflib

    spelling = name.lower().replace(" ", "_")
    # A city without its continent is as common as a typing error.
    known = {zone.rpartition("/")[2].lower(): zone for zone in sorted(_timezones())}
    known |= {zone.lower(): zone for zone in _timezones()}
    # A name that looks like an abbreviation (CEST, EST) is in another part of the world.
    near = [spelling] if spelling in known else []
    if not near and len(spelling) > 4:
        near = difflib.get_close_matches(spelling, known, n=1)
    cure = f'Did you mean "{known[near[0]]}"?' if near else 'Write a name such as "Europe/Berlin" or "UTC"'
    return f'timezone "{name}" does not exist. {cure}'


def _cron_problem(form: Mapping[str, Any]) -> str | None:
    cron = form["cron"]
    if _RANDOM.search(cron):
        return f'cron "{cron}" has H or R, which Prefect does not support. Write the minute and the hour'
    try:
        fires = server_internals.cron_fires(cron, form["day_or"], datetime.now(UTC))
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return f'cron "{cron}" does not parse ({reason}). Write minute hour day month weekday, such as "0 6 * * 1-5"'
    if not fires:
        return f'cron "{cron}" never fires: no date in the future has that day, month and weekday. Correct them'
    return None


def _interval_problem(form: Mapping[str, Any]) -> str | None:
    try:
        next_times(form, 2)
    except (ArithmeticError, ValueError):  # Python has no date after the year 9999
        anchor = f' from anchor_date "{form["anchor_date"]}"' if "anchor_date" in form else ""
        return (
            f"interval of {form['interval']:g} s{anchor} has no date that the server can compute. Write a shorter "
            "interval, or a later anchor_date"
        )
    return None


def _rrule_problem(form: Mapping[str, Any]) -> str | None:
    rrule, timezone = form["rrule"], form["timezone"]
    shown = " ".join(rrule.split())
    shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
    try:
        anchored = server_internals.validated_rrule(server_internals.anchored_rrule(rrule, timezone))
        rule = server_internals.server_schedule({"rrule": anchored, "timezone": timezone}).to_rrule()
        if any(part.interval < 1 for part in recurrence.parts(rule)):
            raise ValueError("INTERVAL is less than 1")
        has_future = _has_future(rule, datetime.now(ZoneInfo(timezone)))
    # For a rule without FREQ dateutil raises TypeError, without a rule IndexError or AttributeError, and for a date
    # after the year 9999 OverflowError. For INTERVAL=0 Prefect divides by zero.
    except (ValueError, TypeError, ArithmeticError, IndexError, AttributeError) as error:
        reason = " ".join(str(error.__context__ or error).split())
        if "'freq'" in reason or isinstance(error, IndexError):
            reason = "it has no FREQ"
        if "UNTIL" in reason:  # dateutil demands the Z even where it is present
            reason = "UNTIL and DTSTART must both have a Z or a TZID, or neither; without a DTSTART UNTIL has none"
        return f'rrule "{shown}" does not parse ({reason}). Write one such as "FREQ=WEEKLY;BYDAY=MO;BYHOUR=6"'
    if has_future:
        return None
    return f'rrule "{shown}" has no date in the future. Remove it or change its UNTIL, COUNT or dates'


def _has_future(rule: Any, now: datetime) -> bool:
    """Return whether a rule of dateutil has a date from `now` on; True if a search would take long. Change the rule."""
    for part in recurrence.parts(rule):
        over = part.until and part.until < now
        # dateutil would walk through all hours or days up to the year 9999, in the server as well.
        if part.frequency >= recurrence.DAILY and not over and not part.has_date(max(now, part.start)):
            return False
        # COUNT bounds the walk through a rule that restricts only the time of day.
        if part.frequency > recurrence.DAILY and not over and not (part.count and part.restricts_time_alone):
            return True
        endless = not part.count and not part.until and part.interval == 1
        if endless and part.rule is rule and part.start < now:
            rule = rule.replace(dtstart=now.replace(microsecond=0))  # skip the years that have passed
            [part] = recurrence.parts(rule)
        # Without an end dateutil walks to the year 9999 in search of a date that does not exist.
        horizon = max(now, part.start) + HORIZON
        part.end_at(min(part.until or horizon, horizon))
    return next(iter(rule.xafter(now, count=1, inc=True)), None) is not None
