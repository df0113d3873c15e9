"""IPv6 packets: round trips, checksums, extension headers, and parsing of whatever a guest may send."""

from __future__ import annotations

import socket
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import ip, ip6
from tests.wire.test_ip import folded, syn

addresses = st.binary(min_size=16, max_size=16)
ports = st.integers(0, 65535)
GUEST, OUTSIDE = (socket.inet_pton(socket.AF_INET6, one) for one in ("fd00::2", "2001:db8:2::1"))


def pseudo(src: bytes, dst: bytes, length: int, protocol: int) -> bytes:
    """RFC 8200 section 8.1."""
    return src + dst + struct.pack("!II", length, protocol)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_malformed(data):
    try:
        header = ip6.parse(data)
    except Malformed:
        return
    assert 40 <= header.payload <= header.total <= len(data)


@st.composite
def nearly_packets(draw):
    """Headers that are right but for a few octets, with extension headers."""
    payload = draw(st.binary(max_size=60))
    kind = draw(st.integers(0, 255))
    for extension in draw(st.lists(st.sampled_from([0, 43, 44, 51, 60]), max_size=4)):
        size = draw(st.integers(0, 2))
        octets = 8 if extension == 44 else (size + 2) * 4 if extension == 51 else (size + 1) * 8
        body = bytes([kind, 0 if extension == 44 else size]) + bytes(octets - 2)
        payload, kind = body + payload, extension
    packet = bytearray(ip6.build(draw(addresses), draw(addresses), kind, payload))
    for _ in range(draw(st.integers(0, 3))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    return bytes(packet[: draw(st.integers(0, len(packet)))]) if draw(st.booleans()) else bytes(packet)


@given(nearly_packets())
def test_damaged_packets_give_a_header_or_malformed(packet):
    try:
        header = ip6.parse(packet)
    except Malformed:
        return
    assert packet[0] >> 4 == 6
    assert 40 <= header.payload <= header.total <= len(packet)
    assert header.total == 40 + int.from_bytes(packet[4:6], "big")
    assert header.protocol not in (0, 43, 44, 51, 60)


@given(addresses, addresses, st.sampled_from([6, 17, 58, 132, 59]), st.binary(max_size=1440), st.integers(1, 255))
def test_what_build_writes_parse_reads(src, dst, protocol, payload, ttl):
    packet = ip6.build(src, dst, protocol, payload, ttl=ttl)
    assert ip6.parse(packet) == ip.Header(src, dst, protocol, ttl, True, 40, 40 + len(payload), 0)
    assert packet[40:] == payload


@given(st.integers(0, 0xFFFFF), st.integers(0, 255))
def test_the_ports_number_is_in_the_lower_half_of_the_flow_label(label, traffic_class):
    packet = struct.pack("!I", 6 << 28 | traffic_class << 20 | label) + ip6.build(GUEST, OUTSIDE, ip.UDP, bytes(8))[4:]
    assert ip6.parse(packet).identification == label & 0xFFFF


@pytest.mark.parametrize("kind", [0, 60, 51, 43])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_stands_behind_extension_headers_is_found(kind, count):
    body = bytes([kind, 1 if kind != 51 else 2]) + bytes(14)
    last = bytes([ip.UDP]) + body[1:]
    packet = ip6.build(GUEST, OUTSIDE, kind, body * (count - 1) + last + b"datagram")
    header = ip6.parse(packet)
    assert (header.protocol, header.payload) == (ip.UDP, 40 + 16 * count)


@pytest.mark.parametrize("field", [0x0001, 0x0008, 0xFFF8, 0xFFF9])
def test_fragments_are_malformed(field):
    packet = ip6.build(GUEST, OUTSIDE, 44, struct.pack("!BBHI", 17, 0, field, 1) + bytes(16))
    with pytest.raises(Malformed, match="fragment"):
        ip6.parse(packet)


@pytest.mark.parametrize("field", [0, 0x0006])
def test_a_fragment_that_is_the_whole_is_none(field):
    packet = ip6.build(GUEST, OUTSIDE, 44, struct.pack("!BBHI", 17, 0xFF, field, 1) + bytes(16))
    assert msgspec.structs.astuple(ip6.parse(packet))[2:] == (17, 64, True, 48, 64, 0)


def test_a_packet_on_a_way_of_its_own_is_malformed():
    for left in (0, 1):
        packet = ip6.build(GUEST, OUTSIDE, 43, bytes([17, 2, 0, left]) + bytes(20) + bytes(8))
        if left:
            with pytest.raises(Malformed, match="segments left"):
                ip6.parse(packet)
        else:
            assert ip6.parse(packet).protocol == ip.UDP


@given(addresses, addresses, ports, ports, st.binary(max_size=1452))
def test_udp_lengths_and_checksum(src, dst, sport, dport, payload):
    packet = ip6.build_udp(src, dst, sport, dport, payload)
    assert struct.unpack_from("!HHH", packet, 40) == (sport, dport, 8 + len(payload))
    assert packet[48:] == payload
    assert folded(pseudo(src, dst, 8 + len(payload), ip.UDP) + packet[40:]) == 0xFFFF
    assert packet[46:48] != b"\0\0"


def test_a_udp_checksum_of_zero_is_sent_as_all_ones():
    base = ip6.build_udp(GUEST, OUTSIDE, 1, 2, b"\0\0")
    assert ip6.build_udp(GUEST, OUTSIDE, 1, 2, base[46:48])[46:48] == b"\xff\xff"


@given(addresses, addresses, ports, ports, st.integers(0, 0xFFFFFFFF), st.integers(0, 10))
def test_a_reset_answers_exactly_its_syn(src, dst, sport, dport, sequence, options):
    packet = ip6.build(src, dst, ip.TCP, syn(sport, dport, sequence, options=bytes(4 * options)))
    reset = ip6.build_reset(packet, ip6.parse(packet))
    header = ip6.parse(reset)
    assert (header.src, header.dst, header.protocol, header.total) == (dst, src, ip.TCP, 60)
    fields = struct.unpack_from("!HHIIBB", reset, 40)
    assert fields == (dport, sport, 0, (sequence + 1) % 2**32, 0x50, ip.RST | ip.ACK)
    assert folded(pseudo(dst, src, 20, ip.TCP) + reset[40:]) == 0xFFFF


@given(st.binary(max_size=3000), st.sampled_from([(1, 0), (2, 0), (3, 0), (4, 1)]), st.integers(0, 0xFFFFFFFF))
def test_errors_quote_the_packet_within_the_least_mtu(payload, kind, rest):
    packet = ip6.build(GUEST, OUTSIDE, ip.UDP, payload)
    error = ip6.build_error(OUTSIDE, packet, *kind, rest=rest)
    header = ip6.parse(error)
    assert (header.src, header.dst, header.protocol) == (OUTSIDE, GUEST, ip6.ICMP)
    assert header.total == len(error) <= 1280  # RFC 4443 section 2.4 (c)
    assert struct.unpack_from("!BB", error, 40) == kind
    assert int.from_bytes(error[44:48], "big") == rest
    assert packet.startswith(error[48:])
    assert len(error) == 1280 or error[48:] == packet
    assert folded(pseudo(OUTSIDE, GUEST, len(error) - 40, ip6.ICMP) + error[40:]) == 0xFFFF


@given(addresses, addresses, ports, ports, st.binary(max_size=1452), st.integers(1, 255))
def test_echo_replies_and_requests(src, dst, identifier, sequence, data, ttl):
    reply = ip6.build_echo_reply(src, dst, identifier, sequence, data, ttl=ttl)
    request = ip6.build_echo_request(src, dst, identifier, sequence, data)
    for packet, kind in ((reply, ip6.ECHO_REPLY), (request, ip6.ECHO_REQUEST)):
        header = ip6.parse(packet)
        assert (header.src, header.dst, header.protocol) == (src, dst, ip6.ICMP)
        assert struct.unpack_from("!BB", packet, 40) == (kind, 0)
        assert struct.unpack_from("!HH", packet, 44) == (identifier, sequence)
        assert packet[48:] == data
        assert folded(pseudo(src, dst, len(packet) - 40, ip6.ICMP) + packet[40:]) == 0xFFFF
    assert ip6.parse(reply).ttl == ttl


def test_the_largest_echo_reply_fits():
    packet = ip6.build_echo_reply(OUTSIDE, GUEST, 1, 1, bytes(65527))
    assert ip6.parse(packet).total == 65575
