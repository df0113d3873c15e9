"""What a DHCP answer carries: the configured options, in the order asked for, within the size that the client accepts.

An answer begins with what a client cannot do without, then follows the client's parameter request list (RFC 2131
section 4.3.1, RFC 2132 section 9.8); a client without a list gets everything. If that does not fit into the client's
size, not even with the `file` and `sname` fields (dhcp4.build), it is laid out again by importance, and the least
important is left out.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Malformed
from openvmnet.wire import dhcp4
from openvmnet.wire.dhcp4 import Fqdn, Message

if TYPE_CHECKING:
    from collections.abc import Iterable

_HEADERS = 28  # IPv4 and UDP: option 57 counts them (RFC 2132 section 9.10), a message's limit does not
_ETHERNET_MTU = 1500

_IMPORTANCE = {
    code: place
    for place, code in enumerate(
        (
            dhcp4.MESSAGE_TYPE,
            dhcp4.SERVER_ID,
            dhcp4.LEASE_TIME,
            dhcp4.SUBNET_MASK,
            dhcp4.CLIENT_ID,
            dhcp4.RAPID_COMMIT,
            dhcp4.ROUTER,
            dhcp4.CLASSLESS_ROUTES,
            dhcp4.DNS_SERVER,
            dhcp4.INTERFACE_MTU,
            dhcp4.RENEWAL_TIME,
            dhcp4.REBINDING_TIME,
            dhcp4.DOMAIN_NAME,
            dhcp4.CLIENT_FQDN,
            dhcp4.HOST_NAME,
        )
    )
}


class DhcpConfig(msgspec.Struct, frozen=True):
    """One network's DHCP: the pool is first..last inclusive, times are in seconds, `mtu` None leaves it to the guest.

    `routed`: the gateway leads further; without, guests get no default route, and know at once what is out of reach.
    `routes` are classless static routes beside the default one (destination, router). `authoritative`: this is the
    network's only DHCP server, so it answers at once where RFC 2131 section 4.3.2 has a server that may be one of
    several keep silent. `rate` bounds the messages a second of one port.
    """

    gateway: IPv4Address
    prefixlen: int
    first: IPv4Address
    last: IPv4Address
    gateway_mac: bytes
    dns: tuple[IPv4Address, ...] = ()
    domain: str = "vmnet.internal"
    search: tuple[str, ...] = ()
    mtu: int | None = None
    lease_time: int = 86400
    routed: bool = True
    routes: tuple[tuple[IPv4Network, IPv4Address], ...] = ()
    authoritative: bool = True
    rate: int = 1000


class Options:
    """The options of one network, encoded once. `Malformed` if a domain of the configuration is no domain name."""

    def __init__(self, config: DhcpConfig) -> None:
        network = IPv4Network((config.gateway, config.prefixlen), strict=False)
        self._config = config
        self._server_id = config.gateway.packed
        values = {
            dhcp4.SUBNET_MASK: network.netmask.packed,
            dhcp4.ROUTER: config.gateway.packed if config.routed else b"",
            dhcp4.DNS_SERVER: b"".join(address.packed for address in config.dns),
            dhcp4.DOMAIN_NAME: config.domain.encode("ascii", "replace"),
            dhcp4.BROADCAST_ADDRESS: network.broadcast_address.packed,
            dhcp4.INTERFACE_MTU: config.mtu.to_bytes(2, "big") if config.mtu is not None else b"",
            dhcp4.DOMAIN_SEARCH: dhcp4.encode_names(config.search),
            dhcp4.CLASSLESS_ROUTES: _routes(config),
        }
        self._values = {code: value for code, value in values.items() if value}
        # RFC 3442: a client that gets option 121 ignores option 3, so without a list both may go.
        self._everything = bytes(self._values)

    def lease_time(self, request: Message) -> int:
        """The lease in seconds: what is asked for, between a minute and the network's own."""
        asked = request.number(dhcp4.LEASE_TIME, 4)
        return self._config.lease_time if asked is None else min(self._config.lease_time, max(60, asked))

    def answer(
        self, request: Message, reply: Message, *, lease_time: int | None, name: str, fqdn: Fqdn | None
    ) -> bytes:
        """`reply` completed for an OFFER or ACK to `request`, as octets.

        `lease_time` None is an answer to INFORM; `name` is the VM's name or "", `fqdn` the client's option 81.
        """
        given = reply.options
        options = {dhcp4.MESSAGE_TYPE: given.pop(dhcp4.MESSAGE_TYPE), dhcp4.SERVER_ID: self._server_id}
        if lease_time is not None:
            options[dhcp4.LEASE_TIME] = lease_time.to_bytes(4, "big")
            options[dhcp4.RENEWAL_TIME] = (lease_time // 2).to_bytes(4, "big")
            options[dhcp4.REBINDING_TIME] = (lease_time * 7 // 8).to_bytes(4, "big")
        options[dhcp4.SUBNET_MASK] = self._values[dhcp4.SUBNET_MASK]
        options |= given
        if fqdn is not None:
            options[dhcp4.CLIENT_FQDN] = self._fqdn(fqdn, name)
        for code in request.options.get(dhcp4.PARAMETER_LIST, self._everything):
            if code in self._values:
                options.setdefault(code, self._values[code])
            elif code == dhcp4.HOST_NAME and name:
                options.setdefault(code, name.encode())
        return self._fit(request, reply, options)

    def refuse(self, request: Message, reply: Message, why: str) -> bytes:
        """`reply` completed as a NAK with its reason (RFC 2131 table 3)."""
        options = reply.options | {dhcp4.SERVER_ID: self._server_id, dhcp4.MESSAGE_TEXT: why.encode()}
        return self._fit(request, reply, options)

    def _fit(self, request: Message, reply: Message, options: dict[int, bytes]) -> bytes:
        if request.giaddr != dhcp4.ZERO and dhcp4.RELAY_AGENT in request.options:
            # RFC 3046 section 2.2: back to the relay as it came.
            options[dhcp4.RELAY_AGENT] = request.options[dhcp4.RELAY_AGENT]
        largest = (self._config.mtu or _ETHERNET_MTU) - _HEADERS
        limit = min((request.number(dhcp4.MAX_MESSAGE_SIZE, 2) or 0) - _HEADERS, largest)
        reply.options = options
        octets, dropped = dhcp4.build(reply, limit=limit)
        if dropped:
            reply.options = dict(_by_importance(options))
            octets, _ = dhcp4.build(reply, limit=limit)
        return octets

    def _fqdn(self, asked: Fqdn, name: str) -> bytes:
        """The answer to option 81 (RFC 4702 section 4): the A record is ours, unless the client wants none."""
        if asked.no_updates:
            answer = Fqdn(asked.name, no_updates=True, canonical=asked.canonical)
        else:
            full = f"{name}.{self._config.domain}." if name else ""
            answer = Fqdn(
                full if asked.canonical else full.rstrip("."),
                server_updates=bool(name),
                overridden=bool(name) != asked.server_updates,
                canonical=asked.canonical,
            )
        try:
            return dhcp4.encode_fqdn(answer)
        except Malformed:
            # The name came from the client and has a label that no name may have.
            return dhcp4.encode_fqdn(Fqdn("", no_updates=answer.no_updates, canonical=asked.canonical))


def _by_importance(options: dict[int, bytes]) -> Iterable[tuple[int, bytes]]:
    return sorted(options.items(), key=lambda item: _IMPORTANCE.get(item[0], len(_IMPORTANCE)))


def _routes(config: DhcpConfig) -> bytes:
    if not config.routes:
        return b""
    # A client that takes option 121 ignores option 3 (RFC 3442), so the default route has to be here too.
    default = [(IPv4Address(0), 0, config.gateway)] if config.routed else []
    routes = [(network.network_address, network.prefixlen, router) for network, router in config.routes]
    return dhcp4.encode_routes(default + routes)
