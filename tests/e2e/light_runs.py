"""Flow runs that import no Prefect, for tests of the worker alone: an import takes seconds of a small machine."""

import shlex

CODE = """
import base64, json, os, sys, time, urllib.request
url = f"{os.environ['PREFECT_API_URL']}/flow_runs/{os.environ['PREFECT__FLOW_RUN_ID']}/set_state"
user = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
headers = {"Authorization": f"Basic {user}", "Content-Type": "application/json"}
for type_, seconds in (("RUNNING", float(sys.argv[1])), ("COMPLETED", 0)):
    body = json.dumps({"state": {"type": type_}}).encode()
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
    time.sleep(seconds)
"""
"""Sets the run Running, waits for the seconds that it is given, and sets the run Completed."""


def light_run(seconds: float = 0) -> dict[str, str]:
    """Return job variables of a run that is Running for some seconds. Its supervisor and its flow are not executed."""
    return {"command": f"python -I -S -c {shlex.quote(CODE)} {seconds}"}


LIGHT_RUN = light_run()
"""Job variables of a run that completes at once."""
