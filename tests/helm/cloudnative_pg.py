"""CloudNativePG's kinds, for tests: what an API server with its operator would take of the server's chart.

The definitions here have the fields that the chart sets, with their types and limits, and an API server with strict
validation refuses all others. They follow CloudNativePG 1.30 and its plugin Barman Cloud 0.14. The projects' own
definitions are part of no package. If `CNPG_DEFINITIONS` names a folder with their YAML files, tests use those instead:

    kubectl get crd clusters.postgresql.cnpg.io --output yaml > FOLDER/clusters.yaml
"""

import functools
import os
from pathlib import Path

import jsonschema
import yaml

from tests.helm.rendering import Object, closed

_TEXT: Object = {"type": "string"}
_FLAG: Object = {"type": "boolean"}
_TEXTS: Object = {"type": "object", "additionalProperties": _TEXT}
_METADATA: Object = {"type": "object"}
_QUANTITY: Object = {
    "anyOf": [{"type": "integer"}, {"type": "string"}],
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",  # noqa: E501
    "x-kubernetes-int-or-string": True,
}


def _object(*required: str, **fields: Object) -> Object:
    return {"type": "object", "properties": fields, **({"required": [*required]} if required else {})}


def _list(items: Object) -> Object:
    return {"type": "array", "items": items}


def _one_of(*texts: str) -> Object:
    return {"type": "string", "enum": [*texts]}


def _integer(least: int) -> Object:
    return {"type": "integer", "minimum": least}


_RESOURCES = _object(
    requests={"type": "object", "additionalProperties": _QUANTITY},
    limits={"type": "object", "additionalProperties": _QUANTITY},
)
_KEY = _object("key", "name", key=_TEXT, name=_TEXT)
_NAMED = _object("name", name=_TEXT)
_PLUGIN = {"name": _TEXT, "parameters": _TEXTS}

_CLUSTER = _object(
    "instances",
    instances=_integer(1),
    imageName=_TEXT,
    imagePullPolicy=_TEXT,
    imagePullSecrets=_list(_NAMED),
    bootstrap=_object(
        initdb=_object(
            database=_TEXT,
            owner=_TEXT,
            dataChecksums=_FLAG,
            postInitSQL=_list(_TEXT),
            postInitApplicationSQL=_list(_TEXT),
        ),
        recovery=_object(source=_TEXT, database=_TEXT, owner=_TEXT, recoveryTarget=_object(targetTime=_TEXT)),
    ),
    enableSuperuserAccess=_FLAG,
    enablePDB=_FLAG,
    primaryUpdateStrategy=_one_of("unsupervised", "supervised"),
    switchoverDelay={"type": "integer"},
    storage=_object(size=_TEXT, storageClass=_TEXT),
    resources=_RESOURCES,
    affinity=_object(
        enablePodAntiAffinity=_FLAG,
        podAntiAffinityType=_TEXT,
        topologyKey=_TEXT,
        nodeSelector=_TEXTS,
        tolerations=_list(
            _object(
                key=_TEXT, operator=_TEXT, value=_TEXT, effect=_TEXT,
                tolerationSeconds={"type": "integer", "format": "int64"},
            )
        ),
    ),
    priorityClassName=_TEXT,
    postgresql=_object(
        parameters=_TEXTS,
        pg_hba=_list(_TEXT),
        synchronous=_object(
            "method", "number", method=_one_of("any", "first"), number={"type": "integer"},
            dataDurability=_one_of("required", "preferred"),
        ),
    ),
    serviceAccountTemplate=_object("metadata", metadata=_object(annotations=_TEXTS, labels=_TEXTS, name=_TEXT)),
    plugins=_list(_object("name", isWALArchiver=_FLAG, enabled=_FLAG, **_PLUGIN)),
    externalClusters=_list(_object("name", name=_TEXT, plugin=_object("name", **_PLUGIN))),
)  # fmt: skip

_SCHEDULED_BACKUP = _object(
    "cluster", "schedule",
    schedule=_TEXT,
    immediate=_FLAG,
    backupOwnerReference=_one_of("none", "self", "cluster"),
    cluster=_NAMED,
    method=_one_of("barmanObjectStore", "volumeSnapshot", "plugin"),
    pluginConfiguration=_object("name", **_PLUGIN),
)  # fmt: skip

_COMPRESSIONS = ("bzip2", "gzip", "lz4", "snappy")

_OBJECT_STORE = _object(
    "configuration",
    configuration=_object(
        "destinationPath",
        destinationPath={"type": "string", "minLength": 1},
        endpointURL=_TEXT,
        s3Credentials=_object(accessKeyId=_KEY, secretAccessKey=_KEY, inheritFromIAMRole=_FLAG),
        googleCredentials=_object(gkeEnvironment=_FLAG, applicationCredentials=_KEY),
        azureCredentials=_object(inheritFromAzureAD=_FLAG, storageAccount=_KEY, storageKey=_KEY),
        wal=_object(compression=_one_of(*_COMPRESSIONS, "xz", "zstd"), maxParallel=_integer(1)),
        data=_object(compression=_one_of(*_COMPRESSIONS), jobs=_integer(1)),
    ),
    retentionPolicy={"type": "string", "pattern": "^[1-9][0-9]*[dwm]$"},
    instanceSidecarConfiguration=_object(
        resources=_RESOURCES, env=_list(_object("name", name=_TEXT, value=_TEXT))
    ),
)  # fmt: skip

_KINDS = (
    ("postgresql.cnpg.io", "Cluster", _CLUSTER),
    ("postgresql.cnpg.io", "ScheduledBackup", _SCHEDULED_BACKUP),
    ("barmancloud.cnpg.io", "ObjectStore", _OBJECT_STORE),
)


@functools.cache
def definitions() -> list[Object]:
    """Return the CustomResourceDefinitions. Callers do not change them."""
    if folder := os.environ.get("CNPG_DEFINITIONS"):
        return [yaml.load(file.read_text(), yaml.CSafeLoader) for file in sorted(Path(folder).glob("*.yaml"))]
    return [_definition(group, kind, spec) for group, kind, spec in _KINDS]


def _definition(group: str, kind: str, spec: Object) -> Object:
    plural = f"{kind.lower()}s"
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _object("metadata", "spec", spec=spec, metadata=_METADATA)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()},
            "versions": [version],
        },
    }


def check(manifest: Object) -> None:
    """Check an object against the schema of its kind, without CEL rules.

    Raises:
        ValidationError: the object has an unknown field or an invalid value.
    """
    [schema] = [
        version["schema"]["openAPIV3Schema"]
        for definition in definitions()
        for version in definition["spec"]["versions"]
        if definition["spec"]["names"]["kind"] == manifest["kind"]
        if manifest["apiVersion"] == f"{definition['spec']['group']}/{version['name']}"
    ]
    named = {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _METADATA}
    jsonschema.validate(manifest, closed(schema | {"properties": schema["properties"] | named}))
