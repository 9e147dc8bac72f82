"""Start the engine of a flow run: import what each run needs, and no more.

    PREFECT__FLOW_RUN_ID=... python -m orchestration.runs.engine_start

The garbage collector is off meanwhile. It would search the growing modules again and again, an eighth of the imports'
time. What is imported stays until the process ends, so the collector never looks at it again.
"""

import gc

from orchestration.prefect_compat import blocks

if __name__ == "__main__":
    gc.disable()
    blocks.defer_notifications()

    from orchestration.runs import engine

    gc.freeze()
    gc.enable()
    engine.main()
