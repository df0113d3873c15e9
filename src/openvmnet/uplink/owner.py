"""Whose packet it is: the port behind a guest's source address.

A guest may write any source address of the subnet into its packets, so bounds that count by address are bounds on
nothing. What it cannot choose is its port. A packet that comes through the TUN no longer says which it was, but the
network knows: the address was leased through a port, or its MAC, which the gateway has resolved, is that of a port's
NIC. Everything else, an address that nobody answers for, belongs to one common owner, NOBODY.

Answers are kept for KEEP seconds; the neighbour table is read at most once in REREAD seconds, whatever comes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NOBODY = 0
KEEP = 10.0  # s
REREAD = 0.2  # s
_BOUND = 65536  # addresses kept; a subnet of /16 has as many


class Owners:
    """`leased(address)` is the port through which an address (4 octets) was leased, or None; `resolved()` the ports of
    all addresses that the gateway has resolved."""

    def __init__(
        self,
        leased: Callable[[bytes], int | None],
        resolved: Callable[[], dict[bytes, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._leased = leased
        self._resolved = resolved
        self._clock = clock
        self._known: dict[bytes, int] = {}
        self._since = 0.0
        self._read = 0.0

    def of(self, address: bytes) -> int:
        """The port of source address `address`, or NOBODY."""
        now = self._clock()
        if now - self._since > KEEP or len(self._known) >= _BOUND:
            self._known.clear()
            self._since = now
        owner = self._known.get(address)
        if owner is None:
            owner = self._leased(address)
            if owner is None and now - self._read > REREAD:
                self._read = now
                self._known |= self._resolved()
                owner = self._known.get(address)
            if owner is None:
                return NOBODY  # not kept: the next look may know
            self._known[address] = owner
        return owner

    def forget(self) -> None:
        """A port is gone: look anew."""
        self._known.clear()
