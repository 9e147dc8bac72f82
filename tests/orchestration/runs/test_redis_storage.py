"""Results in a real Redis, by `orchestration/runs/redis_storage.py`, which fsspec finds by an entry point."""

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
    made = RemoteFileSystem(basepath=f"redis://{uuid4().hex}/results", settings=settings)
    made._filesystem = fsspec.filesystem("redis", skip_instance_cache=True, **settings)
    return made


def test_a_file_is_a_key_that_goes_after_its_time(tmp_path: Path, use_settings: Callable[..., None]) -> None:
    with parts.redis_server(tmp_path) as url, redis.Redis.from_url(url) as there:
        use_settings(RESULTS_REDIS_URL=url)
        for storage, seconds in ((_storage(), -1), (_storage(ttl=60), 60)):
            storage.write_path("a/b", b"one")
            storage.write_path("a/b", b"two")
            assert storage.read_path("a/b") == b"two"
            key = f"{storage.basepath.removeprefix('redis://')}/a/b"
            assert there.get(key) == b"two"
            assert there.ttl(key) == seconds if seconds < 0 else 0 < there.ttl(key) <= seconds
            with pytest.raises(FileNotFoundError):
                storage.read_path("a/c")
        assert there.dbsize() == 2


@pytest.mark.parametrize(("url", "said"), [("", "RESULTS_REDIS_URL is not set"), ("localhost:6379", "not a Redis URL")])
def test_an_url_that_cannot_be_is_said(url: str, said: str, use_settings: Callable[..., None]) -> None:
    use_settings(RESULTS_REDIS_URL=url)
    with pytest.raises(SettingsError, match=said):
        _storage()


def _s3(port: int) -> RemoteFileSystem:
    endpoint = {"endpoint_url": f"http://127.0.0.1:{port}"}
    key = {"key": "someone", "secret": "secret"}
    return RemoteFileSystem(basepath="s3://results/away", settings=key | {"client_kwargs": endpoint})


def _redis(_: int) -> RemoteFileSystem:
    return _storage()


@pytest.mark.parametrize("made", [_redis, _s3])
@pytest.mark.usefixtures("prefect_server")
def test_results_storage_that_is_away_costs_the_results_and_not_the_run(
    made: Callable[[int], RemoteFileSystem], use_settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = parts.free_port()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # each of its retries waits longer than the one before
    use_settings(RESULTS_REDIS_URL=f"redis://127.0.0.1:{port}/0")
    storage = made(port)
    storage.save(f"away-{uuid4().hex[:8]}")

    @task
    def one() -> int:
        return 1

    @flow(result_storage=storage, persist_result=True)
    def away() -> int:
        return one()

    assert away() == 1
