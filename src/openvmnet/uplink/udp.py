"""UDP from a guest to the outside: the first datagram of a flow in Python, the rest between two kernel sockets.

A flow is a guest's address and port with a destination's. Its first datagram comes through the TUN; two sockets are
made for it. One belongs to the namespace: transparent, bound to the *destination's* address and connected to the guest,
so the kernel gives it what else the guest sends there (firewall rule `socket transparent`) and what is written to it
leaves as if the destination had sent it. The other is an ordinary host socket connected to the destination. From then
on datagrams are moved between them in batches, recvmmsg(2) to sendmmsg(2), without being looked at.

Errors that the outside reports to the host socket (IP_RECVERR, ip(7)) are carried back: port, host or net unreachable
and time exceeded as the ICMP message they came as, from the router that sent it; a path too narrow as "fragmentation
needed" or "packet too big" with its MTU. The host socket sends with DF if the guest's first datagram had it; in IPv6,
where no router fragments, unless the guest does: a flow whose first datagram came in fragments, or one that turns to
them when it was told of a narrow path (the next LOOKS datagrams are looked at for that), may be fragmented here. A
datagram larger than the guest's link can only have come in fragments, so it may leave in fragments too.

Both versions of IP share tables and bounds; what differs between them is a flow's `Family`. Where a guest's destination
is to be found from here, `destination` says: the gateway's address is this host.

Datagrams know no back pressure: a guest that sends more than the path takes would take the whole thread. While other
guests are plugged and their TCP is moving, one port's flows and their beginnings may have SHARE of it; beyond that its
sockets rest until the next window, and what their queues do not hold is lost, as on a slower link. A port's flows take
turns together (`uplink.udp_owner`), so that nobody waits for thousands of them.

Flows end after IDLE_NEW seconds without a datagram, after IDLE_ANSWERED once the outside has answered (conntrack's
nf_conntrack_udp_timeout and _timeout_stream). The table is bounded; when it is full, the least recently active flow of
the port that has most of them gives way, so a guest that scans pushes out its own flows and nobody else's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

from openvmnet.budget import Budget
from openvmnet.errors import HostError
from openvmnet.kernel import sockets, sockets6
from openvmnet.kernel.loop import BROKEN, READ
from openvmnet.kernel.mmsg import Batch
from openvmnet.notice import Notice
from openvmnet.uplink import hosterror
from openvmnet.uplink.family import IPV4, IPV6, Family, itself
from openvmnet.uplink.udp_owner import UdpOwner

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.wire import ip

log = logging.getLogger(__name__)

IDLE_NEW = 30.0  # s
IDLE_ANSWERED = 180.0  # s
SHARE = 0.12  # of the thread's time, for one port's datagrams while others' TCP wants it too
LOOKS = 256  # datagrams after "packet too big", among which one in fragments says that the guest has heard it
_TOUCH = 1.0  # s; activity is noted no more often than this
_ROUNDS = 2  # batches moved in one turn; the rest waits for the next, which level-triggered epoll promises
_BATCH = 64  # datagrams
_LARGEST = 65536  # octets
_ERRORS = 4  # pending errors passed over in one batch
# What sendmsg(2) says of a segmented message that the route's device or MTU does not allow.
_NO_SEGMENTS = (errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.EMSGSIZE)
_BUFFER = 1 << 20  # octets for what comes faster than a turn; the kernel clamps it to net.core.rmem_max
_SETTLE = 2731  # datagrams: the smallest takes 768 octets of a buffer that the kernel makes twice as large


class UdpFlow:
    """One flow; `guest` and `host` are its two descriptors, `packet` the headers of its first datagram, for errors."""

    __slots__ = (
        "_udp",
        "answered",
        "careful",
        "family",
        "fragments",
        "guest",
        "header",
        "host",
        "key",
        "last",
        "owner",
        "packet",
        "segments",
        "target",
    )

    def __init__(
        self,
        udp: UdpUplink,
        family: Family,
        key: bytes,
        packet: bytes,
        header: ip.Header,
        guest: int,
        host: int,
        target: bytes,
    ) -> None:
        self._udp = udp
        self.family = family
        self.target = target  # the destination's address on the host's side
        self.owner = header.identification  # the port
        self.key = key
        self.packet = packet[: header.payload + 8]
        self.header = header
        self.guest = guest
        self.host = host
        self.last = 0.0
        self.answered = False
        self.segments = True  # the routes' devices take several datagrams as one segmented message
        self.careful = 0  # datagrams to look at for fragments
        self.fragments = not header.dont_fragment  # whether the host may fragment what it sends for the guest

    def on_guest(self, mask: int) -> None:
        """The guest has sent more, or an error of the namespace is pending (the guest refused an answer)."""
        if self.guest < 0:
            return
        if mask & BROKEN:
            # The guest's own ICMP error about an answer: nobody outside waits for it; reading it clears it.
            sockets.pending_error(self.guest)
        if mask & READ:
            self._udp.relay_up(self)

    def on_host(self, mask: int) -> None:
        """The outside has answered, or reported an error."""
        if self.host < 0:
            return
        if mask & BROKEN:
            self._udp.report(self)
        if mask & READ:
            self._udp.relay_down(self)


class UdpUplink:
    """All UDP flows of a network's guests.

    `transparent()` gives a fresh transparent UDP socket's descriptor of the namespace, `write` puts an IP packet into
    the TUN, `mtu` is the guests' link MTU, `limit` the flows at once.
    """

    def __init__(
        self, lane: Lane, transparent: Callable[[], int], write: Callable[[bytes], object], mtu: int, limit: int
    ) -> None:
        self._lane = lane
        self._transparent = {IPV4: transparent}
        self._write = write
        self._mtu = mtu
        self._limit = limit
        self._batch = Batch(_BATCH, _LARGEST, names=False)
        self._owners: dict[int, UdpOwner] = {}
        self._flows: dict[bytes, UdpFlow] = {}
        self._failed, self._full = Notice(log), Notice(log)
        self.budget = Budget(SHARE)
        # Where a guest's destination, address and port, is found from here; None: nowhere, so it is refused.
        self.destination: Callable[[bytes, int], bytes | None] = itself
        # Set by the network: what counts the turns of others' TCP than a port's, and how to be called later.
        self.turns: Callable[[int], int] = lambda _: 0
        self.later: Callable[[float, Callable[[], None]], object] = lambda _, work: work()
        self.counters = {"udp_opened": 0, "udp_evicted": 0, "udp_errors": 0, "udp_dropped": 0}

    def __len__(self) -> int:
        return len(self._flows)

    def serve6(self, transparent: Callable[[], int]) -> UdpUplink6:
        """Serve IPv6 as well; what opens its flows. `transparent()` is as for IPv4."""
        self._transparent[IPV6] = transparent
        return UdpUplink6(self)

    def open(self, packet: bytes, header: ip.Header) -> None:
        """A flow's first datagram, as a whole IPv4 packet."""
        self.begin(IPV4, packet, header)

    def begin(self, family: Family, packet: bytes, header: ip.Header) -> None:
        """A flow's first datagram, as a whole packet of `family`."""
        offset = header.payload
        if header.total < offset + 8:
            return
        length = struct.unpack_from("!H", packet, offset + 4)[0]
        if not 8 <= length <= header.total - offset:
            return  # no kernel would take it for a datagram either
        key = packet[family.addresses] + packet[offset : offset + 4]
        payload = packet[offset + 8 : offset + length]
        flow = self._flows.get(key)
        if flow is not None:
            self._send_one(flow, payload)
            return
        owner = header.identification
        if not self.allows(owner):
            self.counters["udp_dropped"] += 1
            return
        flow = self._make(family, key, packet, header)
        if flow is not None:
            self._send_one(flow, payload)
            self._settle(flow)
        self.budget.charge(owner)

    def allows(self, number: int) -> bool:
        """Whether a port's datagrams may have a turn, which begins now."""
        budget = self.budget
        budget.begin()
        if not budget.crowded or budget.allows(number):
            return True
        owner = self._owners.get(number)
        return owner is None or not owner.is_contended()

    def relay_up(self, flow: UdpFlow) -> None:
        """Move what the guest has sent."""
        if flow.careful:
            self._relay_carefully(flow)
            return
        batch = self._batch
        for _ in range(_ROUNDS):
            try:
                count = batch.recv(flow.guest)
            except OSError:
                count = 0
            if count == 0:
                return
            self._touch(flow)
            start = 0
            while start < count:
                try:
                    sent = (batch.relay if flow.segments else batch.send)(flow.host, count - start, start)
                    if sent == 0:  # the outside's queue is full: what a network does then is drop
                        self.counters["udp_dropped"] += count - start
                        break
                    start += sent
                except OSError as error:
                    if flow.segments and error.errno in _NO_SEGMENTS:
                        flow.segments = False
                    elif error.errno == errno.EMSGSIZE:
                        self._too_big(flow, bytes(batch.payload(start)))
                        start += 1
                    else:
                        # An error of an earlier datagram, reported once; this one may go the next time.
                        self.report(flow)
                        if flow.host < 0 or error.errno != errno.ECONNREFUSED:
                            start += 1
            if count < _BATCH:
                return

    def _relay_carefully(self, flow: UdpFlow) -> None:
        """Move what the guest has sent one by one, until a datagram came in fragments or enough of them did not."""
        fragmented = (socket.IPPROTO_IPV6, sockets6.IPV6_RECVFRAGSIZE)
        with socket.socket(fileno=flow.guest) as view:
            try:
                while flow.careful:
                    data, ancillary, _, _ = view.recvmsg(_LARGEST, 64, socket.MSG_DONTWAIT)
                    flow.careful -= 1
                    if any(tuple(kind) == fragmented for *kind, _ in ancillary):
                        flow.careful, flow.fragments = 0, True
                        sockets.set_option(flow.host, *flow.family.mtu_discover, sockets.IP_PMTUDISC_WANT)
                    self._send_one(flow, data)
            except OSError:
                pass  # EAGAIN: that was all
            view.detach()

    def relay_down(self, flow: UdpFlow) -> None:
        """Move what the outside has answered."""
        batch = self._batch
        for _ in range(_ROUNDS):
            try:
                count = batch.recv(flow.host)
            except OSError:
                self.report(flow)
                return
            if count == 0:
                return
            flow.answered = True
            self._touch(flow)
            self.counters["udp_dropped"] += count - self._deliver(flow, count)
            if count < _BATCH:
                return

    def _deliver(self, flow: UdpFlow, count: int) -> int:
        """Send a received batch to the guest; how many datagrams its kernel queue took."""
        batch, done, errors = self._batch, 0, 0
        while done < count:
            try:
                sent = (batch.relay if flow.segments else batch.send)(flow.guest, count - done, done)
            except OSError as error:
                if flow.segments and error.errno in _NO_SEGMENTS:
                    flow.segments = False
                    continue
                errors += 1  # the guest's ICMP error about an earlier answer: reported once
                if errors > _ERRORS:
                    return done
                continue
            if sent == 0:
                return done
            done += sent
        return done

    def report(self, flow: UdpFlow, *, narrow: bool = False) -> None:
        """Carry the errors of the host socket back to the guest.

        `narrow`: also that its own kernel found a datagram too large, which else was fragmented instead.
        """
        for error in hosterror.read(flow.host):
            if error.number == errno.EMSGSIZE and error.kind is None and not narrow:
                continue
            self.counters["udp_errors"] += 1
            if error.offender == flow.target:
                error = error._replace(offender=flow.header.dst)
            # With the datagram's beginning: RFC 4443 section 2.4 wants all that fits, and busybox's traceroute6 takes
            # no error that quotes none of it.
            message = flow.family.as_icmp(error, quoted=flow.packet + error.data, destination=flow.header.dst)
            if message is not None:
                self._write(message)

    def sweep(self) -> None:
        """Every few seconds: end the flows that idle."""
        now = time.monotonic()
        for flow in list(self._flows.values()):
            if now - flow.last > (IDLE_ANSWERED if flow.answered else IDLE_NEW):
                self._end(flow)

    def forget_guest(self, address: bytes) -> None:
        """The guest at `address` (4 or 16 octets) is gone: end its flows."""
        for flow in [one for one in self._flows.values() if one.header.src == address]:
            self._end(flow)

    def close(self) -> None:
        """End everything."""
        for flow in list(self._flows.values()):
            self._end(flow)

    def _make(self, family: Family, key: bytes, packet: bytes, header: ip.Header) -> UdpFlow | None:
        if len(self._flows) >= self._limit:
            self._evict()
        target = self.destination(header.dst, int.from_bytes(key[-2:], "big"))
        calls, guest, host = family.sockets, -1, -1
        try:
            if target is None:
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            host = calls.udp()
            sockets.set_option(host, *family.receive_errors)
            sockets.set_option(host, socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            if header.dont_fragment:
                sockets.set_option(host, *family.mtu_discover, sockets.IP_PMTUDISC_DO)
            if header.ttl < 32:  # a guest that counts hops (traceroute) wants them counted outside too
                sockets.set_option(host, *family.hops, header.ttl)
            error = calls.connect(host, key[-2:] + target)
            if error:
                raise OSError(error, os.strerror(error))
            guest = self._transparent[family]()
            calls.bind(guest, key[-2:] + header.dst)
            error = calls.connect(guest, key[-4:-2] + header.src)
            if error:
                raise OSError(error, os.strerror(error))
            flow = UdpFlow(self, family, key, packet, header, guest, host, target)
            self._enter(flow)
        except (OSError, HostError) as error:
            for fd in (guest, host):
                if fd >= 0:
                    os.close(fd)
            self._refuse(family, packet, header, error)
            return None
        self.counters["udp_opened"] += 1
        return flow

    def find(self, key: bytes) -> UdpFlow | None:
        """The flow of that key."""
        return self._flows.get(key)

    def adopt(self, flow: UdpFlow) -> None:
        """Take over a flow that began outside, with its two descriptors. Raises OSError, and leaves them then."""
        if len(self._flows) >= self._limit:
            self._evict()
        self._enter(flow)

    def forget_port(self, owner: int) -> None:
        """The port is gone, and with it every flow of its own."""
        if owner in self._owners:
            for flow in list(self._owners[owner].flows.values()):
                self._end(flow)

    def _enter(self, flow: UdpFlow) -> None:
        owner = self._owners.get(flow.owner)
        if owner is None:
            owner = self._owners[flow.owner] = UdpOwner(self, self._lane, flow.owner)
        try:
            owner.enter(flow)
        except OSError:
            self._release(owner)
            raise
        flow.last = time.monotonic()
        self._flows[flow.key] = flow

    def _release(self, owner: UdpOwner) -> None:
        """Let a port go that has no flow any more."""
        if not owner.flows:
            owner.close()
            del self._owners[owner.number]

    def _settle(self, flow: UdpFlow) -> None:
        """Between bind(2) and connect(2) the socket took anybody's datagrams: pass on this guest's, drop the rest.

        They are the first ones in its buffer, so _SETTLE are enough, however fast the guest goes on sending.
        """
        guest = flow.family.text(flow.header.src), int.from_bytes(flow.key[-4:-2], "big")
        with socket.socket(fileno=flow.guest) as view:
            try:
                for _ in range(_SETTLE):
                    data, sender = view.recvfrom(_LARGEST, socket.MSG_DONTWAIT)
                    if sender[:2] == guest:
                        self._send_one(flow, data)
                    else:
                        self.counters["udp_dropped"] += 1
            except OSError:
                pass
            view.detach()

    def _send_one(self, flow: UdpFlow, payload: bytes) -> None:
        self._touch(flow)
        try:
            _sendto(flow.host, payload)
        except BlockingIOError:
            self.counters["udp_dropped"] += 1
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._too_big(flow, payload)
            else:
                self.report(flow)
                with contextlib.suppress(OSError):
                    _sendto(flow.host, payload)

    def _too_big(self, flow: UdpFlow, payload: bytes) -> None:
        """A datagram that the outside's path does not take whole."""
        if not flow.fragments and len(payload) + flow.family.headers <= self._mtu:
            self.report(flow, narrow=True)  # the error queue holds the path's MTU
            flow.careful = LOOKS if flow.family is IPV6 else 0
            return
        sockets.set_option(flow.host, *flow.family.mtu_discover, sockets.IP_PMTUDISC_DONT)
        with contextlib.suppress(OSError):
            _sendto(flow.host, payload)
        if not flow.fragments:
            sockets.set_option(flow.host, *flow.family.mtu_discover, sockets.IP_PMTUDISC_DO)

    def _refuse(self, family: Family, packet: bytes, header: ip.Header, error: OSError | HostError) -> None:
        code = family.unreachable.get(error.errno or 0) if isinstance(error, OSError) else None
        if code is not None:
            self.counters["udp_errors"] += 1
            self._write(family.packets.build_error(header.dst, packet, family.packets.UNREACHABLE, code))
            return
        self.counters["udp_dropped"] += 1
        self._failed.warn("a UDP flow of %s could not be opened: %s", family.text(header.src), error)

    def _evict(self) -> None:
        owner = max(self._owners.values(), key=len)
        self.counters["udp_evicted"] += 1
        idlest = next(iter(owner.flows.values()))
        guest = idlest.family.text(idlest.header.src)
        self._full.warn("all %d UDP flows are in use; the idlest one of %s gives way", self._limit, guest)
        self._end(idlest)

    def _touch(self, flow: UdpFlow) -> None:
        now = time.monotonic()
        if now - flow.last > _TOUCH:
            flow.last = now
            self._owners[flow.owner].flows.move_to_end(flow.key)

    def _end(self, flow: UdpFlow) -> None:
        owner = self._owners[flow.owner]
        owner.leave(flow)
        for fd in (flow.guest, flow.host):
            os.close(fd)
        flow.guest = flow.host = -1
        del self._flows[flow.key]
        self._release(owner)


class UdpUplink6:
    """What opens IPv6 flows of `udp`."""

    def __init__(self, udp: UdpUplink) -> None:
        self._udp = udp

    def open(self, packet: bytes, header: ip.Header) -> None:
        """A flow's first datagram, as a whole IPv6 packet."""
        self._udp.begin(IPV6, packet, header)


def _sendto(fd: int, payload: bytes) -> None:
    # os.write() of nothing would be no system call on some files; on a datagram socket it is an empty datagram.
    os.write(fd, payload)
