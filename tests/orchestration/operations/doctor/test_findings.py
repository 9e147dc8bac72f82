"""How checks run, and what `orchestrate doctor` prints."""

import asyncio
import json
from typing import Any

import pytest

from orchestration.__main__ import main
from orchestration.errors import ClusterError
from orchestration.operations.doctor import examination
from orchestration.operations.doctor.findings import Check, Finding, failed, ok, run_checks, warning
from orchestration.operations.doctor.installation import Installation, parse_documents

NOTHING = Installation("no cluster", "no server")


def test_one_check_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    async def hang(_: Installation) -> Finding:
        await asyncio.sleep(60)
        return ok("")

    async def break_down(_: Installation) -> Finding:
        raise KeyError("a\nb")

    async def refuse(_: Installation) -> Finding:
        raise ClusterError("Error from server (Forbidden):\npods is forbidden")

    async def look(installation: Installation) -> Finding:
        return ok(str(installation.cluster))

    async def well(_: Installation) -> Finding:
        return ok("well")

    checks = [Check("group", function.__name__, function, 0.2) for function in (hang, break_down, refuse, look, well)]
    findings = asyncio.run(run_checks(NOTHING, checks))
    assert [finding.status for finding in findings] == ["not checked"] * 4 + ["ok"]
    assert [finding.text for finding in findings] == [
        "no answer within 0 s",
        "a mistake in the check: KeyError: 'a\\nb'",
        "Error from server (Forbidden): pods is forbidden",
        "no cluster",
        "well",
    ]
    assert not capsys.readouterr().err


def test_limit_of_one_check_keeps_what_another_waits_for() -> None:
    reads = 0

    async def read() -> str:
        nonlocal reads
        reads += 1
        await asyncio.sleep(0.3)
        return "read"

    async def find(installation: Installation) -> Finding:
        return ok(await installation._once("key", read))

    async def run() -> list[Finding]:
        checks = [Check("group", name, find, seconds) for name, seconds in (("short", 0.05), ("long", 30.0))]
        return await run_checks(Installation("no cluster", "no server"), checks)

    assert [finding.text for finding in asyncio.run(run())] == ["no answer within 0 s", "read"]
    assert reads == 1


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Check, Finding]]:
    """Return the results that `orchestrate doctor` prints."""
    listed: list[tuple[Check, Finding]] = []

    async def examine(*_: str) -> list[tuple[Check, Finding]]:
        return listed

    monkeypatch.setattr(examination, "examine", examine)
    return listed


def _result(group: str, name: str, finding: Finding) -> tuple[Check, Finding]:
    async def find(_: Installation) -> Finding:
        return finding

    return Check(group, name, find), finding


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([ok("well"), Finding("not checked", "no cluster")], 0),
        ([ok("well"), warning("soon", "act")], 2),
        ([failed("broken", "repair"), warning("soon", "act"), ok("well")], 3),
    ],
)
def test_exit_status_is_that_of_the_worst_finding(
    results: list[tuple[Check, Finding]], findings: list[Finding], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    results += [_result("cluster", f"check {number}", finding) for number, finding in enumerate(findings)]
    assert main(["doctor"]) == status
    capsys.readouterr()
    assert main(["doctor", "--json"]) == status
    assert [row["status"] for row in json.loads(capsys.readouterr().out)] == [finding.status for finding in findings]


def test_table_has_the_cure_below_its_problem(
    results: list[tuple[Check, Finding]], capsys: pytest.CaptureFixture[str]
) -> None:
    results += [
        _result("cluster", "dns", failed("no pod\nwith \x1b[2J", "Set networkPolicy.dns")),
        _result("server", "late runs", ok("no run is late")),
    ]
    main(["doctor"])
    assert capsys.readouterr().out == (
        "cluster\n"
        "  failed       dns        no pod\\nwith \\x1b[2J\n"
        "                          -> Set networkPolicy.dns\n"
        "\n"
        "server\n"
        "  ok           late runs  no run is late\n"
        "\n"
        "1 ok, 1 failed\n"
    )


def test_json_has_each_finding(results: list[tuple[Check, Finding]], capsys: pytest.CaptureFixture[str]) -> None:
    results.append(_result("cluster", "dns", failed("\x7f\x1b\n", "cure")))
    main(["doctor", "--json"])
    expected: dict[str, Any] = {
        "group": "cluster", "check": "dns", "status": "failed", "text": "\x7f\x1b\n", "cure": "cure",
    }  # fmt: skip
    assert json.loads(capsys.readouterr().out) == [expected]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--env", "moon"], "ENV=moon is unknown"),
        (["--env", "production"], "ENV=production needs the name of its cluster"),
        (["--context", "absent"], "KUBE_CONTEXT=absent is not in the kubeconfig"),
    ],
)
def test_wrong_environment_is_an_error(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert main(["doctor", *arguments]) == 1
    assert error in capsys.readouterr().err


def test_objects_that_kubectl_creates_are_parsed_one_after_the_other() -> None:
    assert parse_documents('{"a": 1}\n{"b": {"c": 2}}\n') == [{"a": 1}, {"b": {"c": 2}}]
    assert parse_documents("") == []
