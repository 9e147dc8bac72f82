"""The nodes that a dbt command selects, and those that an attempt leaves out."""

from typing import Any

from .nodes import Json, describe

OPTIONS = (
    "select", "exclude", "selector", "resource_types", "inline",
    "empty", "sample", "event_time_start", "event_time_end",
)  # fmt: skip
"""Options of dbt's commands, from the command line, a variable or a file, that leave out nodes or rows."""


def is_stopping(task: Any) -> bool:
    """Return whether dbt stops at a failed node (fail-fast), and has cancelled the others: their sessions end."""
    return task._raise_next_tick is not None


class Selection:
    """Holds the nodes that a dbt task has selected.

    Args:
        task: dbt's task, after it has selected.
        only: the unique ids that may run; None for all that dbt has selected.
    """

    def __init__(self, task: Any, only: set[str] | None) -> None:
        self._task = task
        self.unit_tests: set[str] = getattr(task, "selected_unit_tests", set())
        nodes = {node.unique_id: node for node in task._flattened_nodes}
        nodes |= {unit: task.manifest.unit_tests[unit] for unit in self.unit_tests}
        self.is_whole_project = not _has_selecting_option(task)
        if only is not None:
            selected_count = len(nodes)
            nodes = {key: node for key, node in nodes.items() if key in only or node.is_ephemeral_model}
            self.is_whole_project = self.is_whole_project and len(nodes) == selected_count
        self.nodes = nodes
        self._shown = {key: node for key, node in nodes.items() if not node.is_ephemeral_model}
        self._nearest: dict[str, list[str]] = {}
        """The nearest shown nodes above, by unique id."""

    def descriptions(self) -> list[Json]:
        """Return the description of each node but ephemeral models, which build no relation."""
        parents = {key: self._parents(node) for key, node in self._shown.items()}
        for unit in self.unit_tests & self._shown.keys():
            # dbt runs a unit test before the model that it tests.
            tested = next(iter(self._shown[unit].depends_on_nodes), "")
            node = self._task.manifest.nodes.get(tested)
            above = self._parents(node) if node else []
            parents[unit] = [parent for parent in above if parent not in self.unit_tests]
            if tested in parents:
                parents[tested] = [*parents[tested], unit]
        return [describe(node, self._task.manifest, parents[key]) for key, node in self._shown.items()]

    def _parents(self, node: Any) -> list[str]:
        """Return the nearest shown nodes above, through those that are not shown."""
        if node.unique_id not in self._nearest:
            found: dict[str, None] = {}
            for parent in getattr(node, "depends_on_nodes", ()):
                if parent in self._shown:
                    found[parent] = None
                elif above := self._task.manifest.nodes.get(parent):
                    found |= dict.fromkeys(self._parents(above))
            self._nearest[node.unique_id] = list(found)
        return self._nearest[node.unique_id]

    def leave_out(self, done: set[str]) -> None:
        """Make dbt run only the selected nodes that are not done, as dbt's own retry does."""
        task = self._task
        left = self.nodes.keys() - done
        if len(left) >= len(task._flattened_nodes) + len(self.unit_tests):
            return
        from dbt.graph import GraphQueue

        task._flattened_nodes = [node for node in task._flattened_nodes if node.unique_id in left]
        nodes = {node.unique_id for node in task._flattened_nodes}
        if not nodes:
            task._flattened_nodes = _NothingLeft()
        task.job_queue = GraphQueue(task.graph.get_subset_graph(nodes).graph, task.manifest, nodes)
        task.num_nodes = sum(not node.is_ephemeral_model for node in task._flattened_nodes)
        if getattr(task, "selected_unit_tests", None):
            task.selected_unit_tests = task.selected_unit_tests & left
            task.build_model_to_unit_test_map(task.selected_unit_tests)


class _NothingLeft(list):  # type: ignore[type-arg]
    """An empty list of nodes with the length 1: dbt runs no hooks where the length is 0."""

    def __len__(self) -> int:
        return 1


def _has_selecting_option(task: Any) -> bool:
    """Return whether an option or a default selector of the command leaves out nodes or rows."""
    if any(getattr(task.args, option, None) for option in OPTIONS):
        return True
    # Unit tests build nothing, and dbt advises to leave them out in production.
    if {*(getattr(task.args, "exclude_resource_types", None) or ())} - {"unit_test"}:
        return True
    return bool(task.config.get_default_selector_name())
