"""Storage of results in a real Redis. fsspec finds the file system by its entry point."""

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import redis
from prefect import flow, task
from prefect.filesystems import RemoteFileSystem

from orchestration.errors import SettingsError
from tests import parts


def _storage(**settings: int) -> RemoteFileSystem:
    storage = RemoteFileSystem(basepath=f"redis://{uuid4().hex}/results", settings=settings)
    storage._filesystem = fsspec.filesystem("redis", skip_instance_cache=True, **settings)
    return storage


def test_file_is_a_key_that_expires_after_its_ttl(tmp_path: Path, use_settings: Callable[..., None]) -> None:
    with parts.redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        use_settings(RESULTS_REDIS_URL=url)
        for storage, seconds in ((_storage(), -1), (_storage(ttl=60), 60)):
            storage.write_path("a/b", b"one")
            storage.write_path("a/b", b"two")
            assert storage.read_path("a/b") == b"two"
            key = f"{storage.basepath.removeprefix('redis://')}/a/b"
            assert client.get(key) == b"two"
            assert client.ttl(key) == seconds if seconds < 0 else 0 < client.ttl(key) <= seconds
            with pytest.raises(FileNotFoundError):
                storage.read_path("a/c")
        assert client.dbsize() == 2


@pytest.mark.parametrize(
    ("url", "message"), [("", "RESULTS_REDIS_URL is not set"), ("localhost:6379", "not a Redis URL")]
)
def test_wrong_url_is_an_error_that_names_the_cause(url: str, message: str, use_settings: Callable[..., None]) -> None:
    use_settings(RESULTS_REDIS_URL=url)
    with pytest.raises(SettingsError, match=message):
        _storage()


def _s3(port: int) -> RemoteFileSystem:
    endpoint = {"endpoint_url": f"http://127.0.0.1:{port}"}
    key = {"key": "someone", "secret": "secret"}
    return RemoteFileSystem(basepath="s3://results/away", settings=key | {"client_kwargs": endpoint})


def _redis(_: int) -> RemoteFileSystem:
    return _storage()


@pytest.mark.parametrize("create_storage", [_redis, pytest.param(_s3, marks=pytest.mark.further)])
@pytest.mark.usefixtures("prefect_server")
def test_run_completes_while_the_storage_of_results_is_down(
    create_storage: Callable[[int], RemoteFileSystem],
    use_settings: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = parts.free_port()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # retries wait longer each time
    use_settings(RESULTS_REDIS_URL=f"redis://127.0.0.1:{port}/0")
    storage = create_storage(port)
    storage.save(f"away-{uuid4().hex[:8]}")

    @task
    def one() -> int:
        return 1

    @flow(result_storage=storage, persist_result=True)
    def away() -> int:
        return one()

    assert away() == 1
