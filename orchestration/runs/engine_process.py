"""The process of the engine, as its parent, the supervisor, controls it.

The supervisor imports this module, which therefore imports the standard library alone.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from orchestration import prefect_protocol
from orchestration.protocol import CHECK_TIMEOUT_SECONDS, RECHECK_INTERVAL_SECONDS

GATE_VARIABLE = "EXECUTION_GATE"
"""The environment variable with the file descriptor from which the engine reads its run, once it may begin."""


class EngineProcess:
    """Starts `orchestration.runs.engine_start` in a process group, lets it begin, and ends the group.

    While the flow can be interrupted, the engine is connected to a port of this process. The supervisor sends the
    reason before SIGTERM: from the signal alone the engine would report a crash. `orchestration.prefect_protocol` has
    the messages.
    """

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._token = os.urandom(16).hex()
        read, self._gate = os.pipe()
        control = {
            prefect_protocol.CONTROL_PORT_VARIABLE: str(self._listener.getsockname()[1]),
            prefect_protocol.CONTROL_TOKEN_VARIABLE: self._token,
            GATE_VARIABLE: str(read),
        }
        # -P: the working directory is not on the path, as a user may have a package named `orchestration` there.
        command = [sys.executable, "-P", "-m", "orchestration.runs.engine_start"]
        self.process = subprocess.Popen(command, env=os.environ | control, start_new_session=True, pass_fds=[read])
        os.close(read)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        """Accept the connection that has the token."""
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                connection.settimeout(CHECK_TIMEOUT_SECONDS)
                if connection.makefile("rb", 0).readline().strip() == self._token.encode():
                    # The engine offers to report how it ended. Without this answer it would wait for one at its end.
                    connection.sendall(prefect_protocol.NO_RECEIPTS)
                    self._connection = connection
                    return
            connection.close()

    def is_alive(self) -> bool:
        """Return whether the process has not ended."""
        return self.process.poll() is None

    def begin(self, flow_run: dict[str, Any], deployment: dict[str, Any], environment: Mapping[str, str]) -> None:
        """Let the engine execute the run. The call may wait until the engine has loaded its modules.

        Args:
            flow_run: the run as the Prefect API returns it. If it is empty, the engine asks the API.
            deployment: the run's deployment, likewise.
            environment: variables that the engine of a warm pod does not have yet.
        """
        read = {"flow_run": flow_run, "deployment": deployment, "environment": {**environment}}
        line = json.dumps(read).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._gate, "wb") as gate:
            gate.write(line)

    def announce_sigterm(self, reason: bytes, timeout: float) -> bool:
        """Send the engine the reason for the SIGTERM that follows.

        Args:
            reason: one of the reasons in `orchestration.prefect_protocol`.
            timeout: seconds to wait for the engine's answer. A flow that holds Python's lock, as in a C library, delays
                the answer.

        Returns:
            Whether SIGTERM may follow. False if the engine has not begun or does not answer.
        """
        if not self._connection:
            return False
        try:
            self._connection.settimeout(max(timeout, RECHECK_INTERVAL_SECONDS))
            self._connection.sendall(reason)
            while answer := self._connection.recv(64):
                if answer.endswith(prefect_protocol.ACKNOWLEDGED):
                    return True
        except TimeoutError:
            return False
        except OSError:
            pass
        # The engine has closed the connection: its flow handles signals itself, or is over.
        return True

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the engine and to all processes in its group."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, number)
