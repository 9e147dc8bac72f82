"""A real identity provider as a pod of the cluster, and a browser's way to it and to oauth2-proxy."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from orchestration.operations.local_cluster import images
from orchestration.operations.local_cluster.certificates import Authority
from tests.cluster.namespace import Namespace
from tests.e2e.release import Object, Release, image_values
from tests.orchestration.access.guarded_server import OIDC_GROUPS
from tests.orchestration.access.single_sign_on import HOST, SECRETS, Port, SingleSignOn, find_issuer, list_people

ISSUER = "issuer"
ISSUER_PORT = 8443
CA = "issuer-ca"
"""The ConfigMap with the certificate of the identity provider's CA."""

CREDENTIALS = "oidc"
"""The Secret with the credentials of oauth2-proxy."""


def install_issuer(namespace: Namespace, folder: Path) -> str:
    """Start an identity provider, and return the address of its pod.

    Args:
        namespace: the namespace of the server.
        folder: receives the certificates of the identity provider and of its CA.
    """
    Authority(folder).issue("tls", ISSUER, hosts=[_host(namespace)])
    files = {name: (folder / name).read_text() for name in ("tls.crt", "tls.key")} | {"people.json": list_people()}
    client_secret, cookie_secret = (SECRETS[f"OAUTH2_PROXY_{name}_SECRET"] for name in ("CLIENT", "COOKIE"))
    namespace.apply(
        _object("Secret", ISSUER, stringData=files),
        _object("ConfigMap", CA, data={"ca.crt": (folder / "ca.crt").read_text()}),
        _object("Secret", CREDENTIALS, stringData={"client-secret": client_secret, "cookie-secret": cookie_secret}),
        # Without an address of its own: policies that name addresses mean those of pods.
        _object("Service", ISSUER, spec={"selector": {"app": ISSUER}, "clusterIP": "None"}),
    )
    program = find_issuer()
    image = f"{images.REGISTRY}/{ISSUER}:{program.parent.name.rpartition('-')[2]}"
    images.push_binary(image, program, f'["/{program.name}"]')
    people, *certificate = (f"/etc/issuer/{name}" for name in ("people.json", "tls.crt", "tls.key"))
    given = [people, "prefect", client_secret, f"https://{HOST}/oauth2/callback", *certificate]
    container = {
        "image": image,
        "command": [f"/{program.name}", _url(namespace), f":{ISSUER_PORT}", *given],
        "volumeMounts": [{"name": "files", "mountPath": "/etc/issuer"}],
        "readinessProbe": {"tcpSocket": {"port": ISSUER_PORT}, "periodSeconds": 1},
    }
    namespace.pod(ISSUER, container=container, volumes=[{"name": "files", "secret": {"secretName": ISSUER}}])
    return namespace.kubectl("get", "pod", ISSUER, "-o", "jsonpath={.status.podIP}")


def oidc_values(namespace: Namespace) -> Object:
    """Return the value `oidc` of a server whose people log in at the namespace's identity provider."""
    return {
        "enabled": True,
        "issuerUrl": _url(namespace),
        "clientId": "prefect",
        "existingSecret": CREDENTIALS,
        "groups": OIDC_GROUPS,
        "extraArgs": ["--provider-ca-file=/etc/issuer-ca/ca.crt"],
        "image": image_values(images.push_program_image("oauth2-proxy")),
        "resources": {"requests": {"cpu": "1m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
        "pod": {
            "volumes": [{"name": CA, "configMap": {"name": CA}}],
            "volumeMounts": [{"name": CA, "mountPath": "/etc/issuer-ca", "readOnly": True}],
        },
    }


@contextlib.contextmanager
def single_sign_on(server: Release, ca: Path, issuer_ca: Path) -> Iterator[SingleSignOn]:
    """Forward ports of this machine to a pod of oauth2-proxy and to the identity provider while the block lasts.

    Args:
        server: a release with TLS.
        ca: the certificate of its CA.
        issuer_ca: the certificate of the identity provider's CA.
    """
    name = f"{server.name}-oidc"
    with (
        server.namespace.forwarded(f"service/{name}", 4200) as proxy,
        server.namespace.forwarded(f"pod/{ISSUER}", ISSUER_PORT) as provider,
    ):
        yield SingleSignOn(
            Port(proxy, name, ca),
            _url(server.namespace),
            provider=Port(provider, _host(server.namespace), issuer_ca),
        )


def _host(namespace: Namespace) -> str:
    return f"{ISSUER}.{namespace.name}.svc.cluster.local"


def _url(namespace: Namespace) -> str:
    return f"https://{_host(namespace)}:{ISSUER_PORT}/"


def _object(kind: str, name: str, **fields: object) -> Object:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **fields}
