"""The names of guests' IPv6 addresses.

How it works. A VM has one name, whatever addresses it has: the one of its IPv4 lease, else the one that it gave with
DHCPv6. Its IPv6 addresses are those leased by DHCPv6, and those that it made itself from the prefix, of which nobody
tells: they are learnt from the namespace's neighbour table, where an address is next to the MAC that answered for it.
The table is read when somebody asks, at most once a second; `newcomers` sees to it that fresh addresses come into it.

A neighbour's word is a guest's word. So an address that was learnt stays with its first MAC as long as the table has
it, a leased one is its lease's alone, and a MAC has at most PER_MAC of them.
"""

from __future__ import annotations

import time
from ipaddress import IPv6Address
from typing import TYPE_CHECKING

from openvmnet.service.leases import RESERVED_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from ipaddress import IPv6Network

    from openvmnet.service.leases import LeaseBook
    from openvmnet.service.leases6 import LeaseBook6

PER_MAC = 16
_EVERY = 1.0  # s between looks at the neighbour table


class Names6:
    """Names by address, and addresses by name; `neighbours` gives pairs of address and MAC of the namespace."""

    def __init__(
        self,
        prefix: IPv6Network,
        leases: LeaseBook,
        leases6: LeaseBook6,
        neighbours: Callable[[], Iterable[tuple[str, str]]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prefix = prefix
        self._leases = leases
        self._leases6 = leases6
        self._neighbours = neighbours
        self._clock = clock
        self._looked = -_EVERY
        self._learnt: dict[IPv6Address, bytes] = {}
        self._changes = 0

    def forward(self, label: str) -> list[IPv6Address]:
        """The addresses of the VM with this name."""
        ip = self._leases.by_name(label)
        lease = self._leases.by_ip(ip) if ip is not None else None
        if lease is not None:
            return self.of(lease.mac, lease.port)
        if label in RESERVED_NAMES:
            return []
        named = self._leases6.named(label)
        return self.of(named.mac, named.port) if named is not None else []

    def of(self, mac: bytes, port: int | None) -> list[IPv6Address]:
        """The addresses of the VM with this MAC, the leased ones first."""
        self._look()
        leased = [
            lease.ip
            for lease in self._leases6
            if lease.client.mac == mac and (port is None or lease.client.port in {None, port})
        ]
        return leased + [ip for ip, one in self._learnt.items() if one == mac and ip not in leased]

    def reverse(self, ip: IPv6Address) -> str | None:
        """The name of the VM that has this address."""
        self._look()
        lease6 = self._leases6.at(ip)
        mac, port = (lease6.client.mac, lease6.client.port) if lease6 else (self._learnt.get(ip), None)
        if mac:
            lease = self._leases.by_mac(mac, port)
            if lease is not None and lease.hostname:
                return lease.hostname
            named = lease6 or next((one for one in self._leases6 if one.client.mac == mac and one.hostname), None)
            return (named.hostname or None) if named is not None else None
        return (lease6.hostname or None) if lease6 is not None else None

    def generation(self) -> int:
        """A number that changes whenever a name or an address may have."""
        self._look()
        return self._leases.generation() + self._leases6.moves + self._changes

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < _EVERY:
            return
        self._looked = now
        counts: dict[bytes, int] = {}
        found: dict[IPv6Address, bytes] = {}
        for address, text in self._neighbours():
            ip, mac = IPv6Address(address), bytes.fromhex(text.replace(":", ""))
            mac = self._learnt.get(ip, mac)
            lease = self._leases6.at(ip)
            if ip in self._prefix and lease is None and counts.get(mac, 0) < PER_MAC:
                counts[mac] = counts.get(mac, 0) + 1
                found[ip] = mac
        if found != self._learnt:
            self._learnt = found
            self._changes += 1
