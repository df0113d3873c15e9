"""The UDP flows of one port: which of them idles longest, and their turn on the thread.

A guest may have thousands of flows, all of them busy. They take their turns together, SLICE flows at a time, so that a
neighbour's packet waits for a slice, not for all of them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from openvmnet.budget import WINDOW
from openvmnet.kernel.loop import READ
from openvmnet.kernel.nest import Nest

if TYPE_CHECKING:
    from openvmnet.kernel.loop import Lane
    from openvmnet.uplink.udp import UdpFlow, UdpUplink

_QUIET = 10  # turns of others' TCP in a window that need no help
SLICE = 16  # flows in one turn, some 100 us each


class UdpOwner:
    """Port `number`'s flows, the least recently active first."""

    def __init__(self, udp: UdpUplink, lane: Lane, number: int) -> None:
        self.number = number
        self.flows: OrderedDict[bytes, UdpFlow] = OrderedDict()
        self._udp = udp
        self._turns = 0
        self._contended = False
        self._looked = 0.0
        self._nest = Nest(lane, self._on_ready)

    def __len__(self) -> int:
        return len(self.flows)

    def enter(self, flow: UdpFlow) -> None:
        """A flow begins. Raises OSError, and has not begun then."""
        self._nest.watch(flow.guest, READ, flow.on_guest)
        try:
            self._nest.watch(flow.host, READ, flow.on_host)
        except OSError:
            self._nest.forget(flow.guest)
            raise
        self.flows[flow.key] = flow

    def leave(self, flow: UdpFlow) -> None:
        """A flow ends; its descriptors are closed next."""
        for fd in (flow.guest, flow.host):
            self._nest.dropped(fd)
        del self.flows[flow.key]

    def is_contended(self) -> bool:
        """Whether others' TCP wants the thread, too: what it did in the window before the last look."""
        now = time.monotonic()
        if now - self._looked > WINDOW:
            turns = self._udp.turns(self.number)
            self._contended = turns - self._turns > _QUIET
            self._turns, self._looked = turns, now
        return self._contended

    def close(self) -> None:
        """It has no flow any more."""
        self._nest.close()

    def _on_ready(self) -> None:
        if self._udp.allows(self.number):
            self._nest.serve(SLICE)
            self._udp.budget.charge(self.number)
        else:
            self._nest.rest()
            self._udp.later(WINDOW, self._nest.go_on)
