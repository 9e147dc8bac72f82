"""The supervisor's client of the Prefect API.

The supervisor runs without site-packages and starts in milliseconds. So this module imports the standard library alone,
and does not use `orchestration.prefect_api`, which needs httpx.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestration.protocol import (
    CHECK_INTERVAL_SECONDS,
    CHECK_TIMEOUT_SECONDS,
    DISRUPTION_RETRIES,
    EXPECTED_STATE_HEADER,
    FENCED_LABEL_PREFIX,
    FINAL_STATES,
    RECHECK_INTERVAL_SECONDS,
    claim_of,
    is_given_away,
)

BEGIN_TIMEOUT_SECONDS = 240.0
"""How long a run attempt waits for the API's answer that it may begin."""


def import_http() -> None:
    """Import what requests need. A warm pod has the time, before it has a run."""
    for name in ("base64", "ssl", "urllib.request"):
        __import__(name)


def is_client_error(error: Exception) -> bool:
    """Return whether an error is an HTTP answer that refuses the request, and would refuse it again.

    Such an answer has a code below 500. The codes 408 and 429 ask for another attempt.
    """
    return getattr(error, "code", 500) < 500 and getattr(error, "code", 500) not in (408, 429)


def count_own_schedules(states: Sequence[Mapping[str, Any]]) -> int:
    """Return how often a run's flow has ended with a Scheduled state since the run last had a final state.

    Such a state follows a Running one. The supervisor's own such state says that it is a retry. A process that retries
    its flow is Running next.

    Args:
        states: the run's states, oldest first.
    """
    count = 0
    states = [state for state in states if state["name"] != "Late"]
    for before, state, after in zip(states, states[1:], states[2:], strict=False):
        if state["type"] in FINAL_STATES:
            count = 0
        is_own = not str(state["message"] or "").startswith("Retry ")
        is_own &= (before["type"], state["type"]) == ("RUNNING", "SCHEDULED") and after["type"] != "RUNNING"
        count += is_own
    return count


class RunClient:
    """Asks the Prefect API about the flow run of this run attempt, and changes the flow run.

    Args:
        url: the URL of the API.
        run: the flow run's id.
        job: the name of this run attempt's Job.
        claim: the Job's claim of the run; empty if it is in the Job's name.
    """

    def __init__(self, url: str, run: str, job: str, claim: str = "") -> None:
        self.url = url
        self.job = job
        self._claim = claim or claim_of(job)
        self.csrf_headers: dict[str, str] = {}
        """The headers with a CSRF token, if the API asks for one."""
        self.server_date = ""
        """The Date header of the newest answer; empty if it had none."""
        self.own_schedules = 0
        """How often the flow has scheduled its run again since the run last had a final state."""
        self._run_path = f"/flow_runs/{run}"
        self._states_path = f"/flow_run_states/?flow_run_id={run}"

    def read_run(self) -> dict[str, Any]:
        """Return the flow run.

        Raises:
            Exception: the API does not answer, or its answer is not a flow run.
        """
        return dict(json.loads(self._send(self._run_path)))

    def set_state(self, state: dict[str, Any], expected: str) -> None:
        """Propose a state of the flow run in place of the expected one.

        Args:
            state: the state.
            expected: the id of the state that the run had when this was decided.

        Raises:
            Exception: the API does not answer, refuses the request, or answers no JSON.
        """
        headers = {EXPECTED_STATE_HEADER: expected}
        json.loads(self._send(f"{self._run_path}/set_state", {"state": state}, headers=headers))

    def set_labels(self, labels: dict[str, Any]) -> None:
        """Set labels of the flow run; its other labels stay.

        Raises:
            Exception: the API does not answer, or refuses the request.
        """
        self._send(f"{self._run_path}/labels", labels, "PATCH")

    def disruption_retries(self, run: dict[str, Any]) -> int:
        """Return how often a run may be retried after a disruption.

        The number is a job variable of the run, else of its deployment, else of its work pool.

        Raises:
            Exception: the API does not answer.
        """
        from urllib.parse import quote

        name = "disruption_retries"
        given = (run.get("job_variables") or {}).get(name)
        if given is None:
            given = (self.read_deployment(run).get("job_variables") or {}).get(name)
        if given is None and (pool := run.get("work_pool_name")):
            template = json.loads(self._send(f"/work_pools/{quote(pool, safe='')}"))["base_job_template"]
            given = template.get("variables", {}).get("properties", {}).get(name, {}).get("default")
        try:
            return DISRUPTION_RETRIES if given is None else int(given)
        except (TypeError, ValueError, OverflowError):
            return DISRUPTION_RETRIES

    def forget_retries_in_process(self, run: dict[str, Any]) -> None:
        """Remove Prefect's mark that the process of the run retries its flow. A worker may then claim the run.

        Raises:
            Exception: the API does not answer, or refuses the request.
        """
        policy = run["empirical_policy"] | {"retry_type": None}
        self._send(self._run_path, {"empirical_policy": policy}, "PATCH")

    def release_leases(self, leases: list[str]) -> list[str]:
        """Release leases of concurrency slots; return those that remain because the API does not answer."""
        for number, lease in enumerate(leases):
            try:
                self._send("/v2/concurrency_limits/decrement-with-lease", {"lease_id": lease})
            except Exception:  # in each case the reconciler can still release them
                return leases[number:]
        return []

    def read_run_to_begin(self) -> dict[str, Any] | None:
        """Return the flow run if this run attempt may begin: its Job is not fenced, and its claim not given away.

        The call waits for the API's answer. If the API refuses the request, the flow's own requests will be refused as
        well: the run attempt begins, and reports that.

        Returns:
            The flow run; empty if the API refuses the request. None if this run attempt must not begin.

        Raises:
            TimeoutError: the API has not answered for `BEGIN_TIMEOUT_SECONDS`.
        """
        deadline = time.monotonic() + BEGIN_TIMEOUT_SECONDS
        while True:
            try:
                run, states = self.read_run(), self._read_states()
                self.own_schedules = count_own_schedules(states)
                return None if self.is_fenced(run) or is_given_away(self._claim, states) else run
            except Exception as error:
                if is_client_error(error):
                    return {}
                if time.monotonic() > deadline:
                    raise TimeoutError(f"The Prefect API at {self.url} does not answer: {error}") from None
                time.sleep(RECHECK_INTERVAL_SECONDS)

    def read_deployment(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return the deployment of a run; empty if it has none.

        Raises:
            Exception: the API does not answer, refuses the request, or its answer is not a deployment.
        """
        deployment = run.get("deployment_id")
        return dict(json.loads(self._send(f"/deployments/{deployment}"))) if deployment else {}

    def is_fenced(self, run: dict[str, Any]) -> bool:
        """Return whether the run has the label that fences this run attempt's Job."""
        return bool((run.get("labels") or {}).get(FENCED_LABEL_PREFIX + self.job))

    def is_given_away(self) -> bool:
        """Return whether the Job's claim of the run is over.

        Raises:
            Exception: the API does not answer, or its answer is not a list of states.
        """
        return is_given_away(self._claim, self._read_states())

    def _read_states(self) -> list[dict[str, Any]]:
        """Return all states of the run, oldest first."""
        return list(json.loads(self._send(self._states_path)))

    def is_current_job(self, run: dict[str, Any]) -> bool:
        """Return whether no worker has recorded another Job of the run."""
        recorded = str(run.get("infrastructure_pid") or "")
        return not recorded or recorded.endswith(f":{self.job}")

    def poll_run(self) -> Iterator[dict[str, Any]]:
        """Yield the flow run again and again, for ever: after each answer a pause of `CHECK_INTERVAL_SECONDS`."""
        pause = CHECK_INTERVAL_SECONDS
        while True:
            time.sleep(pause)
            try:
                run, pause = self.read_run(), CHECK_INTERVAL_SECONDS
            except Exception as error:
                # The API would refuse a refused request again. Any other failure may be over soon.
                pause = CHECK_INTERVAL_SECONDS if is_client_error(error) else RECHECK_INTERVAL_SECONDS
                continue
            yield run

    def _send(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send a request, and again with a CSRF token if the API asks for one; return the answer's body."""
        # Imported late, here and below: the command starts before these modules are loaded.
        from urllib.error import HTTPError

        try:
            return self._send_once(path, body, method, headers)
        except HTTPError as error:
            if not (body and error.code == 403 and b"CSRF token" in error.read()):
                raise
        client = os.urandom(16).hex()
        token = json.loads(self._send_once(f"/csrf-token?client={client}"))["token"]
        self.csrf_headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
        return self._send_once(path, body, method, headers)

    def _send_once(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        method: str | None = None,
        extra_headers: Mapping[str, str] | None = None,
    ) -> bytes:
        import base64
        import ssl
        from urllib.request import Request, urlopen

        headers = json.loads(os.environ.get("PREFECT_CLIENT_CUSTOM_HEADERS") or "{}") | self.csrf_headers
        headers |= {"Content-Type": "application/json", **(extra_headers or {})}
        if password := os.environ.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        if key := os.environ.get("PREFECT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        context = None
        if self.url.startswith("https:"):
            context = ssl.create_default_context(cafile=os.environ.get("PREFECT_API_SSL_CERT_FILE"))
            if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true"):
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        data = json.dumps(body).encode() if body else None
        # The URL is the operator's setting.
        request = Request(self.url + path, data, headers, method=method)  # noqa: S310
        with urlopen(request, timeout=CHECK_TIMEOUT_SECONDS, context=context) as answer:  # noqa: S310
            self.server_date = answer.headers["Date"] or ""
            return bytes(answer.read())
