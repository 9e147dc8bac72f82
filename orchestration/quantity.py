"""Kubernetes quantities, such as `500m` or `2Gi`, as numbers.

`kubernetes.utils.quantity` reads quantities too, but its package takes 126 MB and 0.6 s to import, and it accepts text
that Kubernetes refuses, such as `-1` or `1e3Mi`.
"""

import functools
import re
from decimal import Decimal

BINARY_SUFFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
"""The suffixes of powers of 1024, the power as index."""

_DECIMAL_EXPONENTS = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_QUANTITY = re.compile(
    r"\+?(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<suffix>|[KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,3})", re.ASCII
)


@functools.lru_cache(maxsize=1024)
def parse_quantity(text: str) -> Decimal:
    """Return a quantity as a number, as ParseQuantity of Kubernetes does.

    Raises:
        ValueError: the text is not a quantity, or is a negative quantity.
    """
    match = _QUANTITY.fullmatch(text)
    if not match:
        raise ValueError(text)
    number, suffix = Decimal(match["number"]), match["suffix"]
    if suffix in BINARY_SUFFIXES:
        return number * Decimal(1024) ** BINARY_SUFFIXES.index(suffix)
    return number.scaleb(_DECIMAL_EXPONENTS[suffix] if suffix in _DECIMAL_EXPONENTS else int(suffix[1:]))


def quantity_or_zero(text: str) -> float:
    """Return a quantity as a number, and 0 for any other text.

    A quantity of 2**63 or more counts as 0, because Kubernetes has none.
    """
    try:
        number = parse_quantity(text.strip())
    except (ValueError, ArithmeticError):
        return 0.0
    return float(number) if number < 2**63 else 0.0


def format_quantity(amount: Decimal, key: str) -> str:
    """Return a quantity as people write it.

    Args:
        amount: cores of a CPU, bytes of memory or storage, or a count.
        key: the resource that is counted, such as `limits.memory`.
    """
    if key.endswith(".cpu") and amount % 1:
        return f"{(amount * 1000).normalize():f}m"
    power = 0
    if key.endswith(("memory", "ephemeral-storage")):
        while amount and amount % 1024 == 0 and power + 1 < len(BINARY_SUFFIXES):
            amount, power = amount / 1024, power + 1
    return f"{amount:f}{BINARY_SUFFIXES[power]}"
