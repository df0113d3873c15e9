"""IPv6 packets as the slow path reads and writes them: headers, TCP resets, UDP and ICMPv6.

Addresses are 16 bytes, ports and lengths host integers. Builders return whole IPv6 packets, ready for a TUN device, and
have the names of their twins in `wire.ip`. A header is the same `ip.Header`, in IPv6's terms: `protocol` is what the
last extension header announces, `ttl` the hop limit, `payload` the offset behind all extension headers, `dont_fragment`
true, since no router fragments IPv6, and `identification` the lower 16 bits of the flow label.
Sources: RFC 8200 (IPv6), RFC 4443 (ICMPv6), RFC 9293 (TCP), RFC 768 (UDP).
"""

from __future__ import annotations

import struct

from openvmnet.errors import Malformed
from openvmnet.wire.ip import ACK, RST, TCP, UDP, Header, checksum

ICMP = 58

UNREACHABLE, PACKET_TOO_BIG, TIME_EXCEEDED, PARAMETER_PROBLEM, ECHO_REQUEST, ECHO_REPLY = 1, 2, 3, 4, 128, 129
# Codes of UNREACHABLE (RFC 4443 section 3.1).
NO_ROUTE, ADMIN_PROHIBITED, ADDRESS, PORT = 0, 1, 3, 4

HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, NO_NEXT_HEADER, DESTINATION_OPTIONS = 0, 43, 44, 51, 59, 60

_HEADER = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")
_TCP = struct.Struct("!HHIIBBHHH")
_PSEUDO = struct.Struct("!16s16sII")
_HOPS = 64
_QUOTE = 1280 - 48  # octets of the offending packet in an ICMPv6 error: RFC 4443 section 2.4 (c)
_EXTENSIONS = (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS, AUTHENTICATION, FRAGMENT)


def parse(packet: bytes) -> Header:
    """Read the headers of a whole, unfragmented IPv6 packet; `Malformed` for anything else.

    A fragment header of a packet in one piece (RFC 6946) is passed over. A routing header with segments left is
    malformed here: the packet is not for the address that its header names (RFC 5095 forbids type 0).
    """
    if len(packet) < 40:
        raise Malformed(f"an IPv6 header has 40 octets, not {len(packet)}")
    word, length, protocol, hops, src, dst = _HEADER.unpack_from(packet)
    if word >> 28 != 6:
        raise Malformed(f"IP version {word >> 28}, not 6")
    total = 40 + length
    if total > len(packet):
        raise Malformed(f"a packet of {total} octets, of which {len(packet)} are here")
    offset = 40
    if protocol in _EXTENSIONS:
        protocol, offset = _behind(packet, total, protocol, offset)
    return Header(src, dst, protocol, hops, True, offset, total, word & 0xFFFF)


def _behind(packet: bytes, total: int, kind: int, offset: int) -> tuple[int, int]:
    """What stands behind the extension headers, and where."""
    while kind in _EXTENSIONS:
        if offset + 8 > total:
            raise Malformed(f"extension header {kind} at {offset} of a packet of {total} octets")
        following, size = packet[offset], packet[offset + 1]
        if kind == FRAGMENT:
            if int.from_bytes(packet[offset + 2 : offset + 4], "big") & 0xFFF9:
                raise Malformed("a fragment")
            size = 8
        elif kind == AUTHENTICATION:
            size = (size + 2) * 4  # RFC 4302 section 2.2
        else:
            size = (size + 1) * 8
            if kind == ROUTING and packet[offset + 3]:
                raise Malformed("a routing header with segments left")
        kind, offset = following, offset + size
        if offset > total:
            raise Malformed(f"extension headers of {offset} octets in a packet of {total}")
    return kind, offset


def build(src: bytes, dst: bytes, protocol: int, payload: bytes, *, ttl: int = _HOPS) -> bytes:
    """An IPv6 packet around `payload`."""
    return _HEADER.pack(6 << 28, len(payload), protocol, ttl, src, dst) + payload


def build_udp(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes) -> bytes:
    """A UDP datagram as a whole IPv6 packet, checksummed."""
    length = 8 + len(payload)
    datagram = _UDP.pack(sport, dport, length, 0) + payload
    # RFC 8200 section 8.1: zero is no checksum, and IPv6 wants one.
    total = checksum(_PSEUDO.pack(src, dst, length, UDP) + datagram) or 0xFFFF
    return build(src, dst, UDP, datagram[:6] + total.to_bytes(2, "big") + payload)


def build_reset(packet: bytes, header: Header) -> bytes:
    """The RST that refuses the SYN in `packet` (RFC 9293 section 3.10.7.1): acknowledges it, sequence number 0."""
    sport, dport, sequence = struct.unpack_from("!HHI", packet, header.payload)
    segment = _TCP.pack(dport, sport, 0, (sequence + 1) & 0xFFFFFFFF, 0x50, RST | ACK, 0, 0, 0)
    total = checksum(_PSEUDO.pack(header.dst, header.src, len(segment), TCP) + segment)
    return build(header.dst, header.src, TCP, segment[:16] + total.to_bytes(2, "big") + segment[18:])


def build_error(source: bytes, packet: bytes, kind: int, code: int, *, rest: int = 0) -> bytes:
    """An ICMPv6 error about `packet`, from address `source` to the packet's sender.

    `rest` is the second header word: the next hop's MTU for PACKET_TOO_BIG, the pointer of PARAMETER_PROBLEM, else 0.
    """
    return build_icmp(source, packet[8:24], struct.pack("!BBHI", kind, code, 0, rest) + packet[:_QUOTE])


def build_echo_reply(src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes, *, ttl: int = _HOPS) -> bytes:
    """An ICMPv6 echo reply as a whole IPv6 packet, whatever the MTU."""
    return build_icmp(src, dst, struct.pack("!BBHHH", ECHO_REPLY, 0, 0, identifier, sequence) + data, ttl=ttl)


def build_echo_request(src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes) -> bytes:
    """An ICMPv6 echo request as a whole IPv6 packet: what a guest sent, when it has to be quoted back to it."""
    return build_icmp(src, dst, struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, sequence) + data)


def build_icmp(src: bytes, dst: bytes, message: bytes, *, ttl: int = _HOPS) -> bytes:
    """An ICMPv6 message, its checksum filled in (RFC 4443 section 2.3), as a whole IPv6 packet."""
    total = checksum(_PSEUDO.pack(src, dst, len(message), ICMP) + message)
    return build(src, dst, ICMP, message[:2] + total.to_bytes(2, "big") + message[4:], ttl=ttl)
