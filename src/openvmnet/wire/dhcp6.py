"""DHCPv6 messages: bytes to `Message` and back. Sources: RFC 8415, and where another RFC stands beside the line.

How it works. A message is a type, a transaction id of three octets, and options: code and length of two octets each,
then the value. An option may hold options of its own: IA_NA holds addresses, an address holds a status. `options` keeps
every option, in the wire's order, so that those which nobody here knows (vendor and user class, boot file) pass.
A relay's message has another shape; it is recognised by its type and read no further.
"""

from __future__ import annotations

import struct

import msgspec

from openvmnet.errors import Malformed
from openvmnet.wire.icmp6 import decode_domains, encode_domain

SERVER_PORT, CLIENT_PORT = 547, 546
SERVERS = bytes.fromhex("ff020000000000000000000000010002")
"""ff02::1:2, All_DHCP_Relay_Agents_and_Servers (section 7.1)."""

# Message types, section 7.3.
SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY, RELEASE, DECLINE, RECONFIGURE = range(1, 11)
INFORMATION_REQUEST, RELAY_FORWARD, RELAY_REPLY = 11, 12, 13

# Options, section 21.
CLIENT_ID, SERVER_ID, IA_NA, IA_TA, IA_ADDRESS, ORO, PREFERENCE, ELAPSED_TIME = range(1, 9)
STATUS_CODE, RAPID_COMMIT, USER_CLASS, VENDOR_CLASS, VENDOR_OPTIONS = 13, 14, 15, 16, 17
DNS_SERVERS, DOMAIN_LIST = 23, 24  # RFC 3646
IA_PD = 25
INFORMATION_REFRESH_TIME = 32
CLIENT_FQDN = 39  # RFC 4704
BOOT_FILE_URL = 59  # RFC 5970

# Status codes, section 21.13.
SUCCESS, UNSPEC_FAIL, NO_ADDRS_AVAIL, NO_BINDING, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX_AVAIL = range(7)

MAX_DUID = 130
"""Octets of the longest DUID (section 11.1)."""
_DUID_LLT, _DUID_LL, _ETHERNET = 1, 3, 1
_OPTION = struct.Struct("!HH")
_IA = struct.Struct("!III")
_ADDRESS = struct.Struct("!16sII")

Options = list[tuple[int, bytes]]


class Address(msgspec.Struct, frozen=True):
    """An IA address: 16 bytes, its lifetimes in seconds, and its status where the option has one."""

    address: bytes
    preferred: int
    valid: int
    status: int | None = None


class Ia(msgspec.Struct, frozen=True):
    """An IA_NA, or an IA_PD (whose prefixes are not read): `iaid` of 4 bytes, T1 and T2 in seconds."""

    iaid: bytes
    t1: int = 0
    t2: int = 0
    addresses: tuple[Address, ...] = ()
    status: tuple[int, str] | None = None


class Fqdn(msgspec.Struct, frozen=True):
    """The client FQDN option (RFC 4704): `name` dotted; it ends in a dot where the client gave a whole name."""

    name: str
    server_updates: bool = False
    overridden: bool = False
    no_updates: bool = False


class Message(msgspec.Struct):
    """One message between client and server; `transaction` is 3 bytes."""

    type: int
    transaction: bytes
    options: Options = msgspec.field(default_factory=list)

    def get(self, code: int) -> bytes | None:
        """The first option of this code, None where there is none."""
        return next((value for one, value in self.options if one == code), None)

    def duid(self, code: int) -> bytes | None:
        """The client's or the server's DUID, None where it is absent; `Malformed` if it is too short or too long."""
        value = self.get(code)
        if value is not None and not 3 <= len(value) <= MAX_DUID:
            raise Malformed(f"a DUID of {len(value)} octets; 3 to {MAX_DUID} would be right")
        return value

    def requested(self) -> frozenset[int] | None:
        """The codes of the option request option, None where it is absent."""
        value = self.get(ORO)
        if value is None:
            return None
        if len(value) % 2:
            raise Malformed(f"an option request of {len(value)} octets")
        return frozenset(struct.unpack(f"!{len(value) // 2}H", value))

    def ias(self, code: int = IA_NA) -> list[Ia]:
        """The identity associations of one kind."""
        return [decode_ia(value, code) for one, value in self.options if one == code]

    def fqdn(self) -> Fqdn | None:
        """The client FQDN option, None where it is absent."""
        value = self.get(CLIENT_FQDN)
        return None if value is None else decode_fqdn(value)


def parse(data: bytes) -> Message:
    """Read a message (UDP payload) of client or server; `Malformed` for a torn one, and for a relay's."""
    if len(data) < 4:
        raise Malformed(f"a DHCPv6 message has 4 octets or more, not {len(data)}")
    if data[0] in {RELAY_FORWARD, RELAY_REPLY}:
        raise Malformed("a relay's message")
    return Message(data[0], bytes(data[1:4]), parse_options(data[4:]))


def parse_options(data: bytes) -> Options:
    """The options in `data`, in order; `Malformed` for a torn one."""
    options: Options = []
    at = 0
    while at < len(data):
        if at + _OPTION.size > len(data):
            raise Malformed(f"{len(data) - at} octets behind the last DHCPv6 option")
        code, size = _OPTION.unpack_from(data, at)
        at += _OPTION.size
        if at + size > len(data):
            raise Malformed(f"DHCPv6 option {code} of {size} octets where {len(data) - at} are left")
        options.append((code, bytes(data[at : at + size])))
        at += size
    return options


def build(message: Message) -> bytes:
    """The message's octets."""
    return bytes([message.type]) + message.transaction + build_options(message.options)


def build_options(options: Options) -> bytes:
    """The options' octets."""
    return b"".join(_OPTION.pack(code, len(value)) + value for code, value in options)


def decode_ia(value: bytes, code: int = IA_NA) -> Ia:
    """Read an IA_NA or IA_PD; `Malformed` if it, or an address in it, is torn."""
    if len(value) < _IA.size:
        raise Malformed(f"an identity association of {len(value)} octets")
    iaid, t1, t2 = value[:4], *_IA.unpack_from(value)[1:]
    addresses: list[Address] = []
    status = None
    for one, inner in parse_options(value[_IA.size :]):
        if one == IA_ADDRESS and code == IA_NA:
            if len(inner) < _ADDRESS.size:
                raise Malformed(f"an IA address of {len(inner)} octets")
            address, preferred, valid = _ADDRESS.unpack_from(inner)
            more = [decode_status(text) for kind, text in parse_options(inner[_ADDRESS.size :]) if kind == STATUS_CODE]
            addresses.append(Address(address, preferred, valid, more[0][0] if more else None))
        elif one == STATUS_CODE and status is None:
            status = decode_status(inner)
    return Ia(bytes(iaid), t1, t2, tuple(addresses), status)


def encode_ia(ia: Ia) -> bytes:
    """The value of an IA_NA or IA_PD option."""
    options: Options = []
    for one in ia.addresses:
        status = b"" if one.status is None else build_options([(STATUS_CODE, encode_status(one.status))])
        options.append((IA_ADDRESS, _ADDRESS.pack(one.address, one.preferred, one.valid) + status))
    if ia.status is not None:
        options.append((STATUS_CODE, encode_status(*ia.status)))
    return ia.iaid + struct.pack("!II", ia.t1, ia.t2) + build_options(options)


def decode_status(value: bytes) -> tuple[int, str]:
    """A status code and its text."""
    if len(value) < 2:
        raise Malformed(f"a status code of {len(value)} octets")
    return int.from_bytes(value[:2], "big"), value[2:].decode("utf-8", "replace")


def encode_status(code: int, text: str = "") -> bytes:
    """The value of a status code option."""
    return code.to_bytes(2, "big") + text.encode()


def decode_fqdn(value: bytes) -> Fqdn:
    """Read the client FQDN option, whose name may be partial; `Malformed` if it is torn, or sets S and N both."""
    if not value:
        raise Malformed("a client FQDN option without flags")
    flags, text = value[0], value[1:]
    if flags & 5 == 5:
        raise Malformed("a client FQDN option with both S and N set (RFC 4704 section 4.1)")
    whole = text.endswith(b"\0")
    names = decode_domains(text if whole else text + b"\0")
    if len(names) > 1:
        raise Malformed(f"a client FQDN option with {len(names)} names")
    name = names[0] + ("." if whole else "") if names else ""
    return Fqdn(name, bool(flags & 1), bool(flags & 2), bool(flags & 4))


def encode_fqdn(fqdn: Fqdn) -> bytes:
    """The value of a client FQDN option."""
    name = encode_domain(fqdn.name) if fqdn.name.rstrip(".") else b""
    if not fqdn.name.endswith("."):
        name = name[:-1]  # a partial name has no root label (RFC 4704 section 4.2)
    return bytes([fqdn.server_updates | fqdn.overridden << 1 | fqdn.no_updates << 2]) + name


def duid_ll(mac: bytes) -> bytes:
    """A DUID of an Ethernet address (section 11.4)."""
    return struct.pack("!HH", _DUID_LL, _ETHERNET) + mac


def duid_mac(duid: bytes) -> bytes | None:
    """The Ethernet address in a DUID-LL or DUID-LLT, None in one of another kind: a hint, as any client may lie."""
    kind, hardware = struct.unpack_from("!HH", duid) if len(duid) >= 4 else (0, 0)
    at = {_DUID_LL: 4, _DUID_LLT: 8}.get(kind)
    return duid[at:] if at and hardware == _ETHERNET and len(duid) == at + 6 else None
