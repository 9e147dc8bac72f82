"""A Redis file system for fsspec, in which Prefect's remote file system `redis://FOLDER` keeps results.

The environment of the run has the address and password of the Redis, in `RESULTS_REDIS_URL`. The block on the Prefect
server has neither. Prefect's own Redis block would have both.

fsspec finds this class by the entry point in pyproject.toml. The Dockerfile adds the entry point to the image.
"""

from io import BytesIO
from typing import Any

from fsspec import AbstractFileSystem

from orchestration.errors import SettingsError
from orchestration.settings import settings

TIMEOUT_SECONDS = 10
"""How long to wait for a connection and for an answer, unless the URL has a `socket_timeout`.

Without a timeout, a network that drops packets would hold a run for ever.
"""


class RedisFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Stores a file as the key FOLDER/NAME. There are no folders.

    Args:
        ttl: after how many seconds a file is removed; None to keep it.
        options: the options of each fsspec file system.

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
            url.get_secret_value(),
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            health_check_interval=30,
        )
        self._ttl = ttl

    def _open(self, path: str, mode: str = "rb", **_: Any) -> BytesIO:
        """Open a file to read, or a buffer that is written to Redis when it is closed.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        key = self._strip_protocol(path)
        if mode == "wb":
            return _WriteBuffer(lambda content: self._redis.set(key, content, ex=self._ttl))
        content = self._redis.get(key)
        if content is None:
            raise FileNotFoundError(path)
        return BytesIO(content)


class _WriteBuffer(BytesIO):
    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store

    def close(self) -> None:
        if not self.closed:
            self._store(self.getvalue())
        super().close()
