"""Settings: defaults, sources and error messages."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration import settings as module
from orchestration.errors import SettingsError
from orchestration.settings import ROOT, Settings, settings

Use = Callable[..., None]


def test_every_setting_has_a_default(use_settings: Use) -> None:
    use_settings()
    assert settings().warehouse_url is None
    assert settings().warehouse_dir == ROOT / ".warehouse"
    assert settings().warehouse_schema == "analytics"
    assert settings().dbt_threads == 4


def test_environment_takes_precedence_over_the_file(
    tmp_path: Path, use_settings: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("DBT_THREADS=2\nWAREHOUSE_SCHEMA=from_file\nPREFECT_API_URL=http://x\n")
    monkeypatch.setitem(Settings.model_config, "env_file", tmp_path / ".env")
    use_settings(DBT_THREADS="3")
    assert (settings().dbt_threads, settings().warehouse_schema) == (3, "from_file")


def test_empty_variable_counts_as_unset(use_settings: Use) -> None:
    use_settings(WAREHOUSE_URL="", DBT_THREADS="")
    assert (settings().warehouse_url, settings().dbt_threads) == (None, 4)


@pytest.mark.parametrize(
    ("name", "value", "reason", "example"),
    [
        ("DBT_THREADS", "many", "valid integer", "like 4"),
        ("DBT_THREADS", "0", "greater than or equal to 1", "like 4"),
        ("WAREHOUSE_SCHEMA", "My Schema", "match pattern", "like analytics"),
        (
            "WAREHOUSE_URL",
            "mysql://db/x",
            "not a Postgres URL",
            "postgresql://user:password@host:5432/warehouse",
        ),
        ("WAREHOUSE_URL", "postgresql://db", "it names no database", "postgresql://user:password@host"),
        ("WAREHOUSE_URL", "postgresql://db:port/x", "not a URL", "postgresql://user:password@host"),
        ("LANDING_ZONE", "/nowhere", "there is no folder /nowhere", "like data/landing"),
    ],
)
def test_error_names_the_variable_the_value_and_an_example(
    use_settings: Use, name: str, value: str, reason: str, example: str
) -> None:
    use_settings(**{name: value})
    with pytest.raises(SettingsError) as caught:
        settings()
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is wrong: ")
    assert reason in message
    assert example in message


def test_error_names_all_wrong_values(use_settings: Use) -> None:
    use_settings(DBT_THREADS="many", LANDING_ZONE="/nowhere")
    with pytest.raises(SettingsError, match=r"(?s)LANDING_ZONE.*DBT_THREADS"):
        settings()


def test_password_is_never_shown(use_settings: Use) -> None:
    use_settings(WAREHOUSE_URL="mysql://me:s3cret@db/x")
    with pytest.raises(SettingsError) as caught:
        settings()
    assert "s3cret" not in str(caught.value)
    assert "mysql://me:***@db/x" in str(caught.value)
    use_settings(WAREHOUSE_URL="postgresql://me:s3cret@db/x")
    assert "s3cret" not in repr(settings())


def test_every_setting_is_documented() -> None:
    documented = module.__doc__ or ""
    for name, field in Settings.model_fields.items():
        assert f"`{name.upper()}`" in documented
        assert field.description
        assert field.examples
