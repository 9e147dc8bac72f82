"""The fixtures that tests of several of the library's parts share."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import anyio
import pytest
from websockets.asyncio.client import connect


@pytest.fixture
def closed_worker_channels() -> Iterator[None]:
    """Close a worker's websocket before its event loop ends.

    Prefect 3.9.1 cancels the scope in which the websocket waits for the server's closing frame. In a worker's own
    process the exit closes the socket. In the tests' process the warning of an unclosed socket fails a later test.
    """
    close = connect.__aexit__

    async def close_shielded(connection: connect, *error: Any) -> None:
        with anyio.CancelScope(shield=True):
            await close(connection, *error)

    with patch.object(connect, "__aexit__", close_shielded):
        yield
