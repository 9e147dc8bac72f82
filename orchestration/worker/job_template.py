"""The base job template that a worker trusts, and the check of job variables against it.

Every flow run has a credential of the Prefect API, and with that can change the work pool's template on the server. So
a worker takes the template from a file of its release, and checks a run's job variables against the template's
schema before it makes the Job.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from orchestration.errors import PipelineError, SettingsError

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration


class RefusedVariableError(PipelineError):
    """A job variable that the template's schema does not allow."""


def read(path: Path) -> dict[str, Any]:
    """Return the base job template of a file.

    Raises:
        SettingsError: the file is absent, or is not a base job template.
    """
    try:
        template = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(template["variables"])
        if not isinstance(template["job_configuration"], dict):
            raise TypeError("job_configuration is not an object")
    except (OSError, ValueError, TypeError, LookupError, jsonschema.SchemaError) as error:
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


def check(variables: dict[str, Any], schema: dict[str, Any]) -> None:
    """Check that the schema allows all job variables.

    Args:
        variables: the job variables of a deployment and a run by name; `env.NAME` is an entry of `env`, as in Prefect.
        schema: the template's `variables`.

    Raises:
        RefusedVariableError: a variable is not allowed. The message does not show values of `env`.
    """
    # `required` is left out: the template has defaults for required variables.
    known = {"type": "object", "properties": schema.get("properties", {}), "$defs": schema.get("$defs", {})}
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(known).iter_errors(nest_dotted(variables)))
    if error:
        raise RefusedVariableError(_sentence(error))


def _sentence(error: jsonschema.ValidationError) -> str:
    name, *inner = error.absolute_path or ["?"]
    variable = f"job variable {'.'.join(map(str, [name, *inner]))}"
    if "propertyNames" in error.absolute_schema_path:
        owners = "Kubernetes, Prefect and the reconciler"
        return f"{variable}: the key {error.instance!r} is reserved for {owners}. Leave it out"
    cure = "Correct it in the deployment or the run, or allow it in the chart's runs.allowed"
    if name == "env":
        return f"{variable} is not a string. {cure}"
    if error.validator == "enum":
        return f"{variable}: {error.instance!r} is none of {', '.join(map(str, error.validator_value))}. {cure}"
    if error.validator == "pattern":
        return f"{variable}: {error.instance!r} is not allowed by {error.validator_value}. {cure}"
    return f"{variable}: {error.message}. {cure}"


def configuration_of(template: dict[str, Any]) -> "type[KubernetesWorkerJobConfiguration]":
    """Return the class of job configurations that use this template instead of that of the server's pool.

    Args:
        template: the base job template, with `job_configuration` and `variables`.
    """
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    class Trusted(KubernetesWorkerJobConfiguration):
        """Makes a job configuration from the release's template."""

        @classmethod
        async def from_template_and_values(
            cls,
            base_job_template: dict[str, Any],  # noqa: ARG003 - the server's template
            values: dict[str, Any],
            client: "PrefectClient | None" = None,
        ) -> KubernetesWorkerJobConfiguration:
            check(values, template["variables"])
            made: KubernetesWorkerJobConfiguration = await super().from_template_and_values(
                base_job_template=template, values=values, client=client
            )
            return made

    return Trusted
