"""IPv4 packets: round trips, checksums, and parsing of whatever a guest may send."""

from __future__ import annotations

import socket
import struct

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import ip

addresses = st.binary(min_size=4, max_size=4)
ports = st.integers(0, 65535)
GUEST, OUTSIDE = socket.inet_aton("192.168.64.2"), socket.inet_aton("203.0.113.1")


def folded(data: bytes) -> int:
    """RFC 1071, the slow way: the one's complement sum of 16-bit words, carries added back one at a time."""
    total = 0
    for (word,) in struct.iter_unpack("!H", data + b"\0" * (len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total


def syn(sport: int, dport: int, sequence: int, *, options: bytes = b"") -> bytes:
    return (
        struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, (5 + len(options) // 4) << 4, ip.SYN, 64240, 0, 0)
        + options
    )


@given(st.binary(max_size=2000))
@example(b"")
@example(b"\xff")
@example(b"\x00" * 40)
@example(b"\xff\xff" * 20)
def test_checksum_is_the_complement_of_the_folded_sum(data):
    assert ip.checksum(data) == ~folded(data) & 0xFFFF


@given(st.binary(min_size=2, max_size=400).filter(lambda data: len(data) % 2 == 0))
def test_data_with_its_checksum_sums_to_all_ones(data):
    # RFC 1071 section 1: the check over data and checksum gives -0. All-zero data has the checksum that does it, too.
    assert folded(data + ip.checksum(data).to_bytes(2, "big")) == 0xFFFF


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_malformed(data):
    try:
        header = ip.parse(data)
    except Malformed:
        return
    assert 20 <= header.payload <= header.total <= len(data)


@st.composite
def nearly_packets(draw):
    """Headers that are right but for a few octets, so that parsing goes beyond its first test."""
    options = draw(st.integers(0, 10)) * 4
    payload = draw(st.binary(max_size=60))
    packet = bytearray(ip.build(draw(addresses), draw(addresses), draw(st.integers(0, 255)), bytes(options) + payload))
    packet[0] = 0x40 | draw(st.one_of(st.just(5 + options // 4), st.integers(0, 15)))
    for _ in range(draw(st.integers(0, 3))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    return bytes(packet[: draw(st.integers(0, len(packet)))]) if draw(st.booleans()) else bytes(packet)


@given(nearly_packets())
def test_damaged_packets_give_a_header_or_malformed(packet):
    try:
        header = ip.parse(packet)
    except Malformed:
        return
    assert packet[0] >> 4 == 4
    assert header.payload == (packet[0] & 15) * 4
    assert 20 <= header.payload <= header.total <= len(packet)
    assert header.total == int.from_bytes(packet[2:4], "big")
    assert not int.from_bytes(packet[6:8], "big") & 0x3FFF


@given(addresses, addresses, st.integers(0, 255), st.binary(max_size=1480), st.integers(1, 255))
def test_what_build_writes_parse_reads(src, dst, protocol, payload, ttl):
    packet = ip.build(src, dst, protocol, payload, ttl=ttl)
    header = msgspec.structs.replace(ip.parse(packet), dont_fragment=True, identification=0)
    assert header == ip.Header(src, dst, protocol, ttl, True, 20, 20 + len(payload), 0)
    assert packet[20:] == payload
    assert folded(packet[:20]) == 0xFFFF


@pytest.mark.parametrize("bits", [0x2000, 0x0001, 0x1FFF, 0x2001, 0x6000])
def test_fragments_are_malformed(bits):
    packet = bytearray(ip.build(GUEST, OUTSIDE, ip.UDP, bytes(16)))
    packet[6:8] = bits.to_bytes(2, "big")
    with pytest.raises(Malformed, match="fragment"):
        ip.parse(bytes(packet))


@pytest.mark.parametrize(("bits", "expected"), [(0x4000, True), (0x0000, False), (0x8000, False), (0xC000, True)])
def test_dont_fragment_is_read(bits, expected):
    packet = bytearray(ip.build(GUEST, OUTSIDE, ip.UDP, bytes(16)))
    packet[6:8] = bits.to_bytes(2, "big")
    assert ip.parse(bytes(packet)).dont_fragment is expected


def test_the_padding_of_a_short_frame_is_not_part_of_the_packet():
    packet = ip.build(GUEST, OUTSIDE, ip.UDP, bytes(8)) + bytes(18)
    assert ip.parse(packet).total == 28


@given(addresses, addresses, ports, ports, st.binary(max_size=1472))
def test_udp_lengths_and_checksum(src, dst, sport, dport, payload):
    packet = ip.build_udp(src, dst, sport, dport, payload)
    assert struct.unpack_from("!HHH", packet, 20) == (sport, dport, 8 + len(payload))
    assert packet[28:] == payload
    pseudo = src + dst + struct.pack("!BBH", 0, ip.UDP, 8 + len(payload))
    assert folded(pseudo + packet[20:]) == 0xFFFF
    assert packet[26:28] != b"\0\0"  # RFC 768: zero means that there is no checksum


def test_a_udp_checksum_of_zero_is_sent_as_all_ones():
    base = ip.build_udp(GUEST, OUTSIDE, 1, 2, b"\0\0")
    payload = base[26:28]  # makes the sum complete, hence the checksum zero
    assert ip.build_udp(GUEST, OUTSIDE, 1, 2, payload)[26:28] == b"\xff\xff"


@given(addresses, addresses, ports, ports, st.integers(0, 0xFFFFFFFF), st.integers(0, 10))
def test_a_reset_answers_exactly_its_syn(src, dst, sport, dport, sequence, options):
    packet = ip.build(src, dst, ip.TCP, syn(sport, dport, sequence, options=bytes(4 * options)))
    reset = ip.build_reset(packet, ip.parse(packet))
    header = ip.parse(reset)
    assert (header.src, header.dst, header.protocol, header.total) == (dst, src, ip.TCP, 40)
    fields = struct.unpack_from("!HHIIBB", reset, 20)
    assert fields == (dport, sport, 0, (sequence + 1) % 2**32, 0x50, ip.RST | ip.ACK)
    assert folded(dst + src + struct.pack("!BBH", 0, ip.TCP, 20) + reset[20:]) == 0xFFFF


def test_a_reset_finds_the_ports_behind_ip_options():
    packet = bytearray(ip.build(GUEST, OUTSIDE, ip.TCP, bytes(8) + syn(4000, 80, 7)))
    packet[0] = 0x47
    reset = ip.build_reset(bytes(packet), ip.parse(bytes(packet)))
    assert struct.unpack_from("!HHII", reset, 20) == (80, 4000, 0, 8)


@given(st.binary(max_size=3000), st.sampled_from([(3, 0), (3, 4), (11, 0)]), st.integers(0, 0xFFFF))
def test_errors_quote_the_packet_within_576_octets(payload, kind, mtu):
    packet = ip.build(GUEST, OUTSIDE, ip.UDP, payload)
    error = ip.build_error(OUTSIDE, packet, *kind, rest=mtu)
    header = ip.parse(error)
    assert (header.src, header.dst, header.protocol) == (OUTSIDE, GUEST, ip.ICMP)
    assert header.total == len(error) <= 576  # RFC 1812 section 4.3.2.3
    assert struct.unpack_from("!BB", error, 20) == kind
    assert int.from_bytes(error[24:28], "big") == mtu
    quoted = error[28:]
    assert packet.startswith(quoted)
    assert len(quoted) >= min(len(packet), 28)  # RFC 792: the header and eight octets at the least
    assert folded(error[20:]) == 0xFFFF


@given(addresses, addresses, ports, ports, st.binary(max_size=1472), st.integers(1, 255))
def test_echo_replies_and_requests(src, dst, identifier, sequence, data, ttl):
    reply = ip.build_echo_reply(src, dst, identifier, sequence, data, ttl=ttl)
    request = ip.build_echo_request(src, dst, identifier, sequence, data)
    for packet, kind in ((reply, ip.ECHO_REPLY), (request, ip.ECHO_REQUEST)):
        header = ip.parse(packet)
        assert (header.src, header.dst, header.protocol) == (src, dst, ip.ICMP)
        assert struct.unpack_from("!BB", packet, 20) == (kind, 0)
        assert struct.unpack_from("!HH", packet, 24) == (identifier, sequence)
        assert packet[28:] == data
        assert folded(packet[20:]) == 0xFFFF
    assert ip.parse(reply).ttl == ttl


def test_only_what_has_an_identification_may_be_fragmented():
    assert ip.parse(ip.build(GUEST, OUTSIDE, ip.UDP, b"")).dont_fragment
    packet = ip.build(GUEST, OUTSIDE, ip.UDP, b"", identification=0x1234)
    assert not ip.parse(packet).dont_fragment
    assert packet[4:6] == b"\x12\x34"
    replies = [ip.build_echo_reply(OUTSIDE, GUEST, 99, sequence, b"") for sequence in range(100)]
    assert not any(ip.parse(reply).dont_fragment for reply in replies)
    assert len({reply[4:6] for reply in replies}) == 100


def test_the_largest_echo_reply_fits():
    packet = ip.build_echo_reply(OUTSIDE, GUEST, 1, 1, bytes(65507))
    assert ip.parse(packet).total == 65535


def test_the_port_is_read_from_either_version():
    four = ip.build_udp(bytes(4), bytes(4), 1, 2, b"")
    assert ip.port_of(four[:4] + b"\x12\x34" + four[6:]) == 0x1234
    assert ip.port_of(b"\x6f\xff\x12\x34" + bytes(36)) == 0x1234
    assert ip.port_of(b"") == 0
