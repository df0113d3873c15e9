"""Processor time of the one thread that serves everybody, shared among the guests who make it work.

What a guest can ask for at will (opening flows, names that have to be looked up) has a budget. While it is *crowded*,
which is while more than one guest is plugged, one owner may spend `share` of it in the long run, and what it has not
used for up to `burst` windows at once; what it asks for beyond that is dropped before anything is done for it, as on a
congested link, and counted by who drops it. A guest that is alone may take what there is.

It is processor time, not time: on a busy machine, what other processes had would be charged to the guest.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 0.1  # s


class Budget:
    """At most `share` of the time for one owner; an owner is any number that a guest cannot choose."""

    __slots__ = ("_cpu", "_limit", "_share", "_since", "_spent", "_wall", "_window", "crowded")

    def __init__(
        self,
        share: float,
        burst: int = 1,
        *,
        cpu: Callable[[], float] = time.thread_time,
        wall: Callable[[], float] = time.monotonic,
    ) -> None:
        self.crowded = False
        self._share = share
        self._limit = WINDOW * share * burst
        self._cpu = cpu
        self._wall = wall
        self._spent: dict[int, float] = {}
        self._window = 0.0
        self._since = 0.0

    def begin(self) -> None:
        """A turn begins: what is charged next counts from here."""
        if not self.crowded:
            return  # the thread's clock is a system call
        now = self._wall()
        if now - self._window > WINDOW:
            earned = (now - self._window) * self._share
            self._window = now
            self._spent = {owner: spent - earned for owner, spent in self._spent.items() if spent > earned}
        self._since = self._cpu()

    def allows(self, owner: int) -> bool:
        """Whether `owner` has anything left."""
        return not self.crowded or self._spent.get(owner, 0.0) <= self._limit

    def charge(self, owner: int) -> None:
        """What was done since `begin()` or the last charge was done for `owner`."""
        if not self.crowded:
            return
        now = self._cpu()
        self.spend(owner, now - self._since)
        self._since = now

    def spend(self, owner: int, seconds: float) -> None:
        """Charge what will be done for `owner` where nobody measures it."""
        if self.crowded:
            self._spent[owner] = self._spent.get(owner, 0.0) + seconds
