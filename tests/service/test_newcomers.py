"""Which packets are a guest's question whether an address is free, as the kernel's filter and our parser see it."""

from __future__ import annotations

import logging
import socket
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.newcomers import listen_to_probes, probed

logging.getLogger("scapy").setLevel(logging.ERROR)

from scapy.layers.inet import TCP, UDP  # noqa: E402 - scapy talks while it is imported
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, IPv6  # noqa: E402 - as above

FRESH = "fd00:1:2:3::77"
PROBE = IPv6(src="::", dst="ff02::1:ff00:77", hlim=255) / ICMPv6ND_NS(tgt=FRESH)
OTHERS = (
    IPv6(src="fe80::1", dst="ff02::1:ff00:77", hlim=255) / ICMPv6ND_NS(tgt=FRESH),
    IPv6(src="::1:0:0:1", dst="ff02::1:ff00:77", hlim=255) / ICMPv6ND_NS(tgt=FRESH),
    IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NA(tgt=FRESH),
    IPv6(src="::", dst=FRESH) / ICMPv6EchoRequest(data=bytes(64)),
    IPv6(src="fd00::1", dst=FRESH) / TCP() / bytes(64),
    IPv6(src="::", dst=FRESH) / UDP(sport=135 << 8) / bytes(64),
)


def test_a_probe_tells_the_address() -> None:
    assert probed(bytes(PROBE)) == IPv6Address(FRESH).packed
    for packet in OTHERS:
        assert probed(bytes(packet)) is None
    assert probed(bytes(IPv6(src="::", dst="ff02::1", hlim=254) / ICMPv6ND_NS(tgt=FRESH))) is None  # forwarded
    assert probed(bytes(IPv6(src="::", dst="ff02::1", hlim=255) / ICMPv6ND_NS(tgt="ff02::2"))) is None


@given(st.binary(max_size=128) | st.binary(max_size=88).map(lambda rest: bytes(PROBE)[:40] + rest))
def test_any_packet_is_survived(packet: bytes) -> None:
    found = probed(packet)
    assert found is None or len(found) == 16


def test_the_kernels_filter_lets_probes_through_alone() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        listen_to_probes(ours)
        for packet in (*OTHERS, PROBE, *OTHERS, IPv6(), PROBE):
            theirs.send(bytes(packet))
        assert [ours.recv(200) for _ in range(2)] == [bytes(PROBE)] * 2
        with pytest.raises(BlockingIOError):
            ours.recv(200)
