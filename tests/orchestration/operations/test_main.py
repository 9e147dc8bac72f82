"""The exit statuses that scripts rely on."""

import pytest

from orchestration.operations import __main__ as command
from orchestration.operations import release_plan
from orchestration.operations.environment import Environment


@pytest.mark.parametrize(("changes", "status"), [(True, 2), (False, 0)])
def test_exit_status_of_plan_tells_whether_a_deploy_would_change_anything(
    monkeypatch: pytest.MonkeyPatch, changes: bool, status: int
) -> None:
    def plan(_: Environment) -> bool:
        return changes

    monkeypatch.setattr(command, "resolve", lambda name, context, namespace: Environment(name, context, namespace))
    monkeypatch.setattr(release_plan, "plan", plan)
    assert command.main(["plan", "--env", "staging", "--context", "none"]) == status


def test_exit_status_of_plan_is_1_on_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", "--env", "absent", "--context", "none"]) == 1
    assert "absent" in capsys.readouterr().err
