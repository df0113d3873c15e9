"""IPv4 packets as the slow path reads and writes them: headers, checksums, UDP, TCP resets and ICMP errors.

Addresses are 4 bytes, ports and lengths host integers. Builders return whole IPv4 packets, ready for a TUN device.
Sources: RFC 791 (IPv4), RFC 768 (UDP), RFC 9293 (TCP), RFC 792 and RFC 1191 (ICMP, fragmentation needed).
"""

from __future__ import annotations

import struct

import msgspec

from openvmnet.errors import Malformed

ICMP, TCP, UDP = 1, 6, 17

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10

ECHO_REPLY, UNREACHABLE, ECHO_REQUEST, TIME_EXCEEDED = 0, 3, 8, 11
# Codes of UNREACHABLE (RFC 792, RFC 1122 section 3.2.2.1, RFC 1812 section 5.2.7.1).
NET, HOST, PROTOCOL, PORT, FRAGMENTATION_NEEDED, ADMIN_PROHIBITED = 0, 1, 2, 3, 4, 13

_HEADER = struct.Struct("!BBHHHBBH4s4s")
_UDP = struct.Struct("!HHHH")
_TCP = struct.Struct("!HHIIBBHHH")
_PSEUDO = struct.Struct("!4s4sBBH")
_DONT_FRAGMENT = 0x4000
_TTL = 64
_VERSION_6 = b"\x60"  # the first octet of an IPv6 packet is this or more
_QUOTE = 548  # octets of the offending packet in an ICMP error: RFC 1812 section 4.3.2.3 stays within 576 in all


class Header(msgspec.Struct, frozen=True, gc=False):
    """The parts of an IPv4 header that a flow's opening needs; `payload` is the offset of what follows it.

    `identification` is, in what the firewall hands to Python, the number of the port that the packet came through.
    """

    src: bytes
    dst: bytes
    protocol: int
    ttl: int
    dont_fragment: bool
    payload: int
    total: int
    identification: int


def port_of(packet: bytes) -> int:
    """The number of the port that a packet of either version came through, which the firewall has written into the
    identification, or into the lower 16 bits of the flow label; 0 where it is too short for one."""
    return int.from_bytes(packet[2:4] if packet[:1] >= _VERSION_6 else packet[4:6])


def parse(packet: bytes) -> Header:
    """Read the header of a whole, unfragmented IPv4 packet; `Malformed` for anything else."""
    if len(packet) < 20:
        raise Malformed(f"an IPv4 header has 20 octets or more, not {len(packet)}")
    version_ihl, _, total, identification, fragment, ttl, protocol, _, src, dst = _HEADER.unpack_from(packet)
    length = (version_ihl & 15) * 4
    if version_ihl >> 4 != 4:
        raise Malformed(f"IP version {version_ihl >> 4}, not 4")
    if length < 20 or not length <= total <= len(packet):
        raise Malformed(f"header of {length} octets in a packet of {total}, of which {len(packet)} are here")
    if fragment & 0x3FFF:
        raise Malformed("a fragment")
    return Header(src, dst, protocol, ttl, bool(fragment & _DONT_FRAGMENT), length, total, identification)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`: 16 bits, ready for the header field."""
    if len(data) % 2:
        data += b"\0"
    # A number is congruent to the sum of its base-65536 digits modulo 65535, so one division does the sum.
    remainder = int.from_bytes(data, "big") % 0xFFFF
    # One's complement has two zeros; a sum of non-zero words is 0xFFFF, never 0.
    total = remainder or (0xFFFF if any(data) else 0)
    return ~total & 0xFFFF


def build(
    src: bytes, dst: bytes, protocol: int, payload: bytes, *, ttl: int = _TTL, identification: int | None = None
) -> bytes:
    """An IPv4 packet around `payload`: atomic, do-not-fragment set (RFC 6864 section 4.1), unless it has an
    `identification`, with which it may be fragmented on its way."""
    fragment = _DONT_FRAGMENT if identification is None else 0
    header = _HEADER.pack(0x45, 0, 20 + len(payload), identification or 0, fragment, ttl, protocol, 0, src, dst)
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + payload


def build_udp(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes) -> bytes:
    """A UDP datagram as a whole IPv4 packet, checksummed."""
    length = 8 + len(payload)
    datagram = _UDP.pack(sport, dport, length, 0) + payload
    # RFC 768: a computed checksum of zero is sent as all ones.
    total = checksum(_PSEUDO.pack(src, dst, 0, UDP, length) + datagram) or 0xFFFF
    return build(src, dst, UDP, datagram[:6] + total.to_bytes(2, "big") + payload)


def build_reset(packet: bytes, header: Header) -> bytes:
    """The RST that refuses the SYN in `packet` (RFC 9293 section 3.10.7.1): acknowledges it, sequence number 0."""
    sport, dport, sequence = struct.unpack_from("!HHI", packet, header.payload)
    segment = _TCP.pack(dport, sport, 0, (sequence + 1) & 0xFFFFFFFF, 0x50, RST | ACK, 0, 0, 0)
    total = checksum(_PSEUDO.pack(header.dst, header.src, 0, TCP, len(segment)) + segment)
    return build(header.dst, header.src, TCP, segment[:16] + total.to_bytes(2, "big") + segment[18:])


def build_error(source: bytes, packet: bytes, kind: int, code: int, *, rest: int = 0) -> bytes:
    """An ICMP error about `packet`, from address `source` to the packet's sender.

    `rest` is the second header word: the next hop's MTU for FRAGMENTATION_NEEDED (RFC 1191 section 4), else 0.
    """
    message = struct.pack("!BBHI", kind, code, 0, rest) + packet[:_QUOTE]
    return build(source, packet[12:16], ICMP, _summed(message))


def build_echo_reply(src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes, *, ttl: int = _TTL) -> bytes:
    """An ICMP echo reply as a whole IPv4 packet, which a link that is too narrow for it may fragment."""
    message = struct.pack("!BBHHH", ECHO_REPLY, 0, 0, identifier, sequence) + data
    # Replies that are under way at once differ in their sequence number, so this tells their fragments apart.
    return build(src, dst, ICMP, _summed(message), ttl=ttl, identification=identifier ^ sequence)


def build_echo_request(src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes) -> bytes:
    """An ICMP echo request as a whole IPv4 packet: what a guest sent, when it has to be quoted back to it."""
    message = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, sequence) + data
    return build(src, dst, ICMP, _summed(message))


def _summed(message: bytes) -> bytes:
    return message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
