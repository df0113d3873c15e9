"""A published TCP port: from a client that the host accepted to a pair of sockets for the pump.

The listener is the user's, outside of the network's namespace. For each client one socket of the namespace connects
from the gateway to the guest; when the guest has accepted, both go to the pump as the two sides of a flow, counted with
all other flows of the VM's port. It is the other direction of what `tcp` does with the same parts, except that the
host's kernel has accepted before the guest was asked, as for any server behind a port forwarder: where the guest
refuses, does not answer (after what the kernel has patience for), or has no address yet, the client gets a RST.

The socket in the namespace is a transparent one, since the firewall leaves a guest's TCP at the gateway's address to
such sockets alone; any other port there is this host's.

Whoever reaches the port can open connections without end. Those of one VM are bounded as its own are: openings, and
seven eighths of all flows. What is beyond is reset at once and counted.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import TYPE_CHECKING

from openvmnet.errors import HostError
from openvmnet.kernel import sockets
from openvmnet.kernel.loop import BROKEN, READ, WRITE
from openvmnet.notice import Notice
from openvmnet.uplink.family import IPV4, IPV6, of
from openvmnet.uplink.pump import EVENTS, QUIET, Flow

if TYPE_CHECKING:
    from openvmnet.kernel.loop import Lane
    from openvmnet.kernel.watches import Watches
    from openvmnet.uplink.target import Target
    from openvmnet.uplink.tcp import TcpUplink

log = logging.getLogger(__name__)

_ACCEPTS = 32  # clients taken in one turn; the rest waits for the next, which level-triggered epoll promises


class Inward:
    """A client whose guest has been asked: descriptor `guest` in the namespace, `host` outside."""

    __slots__ = ("address", "guest", "home", "host", "port", "seen")

    def __init__(self, port: PublishedTcp, home: Watches, guest: int, host: int, address: bytes) -> None:
        self.port = port
        self.home = home  # where its descriptors are watched, and then the flow's
        self.guest = guest
        self.host = host
        self.address = address  # the guest's
        self.seen = 0  # what epoll told of the client's side in the meantime

    def on_guest(self, mask: int) -> None:
        """The guest has answered, or it is known that it will not."""
        if self.guest < 0:
            return
        if mask & BROKEN:
            self.port.failed(self)
        elif mask & WRITE:
            self.port.connected(self, mask & ~WRITE)

    def on_host(self, mask: int) -> None:
        """The client has sent something, which waits for the flow, or is gone."""
        if self.host < 0:
            return
        self.seen |= mask
        if mask & BROKEN:
            self.port.lost(self)


class PublishedTcp:
    """One published port: `listener` is this host's. Nothing is accepted before `start()`."""

    def __init__(self, lane: Lane, tcp: TcpUplink, listener: socket.socket, target: Target) -> None:
        self._lane = lane
        self._tcp = tcp
        self._listener = listener
        self._accept = (IPV6 if listener.family == socket.AF_INET6 else IPV4).sockets.accept
        self._target = target
        self._owner = target.owner
        self._counters = target.counters
        self._openings: set[Inward] = set()
        self._full = Notice(log)
        self._failed = Notice(log)
        self._resting = False

    def start(self) -> None:
        """Accept clients from now on; those that came before have waited."""
        self._lane.watch(self._listener.fileno(), READ, self._on_accept)

    def sweep(self) -> None:
        """Once in a while: go on accepting where that had to stop."""
        if self._resting:
            self._resting = False
            self._lane.change(self._listener.fileno(), READ)

    def close(self) -> None:
        """Accept nobody more, and end what is not a flow yet."""
        self._lane.forget(self._listener.fileno())
        self._listener.close()
        for opening in list(self._openings):
            self._end(opening)

    def _on_accept(self, _: int) -> None:
        for _ in range(_ACCEPTS):
            try:
                accepted = self._accept(self._listener.fileno())
            except OSError as error:  # no descriptor is free: who waits would keep the loop turning
                self._failed.warn("accepting a client of a published port: %s", error)
                self._lane.change(self._listener.fileno(), 0)
                self._resting = True
                return
            if accepted is None:
                return
            self._open(accepted[0])

    def _open(self, host: int) -> None:
        """Ask the guest for the client at descriptor `host`."""
        if self._tcp.accounts.full(self._owner):
            self._counters["published_dropped"] += 1
            self._full.warn("a client of a published port was reset: its VM has as many connections as it may")
            sockets.abort(host)
            return
        address = self._target.reach()
        if address is None:
            self._counters["published_refused"] += 1
            sockets.abort(host)
            return
        guest = -1
        try:
            guest = self._target.connector(len(address))
            result = of(address).sockets.connect(guest, self._target.port + address)
            if result not in (0, errno.EINPROGRESS):
                raise OSError(result, os.strerror(result))
        except (OSError, HostError) as error:
            self._counters["published_dropped"] += 1
            self._failed.warn("the guest of a published port could not be asked: %s", error)
            sockets.abort(host)
            if guest >= 0:
                os.close(guest)
            return
        home = self._tcp.home(self._owner)
        opening = Inward(self, home, guest, host, address)
        self._openings.add(opening)
        self._tcp.accounts.take(self._owner)
        home.watch(guest, EVENTS, opening.on_guest)
        home.watch(host, QUIET, opening.on_host)

    def connected(self, opening: Inward, seen: int) -> None:
        """The guest has accepted: the pump has both from here on."""
        tcp, home, guest, host = self._tcp, opening.home, opening.guest, opening.host
        self._openings.discard(opening)
        opening.guest = opening.host = -1
        flow = Flow(home, tcp.pool, guest, host, opening.address, tcp.ended, tcp.resume)
        flow.owner = self._owner
        tcp.begin(flow)
        self._counters["published_opened"] += 1
        home.hand_over(guest, flow.on_guest)
        home.hand_over(host, flow.on_host)
        # Their edges so far were reported here; no other will tell of what has come.
        if opening.seen:
            flow.on_host(opening.seen)
        if seen:
            flow.on_guest(seen)

    def failed(self, opening: Inward) -> None:
        """The guest has refused, or nobody answered."""
        self._counters["published_refused"] += 1
        self._end(opening)

    def lost(self, opening: Inward) -> None:
        """The client has gone before the guest answered."""
        self._end(opening)

    def _end(self, opening: Inward) -> None:
        self._openings.discard(opening)
        self._tcp.accounts.give_back(self._owner, opening=True)
        for fd in (opening.guest, opening.host):
            opening.home.dropped(fd)
            sockets.abort(fd)
        opening.guest = opening.host = -1
