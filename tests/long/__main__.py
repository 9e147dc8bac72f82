"""Run the long tests at the shipped time constants: `python -m tests.long --for soak kills`, or `make test-long`."""

import os
import sys

if __name__ == "__main__":
    os.environ["PACE"] = "shipped"  # before what reads it is imported
    from tests.long.runner import main

    sys.exit(main())
