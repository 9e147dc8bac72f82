"""Schedules of a prefect.yaml, in the form in which the server gives them back.

Prefect is imported when a schedule is checked, not before: comparing needs none of it.
"""

import functools
import json
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from orchestration.prefect_compat import recurrence, server_internals

KINDS = ("cron", "interval", "rrule")

HORIZON = timedelta(days=40 * 365)
"""How far ahead a date is searched for: longer than leap years and weekdays take to meet."""

_DTSTART = re.compile(r"^DTSTART[^\n]*\n", re.IGNORECASE)
_RANDOM = re.compile(r"(?:^|[\s,])[HR]\b", re.IGNORECASE)
_DAILY = 3  # dateutil.rrule.DAILY; what is more frequent is greater


def normal(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedule as the server of Prefect 3.9 gives it back.

    Args:
        raw: a schedule of the file: one of cron, interval (seconds, ISO 8601 or HH:MM:SS) and rrule, with timezone,
            day_or and anchor_date. Other keys are not looked at.

    Returns:
        cron: cron, timezone, day_or. interval: interval in seconds, timezone, and anchor_date (UTC, ISO 8601) if `raw`
        has one: else the server takes the time at which it gets the schedule. rrule: rrule, timezone; the server puts a
        DTSTART in front if there is none.

    Raises:
        ValueError: it has no such form, in one sentence. Whether it can run is :func:`problem`'s to say.
    """
    given = [kind for kind in KINDS if raw.get(kind) is not None]
    if len(given) != 1:
        found = f"has {' and '.join(given)}" if given else f"has none of {', '.join(KINDS)}"
        raise ValueError(f"a schedule {found}: give it exactly one")
    timezone = raw.get("timezone") or "UTC"
    if not isinstance(timezone, str):
        raise ValueError(f'timezone {timezone!r} is no text: write a name such as "Europe/Berlin"')
    kind, value = given[0], raw[given[0]]
    if kind == "interval":
        schedule = {"interval": _seconds(value), "timezone": timezone}
        if raw.get("anchor_date") is not None:
            schedule["anchor_date"] = _anchor(raw["anchor_date"])
        return schedule
    if not isinstance(value, str) or not value.strip():
        example = '"0 6 * * *"' if kind == "cron" else '"FREQ=DAILY;BYHOUR=6"'
        raise ValueError(f"{kind} {value!r} is no text: write it in quotes, such as {example}")
    if kind == "cron":
        return {"cron": value.strip(), "timezone": timezone, "day_or": _day_or(raw.get("day_or"))}
    rrule = value.strip()
    if rrule.startswith("{"):  # `prefect deploy` also takes the schedule itself, as JSON
        try:
            inner = json.loads(rrule)
            rrule, timezone = str(inner["rrule"]).strip(), raw.get("timezone") or inner.get("timezone") or "UTC"
        except (ValueError, KeyError):
            raise ValueError(f'rrule {value!r} is no rule: as JSON it is {{"rrule": ..., "timezone": ...}}') from None
    return {"rrule": rrule, "timezone": timezone}


def from_server(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same form of a schedule that the server returned."""
    return normal(raw)


def same(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether two normal forms are one schedule.

    Args:
        wanted: what the file says; what it leaves to the server (anchor_date, DTSTART) may be anything in `found`.
        found: what the server has.
    """
    if "interval" in wanted and "anchor_date" not in wanted:
        found = {key: value for key, value in found.items() if key != "anchor_date"}
    if "rrule" in wanted and "rrule" in found and "DTSTART" not in wanted["rrule"].upper():
        found = {**found, "rrule": _DTSTART.sub("", found["rrule"])}
    return wanted == found


def problem(raw: Mapping[str, Any]) -> str | None:
    """Why a schedule of the file cannot run, in one sentence with the cure; None if it can.

    Rules of hours, minutes and seconds are only looked at for an end in the past: to walk through all their dates may
    take minutes.
    """
    try:
        schedule = normal(raw)
    except ValueError as error:
        return str(error)
    return _checked(json.dumps(schedule, sort_keys=True))


def next_times(schedule: Mapping[str, Any], n: int = 5, after: datetime | None = None) -> list[datetime]:
    """The next `n` times of a schedule that has no problem, as the server finds them.

    Args:
        schedule: as in the file or in its normal form.
        n: how many; there are fewer if the schedule ends.
        after: the first is then or later; None is now. An interval without an anchor_date starts here.

    Returns:
        Times in the schedule's timezone.
    """
    form = normal(schedule)
    start = after or datetime.now(UTC)
    if "interval" in form:
        form.setdefault("anchor_date", start.isoformat())
    elif "rrule" in form:
        form["rrule"] = server_internals.anchored_rrule(form["rrule"], form["timezone"])
    zone = ZoneInfo(form["timezone"])
    return [
        datetime.fromtimestamp(found.timestamp(), zone) for found in server_internals.schedule_dates(form, n, start)
    ]


def is_due_within(schedule: Mapping[str, Any], span: timedelta) -> bool:
    """Whether the first time of a schedule that begins now is no further ahead than that."""
    form = normal(schedule)
    if "interval" in form and "anchor_date" not in form:
        return bool(form["interval"] <= span.total_seconds())
    return _is_due_within(json.dumps(form, sort_keys=True), span)


@functools.lru_cache(maxsize=4096)
def _is_due_within(text: str, span: timedelta) -> bool:
    """Of a normal form, as JSON: see `_checked`. What asks is over within minutes, and with it what is remembered."""
    return any(each - datetime.now(each.tzinfo) <= span for each in next_times(json.loads(text), 1))


@functools.cache
def _seconds_type() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(timedelta)


def _seconds(value: Any) -> float:
    """Seconds of an interval, read as `prefect deploy` reads them."""
    cure = 'write seconds (3600), "PT1H" or "01:00:00"'
    try:
        if isinstance(value, bool):
            raise ValueError
        seconds = float(_seconds_type().validate_python(value).total_seconds())
    except (ValueError, OverflowError):
        raise ValueError(f"interval {value!r} is no length of time: {cure}") from None
    if seconds <= 0:
        raise ValueError(f"interval {value!r} is not longer than nothing: {cure}")
    return seconds


def _anchor(value: Any) -> str:
    """An anchor date as UTC; without an offset it is UTC, as for `prefect deploy`."""
    try:
        if isinstance(value, date) and not isinstance(value, datetime):  # YAML's own, without quotes
            value = datetime.combine(value, time())
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f'anchor_date {value!r} is no date: write it as "2026-01-31T06:00:00+00:00"') from None


def _day_or(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"day_or {value!r} is neither true nor false: true lets the day or the weekday match")
    return value


@functools.lru_cache(maxsize=4096)
def _checked(text: str) -> str | None:
    """Why the schedule (a normal form, as JSON) cannot run. Once a text: a file has few schedules, many times."""
    form = json.loads(text)
    return _timezone_problem(form["timezone"]) or (
        _cron_problem(form) if "cron" in form else _rrule_problem(form) if "rrule" in form else None
    )


@functools.cache
def _timezones() -> frozenset[str]:
    return frozenset(available_timezones())


def _timezone_problem(name: str) -> str | None:
    if name in _timezones():
        return None
    import difflib

    wanted = name.lower().replace(" ", "_")
    # A city without its continent is as common as a typing error.
    known = {zone.rpartition("/")[2].lower(): zone for zone in sorted(_timezones())}
    known |= {zone.lower(): zone for zone in _timezones()}
    # What is near an abbreviation (CEST, EST) is another part of the world.
    near = [wanted] if wanted in known else difflib.get_close_matches(wanted, known, n=1) if len(wanted) > 4 else []
    cure = f'did you mean "{known[near[0]]}"?' if near else 'write a name such as "Europe/Berlin" or "UTC"'
    return f'timezone "{name}" does not exist: {cure}'


def _cron_problem(form: Mapping[str, Any]) -> str | None:
    cron = form["cron"]
    if _RANDOM.search(cron):
        return f'cron "{cron}" has H or R, which Prefect does not have: write the minute and the hour'
    try:
        fires = server_internals.cron_fires(cron, form["day_or"], datetime.now(UTC))
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return f'cron "{cron}" does not parse ({reason}): it is minute hour day month weekday, such as "0 6 * * 1-5"'
    if not fires:
        return f'cron "{cron}" never fires: no coming date has that day, month and weekday; correct them'
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
    # A rule without FREQ is a TypeError to dateutil, one with INTERVAL=0 a division by zero to Prefect.
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error.__context__ or error).split())
        if "'freq'" in reason:
            reason = "it has no FREQ"
        if "UNTIL" in reason:  # dateutil asks for the Z, which may be there
            reason = "UNTIL and DTSTART must both have a Z or a TZID, or neither; without a DTSTART UNTIL has none"
        return f'rrule "{shown}" does not parse ({reason}): write one such as "FREQ=WEEKLY;BYDAY=MO;BYHOUR=6"'
    if _has_future(rule, datetime.now(ZoneInfo(timezone))):
        return None
    return f'rrule "{shown}" has no date in the future: remove it or change its UNTIL, COUNT or dates'


def _has_future(rule: Any, now: datetime) -> bool:
    """Whether a rule of dateutil's has a date from `now` on, as far as that is found soon. It changes the rule."""
    for part in recurrence.parts(rule):
        over = part.until and part.until < now
        # A COUNT bounds how long a rule is walked that restricts no more than the time of day.
        if part.frequency > _DAILY and not over and not (part.count and part.restricts_time_alone):
            return True
        endless = not part.count and not part.until and part.interval == 1
        if endless and part.rule is rule and part.start < now:
            rule = rule.replace(dtstart=now.replace(microsecond=0))  # without the years that have passed
            [part] = recurrence.parts(rule)
        # Without an end dateutil goes on to the year 9999 for a date that there never is.
        horizon = max(now, part.start) + HORIZON
        part.end_at(min(part.until or horizon, horizon))
    return next(iter(rule.xafter(now, count=1, inc=True)), None) is not None
