"""How the cluster's set-up speaks: steps as they are done, and one error for all that stops it."""

from orchestration.errors import ClusterError
from orchestration.progress import step

__all__ = ["ClusterError", "step"]
