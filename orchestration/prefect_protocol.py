"""The protocol between Prefect's processes of a flow run: environment variables, and the control session.

The supervisor imports this module, which therefore imports nothing.

Replaces: `PREFECT__*` variables, and the wire format of `prefect._internal.attempt_control`
Why: without a reason before SIGTERM the engine reports a crash, and a cancelled run would not be Cancelled
Until: Prefect documents how a supervisor ends a flow run
"""

FLOW_RUN_ID_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""The environment variable that Prefect's worker gives to the main container alone."""

RUN_VARIABLE_PREFIX = "PREFECT__"
"""The prefix of the environment variables in which Prefect's worker names the run, its flow and its deployment."""

FLOW_ENTRYPOINT_VARIABLE = "PREFECT__FLOW_ENTRYPOINT"
"""The environment variable that names the flow to the engine: file and function."""

CONTROL_PORT_VARIABLE = "PREFECT__CONTROL_PORT"
CONTROL_TOKEN_VARIABLE = "PREFECT__CONTROL_TOKEN"  # noqa: S105 - a name
"""The environment variables by which the engine connects to the supervisor."""

CANCEL, RESCHEDULE, RELINQUISH = b"c", b"r", b"q"
"""Why the engine is about to get SIGTERM: the supervisor sends one of these."""

ACKNOWLEDGED = b"a"
"""The engine answers that it knows the reason."""

NO_RECEIPTS = b"\x00PF\x02\x00"
"""The supervisor's answer to the engine's offer to report how the run attempt ended: protocol 2, without receipts."""
