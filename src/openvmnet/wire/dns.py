"""DNS messages: queries read, answers built, other servers' answers measured but never rewritten.

A forwarder needs less than a codec of all record types. `parse_query` reads header, question and OPT record, which say
what is asked and how large the answer may be. `build` makes the few answers that are ours: an address, a name, nothing
(with the SOA record that lets a resolver remember it, RFC 2308), or an error. `parse_response` walks over somebody
else's answer and finds what a cache has to know: the question it answers, how long it holds, and where in the octets
the TTLs lie, so that they can be lowered later by writing four octets each.

Names are octets in wire form, labels with their lengths and the root's zero at the end. `lower` makes them comparable:
a length octet is at most 63 and so never in the range of the letters that it changes (RFC 4343).
Reading a compressed name (RFC 1035 section 4.1.4) ends after 255 octets at the latest, and a pointer must point before
the name that it is part of, which makes loops impossible.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from openvmnet.errors import Malformed

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER = 12  # octets

# Header flags (RFC 1035 section 4.1.1, RFC 4035 section 3.1.6 for AD and CD).
QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
OPCODE_MASK = 0x7800

# Response codes; BADVERS is RFC 6891's and needs an OPT record.
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
BADVERS = 16
FAILURES = frozenset({FORMERR, SERVFAIL, NOTIMP, REFUSED})
"""Codes that say the server could not do it, and nothing about the name."""

# Types and classes.
A, NS, CNAME, SOA, PTR, HINFO, TXT, AAAA, OPT, IXFR, AXFR, ANY = 1, 2, 5, 6, 12, 13, 16, 28, 41, 251, 252, 255
IN = 1

MIN_UDP = 512
"""The largest UDP answer for a client without EDNS (RFC 1035 section 4.2.1)."""
MAX_UDP = 1232
"""The largest UDP answer we send or ask for: it fits 1,280 octets with IPv6 and UDP headers, so no path splits it."""
MAX_TTL = 0x7FFFFFFF  # a TTL with the top bit set counts as 0 (RFC 2181 section 8)

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_SOA_NUMBERS = struct.Struct("!IIIII")
_DO = 0x8000
_COPIED = OPCODE_MASK | RD | CD
_ROOT = b"\0"


class Edns(NamedTuple):
    """A query's OPT record (RFC 6891): UDP payload size, version, and the DO flag (RFC 3225)."""

    size: int
    version: int
    dnssec_ok: bool


class Query(msgspec.Struct, frozen=True):
    """One question. `question` is its octets as sent, `name` the name of it in lower case, in wire form."""

    id: bytes
    flags: int
    question: bytes
    name: bytes
    type: int
    klass: int
    edns: Edns | None

    @property
    def opcode(self) -> int:
        """0 for a standard query."""
        return (self.flags & OPCODE_MASK) >> 11

    @property
    def key(self) -> bytes:
        """Queries with the same key may share an answer: same name in any case, type, class, and flags that matter."""
        edns = 0 if self.edns is None else 2 if self.edns.dnssec_ok else 1
        flags = self.flags & (RD | AD | CD)
        return struct.pack("!HBHH", flags, edns, self.type, self.klass) + self.name

    @property
    def limit(self) -> int:
        """The largest answer by UDP, in octets."""
        return MIN_UDP if self.edns is None else min(max(self.edns.size, MIN_UDP), MAX_UDP)


class Record(msgspec.Struct, frozen=True):
    """One resource record of class IN; `name` in wire form, `ttl` in seconds."""

    name: bytes
    type: int
    ttl: int
    data: bytes


class Response(msgspec.Struct, frozen=True):
    """What a cache and a forwarder need of an answer.

    `ttls` are the offsets of all TTL fields but OPT's. `lifetime` is how long it may be kept, in seconds: the least
    TTL, for a negative answer its SOA's by RFC 2308 section 5, and 0 where it may not be kept.
    """

    id: bytes
    flags: int
    question: bytes
    ttls: tuple[int, ...]
    lifetime: int

    @property
    def rcode(self) -> int:
        """The response code without its extension."""
        return self.flags & 15

    @property
    def truncated(self) -> bool:
        """It is not whole and has to be asked for again by TCP."""
        return bool(self.flags & TC)


def lower(name: bytes) -> bytes:
    """A name, or a whole question, in lower case."""
    return name.lower()


def encode_name(text: str) -> bytes:
    """The wire form, in lower case, of a dotted ASCII name; `Malformed` if a label is empty or anything too long."""
    try:
        octets = text.removesuffix(".").lower().encode("ascii")
    except UnicodeEncodeError as error:
        raise Malformed(f"the domain name {text!r} is not ASCII") from error
    if not octets:
        return _ROOT
    out = bytearray()
    for label in octets.split(b"."):
        if not 0 < len(label) <= 63:
            raise Malformed(f"the domain name {text!r} has a label of {len(label)} octets")
        out.append(len(label))
        out += label
    if len(out) > 254:
        raise Malformed(f"a domain name of {len(out) + 1} octets; 255 is the most")
    return bytes(out) + _ROOT


def labels(name: bytes) -> list[bytes]:
    """The labels of a name in wire form (uncompressed and valid, as all names in a `Query` are)."""
    out, at = [], 0
    while name[at]:
        end = at + 1 + name[at]
        out.append(name[at + 1 : end])
        at = end
    return out


def read_name(data: bytes, at: int) -> tuple[bytes, int]:
    """The name at offset `at`, uncompressed, in its own case, and the offset behind it. `Malformed` if it is torn, too
    long, of an unknown label type, or has a pointer that does not point backwards."""
    out = bytearray()
    behind, floor, end = -1, at, len(data)
    while True:
        if at >= end:
            raise Malformed("a domain name without its end")
        length = data[at]
        if length >= 0xC0:
            if at + 2 > end:
                raise Malformed("half a compression pointer")
            target = (length & 0x3F) << 8 | data[at + 1]
            if target >= floor:
                raise Malformed("a compression pointer that does not point backwards")
            behind = at + 2 if behind < 0 else behind
            at = floor = target
            continue
        if length > 63:
            raise Malformed(f"a label of type {length >> 6}")
        label = data[at : at + 1 + length]
        if len(label) != length + 1:
            raise Malformed("a domain name that is torn")
        out += label
        at += length + 1
        if len(out) > 255:
            raise Malformed("a domain name of more than 255 octets")
        if length == 0:
            return bytes(out), at if behind < 0 else behind


def _skip_name(data: bytes, at: int) -> int:
    """The offset behind the name at `at`, without following its pointer."""
    end = len(data)
    while at < end:
        length = data[at]
        if length == 0:
            return at + 1
        if length >= 0xC0:
            return at + 2
        if length > 63:
            raise Malformed(f"a label of type {length >> 6}")
        at += length + 1
    raise Malformed("a domain name without its end")


def parse_query(data: bytes) -> Query:
    """Read a query of one question. `Malformed` for anything else, also for a second OPT record.

    Records beside the OPT are walked over. A name in the question that is compressed is malformed: there is nothing
    before it that it could point to.
    """
    if len(data) < HEADER:
        raise Malformed(f"a DNS message has {HEADER} octets or more, not {len(data)}")
    _, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    if flags & QR:
        raise Malformed("a response where a query was expected")
    if questions != 1:
        raise Malformed(f"a query with {questions} questions")  # RFC 9619
    name, behind = read_name(data, HEADER)
    question = data[HEADER : behind + 4]
    if len(question) != len(name) + 4:
        raise Malformed("a question that is torn or compressed")
    kind, klass = _QUESTION.unpack_from(data, behind)
    edns, at = None, behind + 4
    for index in range(answers + authorities + additionals):
        owner = at
        at = _skip_name(data, at)
        if at + _RECORD.size > len(data):
            raise Malformed("a record that is torn")
        record, size, ttl, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size + length
        if at > len(data):
            raise Malformed("a record that is longer than its message")
        if record == OPT:
            if edns is not None or data[owner] != 0 or index < answers + authorities:
                raise Malformed("an OPT record that is a second one, in another section, or not the root's")
            edns = Edns(size, ttl >> 16 & 0xFF, bool(ttl & _DO))
    return Query(data[:2], flags, question, name.lower(), kind, klass, edns)


def ask(query: Query, ident: bytes) -> bytes:
    """The query that goes upstream for `query`: its question as it was sent, its flags, `ident` (2 octets) as its id.

    An OPT record goes with it if the client sent one, since the answer has to suit the client, but as our own: options
    such as cookies and the payload size concern one hop only (RFC 6891 section 6.2.6).
    """
    header = _HEADER.pack(0, query.flags & (RD | AD | CD), 1, 0, 0, 1 if query.edns else 0)
    return ident + header[2:] + query.question + (_opt(query.edns, 0) if query.edns else b"")


def _opt(edns: Edns, rcode: int) -> bytes:
    return _ROOT + _RECORD.pack(OPT, MAX_UDP, rcode >> 4 << 24 | (_DO if edns.dnssec_ok else 0), 0)


def build(
    query: Query,
    rcode: int = NOERROR,
    answers: Iterable[Record] = (),
    authority: Iterable[Record] = (),
    *,
    authoritative: bool = False,
    flags: int = 0,
) -> bytes:
    """An answer to `query`. Owner names that equal the question's are written as a pointer to it; others whole."""
    answers, authority = tuple(answers), tuple(authority)
    word = QR | RA | (query.flags & _COPIED) | (AA if authoritative else 0) | flags | (rcode & 15)
    parts = [
        query.id,
        _HEADER.pack(0, word, 1, len(answers), len(authority), 1 if query.edns else 0)[2:],
        query.question,
    ]
    for record in (*answers, *authority):
        parts.append(b"\xc0\x0c" if record.name == query.name else record.name)
        parts.append(_RECORD.pack(record.type, IN, record.ttl, len(record.data)))
        parts.append(record.data)
    if query.edns is not None:
        parts.append(_opt(query.edns, rcode))
    return b"".join(parts)


def refuse(data: bytes, rcode: int) -> bytes | None:
    """A bare header that turns down a message which has not been parsed. None where nothing may be answered: a
    fragment shorter than a header, or a response, since two servers would answer each other for ever."""
    if len(data) < HEADER or data[2] & 0x80:
        return None
    flags = QR | RA | (int.from_bytes(data[2:4], "big") & _COPIED) | rcode
    return data[:2] + _HEADER.pack(0, flags, 0, 0, 0, 0)[2:]


def truncate(message: bytes, query: Query) -> bytes:
    """The answer that says "too long, ask by TCP" (TC) in place of `message`; an EDNS client still gets its OPT."""
    flags = int.from_bytes(message[2:4], "big") | TC
    opt = _opt(query.edns, 0) if query.edns is not None else b""
    return query.id + _HEADER.pack(0, flags, 1, 0, 0, 1 if opt else 0)[2:] + query.question + opt


def soa(mname: bytes, rname: bytes, serial: int, minimum: int) -> bytes:
    """An SOA record's data; the transfer timers are RFC 6303 section 3's, `minimum` is the negative TTL in seconds."""
    return mname + rname + _SOA_NUMBERS.pack(serial & 0xFFFFFFFF, 3600, 1200, 604800, minimum)


def parse_response(data: bytes) -> Response:
    """Walk over an answer of one question. `Malformed` if it is a query, has no or more questions, or is torn.

    A failure may have no question: a server that cannot read a query answers with a bare header.
    """
    if len(data) < HEADER:
        raise Malformed(f"a DNS message has {HEADER} octets or more, not {len(data)}")
    _, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(data)
    if flags & QR and not questions and flags & 15 in FAILURES:
        return Response(data[:2], flags, b"", (), 0)
    if not flags & QR or questions != 1:
        raise Malformed("an answer that is a query, or not to one question")
    name, behind = read_name(data, HEADER)
    question = data[HEADER : behind + 4]
    if len(question) != len(name) + 4:
        raise Malformed("a question that is torn or compressed")
    kind = _QUESTION.unpack_from(data, behind)[0]
    ttls, at, least, negative = [], behind + 4, MAX_TTL, -1
    answered = False
    for index in range(answers + authorities + additionals):
        at = _skip_name(data, at)
        if at + _RECORD.size > len(data):
            raise Malformed("a record that is torn")
        record, _, ttl, length = _RECORD.unpack_from(data, at)
        end = at + _RECORD.size + length
        if end > len(data):
            raise Malformed("a record that is longer than its message")
        if record != OPT:
            ttls.append(at + 4)
            ttl = 0 if ttl > MAX_TTL else ttl
            least = min(least, ttl)
            if index < answers:
                answered = answered or record == kind or kind == ANY
            elif record == SOA and index < answers + authorities and length >= _SOA_NUMBERS.size:
                negative = min(ttl, _SOA_NUMBERS.unpack_from(data, end - _SOA_NUMBERS.size)[4])
        at = end
    rcode = flags & 15
    positive = rcode == NOERROR and answered
    lifetime = 0
    if not flags & TC and rcode in {NOERROR, NXDOMAIN} and ttls:
        # Without an SOA record a negative answer may not be kept (RFC 2308 section 5).
        lifetime = least if positive else min(least, max(negative, 0))
    return Response(data[:2], flags, question, tuple(ttls), lifetime)


def age(message: bytes, ttls: Iterable[int], seconds: int) -> bytes:
    """`message` with each TTL lowered by `seconds`, 0 at the least."""
    if seconds <= 0:
        return message
    out = bytearray(message)
    for at in ttls:
        ttl = int.from_bytes(out[at : at + 4], "big")
        out[at : at + 4] = (0 if ttl > MAX_TTL else max(0, ttl - seconds)).to_bytes(4, "big")
    return bytes(out)
