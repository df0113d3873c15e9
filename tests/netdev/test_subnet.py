"""The addresses of a network: what the options mean, and the candidates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openvmnet import netdev
from openvmnet.errors import OptionError
from openvmnet.netdev import Subnet
from tests.netdev.strategies import PRIVATE, triples

if TYPE_CHECKING:
    from ipaddress import IPv4Address


def test_each_mode_has_its_candidates() -> None:
    for mode, first, last in (("shared", "192.168.64.0", "192.168.127.0"), ("host", "192.168.128.0", "192.168.191.0")):
        networks = [subnet.network for subnet in netdev.candidates(mode)]
        assert (str(networks[0]), str(networks[-1]), len(networks)) == (f"{first}/24", f"{last}/24", 64)


@given(triples())
def test_a_subnet_has_a_gateway_a_pool_and_a_mask(triple: tuple[str, str, str]) -> None:
    subnet = Subnet.from_options(*triple)
    assert subnet is not None
    assert (str(subnet.gateway), str(subnet.last), str(subnet.mask)) == triple
    assert subnet.first == subnet.gateway + 1 <= subnet.last
    for address in (subnet.gateway, subnet.first, subnet.last):
        assert subnet.network.network_address < address < subnet.network.broadcast_address


@given(triples(), triples())
def test_overlap_is_what_ipaddress_says(one: tuple[str, str, str], two: tuple[str, str, str]) -> None:
    a, b = Subnet.from_options(*one), Subnet.from_options(*two)
    assert a is not None
    assert b is not None
    assert a.overlaps(b) == b.overlaps(a) == a.network.overlaps(b.network) == a.overlaps(b.network)
    assert a.overlaps(a)


@given(st.ip_addresses(v=4))
def test_no_public_address_is_ever_taken(address: IPv4Address) -> None:
    assume(not any(address in block for block in PRIVATE))
    with pytest.raises(OptionError):
        Subnet.from_options(str(address), "192.168.64.9", "255.255.255.0")


def test_the_candidates_are_macos_shared_networks() -> None:
    found = list(netdev.candidates())
    assert [str(subnet.network) for subnet in found] == [f"192.168.{third}.0/24" for third in range(64, 128)]
    assert found[0] == Subnet.from_options("192.168.64.1", "192.168.64.254", "255.255.255.0")
