"""The names that are answered here and asked of nobody else.

Three kinds:

- The network's own: `NAME.vmnet.internal` for each guest with a DHCP host name, `gateway.vmnet.internal`, and for the
  addresses of the network's subnet and IPv6 prefix the names back. What does not exist there does not exist at all.
- Private addresses backwards (RFC 6303, RFC 7793). Who owns 10.1.2.3 is nobody's business outside, and nobody outside
  knows: the answer is NXDOMAIN, as if each of these zones were served here, empty.
- Names that the DNS does not resolve (RFC 6761, 6762, 7686, 9462, 9476): `localhost` is the guest itself, `local`,
  `onion`, `alt` and `invalid` do not exist, `resolver.arpa` holds nothing. `test`, `home.arpa` and the rest of
  `internal` go to the host's resolvers: networks use them, and a guest shall see what the host sees.

Each such answer carries the SOA record of its zone, which bounds how long a guest may remember that there was nothing
(RFC 2308). In the network's own zones that is short, because the guest that was asked for may be starting just now.

A zone is found by looking up the name's endings, longest first, in a dict. Inside a reverse zone, a name that is only
part of an address exists, and holds nothing, if there is something below it (RFC 8020): otherwise a guest's resolver
could conclude from it that none of its neighbours has a name.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec

from openvmnet.wire import dns
from openvmnet.wire.dns import NOERROR, NXDOMAIN, Query, Record, encode_name

TTL = 10  # s, of the network's own names; an address may pass to another guest
NEGATIVE_TTL = 2  # s, in the network's own zones
_FIXED_TTL = 3600  # s, where nothing will ever be

_PRIVATE = (
    # RFC 6303 section 4.2, and RFC 7793 for 100.64/10.
    "10.in-addr.arpa",
    *(f"{octet}.172.in-addr.arpa" for octet in range(16, 32)),
    "168.192.in-addr.arpa",
    "0.in-addr.arpa",
    "127.in-addr.arpa",
    "254.169.in-addr.arpa",
    "2.0.192.in-addr.arpa",
    "100.51.198.in-addr.arpa",
    "113.0.203.in-addr.arpa",
    "255.255.255.255.in-addr.arpa",
    *(f"{octet}.100.in-addr.arpa" for octet in range(64, 128)),
    # RFC 6303 sections 4.3 to 4.6: unspecified, loopback, unique local (and its unassigned half), link local, examples.
    "0." * 32 + "ip6.arpa",
    "1." + "0." * 31 + "ip6.arpa",
    "d.f.ip6.arpa",
    "c.f.ip6.arpa",
    *(f"{nibble}.e.f.ip6.arpa" for nibble in "89ab"),
    "8.b.d.0.1.0.0.2.ip6.arpa",
)
_ABSENT = ("local", "onion", "alt", "invalid")
_LOCALHOST = encode_name("localhost")
_RESOLVER = encode_name("resolver.arpa")
_LOOPBACKS = {
    encode_name("1.0.0.127.in-addr.arpa"),
    encode_name("1." + "0." * 31 + "ip6.arpa"),
}
_IN_ADDR = encode_name("in-addr.arpa")
_NIBBLES = b"0123456789abcdef"


class Answer(msgspec.Struct, frozen=True):
    """What a zone says: `records` answer the question, `soa` stands for "no more than this"."""

    rcode: int
    records: tuple[Record, ...]
    soa: Record | None


class Names(msgspec.Struct, frozen=True):
    """The IPv6 side of a network: `prefix` is a /64, `forward` and `reverse` as a zone's."""

    prefix: IPv6Network
    gateway: IPv6Address
    forward: Callable[[str], list[IPv6Address]]
    reverse: Callable[[IPv6Address], str | None]


class Zone:
    """All that is answered here.

    `forward` gives the address of a guest by its host name (one label, lower case), `reverse` the host name of an
    address (with or without the domain), `generation` a number that differs once either may say something else.
    """

    def __init__(
        self,
        *,
        domain: str,
        subnet: IPv4Network,
        gateway: IPv4Address,
        forward: Callable[[str], IPv4Address | None],
        reverse: Callable[[IPv4Address], str | None],
        generation: Callable[[], int] = lambda: 0,
        ip6: Names | None = None,
    ) -> None:
        self.domain = domain
        self.generation = generation
        self._subnet = subnet
        self._gateway = gateway
        self._forward = forward
        self._reverse = reverse
        self._domain = encode_name(domain)
        self._gateway_name = encode_name(f"gateway.{domain}")
        self._fixed = {encode_name(name) for name in (*_PRIVATE, *_ABSENT)} | {_LOCALHOST, _RESOLVER}
        self._apexes = self._fixed | {self._domain}
        # The subnet's own reverse zones, at octet boundaries: they answer for a while shorter than the private ones.
        boundary = min(24, -(-subnet.prefixlen // 8) * 8)
        zones = (
            subnet.subnets(new_prefix=boundary)
            if boundary > subnet.prefixlen
            else (subnet.supernet(new_prefix=boundary),)
        )
        for zone in zones:
            octets = str(zone.network_address).split(".")[: boundary // 8]
            self._apexes.add(encode_name(".".join((*reversed(octets), "in-addr.arpa"))))
        self._ip6 = ip6
        self._apex6 = b""
        if ip6 is not None:
            nibbles = ip6.prefix.network_address.packed[:8].hex()
            self._apex6 = encode_name(".".join((*reversed(nibbles), "ip6.arpa")))
            self._apexes.add(self._apex6)

    def answer(self, query: Query) -> Answer | None:
        """The answer to a query of class IN; None for a name that is not ours to answer."""
        apex = self._apex(query.name)
        if apex is None:
            return None
        if query.name == apex and query.type in {dns.SOA, dns.NS, dns.ANY}:
            record = Record(apex, dns.NS, TTL, self._gateway_name) if query.type == dns.NS else self._soa(apex)
            return Answer(NOERROR, (record,), None)
        if apex == self._domain:
            return self._own(query, apex)
        if apex == _LOCALHOST:
            return self._localhost(query, apex)
        if apex == _RESOLVER:
            return self._nothing(NOERROR, apex, volatile=False)  # RFC 9462 section 6.4
        if query.name.endswith(_IN_ADDR):
            return self._backwards(query, apex)
        return self._elsewhere(query, apex)

    def respond(self, query: Query) -> bytes | None:
        """As `answer`, in octets."""
        answer = self.answer(query)
        if answer is None:
            return None
        authority = () if answer.soa is None else (answer.soa,)
        return dns.build(query, answer.rcode, answer.records, authority, authoritative=True)

    def _apex(self, name: bytes) -> bytes | None:
        """The longest zone of ours that `name` is in; it is either the apex itself or ends with it at a label."""
        apexes, at = self._apexes, 0
        while name[at]:
            if at == 0 and name in apexes:
                return name
            if at and name[at:] in apexes:
                return name[at:]
            at += 1 + name[at]
        return None

    def _own(self, query: Query, apex: bytes) -> Answer:
        if query.name == apex:
            return self._nothing(NOERROR, apex, volatile=True)
        address: IPv4Address | None = None
        addresses6: list[IPv6Address] = []
        if query.name == self._gateway_name:
            address = self._gateway
            addresses6 = [self._ip6.gateway] if self._ip6 is not None else []
        else:
            label, *rest = dns.labels(query.name[: len(query.name) - len(apex)] + b"\0")
            # Octets beyond ASCII, and a dot inside a label, are in no host name.
            if not rest and b"." not in label and label.isascii():
                address = self._forward(label.decode("ascii"))
                addresses6 = self._ip6.forward(label.decode("ascii")) if self._ip6 is not None else []
        data = {dns.A: [address.packed] if address is not None else [], dns.AAAA: [one.packed for one in addresses6]}
        if not any(data.values()):
            return self._nothing(NXDOMAIN, apex, volatile=True)
        kinds = data if query.type == dns.ANY else data.keys() & {query.type}
        records = tuple(Record(query.name, kind, TTL, one) for kind in kinds for one in data[kind])
        return Answer(NOERROR, records, None) if records else self._nothing(NOERROR, apex, volatile=True)

    def _localhost(self, query: Query, apex: bytes) -> Answer:
        address = {dns.A: IPv4Address("127.0.0.1").packed, dns.AAAA: bytes(15) + b"\1"}.get(query.type)
        if address is None:
            return self._nothing(NOERROR, apex, volatile=False)
        return Answer(NOERROR, (Record(query.name, query.type, _FIXED_TTL, address),), None)

    def _backwards(self, query: Query, apex: bytes) -> Answer:
        """A name in a reverse zone: of an address, or of the addresses that begin alike."""
        labels = dns.labels(query.name)[:-2]
        octets = [int(label) for label in reversed(labels) if label.isdigit() and len(label) <= 3 and int(label) < 256]
        if len(octets) != len(labels) or not 0 < len(octets) <= 4 or any(len(x) > 1 and x[0] == 0x30 for x in labels):
            return self._nothing(NXDOMAIN, apex, volatile=False)
        prefix = IPv4Network((bytes(octets).ljust(4, b"\0"), len(octets) * 8))
        if len(octets) < 4:
            exists = prefix.overlaps(self._subnet) or query.name == apex
            return self._nothing(NOERROR if exists else NXDOMAIN, apex, volatile=False)
        if query.name in _LOOPBACKS:
            return self._some(query, apex, dns.PTR, [_LOCALHOST], volatile=False)
        address = prefix.network_address
        if address not in self._subnet:
            return self._some(query, apex, dns.PTR, [], volatile=False)
        name = "gateway" if address == self._gateway else self._reverse(address)
        if not name:
            return self._nothing(NXDOMAIN, apex, volatile=True)
        full = name if name.rstrip(".").endswith(f".{self.domain}") else f"{name}.{self.domain}"
        return self._some(query, apex, dns.PTR, [encode_name(full)], volatile=True)

    def _elsewhere(self, query: Query, apex: bytes) -> Answer:
        """In IPv6's reverse zones, and in those that are empty."""
        if self._ip6 is not None and apex == self._apex6:
            return self._backwards6(query, apex, self._ip6)
        if query.name != apex and self._apex6.endswith(query.name):
            return self._nothing(NOERROR, apex, volatile=False)  # there is something below it
        return self._some(query, apex, dns.PTR, [_LOCALHOST] if query.name in _LOOPBACKS else [], volatile=False)

    def _backwards6(self, query: Query, apex: bytes, ip6: Names) -> Answer:
        """As `_backwards`, in the zone of the prefix: nibbles, of which an address has sixteen more."""
        labels = dns.labels(query.name[: len(query.name) - len(apex)] + b"\0")
        nibbles = b"".join(reversed(labels)).lower()
        if any(len(label) != 1 for label in labels) or len(labels) > 16 or nibbles.strip(_NIBBLES):
            return self._nothing(NXDOMAIN, apex, volatile=True)
        if len(labels) < 16:
            return self._nothing(NOERROR, apex, volatile=True)  # some guest's address may begin so
        address = ip6.prefix[int(nibbles, 16)]
        name = "gateway" if address == ip6.gateway else ip6.reverse(address)
        if not name:
            return self._nothing(NXDOMAIN, apex, volatile=True)
        return self._some(query, apex, dns.PTR, [encode_name(f"{name}.{self.domain}")], volatile=True)

    def _some(self, query: Query, apex: bytes, kind: int, data: list[bytes], *, volatile: bool) -> Answer:
        """A name whose records are of one type: them, or nothing of another type, or no such name."""
        if not data:
            return self._nothing(NOERROR if query.name == apex else NXDOMAIN, apex, volatile=volatile)
        if query.type not in {kind, dns.ANY}:
            return self._nothing(NOERROR, apex, volatile=volatile)
        return Answer(NOERROR, tuple(Record(query.name, kind, TTL, one) for one in data), None)

    def _nothing(self, rcode: int, apex: bytes, *, volatile: bool) -> Answer:
        return Answer(rcode, (), self._soa(apex, NEGATIVE_TTL if volatile else None))

    def _soa(self, apex: bytes, ttl: int | None = None) -> Record:
        seconds = ttl if ttl is not None else NEGATIVE_TTL if apex not in self._fixed else _FIXED_TTL
        # RFC 6303 section 3: an empty zone's mailbox is nobody.invalid.
        return Record(apex, dns.SOA, seconds, dns.soa(self._gateway_name, encode_name("nobody.invalid"), 1, seconds))
