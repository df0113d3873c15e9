"""The slow path: what opens a flow comes here as a raw IP packet, through the TUN `up0`.

The firewall sends here what opens: TCP SYNs, UDP datagrams without a flow, ICMP echo requests. Each goes to the uplink
of its protocol; of another protocol (IP in IP) its sender is told that nothing carries it. What an uplink answers in a
guest's direction (the accepted SYN, a RST, an ICMP error, an echo reply) is written to the same TUN. A packet that the
guest sent in fragments comes in fragments, and is put together.

Opening flows is where a guest can make Python work, so it has a budget. While other guests are plugged, one port's
openings may take SHARE of the thread's time. What is beyond it waits, so that a client that opens one connection after
the other is slowed, and not stopped for the second after which a SYN is sent again; what does not fit into the port's
queue is dropped unparsed, as on a congested link, and counted. A guest that is alone may take what there is. The
firewall's own limit per port lies before all that.

The TUN is one queue for all. While there are several guests, it is emptied at once into a queue for each port, and the
ports have their turns one after the other: whoever opens a flow a second waits for nobody who opens thousands.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec

from openvmnet.budget import WINDOW, Budget
from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.wire import ip, ip6
from openvmnet.wire.fragments import Reassembly
from openvmnet.wire.fragments6 import Reassembly6

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.uplink.family import Packets

log = logging.getLogger(__name__)

OTHERS = -1  # in an uplink table's keys: every protocol that has none of its own
PACKETS = 64  # in one turn
SHARED = 16  # in one turn of several guests
READS = 2048  # from the TUN into the ports' queues in one turn
WAITING = 256  # packets of one port
SHARE = 0.3  # of the thread's time, for one port's openings while there are others
_LARGEST = 65536
_VERSION_6 = 0x60  # in the first octet, the upper half


class Uplink(Protocol):
    """What opens flows of one protocol."""

    def open(self, packet: bytes, header: ip.Header) -> None:
        """A packet that opens a flow."""


class Refusal:
    """In an uplink's place for what has none: an ICMP error in the name of `gateway`, written by `write`."""

    def __init__(self, write: Callable[[bytes], None], gateway: bytes, packets: Packets, code: int) -> None:
        self._write = write
        self._gateway = gateway
        self._packets = packets
        self._code = code

    def open(self, packet: bytes, _: ip.Header) -> None:
        """Refuse it."""
        self._write(self._packets.build_error(self._gateway, packet, self._packets.UNREACHABLE, self._code))


class SlowPath:
    """The reader of TUN descriptor `tun`; `uplinks` by IP protocol number are added once they exist, IPv6's apart.
    The one at OTHERS has the protocols that are not there."""

    def __init__(self, lane: Lane, tun: int) -> None:
        self._lane = lane
        self._tun = tun
        self._fragments, self._fragments6 = Reassembly(), Reassembly6()
        self.uplinks: dict[int, Uplink] = {}
        self.uplinks6: dict[int, Uplink] = {}
        self.budget = Budget(SHARE)
        # Set by the network: how to be called later.
        self.later: Callable[[float, Callable[[], None]], object] = lambda _, work: lane.again(work)
        self._queues: dict[int, deque[bytes]] = {}  # of the ports that have anything here, in the order of their turns
        self._held: dict[int, deque[bytes]] = {}  # of those that have used up their budget
        self._going_on = False
        self.counters = {
            "slowpath_packets": 0,
            "slowpath_malformed": 0,
            "slowpath_over_budget": 0,
            "slowpath_failed": 0,
        }

    def start(self) -> None:
        """Begin to read."""
        self._lane.watch(self._tun, READ, self._on_packets)

    def write(self, packet: bytes) -> None:
        """Put a packet into the namespace; one that the kernel does not take is lost, as on any link."""
        try:
            os.write(self._tun, packet)
        except OSError as error:
            log.debug("up0 did not take a packet of %d octets: %s", len(packet), error)

    def close(self) -> None:
        """Stop reading, and close the TUN."""
        self._lane.forget(self._tun)
        self._queues.clear()
        self._held.clear()
        os.close(self._tun)

    def _on_packets(self, _: int) -> None:
        if self.budget.crowded or self._queues or self._held:
            self._sort()
            if not self._going_on:
                self._in_turn()
            return
        counters, tun = self.counters, self._tun
        for _ in range(PACKETS):
            try:
                packet = os.read(tun, _LARGEST)
            except BlockingIOError:
                return
            counters["slowpath_packets"] += 1
            self._dispatch(packet, packet[0] >= _VERSION_6)

    def _sort(self) -> None:
        """Empty the TUN into a queue for each port."""
        counters, queues, held = self.counters, self._queues, self._held
        for _ in range(READS):
            try:
                packet = os.read(self._tun, _LARGEST)
            except BlockingIOError:
                return
            counters["slowpath_packets"] += 1
            owner = ip.port_of(packet)
            queue = queues.get(owner)
            if queue is None:
                queue = held.get(owner)
            if queue is None:
                queue = queues[owner] = deque()
            if len(queue) < WAITING:
                queue.append(packet)
            else:
                counters["slowpath_over_budget"] += 1

    def _in_turn(self) -> None:
        """One packet of each port after the other, as far as its budget goes."""
        self._going_on = False
        budget, queues = self.budget, self._queues
        budget.begin()
        for _ in range(SHARED):
            if not queues:
                return
            owner = next(iter(queues))
            queue = queues.pop(owner)
            if not budget.allows(owner):
                if not self._held:
                    self.later(WINDOW, self._release)
                self._held[owner] = queue
                continue
            packet = queue.popleft()
            if queue:
                queues[owner] = queue  # behind the others
            self._dispatch(packet, packet[0] >= _VERSION_6)
            budget.charge(owner)
        if queues:
            self._going_on = True
            self._lane.again(self._in_turn)

    def _release(self) -> None:
        """Who has waited for a window is looked at again."""
        self._queues |= self._held
        self._held.clear()
        if self._queues and not self._going_on:
            self._in_turn()

    def _dispatch(self, packet: bytes, six: bool) -> None:
        try:
            whole = (self._fragments6 if six else self._fragments).add(packet)
            if whole is None:
                return
            header = ip6.parse(whole) if six else ip.parse(whole)
            if six and whole is not packet:
                # Its sender has fragmented, and so may who is next.
                header = msgspec.structs.replace(header, dont_fragment=False)
            uplinks = self.uplinks6 if six else self.uplinks
            uplink = uplinks.get(header.protocol)
            if uplink is None:  # not `or`: an uplink without flows is empty
                uplink = uplinks.get(OTHERS)
            if uplink is not None:
                uplink.open(whole, header)
        except Malformed as error:
            self.counters["slowpath_malformed"] += 1
            log.debug("a guest's packet was dropped: %s", error)
        except Exception:
            # One packet's trouble must not close the way for all: the lane forgets a handler that raises.
            self.counters["slowpath_failed"] += 1
            if self.counters["slowpath_failed"] == 1:
                log.exception("a packet of %s opened no flow; more of the kind are counted", packet[:40].hex())
