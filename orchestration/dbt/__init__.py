"""dbt in a flow: one child process for each command, and a task run for each node."""

from orchestration.dbt.project import DbtProject
from orchestration.dbt.result import DbtResult, Node

__all__ = ["DbtProject", "DbtResult", "Node"]
