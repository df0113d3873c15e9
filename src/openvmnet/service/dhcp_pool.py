"""Which address a client is offered, and fairness between the switch ports when addresses are few.

How it works. A client gets, in this order: what it was just offered; the address it has or had; the one it asks for,
if nobody has it; the one that the hash of its MAC points to, or the next free one after that, so that the same MAC gets
the same address even from an empty book. If every address is bound, the binding that ended longest ago gives way.
A client with a reservation gets that address, and nothing else.

Nothing is probed. That an address is used by somebody who does not lease it is learnt from a DECLINE, and from ARP that
the gateway hears anyway; both make a *conflict*, which keeps the address from everybody else for a time.

Guests are hostile, so whatever a guest can take is counted against its port:

- an offer lasts 10 seconds, and gives way when its place is needed;
- a port holds at most half of the pool, but never less than 8, once there is a second port;
- when nothing is left, a client of a port that holds less takes the longest-held lease of the port that holds the most,
  if that is more than an equal share;
- a port's conflicts are at most its equal share (at least 8); the oldest gives way.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.service.dhcp_reservations import Reservations

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from openvmnet.service.leases import Lease, LeaseBook

log = logging.getLogger(__name__)

OFFER_TIME = 10.0
"""Seconds that an offer reserves its address."""
DECLINE_TIME = 600
"""Seconds that a declined address is kept back."""
MIN_SHARE = 8
_MAX_OFFERS = 256  # a port's outstanding offers
_PROBES = 256  # addresses looked at for a free one before a remembered one gives way: all of a /24


class Client(NamedTuple):
    """Who asks: MAC, client identifier (b"" if the MAC says it all), switch port (None if not known)."""

    mac: bytes
    client_id: bytes
    port: int | None


class _Offer(NamedTuple):
    client: Client
    until: float


class _Conflict(NamedTuple):
    """`mac` is who uses the address, b"" where that is not known; None as port is not known either."""

    mac: bytes
    port: int | None
    until: float


class Pool:
    """The addresses first..last less `reserved` (the gateway), and what stands in the way of giving them out."""

    def __init__(
        self, first: IPv4Address, last: IPv4Address, reserved: frozenset[int], book: LeaseBook, static_time: int
    ) -> None:
        self.first, self.last = int(first), int(last)
        self.ports: set[int] = set()
        self._reserved = frozenset(address for address in reserved if self.first <= address <= self.last)
        self._span = self.last - self.first + 1
        self.reservations = Reservations()
        self._book = book
        self._static_time = static_time
        self._offers: dict[int, _Offer] = {}  # the oldest first
        self._offered: dict[Client, int] = {}
        self._offer_count: Counter[int | None] = Counter()
        self._conflicts: dict[int, _Conflict] = {}  # the oldest first
        self._conflict_count: Counter[int | None] = Counter()
        self._exhausted = False
        self._greedy: set[int | None] = set()  # ports that were told of

    def __contains__(self, address: int) -> bool:
        return self.first <= address <= self.last and address not in self._reserved

    @property
    def capacity(self) -> int:
        """How many may have a lease at once; a book that is shorter than the pool keeps room for the reservations."""
        return min(self._span - len(self._reserved), self._book.bound - len(self.reservations))

    def choose(self, client: Client, lease: Lease | None, requested: int | None, now: float) -> int | None:
        """The address to offer; None if there is none for this client. `lease` is the client's binding."""
        self._expire(now)
        own = self.reservations.of(client)
        if own is not None:
            return own if self.available(own, client, lease, now) else None
        offered = self._offered.get(client)
        if offered is not None and self.available(offered, client, lease, now):
            return offered
        if lease is not None and self.available(int(lease.ip), client, lease, now):
            return int(lease.ip)
        address = None
        room = self._has_room(client, lease, now)
        if room:
            if requested is not None and self._is_free(requested, client, now):
                address = requested
            else:
                address = self._unbound(client, now) or self._forgettable(client, now)
            address = address or self._taken_offer(client, now) or self._victim(client, now)
        address = address or self._own_offer(client, now)
        self._note_refusal(client.port, room, address)
        return address

    def reserve(self, address: int, client: Client, now: float) -> None:
        """Keep an address for a client for OFFER_TIME; the port's oldest offer gives way beyond its bound."""
        self.withdraw(client)
        self._drop_offer(address)
        if self._offer_count[client.port] >= _MAX_OFFERS:
            self._drop_offer(next(ip for ip, offer in self._offers.items() if offer.client.port == client.port))
        self._offers[address] = _Offer(client, now + OFFER_TIME)
        self._offered[client] = address
        self._offer_count[client.port] += 1

    def withdraw(self, client: Client) -> None:
        """The client's offer, if any, is void."""
        address = self._offered.get(client)
        if address is not None:
            self._drop_offer(address)

    def available(self, address: int, client: Client, lease: Lease | None, now: float) -> bool:
        """May this client have this address now: its own, its offer, or one that nobody has and its port may take."""
        self._expire(now)
        if self.reservations.of(client) == address:
            return self._book.at(address) is not None or self._book.active_count() < self._book.bound
        if address not in self or self._barred(address, client, now):
            return False
        offer = self._offers.get(address)
        holder = self._book.at(address)
        if holder is not None and holder is lease:
            return (
                holder.expires > now
                or (offer is None and self._has_room(client, lease, now))
                or (offer is not None and offer.client == client)
            )
        return offer is not None and offer.client == client and self._may_replace(holder, client, now)

    def may_grant(self, address: int, client: Client, now: float) -> bool:
        """May a client without offer or binding have this address: nobody has it, and its port may hold one more."""
        self._expire(now)
        return self._has_room(client, None, now) and self._is_free(address, client, now)

    # What others have seen.

    def decline(self, address: int, client: Client, now: float) -> None:
        """The client found somebody else at this address."""
        self._note_conflict(address, _Conflict(b"", client.port, now + DECLINE_TIME))

    def seen(self, address: int, mac: bytes, port: int | None, now: float) -> None:
        """`mac` uses this address, says ARP: a conflict unless a lease on it is active, of whomever."""
        if address not in self:
            return
        holder = self._book.at(address)
        if holder is not None and holder.expires > now:
            return
        known = self._conflicts.get(address)
        if known is not None and known.mac == mac and known.until > now + self._static_time - 60:
            return  # a refresh a minute is enough
        self._note_conflict(address, _Conflict(mac, port, now + self._static_time))

    def leased(self, mac: bytes) -> None:
        """A MAC that leases has no static address any more."""
        for address in [address for address, conflict in self._conflicts.items() if conflict.mac == mac]:
            self._drop_conflict(address)

    def port_gone(self, port: int) -> None:
        """The port is gone, with its offers and what was learnt through it."""
        self.ports.discard(port)
        self.reservations.port_gone(port)
        self._greedy.discard(port)
        for address in [address for address, offer in self._offers.items() if offer.client.port == port]:
            self._drop_offer(address)
        for address in [address for address, conflict in self._conflicts.items() if conflict.port == port]:
            self._drop_conflict(address)

    # Ways to find an address, the mildest first.

    def _unbound(self, client: Client, now: float) -> int | None:
        # In a pool larger than the book, a remembered binding makes room in the book without giving its address.
        bound = self._book.active_count() if self._span > self._book.bound else len(self._book)
        if bound >= self.capacity:
            return None
        # The hash is of the MAC, not of the client identifier: boot loader and system shall agree on the address.
        seed = hashlib.blake2b(client.mac or client.client_id, digest_size=8).digest()
        at = int.from_bytes(seed, "big") % self._span
        for _ in range(min(_PROBES, self._span)):
            address = self.first + at
            if self._is_free(address, client, now):
                return address
            at = (at + 1) % self._span
        return None

    def _forgettable(self, client: Client, now: float) -> int | None:
        for lease in self._book.remembered():
            address = int(lease.ip)
            if address in self and address not in self._offers and not self._barred(address, client, now):
                return address
        return None

    def _taken_offer(self, client: Client, now: float) -> int | None:
        """The oldest offer of the port that has the most of them, if it has more than the client's."""
        if not self._offer_count:
            return None
        busiest, count = self._offer_count.most_common(1)[0]
        if count <= self._offer_count[client.port]:
            return None
        return self._offer_of(busiest, client, now)

    def _victim(self, client: Client, now: float) -> int | None:
        """The longest-held lease of the port that holds the most, if fairness allows to take it."""
        ports = self._book.ports()
        if not ports:
            return None
        busiest = max(ports, key=self._book.held)
        for lease in self._book.oldest(busiest):
            address = int(lease.ip)
            if not self._may_evict(lease, client.port):
                return None
            if address in self and address not in self._offers and not self._barred(address, client, now):
                return address
        return None

    def _own_offer(self, client: Client, now: float) -> int | None:
        return self._offer_of(client.port, client, now) if self._offer_count[client.port] else None

    def _offer_of(self, port: int | None, client: Client, now: float) -> int | None:
        """The oldest offer of a port that may go to `client` instead."""
        for address, offer in self._offers.items():
            if offer.client.port != port or self._barred(address, client, now):
                continue
            if self._may_replace(self._book.at(address), client, now):
                return address
        return None

    # Conditions.

    def _is_free(self, address: int, client: Client, now: float) -> bool:
        """Nobody has it, had it, was offered it, or uses it unasked."""
        return (
            address in self
            and self._book.active_count() < self.capacity
            and self._book.at(address) is None
            and address not in self._offers
            and not self._barred(address, client, now)
        )

    def _may_replace(self, holder: Lease | None, client: Client, now: float) -> bool:
        """An address bound like this may go to the client that is offered it."""
        if holder is None:
            return self._book.active_count() < self.capacity
        return holder.expires <= now or self._may_evict(holder, client.port)

    def _may_evict(self, holder: Lease, port: int | None) -> bool:
        """Fairness: the holder's port has more than an equal share, and more than the port that asks."""
        held = self._book.held(holder.port)
        return held > self._book.held(port) and held * self._port_count(port) > self.capacity

    def _has_room(self, client: Client, lease: Lease | None, now: float) -> bool:
        """The port may hold one more, offers included."""
        port = client.port
        if self._port_count(port) == 1:
            return True
        # An active lease of its own that a conflict forbids is given up for the new one: it does not count twice.
        own = lease is not None and lease.expires > now and lease.port == port
        return self._book.held(port) + self._offer_count[port] - own < max(MIN_SHARE, self.capacity // 2)

    def _port_count(self, port: int | None) -> int:
        """How many ports share the pool: those plugged in, or, where nobody says, those that hold leases."""
        if self.ports:
            return len(self.ports)
        return len({*self._book.ports(), port} - {None}) or 1

    def _barred(self, address: int, client: Client, now: float) -> bool:
        """Kept for another client, or another than what is kept for this one, or used by somebody unasked."""
        if not self.reservations.admits(address, client):
            return True
        conflict = self._conflicts.get(address)
        if conflict is None or conflict.mac == client.mac:
            return False
        if conflict.until > now:
            return True
        self._drop_conflict(address)
        return False

    # Bookkeeping.

    def _expire(self, now: float) -> None:
        # All offers last equally long, so the oldest is the first to expire.
        while self._offers:
            address, offer = next(iter(self._offers.items()))
            if offer.until > now:
                break
            self._drop_offer(address)

    def _drop_offer(self, address: int) -> None:
        offer = self._offers.pop(address, None)
        if offer is not None:
            del self._offered[offer.client]
            _less(self._offer_count, offer.client.port)

    def _note_conflict(self, address: int, conflict: _Conflict) -> None:
        self._drop_conflict(address)
        if self._conflict_count[conflict.port] >= max(MIN_SHARE, self.capacity // self._port_count(conflict.port)):
            oldest = next(ip for ip, other in self._conflicts.items() if other.port == conflict.port)
            self._drop_conflict(oldest)
        self._conflicts[address] = conflict
        self._conflict_count[conflict.port] += 1

    def _drop_conflict(self, address: int) -> None:
        conflict = self._conflicts.pop(address, None)
        if conflict is not None:
            _less(self._conflict_count, conflict.port)

    def _note_refusal(self, port: int | None, room: bool, address: int | None) -> None:
        """Say once that a port has all it may have, and once that the pool is empty, until there is room again."""
        leased = self._book.active_count()
        if address is not None:
            # Only with some room is it news again: a pool on the edge shall not log at every change.
            self._exhausted = self._exhausted and self.capacity - leased <= max(1, self.capacity // 16)
        elif room and not self._exhausted:
            self._exhausted = True
            log.warning(
                "no address is left: %d of %d are leased; stop a machine, or give the network a longer range",
                leased,
                self.capacity,
            )
        elif not room and port not in self._greedy:
            self._greedy.add(port)
            log.warning("one port holds half of the %d addresses, and asks for more: refused", self.capacity)


def _less(counter: Counter[int | None], port: int | None) -> None:
    """One less, and no entry for zero: ports come and go."""
    counter[port] -= 1
    if counter[port] <= 0:
        del counter[port]
