"""Kubernetes quantities as numbers."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils import quantity as reference

from orchestration.quantity import parse_quantity, quantity_or_zero


@given(
    st.from_regex(r"[0-9]{1,6}(\.[0-9]{0,3})?([KMGTPE]i|[numkMGTPE])?", fullmatch=True)
    | st.text("0123456789.eEkKMGi-+ ", max_size=8)
)
def test_quantity_equals_the_number_of_the_kubernetes_client(text: str) -> None:
    try:
        expected = reference.parse_quantity(text)
    except ValueError:
        expected = None
    try:
        number = parse_quantity(text)
    except ValueError:
        number = None
    if number is not None:
        assert number == expected
    else:
        # The client also takes what Kubernetes refuses: white space, signs, an exponent with a suffix.
        plain = expected is not None and re.fullmatch(r"[0-9]+(\.[0-9]*)?([KMGTPE]i|[numkMGTPE])?", text)
        assert not plain


def test_text_that_is_no_quantity_counts_as_zero() -> None:
    assert [quantity_or_zero(text) for text in ("1Ki", "1k", "1500m", "2", "x", "")] == [1024, 1000, 1.5, 2, 0, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.2.3", 0), (".", 0), ("9" * 400, 0), ("1e400", 0), ("1.5Gi", 1.5 * 2**30), ("100m", 0.1)],
)
def test_hostile_quantity_counts_as_zero(text: str, number: float) -> None:
    assert quantity_or_zero(text) == pytest.approx(number)
