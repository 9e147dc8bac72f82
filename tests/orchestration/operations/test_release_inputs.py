"""The inputs of a release: a change of what the image does not contain rolls out nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orchestration.operations import registry
from orchestration.operations.environment import POOL, SERVER, Environment
from orchestration.operations.release_inputs import Image, local_images, values_options
from tests.parts import commit_copy_of_checkout

HASHES = f"""
import sys
from orchestration.operations.environment import Environment
from orchestration.operations.release_inputs import Image, input_hash
environment = Environment("local", "context", "namespace")
for release in ("{SERVER}", "{POOL}"):
    print(input_hash(environment, release, Image("registry/image", sys.argv[1])))
"""


def _tag(checkout: Path) -> str:
    """Return the tag of the checkout's image. Without a registry, `docker/build --digest` names the image and fails."""
    environment = os.environ | {"REGISTRY": "localhost:1"}
    command = ["docker/build", "--digest"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    found = re.match(r"localhost:1/prefect-orchestration:(src-[0-9a-f]{12}) is not in the registry", done.stderr)
    assert found, done.stderr
    return found[1]


def _inputs(checkout: Path) -> list[str]:
    """Return the image's tag and the input hash of each release, as this checkout's own code computes them."""
    tag = _tag(checkout)
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", HASHES, tag]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return [tag, *done.stdout.split()]


def test_only_what_the_image_or_a_release_contains_changes_it(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    commit_copy_of_checkout(checkout)
    before = _inputs(checkout)
    assert len(set(before)) == 3
    operations = checkout / "orchestration" / "operations"
    for name in ("deploy.py", "local_cluster/node.py", "local_cluster/manifests/dns.yaml"):
        (operations / name).write_text((operations / name).read_text() + "\n# changed\n")
    (operations / "new.py").write_text("")
    assert _inputs(checkout) == before

    (checkout / "flows" / "report.py").write_text("# changed\n")
    tag, server, pool = _inputs(checkout)
    assert server == before[1], "a flow changes the image and the work pool alone"
    assert tag != before[0]
    assert pool != before[2]

    settings = checkout / "orchestration" / "settings.py"
    settings.write_text(settings.read_text() + "\n# changed\n")
    assert not {tag, server, pool} & set(_inputs(checkout)), "the library changes all three"


@pytest.mark.parametrize("absent", ["nothing", "pgbouncer:1.24"])
def test_local_release_uses_the_images_that_the_registry_has(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    """A node that an older checkout made has no image of PgBouncer."""
    monkeypatch.setattr(registry, "has_image", lambda name: not name.endswith(absent))
    local_images.cache_clear()
    environment = Environment("local", "context", "namespace")
    with values_options(environment, SERVER, Image("registry/image", "sha256:1")) as options:
        values = yaml.safe_load(Path(options[-1]).read_text())
    local_images.cache_clear()
    assert values["database"]["bundled"]["image"] == {"repository": "localhost:5000/postgres", "tag": "17"}
    assert values["redis"]["bundled"]["image"] == {"repository": "localhost:5000/valkey", "tag": "8.1"}
    used = {"image": {"repository": "localhost:5000/pgbouncer", "tag": "1.24"}}
    assert values.get("pgbouncer") == (used if absent == "nothing" else None)
