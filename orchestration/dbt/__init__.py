"""dbt as one child process of a flow."""

from orchestration.dbt.project import DbtProject, DbtResult, Node

__all__ = ["DbtProject", "DbtResult", "Node"]
