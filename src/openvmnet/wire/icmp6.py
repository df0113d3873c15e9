"""Neighbour discovery messages: router solicitations read, router advertisements written, neighbours' messages read.

Messages are ICMPv6, from the type on, as a raw ICMPv6 socket gives and takes them: the kernel checks the checksum of
what comes in, and fills in that of what goes out. `checksum()` is for who has no such socket. An option is type, length
in units of 8 octets, value; one of length zero makes the whole message invalid (RFC 4861 section 4.6).
Sources: RFC 4861 (messages), RFC 8106 (RDNSS, DNSSL), RFC 4443 section 2.3 (checksum).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openvmnet.errors import Malformed
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT = 133, 134, 135, 136
SOURCE_LINK_LAYER, TARGET_LINK_LAYER, PREFIX_INFORMATION, MTU, RDNSS, DNSSL = 1, 2, 3, 5, 25, 31

INFINITE = 0xFFFFFFFF
"""A lifetime that never ends, in seconds."""
UNSPECIFIED = bytes(16)

_MANAGED, _OTHER = 0x80, 0x40
_ON_LINK, _AUTONOMOUS = 0x80, 0x40
_ADVERTISEMENT = struct.Struct("!BBHBBHII")
_PREFIX = struct.Struct("!BBBBIII16s")
_PSEUDO = struct.Struct("!16s16sII")
_NEIGHBOUR = 24  # octets before the options


class Prefix(msgspec.Struct, frozen=True):
    """A prefix information option: the first `length` bits of `address` (16 bytes); lifetimes in seconds."""

    address: bytes
    length: int
    valid: int
    preferred: int
    on_link: bool = True
    autonomous: bool = True


class Advertisement(msgspec.Struct, frozen=True):
    """A router advertisement. Times in seconds, but `reachable` and `retransmit` in milliseconds; 0 says nothing.

    `mtu` and `mac` are None where the option is absent; `dns_lifetime` is that of `dns` (16 bytes each) and `search`.
    """

    lifetime: int
    prefixes: tuple[Prefix, ...] = ()
    managed: bool = False
    other: bool = False
    hop_limit: int = 64
    reachable: int = 0
    retransmit: int = 0
    mtu: int | None = None
    mac: bytes | None = None
    dns: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()
    dns_lifetime: int = 0


class Neighbour(NamedTuple):
    """A neighbour solicitation or advertisement: its type, the address it is about, the MAC that it tells or None."""

    kind: int
    target: bytes
    mac: bytes | None


def checksum(src: bytes, dst: bytes, message: bytes) -> int:
    """The checksum of `message` between two addresses (16 bytes each), its own field counted as it stands."""
    return ip.checksum(_PSEUDO.pack(src, dst, len(message), 58) + message)


def parse_solicitation(message: bytes) -> bytes | None:
    """The sender's MAC as a router solicitation tells it, or None; `Malformed` for anything else."""
    if len(message) < 8 or message[0] != ROUTER_SOLICITATION or message[1]:
        raise Malformed(f"{len(message)} octets that are no router solicitation")
    return _link_layer(message, 8, SOURCE_LINK_LAYER)


def parse_neighbour(message: bytes) -> Neighbour:
    """Read a neighbour solicitation or advertisement; `Malformed` for anything else, and for a multicast target."""
    if len(message) < _NEIGHBOUR or message[0] not in {NEIGHBOUR_SOLICITATION, NEIGHBOUR_ADVERTISEMENT} or message[1]:
        raise Malformed(f"{len(message)} octets that are no neighbour solicitation or advertisement")
    target = bytes(message[8:_NEIGHBOUR])
    if target[0] == 0xFF:
        raise Malformed("a neighbour message about a multicast address")
    kind = message[0]
    option = SOURCE_LINK_LAYER if kind == NEIGHBOUR_SOLICITATION else TARGET_LINK_LAYER
    return Neighbour(kind, target, _link_layer(message, _NEIGHBOUR, option))


def build_neighbour(neighbour: Neighbour, *, solicited: bool = False, override: bool = False) -> bytes:
    """A neighbour solicitation or advertisement, checksum zero; the flags are an advertisement's, never a router's."""
    solicitation = neighbour.kind == NEIGHBOUR_SOLICITATION
    flags = 0 if solicitation else solicited << 30 | override << 29
    message = struct.pack("!BBHI", neighbour.kind, 0, 0, flags) + neighbour.target
    if neighbour.mac is not None:
        message += bytes([SOURCE_LINK_LAYER if solicitation else TARGET_LINK_LAYER, 1]) + neighbour.mac
    return message


def build_advertisement(advertisement: Advertisement) -> bytes:
    """The message, checksum zero. `Malformed` for a search domain that is no domain name."""
    one = advertisement
    flags = (_MANAGED if one.managed else 0) | (_OTHER if one.other else 0)
    message = _ADVERTISEMENT.pack(
        ROUTER_ADVERTISEMENT, 0, 0, one.hop_limit, flags, one.lifetime, one.reachable, one.retransmit
    )
    if one.mac is not None:
        message += bytes([SOURCE_LINK_LAYER, 1]) + one.mac
    if one.mtu is not None:
        message += struct.pack("!BBHI", MTU, 1, 0, one.mtu)
    for prefix in one.prefixes:
        flags = (_ON_LINK if prefix.on_link else 0) | (_AUTONOMOUS if prefix.autonomous else 0)
        message += _PREFIX.pack(
            PREFIX_INFORMATION, 4, prefix.length, flags, prefix.valid, prefix.preferred, 0, prefix.address
        )
    if one.dns:
        message += struct.pack("!BBHI", RDNSS, 1 + 2 * len(one.dns), 0, one.dns_lifetime) + b"".join(one.dns)
    if one.search:
        names = b"".join(map(encode_domain, one.search))
        names += bytes(-len(names) % 8)
        message += struct.pack("!BBHI", DNSSL, 1 + len(names) // 8, 0, one.dns_lifetime) + names
    return message


def parse_advertisement(message: bytes) -> Advertisement:
    """Read a router advertisement, of each option but the prefixes the first; `Malformed` for anything else."""
    if len(message) < _ADVERTISEMENT.size or message[0] != ROUTER_ADVERTISEMENT or message[1]:
        raise Malformed(f"{len(message)} octets that are no router advertisement")
    _, _, _, hops, flags, lifetime, reachable, retransmit = _ADVERTISEMENT.unpack_from(message)
    prefixes: list[Prefix] = []
    found: dict[int, bytes] = {}
    for kind, value in _options(message, _ADVERTISEMENT.size):
        if kind == PREFIX_INFORMATION:
            prefixes.append(_prefix(value))
        else:
            found.setdefault(kind, value)
    servers, names = found.get(RDNSS, b""), found.get(DNSSL, b"")
    return Advertisement(
        lifetime=lifetime,
        prefixes=tuple(prefixes),
        managed=bool(flags & _MANAGED),
        other=bool(flags & _OTHER),
        hop_limit=hops,
        reachable=reachable,
        retransmit=retransmit,
        mtu=int.from_bytes(found[MTU][2:6], "big") if MTU in found else None,
        mac=found[SOURCE_LINK_LAYER][:6] if SOURCE_LINK_LAYER in found else None,
        dns=tuple(servers[at : at + 16] for at in range(6, len(servers) - 15, 16)),
        search=tuple(decode_domains(names[6:])),
        dns_lifetime=int.from_bytes((servers or names)[2:6], "big"),
    )


def _prefix(value: bytes) -> Prefix:
    if len(value) != _PREFIX.size - 2:
        raise Malformed(f"a prefix information option of {len(value) + 2} octets, not {_PREFIX.size}")
    _, _, length, flags, valid, preferred, _, address = _PREFIX.unpack(b"\0\0" + value)
    if length > 128:
        raise Malformed(f"a prefix of {length} bits")
    return Prefix(address, length, valid, preferred, bool(flags & _ON_LINK), bool(flags & _AUTONOMOUS))


def _options(message: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Type and value of each option; `Malformed` for one without length, or that is torn."""
    while at < len(message):
        size = message[at + 1] * 8 if at + 2 <= len(message) else 0
        if not size or at + size > len(message):
            raise Malformed(f"a neighbour discovery option of {size} octets where {len(message) - at} are left")
        yield message[at], bytes(message[at + 2 : at + size])
        at += size


def _link_layer(message: bytes, at: int, wanted: int) -> bytes | None:
    found = None
    for kind, value in _options(message, at):
        if kind == wanted and found is None:
            found = value[:6]
    return found


# Domain names without compression, as DNSSL and DHCPv6 have them (RFC 1035 section 3.1, RFC 8415 section 10).


def encode_domain(name: str) -> bytes:
    """A dotted name as labels with the root's; `Malformed` for one that is not ASCII or has a label of a wrong size."""
    try:
        labels = name.rstrip(".").encode("ascii").split(b".")
    except UnicodeEncodeError as error:
        raise Malformed(f"the domain name {name!r} is not ASCII") from error
    if not all(0 < len(label) <= 63 for label in labels) or sum(map(len, labels)) + len(labels) > 254:
        raise Malformed(f"the domain name {name!r} has a label that is empty or too long, or is too long itself")
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def decode_domains(value: bytes) -> list[str]:
    """The names in `value`, dotted, without the root; zeros between and behind them are padding (RFC 8106 5.2)."""
    names: list[str] = []
    labels: list[bytes] = []
    at = 0
    while at < len(value):
        size = value[at]
        at += 1
        if size == 0:
            if labels:
                names.append(_dotted(labels))
                labels = []
            continue
        if size > 63 or at + size > len(value):
            raise Malformed(f"a domain name with a label of {size} octets where {len(value) - at} are left")
        labels.append(bytes(value[at : at + size]))
        at += size
    if labels:
        raise Malformed("a domain name without its end")
    return names


def _dotted(labels: list[bytes]) -> str:
    if sum(map(len, labels)) + len(labels) > 254:
        raise Malformed("a domain name of more than 255 octets")
    if any(b"." in label for label in labels):
        raise Malformed("a domain name with a dot inside a label")
    try:
        return b".".join(labels).decode("ascii")
    except UnicodeDecodeError as error:
        raise Malformed("a domain name that is not ASCII") from error
