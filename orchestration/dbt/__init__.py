"""dbt in a flow: one child process a command, each node a task run."""

from orchestration.dbt.project import DbtProject
from orchestration.dbt.result import DbtResult, Node

__all__ = ["DbtProject", "DbtResult", "Node"]
