"""TCP from a guest to the outside: from the SYN to a pair of sockets for the pump.

A guest's SYN comes through the TUN as a raw packet. Python opens a host socket to its destination and answers nothing
yet. When the outside has accepted, the same SYN is written back to the TUN; coming from there it meets the TPROXY
rule, and the kernel completes the handshake with the guest on the transparent listener: the guest sees its connection
accepted exactly when the outside accepted it. Where the outside refuses, the guest gets a RST; where the kernel has no
route or a router said so, the matching ICMP error; where nothing answers, nothing, and the host socket gives up when
the kernel does (net.ipv4.tcp_syn_retries). A retransmitted SYN finds its pending opening; one that was so late that the
guest has come meanwhile is written back for the kernel to answer, and opens nothing: the outside would take it for a
second connection.

A segment that opens nothing and has no socket comes here too, and is written back the same way. Most are of connections
that are gone, and the kernel answers from the listener with a RST. Some have lost a race: until Linux 6.19 a lookup may
find neither the request nor the socket that takes its place when a handshake ends, and the segment after the guest's
ACK, on another processor, would be answered with a RST too. When it is back from Python, the socket is there.

An opening is known by its 4-tuple, addresses and ports as they lie in the packet, and whose it is by the port that the
firewall wrote into the packet's identification (IPv6: its flow label): an address can be made up.

IPv4 and IPv6 have a `Door` each, with a listener and an `open()` of its own; behind it, they share tables and bounds.
Where a guest's destination is to be found from here, `destination` says: the gateway's address is this host.

Bounds: those of `uplink.account`, for one port and for all. An accepted host connection whose guest does not complete
within ACCEPT_TIMEOUT is reset, and so is a flow of which one side has been reset while the other takes nothing for
LOST_TIMEOUT. A SYN beyond a bound is dropped, counted, and said once.

While there are several ports, the descriptors of each are a nest (`kernel.nest`), so that a port's connection waits for
a few of another's at a time, and not for its thousands. What was opened before there were several stays in the lane.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from typing import TYPE_CHECKING

from openvmnet.kernel import sockets
from openvmnet.kernel.loop import BROKEN, WRITE
from openvmnet.kernel.nest import Nest
from openvmnet.notice import Notice
from openvmnet.uplink.account import Accounts
from openvmnet.uplink.family import IPV4, IPV6, Family, itself, nowhere
from openvmnet.uplink.pipes import PipePool
from openvmnet.uplink.pump import EVENTS, QUIET, Flow
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.kernel.watches import Watches

log = logging.getLogger(__name__)

ACCEPT_TIMEOUT = 30.0  # s; a guest that answers at all answers a SYN-ACK within a round trip of the bridge
KEEPALIVE_IDLE = 600  # s; well below what home routers forget a connection after (RFC 5382: 2 h 4 min at the least)
# Options of a socket towards a guest: it tells of a peer that is gone, and leaves urgent data in the stream.
GUEST_SIDE = (
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),
)
LOST_TIMEOUT = 60.0  # s for a peer to take what the other side sent before it was reset (a kernel's own patience, too)
_ACCEPTS = 64  # connections accepted in one turn
SLICE = 4  # of one port's descriptors in one turn while there are several ports

# What a failed connect(2) is to the guest: a RST, or an ICMP unreachable code. Everything else stays unanswered.
_FLAGS = ip.SYN | ip.ACK | ip.RST | ip.FIN
_RESET = (errno.ECONNREFUSED, errno.ECONNRESET)


class Opening:
    """A guest's SYN on its way: connecting, or connected and handed to the kernel for the guest's handshake."""

    __slots__ = ("connected", "deadline", "door", "fd", "header", "home", "key", "last", "owner", "packet", "seen")

    def __init__(
        self, door: Door, home: Watches, key: bytes, packet: bytes, header: ip.Header, fd: int, last: bool
    ) -> None:
        self.door = door
        self.owner = header.identification  # of the first SYN: the account that it is on
        self.home = home  # where its descriptors are watched, and then the flow's
        self.last = last  # the destination has no other place to look at
        self.key = key
        self.packet = packet
        self.header = header
        self.fd = fd
        self.connected = False
        self.seen = 0  # what epoll told in the meantime
        self.deadline = 0.0

    def on_event(self, mask: int) -> None:
        """Readiness of the host socket, before the guest's side exists."""
        if self.fd < 0:
            return
        if self.connected:
            self.seen |= mask  # for the flow, which is not there yet
            return
        if mask & BROKEN:
            self.door.failed(self, sockets.pending_error(self.fd) or errno.ECONNREFUSED)
        elif mask & WRITE:
            self.seen = mask & ~WRITE  # an answer may be there with the acceptance
            self.door.connected(self)


class TcpUplink:
    """All TCP connections of a network's guests.

    `listener` is the transparent listening socket made in the namespace, `write` puts an IP packet into the TUN,
    `error_source` is the gateway's address (4 octets), the sender of ICMP errors, `limit` the flows and openings.
    """

    def __init__(
        self,
        lane: Lane,
        listener: socket.socket,
        write: Callable[[bytes], object],
        error_source: bytes,
        resume: Callable[[Callable[[], None]], object],
        limit: int,
    ) -> None:
        self.lane = lane
        self.write = write
        self.resume = resume
        self.pool = PipePool()
        self.openings: dict[bytes, Opening] = {}  # but for those of published ports, which keep them themselves
        self.flows: set[Flow] = set()
        self.live: dict[bytes, Flow] = {}  # those that a guest has opened, by the key of the opening
        self.accounts = Accounts(limit)
        self.crowded = False  # there are several guests, and each has its turns
        self._nests: dict[int, Nest] = {}
        self.counters = {"tcp_opened": 0, "tcp_refused": 0, "tcp_unreachable": 0, "tcp_dropped": 0, "tcp_stray": 0}
        # Where a guest's destination, address and port, is found from here; None: nowhere, so it is refused.
        self.destination: Callable[[bytes, int], bytes | None] = itself
        # Where else, when nobody listens there.
        self.second: Callable[[bytes, int], bytes | None] = nowhere
        self._full = Notice(log)
        self._doors = [Door(self, IPV4, listener, error_source)]
        self.open = self._doors[0].open

    def serve6(self, listener: socket.socket, error_source: bytes) -> Door:
        """Serve IPv6 as well; what opens its connections. `error_source` is the gateway's address (16 octets)."""
        door = Door(self, IPV6, listener, error_source)
        self._doors.append(door)
        return door

    def sweep(self) -> None:
        """Once in a while: reset what no guest came for, and turn keep-alive on for what has lived for some time."""
        now = time.monotonic()
        for opening in [one for one in self.openings.values() if one.connected and one.deadline < now]:
            self._abort(opening)
        for flow in [one for one in self.flows if one.lost and one.lost + LOST_TIMEOUT < now]:
            flow.abort()
        for flow in self.flows:
            if not flow.kept:
                flow.kept = True
                sockets.set_option(flow.host, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
                sockets.set_option(flow.host, socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    def forget_guest(self, address: bytes) -> None:
        """The guest at `address` (4 or 16 octets) is gone: end its flows and openings."""
        for flow in [one for one in self.flows if one.guest_address == address]:
            flow.abort()
        for opening in [one for one in self.openings.values() if one.header.src == address]:
            self._abort(opening)

    def close(self) -> None:
        """End everything."""
        for door in self._doors:
            door.close()
        for address in {one.header.src for one in self.openings.values()} | {one.guest_address for one in self.flows}:
            self.forget_guest(address)
        for nest in self._nests.values():
            nest.close()
        self._nests.clear()
        self.pool.close()

    def home(self, owner: int) -> Watches:
        """Where a port's descriptors are watched: apart from others' while there are any."""
        if not self.crowded:
            return self.lane
        nest = self._nests.get(owner)
        if nest is None:
            try:
                nest = self._nests[owner] = Nest(self.lane, lambda: self._nests[owner].serve(SLICE))
            except OSError:  # no descriptor is left, for the connection neither
                return self.lane
        return nest

    def turns(self, owner: int) -> int:
        """Turns in which TCP of others than `owner` was moved, since the beginning."""
        turns = self.pool.turns
        return sum(turns.values()) - turns.get(owner, 0)

    def pending(self) -> int:
        """Openings now."""
        return self.accounts.openings

    def begin(self, flow: Flow) -> None:
        """An opening has become a flow."""
        self.flows.add(flow)
        if flow.key:
            self.live[flow.key] = flow
        self.accounts.settle(flow.owner)

    def forget_port(self, owner: int) -> None:
        """The port is gone, and with it every flow and opening of its own, from whatever address."""
        for flow in [one for one in self.flows if one.owner == owner]:
            flow.abort()
        for opening in [one for one in self.openings.values() if one.owner == owner]:
            self._abort(opening)
        self.pool.turns.pop(owner, None)
        nest = self._nests.pop(owner, None)
        if nest is not None:
            nest.close()

    def ended(self, flow: Flow) -> None:
        """A flow ends."""
        self.flows.discard(flow)
        if self.live.get(flow.key) is flow:
            del self.live[flow.key]
        self.accounts.give_back(flow.owner)

    def drop(self, guest: str, owner: int, error: OSError | None = None) -> None:
        """Leave a SYN unanswered; its sender tries again."""
        self.counters["tcp_dropped"] += 1
        account = self.accounts.of(owner)
        self._full.warn(
            "a connection of %s was dropped: %s (its port has %d openings, %d with its connections; all have %d of %d)",
            guest,
            error or "a bound is reached",
            account.openings,
            account.held,
            self.accounts.held,
            self.accounts.limit,
        )

    def _abort(self, opening: Opening) -> None:
        """No guest comes for it: end it, with a RST to the outside."""
        opening.door.forget(opening)
        opening.home.dropped(opening.fd)
        sockets.abort(opening.fd)
        opening.fd = -1


class Door:
    """The way in of one version of IP: what its SYNs open, and what its listener accepts."""

    def __init__(self, tcp: TcpUplink, family: Family, listener: socket.socket, error_source: bytes) -> None:
        self._tcp = tcp
        self._lane = tcp.lane
        self._openings = tcp.openings
        self._family = family
        self._sockets = family.sockets
        self._addresses = family.addresses
        self._listener = listener
        self._accept_fd = listener.fileno()
        self._error_source = error_source
        self._awaited = 0  # guests that the kernel shakes hands with
        for level, option, value in GUEST_SIDE:
            listener.setsockopt(level, option, value)  # accepted sockets inherit all of it
        self._lane.watch(self._accept_fd, 1, self._on_accept)

    def open(self, packet: bytes, header: ip.Header) -> None:
        """A guest's SYN, or a segment without a socket, as a whole IP packet."""
        tcp, offset = self._tcp, header.payload
        if len(packet) < offset + 20:
            return
        if packet[offset + 13] & _FLAGS != ip.SYN:
            tcp.counters["tcp_stray"] += 1
            tcp.write(packet)
            return
        key = packet[self._addresses] + packet[offset : offset + 4]
        known = self._openings.get(key)
        if known is not None:
            # The first one or the SYN-ACK to it was lost; or the guest has given up and begins anew from the same port,
            # with a sequence number of which the one before knows nothing.
            known.packet, known.header = packet, header
            if known.connected:
                known.deadline = time.monotonic() + ACCEPT_TIMEOUT
                tcp.write(packet)
            return
        flow = tcp.live.get(key)
        if flow is not None and not sockets.is_closed(flow.guest):  # else its end is about to be told
            tcp.write(packet)
            return
        owner = header.identification
        if tcp.accounts.full(owner):
            tcp.drop(self._family.text(header.src), owner)
            return
        target = tcp.destination(header.dst, key[-2] << 8 | key[-1])
        if target is None:
            self._answer(packet, header, errno.ECONNREFUSED)
            return
        self._connect(key, packet, header, target, last=False)

    def _connect(self, key: bytes, packet: bytes, header: ip.Header, target: bytes, *, last: bool) -> None:
        """Ask at `target`, an address of the host's side, for the guest whose SYN this is."""
        tcp = self._tcp
        try:
            fd = self._sockets.tcp()
        except OSError as error:
            if error.errno in self._family.unreachable:
                self._answer(packet, header, error.errno or 0)
            else:
                tcp.drop(self._family.text(header.src), header.identification, error)
            return
        opening = Opening(self, tcp.home(header.identification), key, packet, header, fd, last)
        result = self._sockets.connect(fd, key[-2:] + target)
        if result not in (0, errno.EINPROGRESS):
            os.close(fd)
            self._refused(opening, result)
            return
        self._openings[key] = opening
        tcp.accounts.take(opening.owner)
        opening.home.watch(fd, EVENTS, opening.on_event)

    def connected(self, opening: Opening) -> None:
        """The outside has accepted: let the kernel shake hands with the guest."""
        opening.connected = True
        self._awaited += 1
        opening.deadline = time.monotonic() + ACCEPT_TIMEOUT
        self._tcp.write(opening.packet)

    def failed(self, opening: Opening, error: int) -> None:
        """The outside has not accepted: say to the guest what its own kernel would have said."""
        self.forget(opening)
        opening.home.dropped(opening.fd)
        os.close(opening.fd)
        opening.fd = -1
        self._refused(opening, error)

    def _refused(self, opening: Opening, error: int) -> None:
        """Look at the second place, or let the guest know."""
        key, packet, header = opening.key, opening.packet, opening.header
        if error in _RESET and not opening.last:
            target = self._tcp.second(header.dst, int.from_bytes(key[-2:], "big"))
            if target is not None:
                self._connect(key, packet, header, target, last=True)
                return
        self._answer(packet, header, error)

    def forget(self, opening: Opening) -> None:
        """An opening ends, and no flow comes of it."""
        if self._openings.pop(opening.key, None) is not None:
            self._awaited -= opening.connected
            self._tcp.accounts.give_back(opening.owner, opening=True)

    def close(self) -> None:
        """Accept nothing more."""
        self._lane.forget(self._accept_fd)
        self._listener.close()

    def _on_accept(self, _: int) -> None:
        tcp = self._tcp
        for _ in range(_ACCEPTS):
            try:
                accepted = self._sockets.accept(self._accept_fd)
            except OSError as error:
                log.warning("accepting a guest's connection: %s", error)
                return
            if accepted is None:
                return
            guest, peer = accepted
            target = self._sockets.local(guest)
            opening = self._openings.pop(peer[2:] + target[2:] + peer[:2] + target[:2], None)
            if opening is None:
                tcp.counters["tcp_stray"] += 1
                sockets.abort(guest)
                continue
            host = opening.fd
            opening.fd = -1
            self._awaited -= opening.connected
            home = opening.home
            flow = Flow(home, tcp.pool, guest, host, peer[2:], tcp.ended, tcp.resume)
            flow.owner, flow.key = opening.owner, opening.key
            tcp.begin(flow)
            tcp.counters["tcp_opened"] += 1
            # The host's socket is watched already: what came while there was no flow is told to it now.
            home.hand_over(host, flow.on_host)
            home.watch(guest, QUIET, flow.on_guest)
            if opening.seen:
                flow.on_host(opening.seen)
            if not self._awaited:
                return  # nobody else is expected: spare accept4(2) its EAGAIN

    def _answer(self, packet: bytes, header: ip.Header, error: int) -> None:
        counters, family = self._tcp.counters, self._family
        code = family.unreachable.get(error)
        if error in _RESET:
            counters["tcp_refused"] += 1
            self._tcp.write(family.packets.build_reset(packet, header))
        elif code is not None:
            counters["tcp_unreachable"] += 1
            kind = family.packets.UNREACHABLE
            self._tcp.write(family.packets.build_error(self._error_source, packet, kind, code))
        else:  # ETIMEDOUT is silence outside, so silence inside; EADDRNOTAVAIL: no port is free, a retry may find one
            counters["tcp_dropped"] += 1
