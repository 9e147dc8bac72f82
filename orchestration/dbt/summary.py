"""What a dbt command did, for people: a text for logs, a page for the UI, a picture of its threads."""

import base64
from html import escape

from orchestration.dbt.artifacts import Earlier
from orchestration.dbt.result import DbtResult, Node

SLOWEST = 5
"""Nodes that are named as the slowest."""

_COLOURS = {"model": "#2a9d8f", "seed": "#8ab17d", "snapshot": "#287271", "test": "#e9c46a", "unit_test": "#e9c46a"}
_FAILED, _OTHER = "#e76f51", "#8d99ae"


def counts(result: DbtResult) -> str:
    """How many nodes there were and what became of them."""
    passed = sum(node.status in ("success", "pass", "no-op") for node in result.nodes)
    parts = {
        "ok": passed,
        "warned": len(result.warned),
        "failed": len(result.failed),
        "skipped": len(result.skipped),
        "done before": len(result.reused),
    }
    listed = ", ".join(f"{count} {word}" for word, count in parts.items() if count) or "nothing to do"
    return f"{len(result.nodes)} nodes in {result.seconds:.1f} s: {listed}"


def slowest(result: DbtResult) -> list[Node]:
    """The nodes that took longest, longest first."""
    return sorted((node for node in result.nodes if node.seconds), key=lambda node: -node.seconds)[:SLOWEST]


def changes(result: DbtResult, before: Earlier | None) -> list[str]:
    """What is different from the run before, a line each; nothing if there was none."""
    if before is None:
        return []
    now = {node.id: node for node in result.nodes}
    both = [(before.nodes[key], node) for key, node in now.items() if key in before.nodes]
    slower = [
        f"{node.title} ({old.seconds:.1f} s → {node.seconds:.1f} s)"
        for old, node in both
        if node.seconds > 1.5 * old.seconds and node.seconds - old.seconds > 1
    ]
    found = {
        "fails now": [node.title for old, node in both if node.failed and not old.failed],
        "works again": [node.title for old, node in both if old.failed and node.done],
        "new": [node.title for key, node in now.items() if key not in before.nodes],
        "gone": [node.title for key, node in before.nodes.items() if key not in now],
        "slower": slower,
    }
    return [f"{what}: {_some(titles)}" for what, titles in found.items() if titles]


def _some(titles: list[str]) -> str:
    more = f" and {len(titles) - SLOWEST} more" if len(titles) > SLOWEST else ""
    return ", ".join(titles[:SLOWEST]) + more


def _critical(result: DbtResult) -> tuple[float, list[Node]]:
    path = [node for node in result.critical_path() if node.seconds]
    return sum(node.seconds for node in path), path


def text(result: DbtResult, before: Earlier | None = None) -> str:
    """The summary as plain text, a line a fact."""
    seconds, path = _critical(result)
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


def markdown(result: DbtResult, before: Earlier | None = None) -> str:
    """The summary as the Markdown of Prefect's artifact."""
    seconds, path = _critical(result)
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
            above = by_id.get(node.because)
            lines.append(f"| `{node.title}` | {f'`{above.title}`' if above else _cell(node.message)} |")
        lines.append("")
    if changed := changes(result, before):
        lines += ["Since the run before:", "", *(f"- {line}" for line in changed), ""]
    if result.stored:
        lines.append(f"Artifacts: `{result.stored}`")
    return "\n".join(lines)


def _count(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,}"


def _table(node: Node) -> list[str]:
    """The rows that a test found, as a table."""
    if not node.sample:
        return []
    header = [f"| {' | '.join(map(_cell, node.columns))} |", f"|{'---|' * len(node.columns)}"]
    return header + [f"| {' | '.join(_cell(str(value)) for value in row)} |" for row in node.sample]


def rows_as_text(node: Node) -> str:
    """A failed test's SQL and the rows it found, aligned for a log."""
    rows = [node.columns, *([str(value) for value in row] for row in node.sample)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(node.columns))]
    table = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    found = f"\n\nRows that it found (at most {len(node.sample)} shown):\n\n" + "\n".join(table) if node.sample else ""
    return node.sql.strip() + found


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def gantt(result: DbtResult) -> str:
    """A picture of the threads as SVG: a row a thread, a bar a node, on the critical path framed."""
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
    """A picture as a URL that holds it, so that the UI needs no file store to show it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
