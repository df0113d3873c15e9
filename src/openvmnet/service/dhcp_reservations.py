"""Addresses that are kept for one NIC each, while its port is plugged in.

How it works. A reservation ties an address to a MAC on a switch port. The client with that MAC, asking through that
port, gets this address and no other, whatever it had, asks for or declines; nobody else gets it, not even a client that
poses under the same MAC through another port. The firewall ties the address to the port as it does with leased ones, so
what ARP says of it is not heeded. A reservation goes with its port; the lease that was made of it is like any other.

There are at most as many as ports, and no guest can make one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openvmnet.service.dhcp_pool import Client


class Reservations:
    """Who has which address kept. `moves` counts each one made or gone."""

    def __init__(self) -> None:
        self.moves = 0
        self._addresses: dict[tuple[bytes, int], int] = {}  # by MAC and port
        self._owners: dict[int, tuple[bytes, int]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each address with its port."""
        return ((address, port) for address, (_, port) in self._owners.items())

    def add(self, address: int, mac: bytes, port: int) -> None:
        """Keep `address` for `mac` on `port`; the caller has made sure that nobody else's is kept there."""
        self.moves += 1
        self._owners[address] = (mac, port)
        self._addresses[mac, port] = address

    def port_gone(self, port: int) -> None:
        """The port's reservations are over."""
        for address, owner in list(self._owners.items()):
            if owner[1] == port:
                self.moves += 1
                del self._owners[address], self._addresses[owner]

    def of(self, client: Client) -> int | None:
        """The address kept for a client; where ports are not known, its MAC alone decides."""
        if client.port is not None:
            return self._addresses.get((client.mac, client.port))
        return next((address for address, (mac, _) in self._owners.items() if mac == client.mac), None)

    def admits(self, address: int, client: Client) -> bool:
        """Whether this client may have this address: its own if one is kept for it, else one kept for nobody."""
        own = self.of(client)
        return address == own if own is not None else address not in self._owners
