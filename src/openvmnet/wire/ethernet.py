"""Ethernet II frames and ARP (RFC 826): what the gateway's own services read and write by hand.

A MAC is 6 bytes, an IPv4 address 4 bytes. Parsers take whole frames as an AF_PACKET socket gives them, without the
frame check sequence.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from openvmnet.errors import Malformed

IPV4, ARP, VLAN, IPV6 = 0x0800, 0x0806, 0x8100, 0x86DD
BROADCAST = b"\xff" * 6
ZERO_MAC = bytes(6)
ARP_REQUEST, ARP_REPLY = 1, 2

MIN_FRAME = 60
"""The shortest frame without its check sequence (IEEE 802.3); QEMU's socket backends do not pad by themselves."""

_HEADER = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_ARP_ETHERNET_IPV4 = (1, IPV4, 6, 4)
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?:([:-])[0-9A-Fa-f]{2})(?:\1[0-9A-Fa-f]{2}){4}")


class Frame(NamedTuple):
    """An Ethernet II frame; `payload` may end in padding, which only the inner protocol's length can tell."""

    dst: bytes
    src: bytes
    ethertype: int
    payload: bytes


class Arp(NamedTuple):
    """An ARP packet for IPv4 over Ethernet. `operation` is ARP_REQUEST or ARP_REPLY (others exist and pass)."""

    operation: int
    sender_mac: bytes
    sender_ip: bytes
    target_mac: bytes
    target_ip: bytes


def parse(frame: bytes) -> Frame:
    """Split a frame into its header and payload; `Malformed` below 14 octets or for an IEEE 802.3 length field."""
    if len(frame) < 14:
        raise Malformed(f"an Ethernet header has 14 octets, not {len(frame)}")
    dst, src, ethertype = _HEADER.unpack_from(frame)
    if ethertype < 0x600:
        raise Malformed(f"an 802.3 frame of length {ethertype}, not Ethernet II")
    return Frame(dst, src, ethertype, frame[14:])


def build(dst: bytes, src: bytes, ethertype: int, payload: bytes) -> bytes:
    """A frame around `payload`, padded with zeros to MIN_FRAME octets."""
    return (_HEADER.pack(dst, src, ethertype) + payload).ljust(MIN_FRAME, b"\0")


def parse_arp(payload: bytes) -> Arp:
    """Read an ARP packet; `Malformed` if it is short or not for IPv4 over Ethernet. Padding behind it is ignored."""
    if len(payload) < _ARP.size:
        raise Malformed(f"an ARP packet has {_ARP.size} octets, not {len(payload)}")
    hardware, protocol, hlen, plen, *rest = _ARP.unpack_from(payload)
    if (hardware, protocol, hlen, plen) != _ARP_ETHERNET_IPV4:
        raise Malformed(f"ARP for hardware {hardware} and protocol {protocol:#06x}, not IPv4 over Ethernet")
    return Arp(*rest)


def build_arp(arp: Arp) -> bytes:
    """The ARP packet alone, 28 octets, for `build(..., ARP, ...)`."""
    return _ARP.pack(*_ARP_ETHERNET_IPV4, *arp)


def format_mac(mac: bytes) -> str:
    """`52:54:00:12:34:56`, whatever the length."""
    return mac.hex(":")


def parse_mac(text: str) -> bytes:
    """The 6 bytes of a MAC written with colons or dashes; `Malformed` otherwise."""
    if not _MAC.fullmatch(text):
        raise Malformed(f"'{text}' is not a MAC address such as 52:54:00:12:34:56")
    return bytes.fromhex(text.replace("-", ":").replace(":", ""))
