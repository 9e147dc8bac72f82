"""Objects of files and servers compare equal exactly if a sync has nothing to change."""

from typing import Any

import pytest

from orchestration.deployments.resources import DEPLOYMENT, POOL, VARIABLE, Object, differences, read_trigger


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (DEPLOYMENT, "parameters"),
        (DEPLOYMENT, "job_variables"),
        (DEPLOYMENT, "parameter_openapi_schema"),
        (POOL, "base_job_template"),
        (VARIABLE, "value"),
    ],
)
def test_removed_key_called_enabled_differs(kind: str, field: str) -> None:
    live = {field: {"enabled": True, "inner": {"enabled": True}, "kept": 1}}
    found = differences(Object(kind, "a", {field: {"inner": {}, "kept": 1}}), live)
    assert found == [(f"{field}.enabled", True, None), (f"{field}.inner.enabled", True, None)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1e23, 10**23, True),  # as Postgres returns it
        (1.5, 1.5, True),
        (5, 5.0, True),
        (1e23, 10**23 + 10**9, False),
        (1e300, 10**400, False),
        (1, True, False),
        (0, False, False),
        (0.0, False, False),
        (True, True, True),
        (None, 0, False),
        ("1", 1, False),
    ],
)
def test_numbers_and_truths_are_compared_as_a_server_keeps_them(one: Any, other: Any, same: bool) -> None:
    for a, b in ((one, other), (other, one)):
        for wrap in (lambda x: x, lambda x: [x], lambda x: {"k": [x, {"l": x}]}):
            fields = {
                "parameters": {"p": wrap(a)},
                "value": wrap(a),
                "schedules": {"s": {"schedule": CRON, "active": None, "parameters": {"p": wrap(a)}, "slug": None}},
                "triggers": trigger(parameters={"p": wrap(a)}, match={"x": "y"}),
            }
            live = {
                "parameters": {"p": wrap(b)},
                "value": wrap(b),
                "schedules": {"s": {"schedule": CRON, "active": True, "parameters": {"p": wrap(b)}, "slug": None}},
                "triggers": trigger(parameters={"p": wrap(b)}, match={"x": "y"}),
            }
            found = {name.partition(".")[0] for name, _, _ in differences(Object(DEPLOYMENT, "a", fields), live)}
            assert found == (set() if same else {"parameters", "value", "schedules", "triggers"})


CRON = {"cron": "0 6 * * *", "timezone": "UTC", "day_or": True}


def trigger(**fields: Any) -> dict[str, Any]:
    """Return a deployment's triggers of a file, without a value of `enabled`."""
    return {"t": read_trigger({"expect": ["a.b"]} | fields) | {"enabled": None}}


def test_switch_of_a_trigger_stays_and_its_parameter_called_enabled_does_not() -> None:
    desired = Object(DEPLOYMENT, "a", {"triggers": trigger(parameters={})})
    live = {"triggers": {"t": trigger(parameters={})["t"] | {"enabled": False}}}
    assert differences(desired, live) == []
    live["triggers"]["t"]["actions"][0]["parameters"] = {"enabled": True}
    assert [name for name, _, _ in differences(desired, live)] == ["triggers.t.actions"]


LABELS = {"id": "b.1", "expect": "text", "after": ["x", "a"], "for_each": "me", "triggers": "t"}


@pytest.mark.parametrize(
    "fields",
    [{"match": LABELS}, {"match_related": LABELS}, {"match_related": [LABELS, {"id": ["b", "a"]}]}],
    ids=["match", "match_related", "list of match_related"],
)
def test_labels_of_a_trigger_keep_their_names_and_values(fields: dict[str, Any]) -> None:
    read = read_trigger({"expect": ["b", "a"], "after": ["d", "c"]} | fields)["trigger"]
    assert {key: read[key] for key in fields} == fields
    assert (read["expect"], read["after"]) == (["a", "b"], ["c", "d"])
    assert "id" not in read
    nested = read_trigger({"type": "sequence", "within": 60, "triggers": [{"expect": ["b", "a"]} | fields]})["trigger"]
    (inner,) = nested["triggers"]
    assert {key: inner[key] for key in fields} == fields
    assert inner["expect"] == ["a", "b"]
    assert "id" not in inner
