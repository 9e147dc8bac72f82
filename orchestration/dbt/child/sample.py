"""Bound the size of values, rows and SQL that are reported."""

from typing import Any

CELL_BYTES, SAMPLE_BYTES, SQL_BYTES = 500, 10_000, 20_000
"""Longest value, longest sample of rows, and longest SQL of a failing test, in bytes."""


def bounded_rows(columns: list[str], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Return as many of the columns and rows as fit into `SAMPLE_BYTES`."""
    names: list[str] = []
    left = SAMPLE_BYTES
    for column in columns:
        name = cut(column, CELL_BYTES)
        left -= len(name.encode()) + 2
        if left < SAMPLE_BYTES // 2:
            break
        names.append(name)
    shown = []
    for row in rows:
        cells = [_bounded_cell(value) for value in row[: len(names)]]
        left -= sum(len(str(cell).encode("utf-8", "replace")) + 2 for cell in cells)
        if left < 0:
            break
        shown.append(cells)
    return names, shown


def _bounded_cell(value: Any) -> Any:
    """Return a value as JSON has it: bytes as hexadecimal digits, other types as text."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value[:CELL_BYTES]).hex()
    text = str(value)
    return value if isinstance(value, int) and len(text) <= CELL_BYTES else cut(text, CELL_BYTES)


def cut(text: str, maximum_bytes: int) -> str:
    """Return the text, shortened to the bytes in UTF-8."""
    data = text[:maximum_bytes].encode("utf-8", "replace")
    if len(text) <= maximum_bytes and len(data) <= maximum_bytes:
        return text
    return data[: maximum_bytes - 4].decode("utf-8", "ignore") + " …"
