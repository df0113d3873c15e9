"""linkinfo: the kernel's own links, and attributes that no kernel sends."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from openvmnet.kernel import linkinfo


def test_the_loopback() -> None:
    (lo,) = [link for link in linkinfo.links() if link.flags & linkinfo.LOOPBACK]
    assert (lo.name, lo.kind, lo.hardware, lo.ifindex) == ("lo", "", 772, 1)
    assert (lo.master, lo.lower, lo.settling, lo.mac) == (0, 0, 0.0, "00:00:00:00:00:00")


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def test_a_bridge_with_spanning_tree() -> None:
    data = attribute(1, struct.pack("=I", 1500)) + attribute(5, struct.pack("=I", 1))
    nature = attribute(1, b"bridge\0") + attribute(2 | 0x8000, data) + attribute(4, b"vrf\0")
    body = struct.pack("=BxHiII", 0, 1, 7, 1, 0) + attribute(3, b"br0\0") + attribute(4, struct.pack("=I", 1400))
    body += attribute(18 | 0x8000, nature) + attribute(10, struct.pack("=I", 9)) + attribute(33, b"\0")
    link = linkinfo._link(body)
    assert (link.name, link.kind, link.master, link.master_kind, link.mtu) == ("br0", "bridge", 9, "vrf", 1400)
    assert (link.settling, link.up, link.carrier) == (30.0, True, False)


def test_a_link_on_one_in_another_namespace_has_no_lower() -> None:
    body = struct.pack("=BxHiII", 0, 1, 7, 1, 0) + attribute(5, struct.pack("=I", 2))
    assert linkinfo._link(body).lower == 2
    assert linkinfo._link(body + attribute(37, struct.pack("=i", 0))).lower == 0


@given(st.binary(max_size=120))
def test_whatever_follows_the_header_is_a_link(data: bytes) -> None:
    assert linkinfo._link(struct.pack("=BxHiII", 0, 1, 7, 0, 0) + data).ifindex == 7
