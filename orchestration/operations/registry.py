"""Ask an image registry of this machine for an image."""

_MANIFESTS = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"


def has_image(image: str) -> bool:
    """Return whether a registry that speaks HTTP has an image; False where no registry answers.

    Args:
        image: HOST:PORT/NAME:TAG or HOST:PORT/NAME@DIGEST.
    """
    import httpx

    host, _, path = image.partition("/")
    name, _, reference = path.rpartition("@" if "@" in path else ":")
    try:
        url = f"http://{host}/v2/{name}/manifests/{reference}"
        return httpx.head(url, headers={"Accept": _MANIFESTS}, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False
