"""QEMU's option text: taken apart and put together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet import netdev


@given(st.text(alphabet="ab,=", max_size=20))
def test_split_and_join_are_inverse(text: str) -> None:
    items = netdev.split(text)
    assert netdev.split(netdev.join(items)) == items


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,4}", fullmatch=True), st.text(max_size=8)), max_size=5))
def test_any_value_survives_the_doubling_of_commas(pairs: list[tuple[str, str]]) -> None:
    items: netdev.Items = list(pairs)
    assert netdev.split(netdev.join(items)) == items


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("user,id=a,,b", [(None, "user"), ("id", "a,b")]),
        ("user,,id=b", [(None, "user,id=b")]),
        ("user,id=a,", [(None, "user"), ("id", "a")]),
        ("user,restrict,id=a", [(None, "user"), ("restrict", None), ("id", "a")]),
        ("type=user,id=a=b", [("type", "user"), ("id", "a=b")]),
        ("user,=b,id=a", [(None, "user"), ("", "b"), ("id", "a")]),
        ("user,a=,b=1", [(None, "user"), ("a", ""), ("b", "1")]),
        ("user,a=1,,,b=2", [(None, "user"), ("a", "1,"), ("b", "2")]),
        ("", []),
    ],
)
def test_split_follows_qemu(text: str, items: netdev.Items) -> None:
    assert netdev.split(text) == items
