"""Summarise a dbt command: text for logs, Markdown for the UI, and a picture of dbt's threads."""

import base64
from html import escape

from orchestration.dbt.artifacts import StoredCommand
from orchestration.dbt.result import DbtResult, Node

SLOWEST_NODES = 5
"""How many nodes the summary names as the slowest, and in each of its lists."""

_COLOURS = {"model": "#2a9d8f", "seed": "#8ab17d", "snapshot": "#287271", "test": "#e9c46a", "unit_test": "#e9c46a"}
_FAILED, _OTHER = "#e76f51", "#8d99ae"


def counts(result: DbtResult) -> str:
    """Return the number of nodes, the seconds, and the number of nodes by outcome."""
    passed = sum(node.status in ("success", "pass", "no-op") for node in result.nodes)
    parts = {
        "ok": passed,
        "warned": len(result.warned),
        "failed": len(result.failed),
        "skipped": len(result.skipped),
        "done before": len(result.reused),
        "of unknown status": len(result.unknown),
    }
    listed = ", ".join(f"{count} {word}" for word, count in parts.items() if count) or "nothing to do"
    return f"{len(result.nodes)} nodes in {result.seconds:.1f} s: {listed}"


def slowest(result: DbtResult) -> list[Node]:
    """Return the nodes that took longest, longest first."""
    return sorted((node for node in result.nodes if node.seconds), key=lambda node: -node.seconds)[:SLOWEST_NODES]


def changes(result: DbtResult, before: StoredCommand | None) -> list[str]:
    """Return the differences from the command before, one line each; empty if there is none to compare with."""
    if before is None:
        return []
    now = {node.id: node for node in result.nodes}
    pairs = [(before.nodes[key], node) for key, node in now.items() if key in before.nodes]
    slower = [
        f"{node.title} ({old.seconds:.1f} s → {node.seconds:.1f} s)"
        for old, node in pairs
        if node.seconds > 1.5 * old.seconds and node.seconds - old.seconds > 1
    ]
    by_change = {
        "fails now": [node.title for old, node in pairs if node.failed and not old.failed],
        "works again": [node.title for old, node in pairs if old.failed and node.done],
        "new": [node.title for key, node in now.items() if key not in before.nodes],
        "gone": [node.title for key, node in before.nodes.items() if key not in now],
        "slower": slower,
    }
    return [f"{change}: {_first_titles(titles)}" for change, titles in by_change.items() if titles]


def _first_titles(titles: list[str]) -> str:
    more = f" and {len(titles) - SLOWEST_NODES} more" if len(titles) > SLOWEST_NODES else ""
    return ", ".join(titles[:SLOWEST_NODES]) + more


def _critical_path(result: DbtResult) -> tuple[float, list[Node]]:
    """Return the seconds of the critical path, and its nodes that took time."""
    path = [node for node in result.critical_path() if node.seconds]
    return sum(node.seconds for node in path), path


def text(result: DbtResult, before: StoredCommand | None = None) -> str:
    """Return the summary as plain text, one fact a line."""
    seconds, path = _critical_path(result)
    lines = [f"dbt {result.command}: {counts(result)}"]
    if path:
        chain = " → ".join(node.title for node in path)
        share = f"{seconds:.1f} s of {result.seconds:.1f} s"
        lines += [
            f"  critical path  {share}: {chain}",
            "  slowest        " + ", ".join(f"{node.title} {node.seconds:.1f} s" for node in slowest(result)),
        ]
    lines += [f"  {node.status:<13}  {node.title} ({node.path}): {node.reason}" for node in result.failed[:20]]
    lines += [f"  since before   {line}" for line in changes(result, before)]
    return "\n".join(lines)


def markdown(result: DbtResult, before: StoredCommand | None = None) -> str:
    """Return the summary as Markdown, for an artifact in Prefect's UI."""
    seconds, path = _critical_path(result)
    by_id = {node.id: node for node in result.nodes}
    lines = [f"**dbt {result.command}: {counts(result)}**", ""]
    if path:
        lines += [
            f"Critical path: {seconds:.1f} s of {result.seconds:.1f} s.",
            "",
            "| critical path | kind | seconds |", "|---|---|---:|",
            *(f"| `{node.title}` | {node.kind} | {node.seconds:.2f} |" for node in path[-20:]),
            "",
            "| slowest | kind | rows | seconds |", "|---|---|---:|---:|",
            *(
                f"| `{node.title}` | {node.kind} | {_count(node.rows)} | {node.seconds:.2f} |"
                for node in slowest(result)
            ),
            "",
        ]  # fmt: skip
    if result.failed or result.warned:
        lines += ["| what failed | file | why |", "|---|---|---|"]
        for node in [*result.failed, *result.warned][:50]:
            lines.append(f"| `{node.title}` | {node.path} | {_cell(node.reason[:1_000])} |")
        lines.append("")
    for node in [node for node in [*result.failed, *result.warned] if node.sql][:5]:
        lines += [f"`{node.title}`:", "", "```sql", node.sql.strip(), "```", "", *_table(node), ""]
    if result.skipped:
        lines += ["| skipped | because of |", "|---|---|"]
        for node in result.skipped[:50]:
            cause = by_id.get(node.because)
            lines.append(f"| `{node.title}` | {f'`{cause.title}`' if cause else _cell(node.message)} |")
        lines.append("")
    if changed := changes(result, before):
        lines += ["Since the run before:", "", *(f"- {line}" for line in changed), ""]
    if result.stored:
        lines.append(f"Artifacts: `{result.stored}`")
    return "\n".join(lines)


def _count(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,}"


def _table(node: Node) -> list[str]:
    """Return the rows that a test found as lines of a Markdown table."""
    if not node.sample:
        return []
    header = [f"| {' | '.join(map(_cell, node.columns))} |", f"|{'---|' * len(node.columns)}"]
    return header + [f"| {' | '.join(_cell(str(value)) for value in row)} |" for row in node.sample]


def rows_as_text(node: Node) -> str:
    """Return a failed test's SQL and the rows that it found, in columns for a log."""
    rows = [node.columns, *([str(value) for value in row] for row in node.sample)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(node.columns))]
    table = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    found = f"\n\nRows that it found (at most {len(node.sample)} shown):\n\n" + "\n".join(table) if node.sample else ""
    return node.sql.strip() + found


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def gantt(result: DbtResult) -> str:
    """Return an SVG picture of dbt's threads: a row for each thread, a bar for each node.

    Bars of the critical path have a frame. Empty if no node has run in a thread.
    """
    bars = [node for node in result.nodes if node.started and node.ended and node.thread]
    if not bars:
        return ""
    start = min(node.started for node in bars if node.started)
    total = max((node.ended - start).total_seconds() for node in bars if node.ended) or 1.0
    threads = sorted({node.thread for node in bars})
    width, left, row = 1200, 90, 26
    scale = (width - left - 10) / total
    critical = {node.id for node in result.critical_path()}
    drawn = []
    for node in bars:
        assert node.started
        assert node.ended
        x = left + (node.started - start).total_seconds() * scale
        y = 8 + threads.index(node.thread) * row
        length = max((node.ended - node.started).total_seconds() * scale, 1.0)
        colour = _FAILED if node.failed else _COLOURS.get(node.kind, _OTHER)
        frame = ' stroke="#264653" stroke-width="2"' if node.id in critical else ""
        title = escape(f"{node.title}: {node.status}, {node.seconds:.2f} s")
        drawn.append(
            f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{row - 6}" fill="{colour}"{frame}>'
            f"<title>{title}</title></rect>"
        )
        if length > 7 * len(node.title):
            drawn.append(f'<text x="{x + 4:.1f}" y="{y + 14}" fill="#fff">{escape(node.title)}</text>')
    height = 8 + len(threads) * row
    labels = [
        f'<text x="4" y="{22 + index * row}">{escape(thread.split(" ")[0].lower())}</text>'
        for index, thread in enumerate(threads)
    ]
    axis = [
        f'<line x1="{left + part * total * scale:.1f}" y1="4" x2="{left + part * total * scale:.1f}" y2="{height}" '
        f'stroke="#ddd"/><text x="{left + part * total * scale - 4:.1f}" y="{height + 14}">{part * total:.1f} s</text>'
        for part in (0, 0.25, 0.5, 0.75, 0.97)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 20}" '
        f'font-family="sans-serif" font-size="11">{"".join(axis + labels + drawn)}</svg>'
    )


def as_data_url(svg: str) -> str:
    """Return a `data:` URL of the picture, which the UI shows without a file store."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
