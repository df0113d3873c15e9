"""IPv6 packets beside scapy's: what we write it reads the same, and what it writes we read the same."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.wire import ip6
from openvmnet.wire.fragments6 import Reassembly6, split

scapy = pytest.importorskip("scapy.layers.inet6", reason="scapy is not installed")
inet = pytest.importorskip("scapy.layers.inet", reason="scapy is not installed")
IPv6, TCP, UDP = scapy.IPv6, inet.TCP, inet.UDP

addresses = st.ip_addresses(v=6).map(str)
ports = st.integers(1, 65535)


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, address)


@settings(max_examples=60)
@given(addresses, addresses, ports, ports, st.binary(max_size=600))
def test_udp(src, dst, sport, dport, payload):
    theirs = bytes(IPv6(src=src, dst=dst) / UDP(sport=sport, dport=dport) / payload)
    assert ip6.build_udp(packed(src), packed(dst), sport, dport, payload) == theirs


@settings(max_examples=60)
@given(addresses, addresses, ports, ports, st.integers(0, 0xFFFFFFFF), st.binary(max_size=60))
def test_a_reset_to_scapys_syn(src, dst, sport, dport, sequence, data):
    syn = bytes(
        IPv6(src=src, dst=dst)
        / scapy.IPv6ExtHdrDestOpt()
        / TCP(sport=sport, dport=dport, seq=sequence, flags="S", options=[("MSS", 1440), ("SAckOK", b"")])
        / data
    )
    reset = ip6.build_reset(syn, ip6.parse(syn))
    theirs = IPv6(src=dst, dst=src) / TCP(
        sport=dport, dport=sport, seq=0, ack=(sequence + 1) % 2**32, flags="RA", window=0
    )
    assert reset == bytes(theirs)


@settings(max_examples=60)
@given(addresses, addresses, st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=600), st.integers(1, 255))
def test_echo(src, dst, identifier, sequence, data, ttl):
    theirs = IPv6(src=src, dst=dst, hlim=ttl) / scapy.ICMPv6EchoReply(id=identifier, seq=sequence, data=data)
    assert ip6.build_echo_reply(packed(src), packed(dst), identifier, sequence, data, ttl=ttl) == bytes(theirs)


@settings(max_examples=60)
@given(addresses, addresses, addresses, ports, st.integers(1280, 1500), st.binary(max_size=1400))
def test_packet_too_big(src, dst, router, port, mtu, payload):
    about = bytes(IPv6(src=src, dst=dst) / UDP(sport=port, dport=port) / payload)
    error = ip6.build_error(packed(router), about, ip6.PACKET_TOO_BIG, 0, rest=mtu)
    theirs = IPv6(src=router, dst=src) / scapy.ICMPv6PacketTooBig(mtu=mtu) / about[:1232]
    assert error == bytes(theirs)


@settings(max_examples=60)
@given(addresses, addresses, addresses, ports, st.sampled_from([0, 1, 3, 4, 5, 6]))
def test_unreachable(src, dst, router, port, code):
    about = bytes(IPv6(src=src, dst=dst) / UDP(sport=port, dport=port))
    theirs = IPv6(src=router, dst=src) / scapy.ICMPv6DestUnreach(code=code) / about
    assert ip6.build_error(packed(router), about, ip6.UNREACHABLE, code) == bytes(theirs)


@settings(max_examples=60)
@given(addresses, addresses, st.binary(min_size=2000, max_size=5000), st.integers(1280, 2000))
def test_fragments_both_ways(src, dst, payload, mtu):
    datagram = ip6.build_udp(packed(src), packed(dst), 5, 6, payload)
    back = scapy.defragment6([IPv6(piece) for piece in split(datagram, mtu, 77)])
    assert bytes(back) == datagram
    whole = IPv6(src=src, dst=dst) / scapy.IPv6ExtHdrFragment(id=77) / UDP(sport=5, dport=6) / payload
    reassembly = Reassembly6()
    pieces = [bytes(piece) for piece in scapy.fragment6(whole, mtu)]
    assert [one for piece in pieces if (one := reassembly.add(piece)) is not None] == [datagram]
