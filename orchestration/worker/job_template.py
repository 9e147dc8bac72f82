"""The base job template that a worker trusts, and the check of job variables against it.

Every flow run has a credential of the Prefect API, and with that can change the work pool's template on the server. So
a worker takes the template from a file of its release, and checks a run's job variables against the template's
schema before it makes the Job.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jsonschema
import yaml

from orchestration.errors import PipelineError, SettingsError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.workers.base import BaseJobConfiguration

Configuration = TypeVar("Configuration", bound="BaseJobConfiguration")

CHART = "the chart's runs.allowed"
"""Where the chart's template says what job variables may be."""

SAME_CODE_VARIABLES = frozenset(
    f"{kind}_{part}" for kind in ("cpu", "memory") for part in ("request", "limit")
) | {
    "active_deadline_seconds", "annotations", "backoff_limit", "crash_backoff", "crash_retries", "disruption_retries",
    "finished_job_ttl", "image_pull_policy", "labels", "memory_growth", "memory_max", "name",
}  # fmt: skip
"""Job variables that do not change which code a run executes."""


class RefusedVariableError(PipelineError):
    """A job variable that the template's schema does not allow."""


def read(path: Path, pool: str = "") -> dict[str, Any]:
    """Return the base job template of a file.

    Args:
        path: a template as JSON, or a YAML file of desired state with `work_pools`.
        pool: the work pool's name in a file of desired state.

    Raises:
        SettingsError: the file is absent, or is not a base job template.
    """
    try:
        if path.suffix in (".yaml", ".yml"):
            pools = {entry["name"]: entry for entry in yaml.safe_load(path.read_text())["work_pools"]}
            template = pools[pool]["base_job_template"]
        else:
            template = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(template["variables"])
        if not isinstance(template["job_configuration"], dict):
            raise TypeError("job_configuration is not an object")
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError, jsonschema.SchemaError) as error:
        cause = error.message if isinstance(error, jsonschema.SchemaError) else error
        raise SettingsError(
            f"{path} is not a base job template: {cause}. Name the file of the release in --template"
        ) from None
    return dict(template)


def nest_dotted(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return job variables with `env.NAME` as an entry of `env`.

    If a variable is written both ways, the values of the whole variable win. Source:
    `BaseJobConfiguration.from_template_and_values` of Prefect.
    """
    from prefect.utilities.collections import deep_merge, set_in_dict

    nested: dict[str, Any] = {}
    for name, value in variables.items():
        if "." in name:
            set_in_dict(nested, name, value)
    for name, value in variables.items():
        if "." not in name:
            can_merge = isinstance(nested.get(name), dict) and isinstance(value, dict)
            nested[name] = deep_merge(nested[name], value) if can_merge else value
    return nested


def check(variables: dict[str, Any], schema: dict[str, Any], place: str = CHART) -> None:
    """Check that the schema allows all job variables.

    Args:
        variables: the job variables of a deployment and a run by name; `env.NAME` is an entry of `env`, as in Prefect.
        schema: the template's `variables`.
        place: where a person allows more, for the message.

    Raises:
        RefusedVariableError: a variable is not allowed. The message does not show values of `env`.
    """
    # `required` is left out: the template has defaults for required variables.
    known = {"type": "object", "properties": schema.get("properties", {}), "$defs": schema.get("$defs", {})}
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(known).iter_errors(nest_dotted(variables)))
    if error:
        raise RefusedVariableError(_sentence(error, place))


def signing_scope(flow_run: "FlowRun") -> str:
    """Return which runs share the key of a run's stored results: those of its deployment, or of its flow without one.

    Whoever may create a run of a deployment could give the run another command. So a run whose own job variables
    choose what is executed has a key that only its retries share.
    """
    if set(nest_dotted(flow_run.job_variables or {})) - SAME_CODE_VARIABLES:
        return f"flow-run/{flow_run.id}"
    if flow_run.deployment_id:
        return f"deployment/{flow_run.deployment_id}"
    return f"flow/{flow_run.flow_id}"


def _sentence(error: jsonschema.ValidationError, place: str) -> str:
    name, *inner = error.absolute_path or ["?"]
    variable = f"job variable {'.'.join(map(str, [name, *inner]))}"
    if "propertyNames" in error.absolute_schema_path:
        if error.validator == "pattern":
            return f"{variable}: the key {error.instance!r} does not match {error.validator_value}. Use a key that does"
        owners = "Kubernetes, Prefect and the reconciler"
        return f"{variable}: the key {error.instance!r} is reserved for {owners}. Leave it out"
    cure = f"Correct it in the deployment or the run, or allow it in {place}"
    if name == "env":
        return f"{variable} is not a string. {cure}"
    if error.validator == "enum":
        return f"{variable}: {error.instance!r} is none of {', '.join(map(str, error.validator_value))}. {cure}"
    if error.validator == "pattern":
        return f"{variable}: {error.instance!r} is not allowed by {error.validator_value}. {cure}"
    return f"{variable}: {error.message}. {cure}"


def configuration_of(template: dict[str, Any], base: type[Configuration], place: str = CHART) -> type[Configuration]:
    """Return the class of job configurations that use this template instead of that of the server's pool.

    Args:
        template: the base job template, with `job_configuration` and `variables`.
        base: the job configuration of Prefect's worker.
        place: where a person allows more job variables, for the message of a refused one.
    """

    class Trusted(base):  # type: ignore[valid-type,misc]
        """Makes a job configuration from the release's template."""

        @classmethod
        async def from_template_and_values(
            cls,
            base_job_template: dict[str, Any],  # noqa: ARG003 - the server's template
            values: dict[str, Any],
            client: "PrefectClient | None" = None,
        ) -> Any:
            check(values, template["variables"], place)
            return await super().from_template_and_values(base_job_template=template, values=values, client=client)

    return Trusted
