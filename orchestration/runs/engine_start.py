"""Start the engine of a flow run: import what each run needs, and no more.

PREFECT__FLOW_RUN_ID=... python -m orchestration.runs.engine_start
"""

from orchestration.garbage_collection import paused_for_imports
from orchestration.prefect_compat import blocks

if __name__ == "__main__":
    with paused_for_imports():
        blocks.defer_notifications()
        from orchestration.runs import engine
    engine.main()
