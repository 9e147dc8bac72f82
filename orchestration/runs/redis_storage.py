"""A Redis file system for fsspec, in which Prefect's remote file system `redis://FOLDER` keeps results.

The environment of the run has the address and password of the Redis, in `RESULTS_REDIS_URL`. The block on the Prefect
server has neither. Prefect's own Redis block would have both.

fsspec finds this class by the entry point in pyproject.toml. The Dockerfile adds the entry point to the image.
"""

import errno
import math
import time
from io import BytesIO
from typing import Any
from uuid import uuid4

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
            return _WriteBuffer(lambda content: self._set(key, content))
        content = self._redis.get(key)
        if content is None:
            raise FileNotFoundError(path)
        return BytesIO(content)

    def _set(self, key: str, content: bytes) -> None:
        from redis.exceptions import OutOfMemoryError

        try:
            self._redis.set(key, content, ex=self._ttl)
        except OutOfMemoryError as error:
            raise OSError(errno.ENOSPC, str(error).removesuffix(".")) from error

    def units(self, path: str) -> "RedisUnits":
        """Return what counts the stored units of a deployment (`orchestration.runs.result_limit`).

        Args:
            path: the name of the sorted set.
        """
        return RedisUnits(self._redis, self._strip_protocol(path), self._ttl)


class RedisUnits:
    """Counts units as the members of a sorted set whose time has not come.

    Args:
        redis: the client.
        key: the name of the sorted set.
        ttl: after how many seconds units no longer count; None to count them for ever.
    """

    def __init__(self, redis: Any, key: str, ttl: int | None) -> None:
        self._redis = redis
        self._key = key
        self._ttl = ttl

    def count(self) -> int:
        """Return the units whose results are still stored."""
        return sum(
            int(member.partition(b":")[0]) for member in self._redis.zrangebyscore(self._key, time.time(), "inf")
        )

    def add(self, units: int) -> None:
        """Add a member, and remove those whose time has come."""
        now = time.time()
        with self._redis.pipeline() as pipeline:
            pipeline.zadd(self._key, {f"{units}:{uuid4().hex}": now + (self._ttl or math.inf)})
            pipeline.zremrangebyscore(self._key, "-inf", now)
            if self._ttl:
                pipeline.expire(self._key, self._ttl)
            pipeline.execute()

    def capacity(self) -> int:
        """Return the memory that the Redis may use, in bytes; 0 if it has no limit."""
        return int(self._redis.info("memory").get("maxmemory", 0))


class _WriteBuffer(BytesIO):
    def __init__(self, store: Any) -> None:
        super().__init__()
        self._store = store

    def close(self) -> None:
        try:
            if not self.closed:
                self._store(self.getvalue())
        finally:
            super().close()  # else the garbage collector would store once more
