"""The gateway's DHCPv6 server: RFC 8415 section 18.3 without I/O, stateful and stateless.

How it works. `handle()` takes one UDP payload and gives the answer, or nothing; time is an argument. A SOLICIT is
answered from memory, with preference 255, so that the client asks no further servers and waits for none; the address it
is offered follows from who it is, so no offer has to be kept. REQUEST, RENEW, REBIND and a SOLICIT with rapid commit
write the lease, and their answers carry `commit`: they leave when the lease file is stable.

This is the network's only server, the firewall sees to that. So it may answer where RFC 8415 leaves it to servers that
may be one of several: a client that renews or rebinds what the book does not know gets it, if nobody else has it.
Messages to the gateway's own address are served like those to the group; nothing on one link could go wrong by it.

Prefixes (IA_PD) are not delegated, and temporary addresses (IA_TA) not given: what a client asks of these is refused or
passed over, and it gets its address all the same. Relays' messages are counted and ignored: there are none on one link.
"""

from __future__ import annotations

import logging
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Malformed
from openvmnet.service.buckets import Buckets
from openvmnet.service.leases import sanitise
from openvmnet.service.leases6 import Client
from openvmnet.wire import dhcp6, icmp6
from openvmnet.wire.dhcp6 import Address, Fqdn, Ia, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.service.leases6 import LeaseBook6

log = logging.getLogger(__name__)

_KINDS = {
    dhcp6.SOLICIT: "solicit",
    dhcp6.REQUEST: "request",
    dhcp6.CONFIRM: "confirm",
    dhcp6.RENEW: "renew",
    dhcp6.REBIND: "rebind",
    dhcp6.RELEASE: "release",
    dhcp6.DECLINE: "decline",
    dhcp6.INFORMATION_REQUEST: "information",
}
_OUTCOMES = ("advertise", "reply", "malformed", "ignored", "limited", "refused")
# Section 16: messages in which the server's identifier has to be, and those in which it must not be.
_OURS = {dhcp6.REQUEST, dhcp6.RENEW, dhcp6.RELEASE, dhcp6.DECLINE}
_NOBODYS = {dhcp6.SOLICIT, dhcp6.CONFIRM, dhcp6.REBIND}
_MAX_IAS = 8  # of one message
_RATE = 200.0  # messages a second and port
_LINK_LOCAL = b"\xfe\x80" + bytes(6)


class Dhcp6Config(msgspec.Struct, frozen=True):
    """One network's DHCPv6; times in seconds. `mac` is the gateway's, of which its DUID is made."""

    prefix: IPv6Network
    mac: bytes
    dns: tuple[IPv6Address, ...]
    domain: str = "vmnet.internal"
    lease_time: int = 86400
    refresh_time: int = 86400

    @property
    def pool(self) -> tuple[IPv6Address, IPv6Address]:
        """First and last address that is leased: PREFIX::1:0 to PREFIX::1:ffff, apart from whatever ends in its own."""
        return self.prefix[0x10000], self.prefix[0x1FFFF]


class Reply6(msgspec.Struct, frozen=True):
    """One answer, to port 546 of who asked. commit: it waits for the lease file."""

    payload: bytes
    commit: bool = False


class Dhcp6Server:
    """One network's server. `mac_of` gives the MAC of a port's VM, b"" where it is not known."""

    def __init__(
        self, config: Dhcp6Config, leases: LeaseBook6, mac_of: Callable[[int], bytes] = lambda _port: b""
    ) -> None:
        self.config = config
        self.leases = leases
        self.counters = dict.fromkeys([*_KINDS.values(), *_OUTCOMES], 0)
        self._duid = dhcp6.duid_ll(config.mac)
        self._mac_of = mac_of
        self._buckets = Buckets(_RATE, _RATE)
        self._values = {
            dhcp6.DNS_SERVERS: b"".join(address.packed for address in config.dns),
            dhcp6.DOMAIN_LIST: icmp6.encode_domain(config.domain),
        }

    def port_added(self, port: int) -> None:
        """A port exists from now on; the book is shared between those that exist."""
        self.leases.ports.add(port)

    def port_gone(self, port: int) -> None:
        """A port is gone: its leases end, the addresses stay remembered."""
        self.leases.release_port(port)
        self._buckets.forget(port)

    def handle(self, payload: bytes, *, source: bytes, port: int | None, now: float) -> Reply6 | None:
        """Take one message that came from address `source` (16 bytes) through `port` at `now` (since the epoch)."""
        if not self._buckets.take(port, now):
            self.counters["limited"] += 1
            return None
        self.leases.sweep(now)
        try:
            return self._dispatch(dhcp6.parse(payload), source, port, now)
        except Malformed as error:
            self.counters["malformed"] += 1
            log.debug("a malformed DHCPv6 message on port %s: %s", port, error)
            return None

    def _dispatch(self, message: Message, source: bytes, port: int | None, now: float) -> Reply6 | None:
        duid, server = message.duid(dhcp6.CLIENT_ID), message.duid(dhcp6.SERVER_ID)
        kind = message.type
        if kind not in _KINDS or (kind in _NOBODYS and server is not None) or server not in {None, self._duid}:
            self.counters["ignored"] += 1
            return None
        if kind == dhcp6.INFORMATION_REQUEST:
            if message.get(dhcp6.IA_NA) is not None or message.get(dhcp6.IA_PD) is not None:
                raise Malformed("an information request for addresses (RFC 8415 section 16.12)")
            self.counters["information"] += 1
            return self._reply(message, [])
        if duid is None or (kind in _OURS and server is None):
            raise Malformed(f"DHCPv6 message {kind} without the identifiers that it has to have")
        self.counters[_KINDS[kind]] += 1
        mac = self._mac(duid, source, port)
        ias = message.ias()[:_MAX_IAS]
        clients = [(Client(duid, ia.iaid, mac, port), ia) for ia in ias]
        if kind == dhcp6.CONFIRM:
            return self._confirm(message, ias)
        if kind in {dhcp6.RELEASE, dhcp6.DECLINE}:
            return self._give_back(message, clients, now)
        if kind == dhcp6.SOLICIT and message.get(dhcp6.RAPID_COMMIT) is None:
            return self._advertise(message, clients, now)
        answers = [self._lease(message, client, ia, now) for client, ia in clients]
        return self._reply(message, answers, commit=any(one.addresses for one in answers))

    def _advertise(self, message: Message, clients: list[tuple[Client, Ia]], now: float) -> Reply6:
        answers = []
        for client, ia in clients:
            address = self.leases.choose(client, _wanted(ia), now)
            answers.append(self._refusal(ia) if address is None else self._granted(ia, address))
        self.counters["advertise"] += 1
        answer = self._begin(message, dhcp6.ADVERTISE)
        if clients and not any(one.addresses for one in answers):
            # Section 18.3.9: the status stands outside, where a client has nothing else to gain.
            answer.options.append((dhcp6.STATUS_CODE, dhcp6.encode_status(dhcp6.NO_ADDRS_AVAIL, "no address is left")))
        else:
            answer.options.append((dhcp6.PREFERENCE, b"\xff"))
        return self._finish(message, answer, answers, commit=False)

    def _lease(self, message: Message, client: Client, ia: Ia, now: float) -> Ia:
        """What a REQUEST, RENEW, REBIND or quick SOLICIT gets for one association, written into the book."""
        address = self.leases.choose(client, _wanted(ia), now)
        if address is None:
            return self._refusal(ia)
        name = _name(message)
        before = self.leases.find(client)
        if not name and before is not None and message.fqdn() is None:
            name = before.hostname
        self.leases.grant(client, address, name, int(now) + self.config.lease_time, now)
        return self._granted(ia, address)

    def _granted(self, ia: Ia, address: int) -> Ia:
        """The address, and lifetimes of zero for each other one that the client has (section 18.3.4)."""
        seconds = self.config.lease_time
        packed = address.to_bytes(16, "big")
        others = {one.address for one in ia.addresses} - {packed}
        given = (Address(packed, seconds, seconds), *(Address(other, 0, 0) for other in sorted(others)[:_MAX_IAS]))
        return Ia(ia.iaid, seconds // 2, seconds * 4 // 5, given)

    def _refusal(self, ia: Ia) -> Ia:
        self.counters["refused"] += 1
        return Ia(ia.iaid, status=(dhcp6.NO_ADDRS_AVAIL, "no address is left"))

    def _confirm(self, message: Message, ias: list[Ia]) -> Reply6 | None:
        addresses = [one.address for ia in ias for one in ia.addresses]
        if not addresses:
            self.counters["ignored"] += 1
            return None
        here = all(IPv6Address(address) in self.config.prefix for address in addresses)
        status = (dhcp6.SUCCESS, "") if here else (dhcp6.NOT_ON_LINK, "not an address of this network")
        return self._reply(message, [], status=status)

    def _give_back(self, message: Message, clients: list[tuple[Client, Ia]], now: float) -> Reply6:
        answers = []
        for client, ia in clients:
            lease = self.leases.find(client)
            if lease is None or lease.ip.packed not in {one.address for one in ia.addresses}:
                answers.append(Ia(ia.iaid, status=(dhcp6.NO_BINDING, "no such lease")))
            elif message.type == dhcp6.RELEASE:
                self.leases.end(lease, now)
            else:
                self.leases.decline(lease, now)
        return self._reply(message, answers, status=(dhcp6.SUCCESS, ""))

    def _reply(
        self, message: Message, answers: list[Ia], *, status: tuple[int, str] | None = None, commit: bool = False
    ) -> Reply6:
        self.counters["reply"] += 1
        answer = self._begin(message, dhcp6.REPLY)
        if status is not None:
            answer.options.append((dhcp6.STATUS_CODE, dhcp6.encode_status(*status)))
        if message.type == dhcp6.SOLICIT:
            answer.options.append((dhcp6.RAPID_COMMIT, b""))
        return self._finish(message, answer, answers, commit=commit)

    def _begin(self, message: Message, kind: int) -> Message:
        answer = Message(kind, message.transaction)
        client = message.get(dhcp6.CLIENT_ID)
        if client is not None:
            answer.options.append((dhcp6.CLIENT_ID, client))
        answer.options.append((dhcp6.SERVER_ID, self._duid))
        return answer

    def _finish(self, message: Message, answer: Message, answers: list[Ia], *, commit: bool) -> Reply6:
        options = answer.options
        options += [(dhcp6.IA_NA, dhcp6.encode_ia(ia)) for ia in answers]
        if message.type in {dhcp6.SOLICIT, dhcp6.REQUEST, dhcp6.RENEW, dhcp6.REBIND}:
            for ia in message.ias(dhcp6.IA_PD)[:_MAX_IAS]:
                refused = Ia(ia.iaid, status=(dhcp6.NO_PREFIX_AVAIL, "no prefixes are delegated"))
                options.append((dhcp6.IA_PD, dhcp6.encode_ia(refused)))
        wanted = message.requested()
        options += [(code, value) for code, value in self._values.items() if wanted is None or code in wanted]
        if message.type == dhcp6.INFORMATION_REQUEST:  # section 21.23
            options.append((dhcp6.INFORMATION_REFRESH_TIME, self.config.refresh_time.to_bytes(4, "big")))
        asked = message.fqdn()
        if asked is not None and answers:
            options.append((dhcp6.CLIENT_FQDN, self._fqdn(asked)))
        return Reply6(dhcp6.build(answer), commit)

    def _fqdn(self, asked: Fqdn) -> bytes:
        """The answer to the FQDN option: names are ours to write, unless the client wants none (RFC 4704 section 6)."""
        label = _label(asked)
        if asked.no_updates or not label:
            return dhcp6.encode_fqdn(Fqdn("", no_updates=asked.no_updates))
        full = f"{label}.{self.config.domain}."
        return dhcp6.encode_fqdn(Fqdn(full, server_updates=True, overridden=not asked.server_updates))

    def _mac(self, duid: bytes, source: bytes, port: int | None) -> bytes:
        """The MAC of who asks: its port's, else what its link-local address or its DUID tells."""
        mac = self._mac_of(port) if port is not None else b""
        return mac or interface_mac(source) or dhcp6.duid_mac(duid) or b""


def interface_mac(address: bytes) -> bytes | None:
    """The MAC that an address of modified EUI-64 (RFC 4291 appendix A) was made of; None for another address."""
    if address[11:13] != b"\xff\xfe" or address[:8] != _LINK_LOCAL:
        return None
    return bytes([address[8] ^ 2]) + address[9:11] + address[13:]


def _wanted(ia: Ia) -> int | None:
    return int.from_bytes(ia.addresses[0].address, "big") if ia.addresses else None


def _name(message: Message) -> str:
    asked = message.fqdn()
    return _label(asked) if asked is not None and not asked.no_updates else ""


def _label(asked: Fqdn) -> str:
    return sanitise(asked.name)
