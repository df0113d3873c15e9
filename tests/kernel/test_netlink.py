"""rtnetlink: what the kernel says of the test's own loopback, and messages that no kernel sends."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import HostError
from openvmnet.kernel import netlink


@pytest.fixture
def sock():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE) as made:
        made.settimeout(2)
        yield made


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def link_body(name: bytes, *, family: int = 0) -> bytes:
    return struct.pack("=BxHiII", family, 1, 7, 0, 0) + attribute(3, name + b"\0")


def test_links_has_the_loopback_with_moving_counters(sock):
    def loopback() -> netlink.Link:
        return next(link for link in netlink.links(sock) if link.name == "lo")

    before = loopback()
    assert before.ifindex == socket.if_nametoindex("lo")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        one.sendto(bytes(1000), one.getsockname())
        one.recv(2000)
    after = loopback()
    assert after.rx_packets > before.rx_packets
    assert after.rx_bytes >= before.rx_bytes + 1028
    assert after.tx_bytes >= before.tx_bytes + 1028


def test_links_are_all_links(sock):
    assert {(link.ifindex, link.name) for link in netlink.links(sock)} == set(socket.if_nameindex())


def test_neighbours_do_not_fail_where_there_are_none(sock):
    assert all(neighbour.link > 0 for neighbour in netlink.neighbours(sock))


def test_an_error_of_the_kernels_is_a_host_error(sock):
    with pytest.raises(HostError, match="refused"):
        list(netlink.dump(sock, 9999, b"\0" * 16))


def test_departures_are_the_links_that_went():
    data = message(17, link_body(b"vm3")) + message(16, link_body(b"vm4")) + message(17, link_body(b"vm15"))
    assert netlink.departures(data) == ["vm3", "vm15"]


def test_a_link_that_leaves_its_bridge_has_not_departed():
    assert netlink.departures(message(17, link_body(b"vm3", family=socket.AF_BRIDGE))) == []


@given(st.binary(max_size=300))
def test_departures_of_any_bytes(data):
    assert all(isinstance(name, str) for name in netlink.departures(data))


@given(st.binary(max_size=80), st.integers(0, 40))
def test_departures_of_damaged_messages(tail, cut):
    data = message(17, link_body(b"vm3") + tail)
    assert all(isinstance(name, str) for name in netlink.departures(data[: len(data) - cut]))
    assert netlink.departures(data)[0] == "vm3"
