"""The gateway's DHCPv4 server: RFC 2131's state machine, without I/O.

How it works. `handle()` takes one UDP payload, says what to send and how, and never blocks; time is an argument, so the
same messages at the same times give the same answers. Beside it stand three things: the lease book (who has what), the
pool (who may get what) and the options (what an answer carries).

A DISCOVER is answered from memory at once: nothing is probed and nothing is written. A REQUEST is one of four, told
apart as RFC 2131 table 4 says: with our server identifier it selects our offer; with a requested address it comes from
a rebooted client; with ciaddr it renews or rebinds. An ACK that changed a lease carries `commit`: it must not be sent
before the lease file is stable.

NAK means that the client's address is wrong here: another network's, another client's, or not to be had.
Where the client is simply not known, RFC 2131 section 4.3.2 wants silence, for the sake of other servers on the wire.
There is none on our wire (the firewall drops their answers), and silence costs a guest that comes with an old lease ten
seconds. So an authoritative server, the default, gives such a client the address if it is free.

Malformed messages and those of others are counted and dropped; a port that sends more than its rate is not heard for
the moment. Hardware addresses that no guest may have (a group's, the gateway's) are malformed.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Malformed
from openvmnet.service.buckets import Buckets
from openvmnet.service.dhcp_options import DhcpConfig, Options
from openvmnet.service.dhcp_pool import Client, Pool
from openvmnet.service.leases import Lease
from openvmnet.wire import dhcp4
from openvmnet.wire.dhcp4 import CLIENT_PORT, SERVER_PORT, ZERO, Fqdn, Message
from openvmnet.wire.ethernet import BROADCAST, ZERO_MAC

if TYPE_CHECKING:
    from openvmnet.service.leases import LeaseBook

__all__ = ["DhcpConfig", "DhcpServer", "Reply"]

log = logging.getLogger(__name__)

_EVERYBODY = b"\xff" * 4
_LINK_SELECTION = 5  # sub-option of 82 (RFC 3527)
_MAX_CLIENT_ID = 255  # octets

_KINDS = {
    dhcp4.DISCOVER: "discover",
    dhcp4.REQUEST: "request",
    dhcp4.DECLINE: "decline",
    dhcp4.RELEASE: "release",
    dhcp4.INFORM: "inform",
}
_OUTCOMES = ("offer", "ack", "nak", "bootp", "malformed", "ignored", "limited", "refused", "evicted")


class Reply(msgspec.Struct, frozen=True):
    """One answer. `mac` and `ip` (4 bytes) and UDP `port` are its destination.

    raw: the receiver has no address yet, so send a whole frame; else plain UDP. commit: wait for the lease file.
    """

    mac: bytes
    ip: bytes
    port: int
    payload: bytes
    raw: bool
    commit: bool = False


class DhcpServer:
    """One network's server. `counters` are messages by kind and by outcome; `pool.ports` the ports plugged in."""

    def __init__(self, config: DhcpConfig, leases: LeaseBook) -> None:
        network = IPv4Network((config.gateway, config.prefixlen), strict=False)
        self.config = config
        self.leases = leases
        reserved = {int(config.gateway), int(network.network_address), int(network.broadcast_address)}
        self.pool = Pool(config.first, config.last, frozenset(reserved), leases, config.lease_time)
        self.counters = dict.fromkeys([*_KINDS.values(), *_OUTCOMES], 0)
        leases.restrict(self.pool.__contains__)
        self._gateway = config.gateway.packed
        self._net, self._mask = int(network.network_address), int(network.netmask)
        self._options = Options(config)
        self._buckets = Buckets(config.rate, config.rate)
        self._declined = False

    # The ports.

    def port_added(self, port: int) -> None:
        """A port exists from now on; the pool is shared between those that exist. A port's id is its packets' mark."""
        self.pool.ports.add(port)

    def reserve(self, address: IPv4Address, mac: bytes, port: int) -> None:
        """Keep an address of the pool for `mac` on `port` as long as the port is there; who leases it, does no more."""
        self.pool.reservations.add(int(address), mac, port)
        holder = self.leases.by_ip(address)
        if holder is not None and holder.port != port:
            self.leases.forget(holder)

    def port_gone(self, port: int) -> None:
        """A port is gone: its leases end (the addresses stay remembered), its offers and conflicts are void."""
        self.leases.release_port(port)
        self.pool.port_gone(port)
        self._buckets.forget(port)

    def seen_arp(self, ip: bytes, mac: bytes, *, port: int | None = None, now: float) -> None:
        """ARP says that `mac` uses `ip` (4 bytes): nobody else is offered it for the time of a lease."""
        if ip != self._gateway and mac != self.config.gateway_mac:
            self.pool.seen(int.from_bytes(ip, "big"), mac, port, now)

    # The messages.

    def handle(self, payload: bytes, *, source_mac: bytes | None, port: int | None, now: float) -> Reply | None:
        """Take one message (UDP payload) that came in through `port` at `now`, seconds since the epoch.

        `source_mac` is the frame's source, where known: it replaces a hardware address that is not Ethernet's.
        """
        if not self._buckets.take(port, now):
            self.counters["limited"] += 1
            return None
        self.leases.sweep(now)
        try:
            return self._dispatch(dhcp4.parse(payload), source_mac, port, now)
        except Malformed as error:
            self.counters["malformed"] += 1
            log.debug("a malformed DHCP message on port %s: %s", port, error)
            return None

    def _dispatch(self, message: Message, source_mac: bytes | None, port: int | None, now: float) -> Reply | None:
        kind = message.type()
        if kind is None or message.op != dhcp4.BOOTREQUEST:
            self.counters["bootp" if kind is None else "ignored"] += 1
            return None
        if kind not in _KINDS or not self._is_local(message):
            self.counters["ignored"] += 1
            return None
        self.counters[_KINDS[kind]] += 1
        if kind == dhcp4.INFORM:
            return self._inform(message)
        client = self._client(message, source_mac, port)
        lease = self.leases.find(*client, now)
        if kind == dhcp4.DISCOVER:
            return self._discover(message, client, lease, now)
        if kind == dhcp4.REQUEST:
            return self._request(message, client, lease, now)
        if message.address(dhcp4.SERVER_ID) not in {None, self._gateway}:
            self.counters["ignored"] += 1
        elif kind == dhcp4.DECLINE:
            self._decline(message, client, lease, now)
        elif lease is not None and lease.ip.packed == message.ciaddr:
            self.leases.end(lease, now)
        return None

    def _discover(self, message: Message, client: Client, lease: Lease | None, now: float) -> Reply | None:
        asked = message.address(dhcp4.REQUESTED_ADDRESS)
        address = self.pool.choose(client, lease, None if asked is None else int.from_bytes(asked, "big"), now)
        if address is None:
            self.counters["refused"] += 1
            return None
        if dhcp4.RAPID_COMMIT in message.options:
            return self._ack(message, client, lease, address, now)
        self.pool.reserve(address, client, now)
        self.counters["offer"] += 1
        reply = dhcp4.reply_to(message, dhcp4.OFFER)
        reply.yiaddr = address.to_bytes(4, "big")
        wanted, fqdn = _wanted_name(message)
        name = self.leases.free_name(wanted, lease.hostname if lease else "", now, lease)
        seconds = self._options.lease_time(message)
        payload = self._options.answer(message, reply, lease_time=seconds, name=name, fqdn=fqdn)
        return self._address(message, reply, payload)

    def _request(self, message: Message, client: Client, lease: Lease | None, now: float) -> Reply | None:
        server = message.address(dhcp4.SERVER_ID)
        if server is not None and server != self._gateway:
            # Another server was selected: the offer is not wanted.
            self.pool.withdraw(client)
            return None
        selecting = server is not None
        wanted = message.address(dhcp4.REQUESTED_ADDRESS)
        if wanted is None or (message.ciaddr != ZERO and not selecting):
            wanted = message.ciaddr
        if wanted == ZERO:
            raise Malformed("a DHCPREQUEST that names no address")
        address = int.from_bytes(wanted, "big")
        if address & self._mask != self._net:
            return self._nak(message, "the address is not of this network")
        if self.pool.available(address, client, lease, now):
            return self._ack(message, client, lease, address, now)
        if lease is None and not selecting and not self.config.authoritative:
            self.counters["ignored"] += 1
            return None
        if lease is None and self.pool.may_grant(address, client, now):
            return self._ack(message, client, lease, address, now)
        self.pool.withdraw(client)
        kept = self.pool.reservations.of(client)
        return self._nak(message, "the address is not available" if kept is None else "another one is kept for you")

    def _ack(self, message: Message, client: Client, lease: Lease | None, address: int, now: float) -> Reply:
        holder = self.leases.at(address)
        if holder is not None and holder is not lease and holder.mac != client.mac and holder.expires > now:
            self.counters["evicted"] += 1
        current = ""
        if lease is not None:
            current = lease.hostname
            self.leases.forget(lease)
        wanted, fqdn = _wanted_name(message)
        seconds = self._options.lease_time(message)
        granted = Lease(*client[:2], IPv4Address(address), current, int(now) + seconds, client.port)
        self.leases.grant(granted, wanted, now)
        self.pool.withdraw(client)
        self.pool.leased(client.mac)
        self.counters["ack"] += 1
        reply = dhcp4.reply_to(message, dhcp4.ACK)
        reply.yiaddr = address.to_bytes(4, "big")
        reply.ciaddr = message.ciaddr
        if dhcp4.RAPID_COMMIT in message.options and message.type() == dhcp4.DISCOVER:
            reply.options[dhcp4.RAPID_COMMIT] = b""
        payload = self._options.answer(message, reply, lease_time=seconds, name=granted.hostname, fqdn=fqdn)
        return self._address(message, reply, payload, commit=True)

    def _nak(self, message: Message, why: str) -> Reply:
        self.counters["nak"] += 1
        reply = dhcp4.reply_to(message, dhcp4.NAK)
        # The client may have no usable address: broadcast, the relay's part of the way too (RFC 2131 section 4.3.2).
        reply.flags |= dhcp4.BROADCAST_FLAG
        return self._address(message, reply, self._options.refuse(message, reply, why))

    def _inform(self, message: Message) -> Reply | None:
        address = int.from_bytes(message.ciaddr, "big")
        if address & self._mask != self._net or message.ciaddr == self._gateway:
            self.counters["ignored"] += 1
            return None
        self.counters["ack"] += 1
        reply = dhcp4.reply_to(message, dhcp4.ACK)
        reply.ciaddr = message.ciaddr
        payload = self._options.answer(message, reply, lease_time=None, name="", fqdn=None)
        if message.giaddr != ZERO:
            return self._address(message, reply, payload)
        return Reply(_hardware(message), message.ciaddr, CLIENT_PORT, payload, raw=False)

    def _decline(self, message: Message, client: Client, lease: Lease | None, now: float) -> None:
        address = int.from_bytes(message.address(dhcp4.REQUESTED_ADDRESS) or message.ciaddr, "big")
        if lease is None or int(lease.ip) != address:
            # Not this client's to decline.
            self.counters["ignored"] += 1
            return
        self.leases.forget(lease)
        self.pool.withdraw(client)
        self.pool.decline(address, client, now)
        if not self._declined:
            self._declined = True
            log.warning(
                "%s is used by somebody who did not lease it, says a guest; further such reports are only counted",
                lease.ip,
            )

    # Who, and where to.

    def _client(self, message: Message, source_mac: bytes | None, port: int | None) -> Client:
        mac = message.chaddr
        identifier = message.options.get(dhcp4.CLIENT_ID, b"")
        if len(identifier) > _MAX_CLIENT_ID:
            raise Malformed(f"a client identifier of {len(identifier)} octets")
        if identifier == bytes([message.htype]) + mac:
            # The hardware address once more (RFC 2132 section 9.14): says nothing new.
            identifier = b""
        if message.htype != dhcp4.ETHERNET or len(mac) != 6:
            mac = source_mac or mac
        if (len(mac) == 6 and mac[0] & 1) or mac in {ZERO_MAC, self.config.gateway_mac}:
            raise Malformed(f"{mac.hex(':')} is no guest's hardware address")
        if not mac and not identifier:
            raise Malformed("neither a hardware address nor a client identifier")
        return Client(mac, identifier, port)

    def _is_local(self, message: Message) -> bool:
        """The client is on this network: directly, or behind a relay that stands on it."""
        if message.giaddr == ZERO:
            return True
        if message.giaddr == self._gateway or int.from_bytes(message.giaddr, "big") & self._mask != self._net:
            return False
        link = _suboption(message.options.get(dhcp4.RELAY_AGENT, b""), _LINK_SELECTION)
        return link is None or int.from_bytes(link, "big") & self._mask == self._net

    def _address(self, message: Message, reply: Message, payload: bytes, *, commit: bool = False) -> Reply:
        """Where an answer goes: RFC 2131 section 4.1, the paragraphs on giaddr, ciaddr and the broadcast flag."""
        if message.giaddr != ZERO:
            return Reply(BROADCAST, message.giaddr, SERVER_PORT, payload, raw=False, commit=commit)
        if reply.yiaddr != ZERO and message.ciaddr == reply.yiaddr:
            return Reply(_hardware(message), message.ciaddr, CLIENT_PORT, payload, raw=False, commit=commit)
        mac = _hardware(message)
        if reply.broadcast or mac == BROADCAST:
            return Reply(BROADCAST, _EVERYBODY, CLIENT_PORT, payload, raw=True, commit=commit)
        return Reply(mac, reply.yiaddr, CLIENT_PORT, payload, raw=True, commit=commit)


def _hardware(message: Message) -> bytes:
    """The MAC to send to; everybody's, where the client's hardware is not Ethernet."""
    return message.chaddr if message.htype == dhcp4.ETHERNET and len(message.chaddr) == 6 else BROADCAST


def _wanted_name(message: Message) -> tuple[str, Fqdn | None]:
    """What the client calls itself, and its option 81, which comes before option 12 (RFC 4702 section 4).

    A client that asks for no DNS updates (N) gets no name; a torn option 81 counts as absent.
    """
    name = message.options.get(dhcp4.HOST_NAME, b"").decode("ascii", "replace")
    fqdn = None
    if dhcp4.CLIENT_FQDN in message.options:
        try:
            fqdn = dhcp4.decode_fqdn(message.options[dhcp4.CLIENT_FQDN])
        except Malformed as error:
            log.debug("option 81 is ignored: %s", error)
    if fqdn is not None:
        name = "" if fqdn.no_updates else fqdn.name or name
    return name, fqdn


def _suboption(value: bytes, code: int) -> bytes | None:
    """One sub-option of option 82; None if it is absent or the option is torn."""
    at = 0
    while at + 2 <= len(value):
        end = at + 2 + value[at + 1]
        if end > len(value):
            return None
        if value[at] == code:
            return value[at + 2 : end]
        at = end
    return None
