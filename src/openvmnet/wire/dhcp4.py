"""DHCPv4 messages: bytes to `Message` and back. Sources: RFC 2131 (format), RFC 2132 (options).

How it works. A message is the fixed BOOTP part (236 octets), a magic cookie, and options: code, length, value.
`parse()` gives the options as one dict in the order of the wire, after undoing the two things that bend the format:

- *option overload* (52): the `file` and `sname` fields hold more options. They are read after the option field, `file`
  first, and both fields then read as empty (RFC 2131 section 4.1).
- *long options* (RFC 3396): several instances of one code are one value in pieces, joined in that order.

`build()` does the same backwards. Values beyond 255 octets are split. Options that do not fit into the limit go, whole,
to `file` and then to `sname`, where those are empty; what fits nowhere is left out and reported, so that the caller
decides about the order. The relay's option 82 is always last and always fits (RFC 3046 section 2.1).

The server trusts nothing that it reads: a length that points beyond its field is `Malformed`, and so is a known option
of a wrong size, when it is asked for. A missing end mark is tolerated, as every server does. A message without the
magic cookie is plain BOOTP and has no options.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SERVER_PORT, CLIENT_PORT = 67, 68
BOOTREQUEST, BOOTREPLY = 1, 2
ETHERNET = 1  # htype
BROADCAST_FLAG = 0x8000

# Message types, option 53 (RFC 2132 section 9.6).
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

# Options: RFC 2132, and where another RFC stands beside the line.
PAD, END = 0, 255
SUBNET_MASK = 1
ROUTER = 3
DNS_SERVER = 6
HOST_NAME = 12
DOMAIN_NAME = 15
INTERFACE_MTU = 26
BROADCAST_ADDRESS = 28
REQUESTED_ADDRESS = 50
LEASE_TIME = 51
OVERLOAD = 52
MESSAGE_TYPE = 53
SERVER_ID = 54
PARAMETER_LIST = 55
MESSAGE_TEXT = 56
MAX_MESSAGE_SIZE = 57
RENEWAL_TIME = 58
REBINDING_TIME = 59
CLIENT_ID = 61
RAPID_COMMIT = 80  # RFC 4039
CLIENT_FQDN = 81  # RFC 4702
RELAY_AGENT = 82  # RFC 3046
IPV6_ONLY = 108  # RFC 8925
DOMAIN_SEARCH = 119  # RFC 3397
CLASSLESS_ROUTES = 121  # RFC 3442

MIN_LIMIT = 548
"""Octets of a message that every client accepts: a datagram of 576 less IP and UDP headers (RFC 2131 section 2)."""
MIN_SIZE = 300
"""Messages are padded to this: BOOTP's size, below which some relays and clients drop (RFC 1542 section 2.1)."""

_FIXED = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")
_COOKIE = b"\x63\x82\x53\x63"
_OPTIONS_AT = _FIXED.size + len(_COOKIE)
_SNAME, _FILE = 64, 128
ZERO = bytes(4)


class Message(msgspec.Struct):
    """One message. Addresses are 4 bytes, `chaddr` has the length that hlen says, options keep their order.

    `sname` and `file` are without trailing zeros; both are empty where option overload used the fields.
    """

    op: int
    xid: int
    chaddr: bytes
    options: dict[int, bytes] = msgspec.field(default_factory=dict)
    htype: int = ETHERNET
    hops: int = 0
    secs: int = 0
    flags: int = 0
    ciaddr: bytes = ZERO
    yiaddr: bytes = ZERO
    siaddr: bytes = ZERO
    giaddr: bytes = ZERO
    sname: bytes = b""
    file: bytes = b""

    @property
    def broadcast(self) -> bool:
        """The client cannot receive unicast before it is configured (RFC 2131 section 4.1)."""
        return bool(self.flags & BROADCAST_FLAG)

    def type(self) -> int | None:
        """The DHCP message type, None for BOOTP; `Malformed` if the option is not one octet."""
        return self.number(MESSAGE_TYPE, 1)

    def number(self, code: int, size: int) -> int | None:
        """An unsigned option of `size` octets, None where it is absent."""
        value = self.options.get(code)
        if value is None:
            return None
        if len(value) != size:
            raise Malformed(f"DHCP option {code} has {len(value)} octets, not {size}")
        return int.from_bytes(value, "big")

    def address(self, code: int) -> bytes | None:
        """An option that is one IPv4 address, None where it is absent."""
        value = self.options.get(code)
        if value is not None and len(value) != 4:
            raise Malformed(f"DHCP option {code} has {len(value)} octets, not an address's 4")
        return value


def parse(data: bytes) -> Message:
    """Read a message (UDP payload). `Malformed` if it is short, or its op, hlen or an option's length is wrong."""
    if len(data) < _FIXED.size:
        raise Malformed(f"a DHCP message has {_FIXED.size} octets or more, not {len(data)}")
    op, htype, hlen, hops, xid, secs, flags, ci, yi, si, gi, chaddr, sname, file = _FIXED.unpack_from(data)
    if op not in {BOOTREQUEST, BOOTREPLY}:
        raise Malformed(f"DHCP op {op}, neither request nor reply")
    if hlen > len(chaddr):
        raise Malformed(f"a hardware address of {hlen} octets in a field of 16")
    options: dict[int, bytes] = {}
    if data[_FIXED.size : _OPTIONS_AT] == _COOKIE:
        _read_options(data[_OPTIONS_AT:], options)
        overload = options.pop(OVERLOAD, b"\0")
        if overload not in {b"\0", b"\1", b"\2", b"\3"}:
            raise Malformed(f"DHCP option overload {overload.hex()}, not 01, 02 or 03")
        if overload[0] & 1:
            _read_options(file, options)
            file = b""
        if overload[0] & 2:
            _read_options(sname, options)
            sname = b""
        # An overload option inside an overloaded field means nothing (RFC 2131 section 4.1).
        options.pop(OVERLOAD, None)
    return Message(
        op=op,
        xid=xid,
        chaddr=chaddr[:hlen],
        options=options,
        htype=htype,
        hops=hops,
        secs=secs,
        flags=flags,
        ciaddr=ci,
        yiaddr=yi,
        siaddr=si,
        giaddr=gi,
        sname=sname.rstrip(b"\0"),
        file=file.rstrip(b"\0"),
    )


def _read_options(data: bytes, options: dict[int, bytes]) -> None:
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        if code == PAD:
            at += 1
            continue
        if code == END:
            return
        start = at + 2
        if start > end:
            raise Malformed(f"DHCP option {code} has no length")
        at = start + data[start - 1]
        if at > end:
            raise Malformed(f"DHCP option {code} of {data[start - 1]} octets where {end - start} are left")
        piece = data[start:at]
        options[code] = options[code] + piece if code in options else piece


def build(message: Message, *, limit: int = MIN_LIMIT) -> tuple[bytes, tuple[int, ...]]:
    """The message's octets, at most `limit` of them, and the codes of the options that had to be left out.

    Options are placed in the order of the dict. `limit` is at least MIN_LIMIT. `Malformed` when option 82 alone, which
    may not be left out, exceeds it.
    """
    room = max(limit, MIN_LIMIT) - _OPTIONS_AT - 1
    pieces = {code: _pieces(code, value) for code, value in message.options.items() if code != OVERLOAD}
    last = pieces.pop(RELAY_AGENT, b"")
    room -= len(last)
    if room < 3:
        raise Malformed(f"a relay agent option of {len(last)} octets leaves no room for a reply")
    sname, file = message.sname, message.file
    dropped: tuple[int, ...] = ()
    if sum(map(len, pieces.values())) <= room:
        options, overload = b"".join(pieces.values()), 0
    else:
        rooms = [room - 3, 0 if file else _FILE - 1, 0 if sname else _SNAME - 1]
        (options, in_file, in_sname), dropped = _place(pieces, rooms)
        overload = (1 if in_file else 0) | (2 if in_sname else 0)
        file = in_file + bytes([END]) if in_file else file
        sname = in_sname + bytes([END]) if in_sname else sname
    if overload:
        options += bytes([OVERLOAD, 1, overload])
    chaddr = message.chaddr
    fixed = _FIXED.pack(
        message.op,
        message.htype,
        len(chaddr),
        message.hops,
        message.xid,
        message.secs,
        message.flags,
        message.ciaddr,
        message.yiaddr,
        message.siaddr,
        message.giaddr,
        chaddr,
        sname,
        file,
    )
    return (fixed + _COOKIE + options + last + bytes([END])).ljust(MIN_SIZE, b"\0"), dropped


def _pieces(code: int, value: bytes) -> bytes:
    """One option on the wire: in pieces of at most 255 octets (RFC 3396 section 5)."""
    if len(value) <= 255:
        return bytes([code, len(value)]) + value
    return b"".join(
        bytes([code, len(part)]) + part for part in (value[at : at + 255] for at in range(0, len(value), 255))
    )


def _place(pieces: dict[int, bytes], rooms: list[int]) -> tuple[list[bytes], tuple[int, ...]]:
    """First fit of whole options into the three fields; a value is never torn between two fields."""
    fields, dropped = [b"", b"", b""], []
    for code, octets in pieces.items():
        for index, room in enumerate(rooms):
            if len(fields[index]) + len(octets) <= room:
                fields[index] += octets
                break
        else:
            dropped.append(code)
    return fields, tuple(dropped)


# Classless static routes (RFC 3442): destination's prefix length, its significant octets, router.


def encode_routes(routes: Iterable[tuple[IPv4Address, int, IPv4Address]]) -> bytes:
    """Option 121 of (destination, prefix length, router); router 0.0.0.0 means on-link."""
    out = bytearray()
    for destination, prefixlen, router in routes:
        out.append(prefixlen)
        out += destination.packed[: (prefixlen + 7) // 8]
        out += router.packed
    return bytes(out)


def decode_routes(value: bytes) -> list[tuple[IPv4Address, int, IPv4Address]]:
    """The routes of option 121; `Malformed` for a prefix beyond 32, host bits set, or a torn entry."""
    routes = []
    at = 0
    while at < len(value):
        prefixlen = value[at]
        significant = (prefixlen + 7) // 8
        entry = value[at + 1 : at + 5 + significant]
        if prefixlen > 32 or len(entry) != significant + 4:
            raise Malformed(f"a classless route of prefix length {prefixlen} with {len(entry)} octets behind it")
        destination = int.from_bytes(entry[:significant].ljust(4, b"\0"), "big")
        if destination & (0xFFFFFFFF >> prefixlen):
            raise Malformed(f"a classless route to {IPv4Address(destination)}/{prefixlen} has host bits set")
        routes.append((IPv4Address(destination), prefixlen, IPv4Address(entry[significant:])))
        at += 5 + significant
    return routes


# Domain names in options: DNS wire form, with compression inside one option (RFC 3397 section 2, RFC 1035 4.1.4).


def encode_names(names: Iterable[str]) -> bytes:
    """Option 119: the search list, compressed. Names are ASCII; `Malformed` for a label of 0 or beyond 63 octets."""
    out = bytearray()
    known: dict[tuple[bytes, ...], int] = {}
    for name in names:
        labels = tuple(_labels(name))
        for index in range(len(labels)):
            suffix = labels[index:]
            pointer = known.get(suffix)
            if pointer is not None:
                out += (0xC000 | pointer).to_bytes(2, "big")
                break
            if len(out) < 0x4000:
                known[suffix] = len(out)
            out.append(len(labels[index]))
            out += labels[index]
        else:
            out.append(0)
    return bytes(out)


def _labels(name: str) -> Iterator[bytes]:
    """The labels of a dotted name, checked."""
    try:
        octets = name.rstrip(".").encode("ascii")
    except UnicodeEncodeError as error:
        raise Malformed(f"the domain name {name!r} is not ASCII") from error
    if len(octets) > 253:
        raise Malformed(f"a domain name of {len(octets)} octets; 253 is the most")
    for label in octets.split(b"."):
        if not 0 < len(label) <= 63:
            raise Malformed(f"the domain name {name!r} has a label of {len(label)} octets")
        yield label


def decode_names(value: bytes) -> list[str]:
    """The search list of option 119; `Malformed` for a pointer that does not point backwards, or bytes beyond ASCII."""
    names, at = [], 0
    while at < len(value):
        name, at = _name_at(value, at)
        names.append(name)
        if len(names) > 128:
            raise Malformed("a search list of more than 128 domains")
    return names


def _name_at(value: bytes, at: int) -> tuple[str, int]:
    labels: list[bytes] = []
    size, resume, floor = 0, -1, at
    while True:
        if at >= len(value):
            raise Malformed("a domain name without its end")
        length = value[at]
        if length >= 0xC0:
            if at + 2 > len(value):
                raise Malformed("half a compression pointer")
            target = int.from_bytes(value[at : at + 2], "big") & 0x3FFF
            if target >= floor:
                raise Malformed("a compression pointer that does not point backwards")
            resume = at + 2 if resume < 0 else resume
            at = floor = target
            continue
        if length > 63:
            raise Malformed(f"a label of type {length >> 6}")
        at += 1
        if length == 0:
            break
        labels.append(value[at : at + length])
        at += length
        size += length + 1
        if len(labels[-1]) != length or size > 254:
            raise Malformed("a domain name that is torn or too long")
    try:
        return b".".join(labels).decode("ascii"), at if resume < 0 else resume
    except UnicodeDecodeError as error:
        raise Malformed("a domain name that is not ASCII") from error


class Fqdn(msgspec.Struct, frozen=True):
    """The client FQDN option (RFC 4702). `name` is as given: with dots, relative if it has no trailing one.

    server_updates is S (the server shall do the A record), overridden O, no_updates N, canonical E (wire form).
    """

    name: str
    server_updates: bool = False
    overridden: bool = False
    no_updates: bool = False
    canonical: bool = True


def decode_fqdn(value: bytes) -> Fqdn:
    """Read option 81, whose name may be partial or empty; `Malformed` if it is short, torn, or sets S and N both."""
    if len(value) < 3:
        raise Malformed(f"a client FQDN option has 3 octets or more, not {len(value)}")
    flags, text = value[0], value[3:]
    if flags & 9 == 9:
        raise Malformed("a client FQDN option with both S and N set (RFC 4702 section 2.1)")
    if flags & 4:
        # A partial name has no root label (RFC 4702 section 2.3.1).
        whole = text.endswith(b"\0")
        name = _name_at(text if whole else text + b"\0", 0)[0] + ("." if whole and len(text) > 1 else "")
    else:
        name = text.rstrip(b"\0").decode("ascii", "replace")
    return Fqdn(name, bool(flags & 1), bool(flags & 2), bool(flags & 8), bool(flags & 4))


def encode_fqdn(fqdn: Fqdn, *, rcode: int = 255) -> bytes:
    """Option 81 with both result codes `rcode`; a server sends 255 (RFC 4702 section 2.2)."""
    flags = fqdn.server_updates | fqdn.overridden << 1 | fqdn.canonical << 2 | fqdn.no_updates << 3
    if fqdn.canonical:
        name = b"".join(bytes([len(label)]) + label for label in _labels(fqdn.name)) if fqdn.name.rstrip(".") else b""
        if fqdn.name.endswith("."):
            name += b"\0"
    else:
        name = fqdn.name.encode("ascii", "replace")
    return bytes([flags, rcode, rcode]) + name


def reply_to(request: Message, kind: int) -> Message:
    """A reply to `request` with what RFC 2131 table 3 copies into every one: xid, flags, giaddr, chaddr, and by
    RFC 6842 the client identifier. Options begin with the message type."""
    options = {MESSAGE_TYPE: bytes([kind])}
    if CLIENT_ID in request.options:
        options[CLIENT_ID] = request.options[CLIENT_ID]
    return Message(
        op=BOOTREPLY,
        xid=request.xid,
        chaddr=request.chaddr,
        options=options,
        htype=request.htype,
        flags=request.flags,
        giaddr=request.giaddr,
    )
