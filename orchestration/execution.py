"""Run the supervisor in the container of a flow run.

    python -I -S /app/orchestration/execution.py prefect flow-run execute

Base job templates name this file. The image of a deployment may be from another release than the chart, so the path of
this file is an interface between charts and images. It stays when modules move.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))  # with -I Python adds no folder to sys.path

    from orchestration.runs.supervisor import main

    sys.exit(main(sys.argv[1:]))
