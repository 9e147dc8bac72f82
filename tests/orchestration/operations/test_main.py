"""Exit statuses that scripts rely on."""

import pytest

from orchestration.operations import __main__ as command
from orchestration.operations import release_plan
from orchestration.operations.environment import Environment
from orchestration.operations.rotation import kinds


@pytest.mark.parametrize(("changes", "status"), [(True, 2), (False, 0)])
def test_plan_exits_with_2_for_a_change_and_0_for_none(
    monkeypatch: pytest.MonkeyPatch, changes: bool, status: int
) -> None:
    def plan(_: Environment) -> bool:
        return changes

    monkeypatch.setattr(command, "resolve", lambda name, context, namespace: Environment(name, context, namespace))
    monkeypatch.setattr(release_plan, "plan", plan)
    assert command.main(["plan", "--env", "staging", "--context", "none"]) == status


def test_plan_exits_with_1_on_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", "--env", "absent", "--context", "none"]) == 1
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("secret", "cause"), [("", "No Secret is named"), ("passwords", "SECRET=passwords is unknown")]
)
def test_rotate_lists_the_secrets_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], secret: str, cause: str
) -> None:
    monkeypatch.setattr(command, "resolve", lambda name, context, namespace: Environment(name, context, namespace))
    assert command.main(["rotate", "--env", "staging", "--keep-old", "--", secret]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"{cause}: make rotate ENV=staging SECRET=NAME, with one of\n")
    assert [line.split()[0] for line in shown.splitlines()[1:]] == [f"SECRET={kind}" for kind in kinds.KINDS]
