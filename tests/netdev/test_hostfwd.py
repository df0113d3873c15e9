"""Published ports: a rule is read back, or refused in QEMU's words."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import OptionError
from openvmnet.netdev import Forward, Shared, hostfwd
from tests.netdev.strategies import forwards


@given(forwards())
def test_a_rule_is_read_back(forward: Forward) -> None:
    assert hostfwd.parse(str(forward)) == forward


@given(st.text(max_size=40) | st.text(alphabet="tcpud:-[].0123456789abf", max_size=40))
def test_any_text_is_a_rule_or_begins_with_qemus_words(text: str) -> None:
    said, forward = "", None
    try:
        forward = hostfwd.parse(text)
    except OptionError as error:
        said = error.message
    assert said.startswith(f"Invalid host forwarding rule '{text}' (") == (forward is None)
    assert forward is None or hostfwd.parse(str(forward)) == forward


def test_a_rule_has_defaults_and_brackets() -> None:
    assert hostfwd.parse("::2222-:22") == Forward("tcp", None, 2222, None, 22)
    assert hostfwd.parse("udp:127.0.0.1:53-192.168.64.9:5353") == Forward(
        "udp", IPv4Address("127.0.0.1"), 53, IPv4Address("192.168.64.9"), 5353
    )
    assert hostfwd.parse("tcp:[::]:80-[fd00::7]:8080") == Forward(
        "tcp", IPv6Address("::"), 80, IPv6Address("fd00::7"), 8080
    )


def test_the_rules_of_a_netdev_have_a_bound() -> None:
    rules = tuple(f"tcp::{port}-:22" for port in range(1, 514))
    assert len(Shared("n", hostfwd=rules[:512]).forwards) == 512
    with pytest.raises(OptionError, match="is there 513 times; a netdev takes 512"):
        Shared("n", hostfwd=rules).validate()
