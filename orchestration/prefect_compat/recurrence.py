"""The private attributes of dateutil's recurrence rules."""

import math
from datetime import datetime
from typing import Any

_YEARLY, DAILY = 0, 3  # of dateutil.rrule; more frequent rules have greater numbers


class RulePart:
    """Gives the parts of a dateutil rule public names.

    Replaces: the attributes `_freq`, `_count`, `_interval`, `_until`, `_dtstart` and `_original_rule` of `rrule`
    Why: walking through a rule's dates in search of one in the future may take minutes
    Until: dateutil's rules have public attributes
    """

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    @property
    def frequency(self) -> int:
        """Return dateutil's number of FREQ: 3 is DAILY, and a greater number is more frequent."""
        return int(self.rule._freq)

    @property
    def count(self) -> int | None:
        """Return COUNT."""
        found: int | None = self.rule._count
        return found

    @property
    def interval(self) -> int:
        """Return INTERVAL."""
        return int(self.rule._interval)

    @property
    def start(self) -> datetime:
        """Return DTSTART."""
        found: datetime = self.rule._dtstart
        return found

    @property
    def until(self) -> datetime | None:
        """Return UNTIL."""
        found: datetime | None = self.rule._until
        return found

    @property
    def restricts_time_alone(self) -> bool:
        """Return whether the rule restricts only the time of day."""
        restricted = {key for key, value in self.rule._original_rule.items() if value}
        return restricted <= {"byhour", "byminute", "bysecond"}

    def has_date(self, start: datetime) -> bool:
        """Return whether a day from a date on has the rule's months, weeks and days, and a time of BYSETPOS."""
        if not self._has_position():
            return False
        days = {"byweekno", "byyearday", "bymonthday", "byweekday", "byeaster"}
        is_any = not any(self.rule._original_rule.get(key) for key in days)
        every: dict[str, Any] = {"bymonthday": range(1, 32)} if is_any else {}
        none = {"count": None, "until": None, "bysetpos": None}
        # A walk by years takes a second, one by days a minute.
        by_years = self.rule.replace(
            freq=_YEARLY, interval=1, dtstart=start, byhour=0, byminute=0, bysecond=0, **none, **every
        )
        return next(iter(by_years), None) is not None

    def _has_position(self) -> bool:
        """Return whether an hour, a minute or a second of the rule has as many dates as BYSETPOS counts.

        Of a rule of days or longer it is True: such a rule has few enough dates to walk through.
        """
        given = self.rule._original_rule
        if self.frequency <= DAILY or not given.get("bysetpos"):
            return True
        parts_of_time = ("byminute", "bysecond")[self.frequency - DAILY - 1 :]
        dates = math.prod(len(given.get(part) or (0,)) for part in parts_of_time)
        return bool(min(map(abs, given["bysetpos"])) <= dates)

    def end_at(self, until: datetime) -> None:
        """Change UNTIL."""
        self.rule._until = until


def parts(rule: Any) -> list[RulePart]:
    """Return the rules of a dateutil rule set, or the one rule.

    Replaces: `rruleset._rrule`
    Why: a schedule may have several rules
    Until: dateutil's sets can be iterated
    """
    return [RulePart(part) for part in getattr(rule, "_rrule", [rule])]
