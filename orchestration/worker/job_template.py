"""The base job template that a worker trusts, and what job variables may not say.

Every flow run has a credential of the Prefect API, and with that can change the work pool's template on the server. So
a worker takes the template from a file of its own release, and checks a run's job variables against the template's
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
    """A job variable that the template's schema does not allow: which, why, and the cure."""


def read(path: Path) -> dict[str, Any]:
    """Return the base job template of a file.

    Raises:
        SettingsError: the file is absent, or is none.
    """
    try:
        found = json.loads(path.read_text())
        jsonschema.Draft202012Validator.check_schema(found["variables"])
        if not isinstance(found["job_configuration"], dict):
            raise TypeError("job_configuration is no object")
    except (OSError, ValueError, TypeError, LookupError, jsonschema.SchemaError) as error:
        said = error.message if isinstance(error, jsonschema.SchemaError) else error
        raise SettingsError(
            f"{path} is no base job template: {said}. Name the file of the release in --template"
        ) from None
    return dict(found)


def nested(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return job variables by name, `env.NAME` as an entry of `env`; what is written whole wins.

    Source: `BaseJobConfiguration.from_template_and_values` of Prefect.
    """
    from prefect.utilities.collections import deep_merge, set_in_dict

    made: dict[str, Any] = {}
    for name, value in variables.items():
        if "." in name:
            set_in_dict(made, name, value)
    for name, value in variables.items():
        if "." not in name:
            both = isinstance(made.get(name), dict) and isinstance(value, dict)
            made[name] = deep_merge(made[name], value) if both else value
    return made


def check(variables: dict[str, Any], schema: dict[str, Any]) -> None:
    """Refuse job variables that the schema does not allow.

    Args:
        variables: of a deployment and a run, by name; `env.NAME` is an entry of `env`, as for Prefect.
        schema: the template's `variables`.

    Raises:
        RefusedVariableError: one is not allowed. The message does not show values of `env`.
    """
    # What is required the template has defaults for.
    known = {"type": "object", "properties": schema.get("properties", {}), "$defs": schema.get("$defs", {})}
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(known).iter_errors(nested(variables)))
    if error:
        raise RefusedVariableError(_sentence(error))


def _sentence(error: jsonschema.ValidationError) -> str:
    name, *inside = error.absolute_path or ["?"]
    what = f"job variable {'.'.join(map(str, [name, *inside]))}"
    if "propertyNames" in error.absolute_schema_path:
        return f"{what}: the key {error.instance!r} is kept for Kubernetes, Prefect and the reconciler. Leave it out"
    cure = "Correct it in the deployment or the run, or allow it in the chart's runs.allowed"
    if name == "env":
        return f"{what} is no text. {cure}"
    if error.validator == "enum":
        return f"{what}: {error.instance!r} is none of {', '.join(map(str, error.validator_value))}. {cure}"
    if error.validator == "pattern":
        return f"{what}: {error.instance!r} is not allowed by {error.validator_value}. {cure}"
    return f"{what}: {error.message}. {cure}"


def configuration_of(template: dict[str, Any]) -> "type[KubernetesWorkerJobConfiguration]":
    """Return the job configuration that a worker makes of this template, whatever the server's pool has.

    Args:
        template: the base job template, with `job_configuration` and `variables`.
    """
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    class Trusted(KubernetesWorkerJobConfiguration):
        """A job configuration of the release's template."""

        @classmethod
        async def from_template_and_values(
            cls,
            base_job_template: dict[str, Any],  # noqa: ARG003 - the server's
            values: dict[str, Any],
            client: "PrefectClient | None" = None,
        ) -> KubernetesWorkerJobConfiguration:
            check(values, template["variables"])
            made: KubernetesWorkerJobConfiguration = await super().from_template_and_values(
                base_job_template=template, values=values, client=client
            )
            return made

    return Trusted
