"""Schedules of a file equal those that Prefect's server returns, and their next times are the server's."""

import asyncio
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.cli.deploy._models import RawScheduleConfig
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule
from prefect.client.schemas.actions import DeploymentScheduleCreate

from orchestration.deployments import schedules
from tests.parts import asked, client_of, examples, wait_until

FILE: list[dict[str, Any]] = [
    {"cron": "0 6 * * *"},
    {"cron": "*/15 8-18 * * mon-fri", "timezone": "America/New_York", "day_or": False},
    {"cron": "@daily", "timezone": "Europe/Berlin"},
    {"interval": 3600},
    {"interval": 0.5},
    {"interval": "PT1H30M", "timezone": "Europe/Berlin"},
    {"interval": "P1M", "anchor_date": "2024-01-01"},
    {"interval": "01:30:00", "anchor_date": "2024-03-31T01:30:00"},
    {"interval": 86400, "anchor_date": "2024-01-01T06:00:00+05:30", "timezone": "America/New_York"},
    {"interval": 86400.25, "anchor_date": "2024-01-01T06:00:00.123456Z"},
    {"rrule": "FREQ=DAILY;BYHOUR=6"},
    {"rrule": "RRULE:FREQ=MINUTELY;INTERVAL=7", "timezone": "Asia/Kolkata"},
    {"rrule": "DTSTART:20240101T060000\nRRULE:FREQ=WEEKLY;BYDAY=MO,FR", "timezone": "Europe/Berlin"},
    {"rrule": '{"rrule": "FREQ=DAILY", "timezone": "Europe/Paris"}'},
    {"rrule": '{"rrule": "FREQ=DAILY", "timezone": "Europe/Paris"}', "timezone": "UTC"},
]


def sent_to_server(raw: dict[str, Any]) -> Any:
    """Return the server's JSON of a schedule that `prefect deploy` sends: file, client, wire, server."""
    # Only the process that runs these tests imports Prefect's server, as this takes seconds.
    from prefect.server.schemas import actions

    config = RawScheduleConfig.model_validate(raw).model_dump(exclude_unset=True)
    sent = DeploymentScheduleCreate.model_validate(_schedule_config_to_deployment_schedule(config))
    kept = actions.DeploymentScheduleCreate.model_validate(sent.model_dump(mode="json", exclude_unset=True))
    return kept.model_dump(mode="json")["schedule"]


@pytest.mark.parametrize("raw", FILE, ids=str)
def test_schedule_equals_what_the_server_returns(raw: dict[str, Any]) -> None:
    returned = sent_to_server(raw)
    desired, live = schedules.normalize(raw), schedules.normalize(returned)
    assert schedules.is_same(desired, live)
    assert schedules.find_problem(raw) is None
    assert schedules.normalize(live) == live
    assert desired.keys() - live.keys() == set()
    # The server makes the same schedule of the normalized form.
    assert schedules.is_same(desired, schedules.normalize(sent_to_server(desired)))
    for key in ("cron", "interval", "day_or"):
        assert desired.get(key) == returned.get(key)


def test_different_schedules_are_not_equal() -> None:
    found = [schedules.normalize(sent_to_server(raw)) for raw in FILE]
    for number, raw in enumerate(FILE):
        equal = [n for n, other in enumerate(found) if schedules.is_same(schedules.normalize(raw), other)]
        assert equal == [number]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"interval": 60, "anchor_date": "2024-01-01"}, {"interval": 60, "anchor_date": "2024-01-02"}),
        ({"rrule": "DTSTART:20240101T060000\nFREQ=DAILY"}, {"rrule": "DTSTART:20240102T060000\nFREQ=DAILY"}),
        ({"cron": "0 6 * * *"}, {"cron": "0 6 * * *", "day_or": False}),
        ({"cron": "0 6 * * *"}, {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}),
    ],
)
def test_schedules_that_differ_in_one_key_are_not_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not schedules.is_same(schedules.normalize(one), schedules.normalize(sent_to_server(other)))


def test_anchor_date_without_quotes_is_read_as_a_date() -> None:
    for anchor in (date(2024, 1, 1), datetime(2024, 1, 1), "2024-01-01T01:00:00+01:00"):
        assert schedules.normalize({"interval": 60, "anchor_date": anchor})["anchor_date"] == "2024-01-01T00:00:00Z"


LONG = "FREQ=DAILY;BYSECOND=" + "1," * 4000 + "1"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({}, "a schedule has none of cron, interval, rrule. Give it exactly one"),
        ({"cron": "0 6 * * *", "interval": 60}, "a schedule has cron and interval. Give it exactly one"),
        ({"cron": 5}, "cron 5 is not text"),
        (
            {"cron": "0 25 * * *"},
            'cron "0 25 * * *" does not parse ([0 25 * * *] is not acceptable, out of range). Write minute',
        ),
        ({"cron": "0 6 * *"}, 'cron "0 6 * *" does not parse'),
        ({"cron": "H 6 * * *"}, 'cron "H 6 * * *" has H or R'),
        ({"cron": "0 0 30 2 *"}, 'cron "0 0 30 2 *" never fires'),
        ({"cron": "0 0 1 1 * 0 2020"}, "never fires"),
        (
            {"cron": "0 0 30 2 1"},
            "never fires",
        ),  # on a Monday elsewhere; Prefect's croniter looks for both and gives up
        ({"cron": "0 6 * * *", "day_or": "perhaps"}, "day_or 'perhaps' is neither true nor false"),
        ({"cron": "0 6 * * *", "timezone": "Europe/Berln"}, 'does not exist. Did you mean "Europe/Berlin"?'),
        ({"interval": 60, "timezone": "new york"}, 'Did you mean "America/New_York"?'),
        ({"cron": "0 6 * * *", "timezone": "CEST"}, 'timezone "CEST" does not exist. Write a name such as'),
        ({"cron": "0 6 * * *", "timezone": 2}, "timezone 2 is not text"),
        ({"interval": 0}, "interval 0 is not greater than zero. Write seconds"),
        ({"interval": "-PT1H"}, "interval '-PT1H' is not greater than zero"),
        ({"interval": "1 hour"}, "interval '1 hour' is not a length of time. Write seconds"),
        ({"interval": True}, "interval True is not a length of time"),
        ({"interval": float("inf")}, "interval inf is not a length of time"),
        ({"interval": 60, "anchor_date": "soon"}, "anchor_date 'soon' is not a date"),
        ({"rrule": "FREQ=FOO"}, "does not parse (invalid 'FREQ': FOO). Write one such as"),
        ({"rrule": "INTERVAL=2"}, "does not parse (it has no FREQ)"),
        ({"rrule": "FREQ=DAILY;INTERVAL=0"}, "does not parse (INTERVAL is less than 1)"),
        ({"rrule": "FREQ=MINUTELY;INTERVAL=0"}, "does not parse"),
        ({"rrule": "FREQ=DAILY;UNTIL=20240101T000000"}, "has no date in the future. Remove it or change"),
        ({"rrule": "FREQ=SECONDLY;UNTIL=20240101T000000"}, "has no date in the future"),
        ({"rrule": "FREQ=HOURLY;COUNT=3"}, "has no date in the future"),
        ({"rrule": "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=30"}, "has no date in the future"),
        ({"rrule": "RDATE:20200101T000000Z"}, "has no date in the future"),
        ({"rrule": "{}"}, "is not a rule. As JSON"),
        ({"rrule": '{"rrule": "FREQ=DAILY", "timezone": 5}'}, "timezone 5 of the rrule is not text"),
        ({"rrule": "DTSTART:20240101"}, "does not parse (it has no FREQ)"),
        ({"rrule": "DTSTART:99991231T235959\nRRULE:FREQ=DAILY"}, "has no date in the future"),
        ({"rrule": "DTSTART:99991231T235959\nRRULE:FREQ=WEEKLY"}, "does not parse (date value out of range)"),
        ({"rrule": "FREQ=HOURLY;BYMONTHDAY=31;BYMONTH=2"}, "has no date in the future"),
        ({"rrule": "FREQ=SECONDLY;BYMONTHDAY=30;BYMONTH=2"}, "has no date in the future"),
        ({"rrule": "FREQ=DAILY;BYMONTHDAY=30;BYMONTH=2"}, "has no date in the future"),
        ({"rrule": "FREQ=HOURLY;BYMINUTE=0,30;BYSETPOS=3,-4"}, "has no date in the future"),
        ({"rrule": "FREQ=MINUTELY;BYSETPOS=2"}, "has no date in the future"),
        ({"rrule": "FREQ=SECONDLY;BYSETPOS=-2"}, "has no date in the future"),
        ({"interval": 1e12}, "interval of 1e+12 s has no date that the server can compute"),
        ({"interval": "P999999999D"}, "has no date that the server can compute"),
        (
            {"interval": 172800, "anchor_date": "0001-01-01T00:00:00Z", "timezone": "America/New_York"},
            'interval of 172800 s from anchor_date "0001-01-01T00:00:00Z" has no date that the server can compute',
        ),
        ({"rrule": LONG}, "does not parse"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_schedule_that_cannot_run_is_explained(raw: dict[str, Any], says: str) -> None:
    problem = schedules.find_problem(raw)
    assert problem
    assert says in problem
    assert "\n" not in problem
    assert len(problem) < 400


@pytest.mark.parametrize(
    "raw",
    [
        {"cron": "0 0 29 2 *"},
        {"cron": "0 0 29 2 1", "day_or": False},
        {"rrule": "FREQ=SECONDLY"},
        {"rrule": "FREQ=HOURLY;BYMONTH=2"},
        {"rrule": "FREQ=MINUTELY;BYMONTHDAY=29;BYMONTH=2;BYHOUR=23"},
        {"rrule": "FREQ=HOURLY;BYDAY=MO;BYMONTHDAY=1"},
        {"interval": 3_000_000_000},
        {"rrule": "DTSTART:20000229T000000\nRRULE:FREQ=YEARLY;INTERVAL=4"},
        {"rrule": "DTSTART:20990101T000000\nRRULE:FREQ=DAILY;COUNT=1"},
        {"rrule": "RDATE:20990101T000000Z"},
    ],
    ids=str,
)
def test_schedule_that_fires_rarely_or_often_is_valid(raw: dict[str, Any]) -> None:
    assert schedules.find_problem(raw) is None


async def dates(raw: dict[str, Any], start: datetime) -> list[datetime]:
    """Return the next five dates of the server's own class."""
    from prefect.server.schemas import schedules as server_schedules

    kind = {
        "cron": server_schedules.CronSchedule,
        "interval": server_schedules.IntervalSchedule,
        "rrule": server_schedules.RRuleSchedule,
    }
    schedule = next(kind[key](**raw) for key in raw if key in kind)
    # In Python an ambiguous local time equals no time of another zone.
    return [moment.astimezone(UTC) for moment in await schedule.get_dates(n=5, start=start)]


@pytest.mark.parametrize(
    "start", ["2026-03-28T20:00:00+00:00", "2026-10-24T20:00:00+00:00", "2026-03-08T04:00:00+00:00"]
)
@pytest.mark.parametrize(
    "raw",
    [
        {"cron": "30 2 * * *", "timezone": "Europe/Berlin"},
        {"cron": "*/30 * * * *", "timezone": "America/New_York"},
        {"cron": "0 0 13 * 5", "day_or": False},
        {"interval": 86400.0, "anchor_date": "2026-01-01T02:30:00Z", "timezone": "Europe/Berlin"},
        {"interval": 5400.0, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "America/New_York"},
        {"rrule": "FREQ=DAILY;BYHOUR=2;BYMINUTE=30;BYSECOND=0", "timezone": "Europe/Berlin"},
        {"rrule": "DTSTART:20260101T000000\nRRULE:FREQ=HOURLY;INTERVAL=5", "timezone": "America/New_York"},
    ],
    ids=str,
)
def test_next_times_equal_those_of_the_server_across_dst(raw: dict[str, Any], start: str) -> None:
    after = datetime.fromisoformat(start)
    found = schedules.next_times(raw, 5, after)
    assert [moment.astimezone(UTC) for moment in found] == asyncio.run(dates(raw, after))
    assert {str(moment.tzinfo) for moment in found} == {raw.get("timezone", "UTC")}


@settings(max_examples=examples(0.4))
@given(
    st.integers(0, 59),
    st.integers(0, 23),
    st.sampled_from(["*", "1-5", "sun", "1#2"]),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata", "UTC"]),
    st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),
)
def test_next_times_of_any_cron_equal_those_of_the_server(
    minute: int, hour: int, weekday: str, timezone: str, moment: datetime
) -> None:
    raw = {"cron": f"{minute} {hour} * * {weekday}", "timezone": timezone}
    start = moment.replace(tzinfo=UTC)
    found = schedules.next_times(raw, 5, start)
    assert [moment.astimezone(UTC) for moment in found] == asyncio.run(dates(raw, start))


def test_next_times_start_now() -> None:
    before = datetime.now(UTC)
    first = schedules.next_times({"interval": 3600}, 2)
    assert before <= first[0] <= datetime.now(UTC)
    assert first[1] - first[0] == timedelta(hours=1)
    assert len(schedules.next_times({"rrule": "DTSTART:20990101T000000\nRRULE:FREQ=DAILY;COUNT=2"})) == 2
    # Without the DTSTART that the server adds, this would walk through all seconds since 2020.
    assert len(schedules.next_times({"rrule": "FREQ=SECONDLY"})) == 5


def test_server_schedules_runs_at_the_next_times(prefect_server: str) -> None:
    """On SQLAlchemy 2.1 Prefect 3.8 created no runs, and reported that only in its log."""
    raw: list[dict[str, Any]] = [
        {"cron": "*/7 * * * *", "timezone": "America/New_York"},
        {"interval": 1800.0, "anchor_date": "2026-01-01T00:10:00Z", "timezone": "Europe/Berlin"},
        {"rrule": "DTSTART:20260101T000000\nRRULE:FREQ=HOURLY;BYMINUTE=5", "timezone": "UTC"},
    ]
    with client_of(prefect_server) as api:
        flow = asked(api, "POST", "/flows/", {"name": f"scheduled-{uuid4().hex[:6]}"})["id"]
        made: dict[str, dict[str, Any]] = {}
        for number, schedule in enumerate(raw):
            body = {"name": f"d{number}", "flow_id": flow, "schedules": [{"schedule": schedule, "active": True}]}
            made[asked(api, "POST", "/deployments/", body)["id"]] = schedule
        which = {"deployments": {"id": {"any_": list(made)}}}

        def times() -> dict[str, list[datetime]]:
            found: dict[str, list[datetime]] = {id_: [] for id_ in made}
            for run in asked(api, "POST", "/flow_runs/filter", which):
                assert run["state"]["type"] == "SCHEDULED"
                found[run["deployment_id"]].append(datetime.fromisoformat(run["expected_start_time"]))
            return {id_: sorted(found[id_]) for id_ in made}

        wait_until(lambda: all(len(due) > 2 for due in times().values()), "three runs of each schedule")
        for deployment, found in times().items():
            expected = schedules.next_times(made[deployment], len(found), found[0])
            assert found == [moment.astimezone(UTC) for moment in expected]
            asked(api, "DELETE", f"/deployments/{deployment}")


def test_module_does_not_import_prefect() -> None:
    code = "import sys, orchestration.deployments.schedules; sys.exit(bool({'prefect', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
