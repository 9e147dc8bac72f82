"""Start the engine of a flow run: import what each run needs, and no more. In a warm pod, also what flows need.

PREFECT__FLOW_RUN_ID=... python -m orchestration.runs.engine_start
"""

import os

from orchestration.garbage_collection import paused_for_imports
from orchestration.prefect_compat import blocks
from orchestration.protocol import HAND_OVER_VARIABLE

if __name__ == "__main__":
    with paused_for_imports():
        blocks.defer_notifications()
        from orchestration.runs import engine

        if os.environ.pop(HAND_OVER_VARIABLE, ""):
            from orchestration.runs import flow_imports

            flow_imports.import_packages_of_flows()
    engine.main()
