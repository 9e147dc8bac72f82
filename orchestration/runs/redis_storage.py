"""Redis as a file system of fsspec's: Prefect's remote file system `redis://FOLDER` keeps results in it.

Where the Redis is and its password come from the environment of the run, `RESULTS_REDIS_URL`: the block on the Prefect
server has neither. Prefect's own block for Redis would have both.

fsspec finds this class by the entry point in pyproject.toml; the image has it from its Dockerfile.
"""

from io import BytesIO
from typing import Any

from fsspec import AbstractFileSystem

from orchestration.errors import SettingsError
from orchestration.settings import settings

TIMEOUT = 10
"""Seconds for a connection and for an answer, as long as the URL says no `socket_timeout`: without one, packets that
are dropped would hold a run for ever."""


class RedisFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Files are keys, FOLDER/NAME; there are no folders.

    Args:
        ttl: seconds after which a file is gone; none: it stays.
        options: of every file system of fsspec's.

    Raises:
        SettingsError: `RESULTS_REDIS_URL` is not set.
    """

    protocol = "redis"

    def __init__(self, ttl: int | None = None, **options: Any) -> None:
        from prefect_redis.connection import redis_from_url

        super().__init__(**options)
        url = settings().results_redis_url
        if url is None:
            raise SettingsError(
                "RESULTS_REDIS_URL is not set. Set it to something like redis://user:password@host:6379/0"
            )
        self._redis = redis_from_url(
            url.get_secret_value(), socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, health_check_interval=30
        )
        self._ttl = ttl

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BytesIO:
        """A file's content, or what becomes it when it is closed.

        Raises:
            FileNotFoundError: there is none.
        """
        key = self._strip_protocol(path)
        if mode == "wb":
            return _Written(lambda content: self._redis.set(key, content, ex=self._ttl))
        content = self._redis.get(key)
        if content is None:
            raise FileNotFoundError(path)
        return BytesIO(content)


class _Written(BytesIO):
    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store

    def close(self) -> None:
        if not self.closed:
            self._store(self.getvalue())
        super().close()
