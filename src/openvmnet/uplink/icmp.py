"""ICMP echo from a guest to the outside, by the host's ping sockets.

An unprivileged program may send echo requests through a datagram socket of protocol ICMP where the host's
net.ipv4.ping_group_range has its group in it (icmp(7)); with CAP_NET_RAW a host may still forbid it, and then echo
requests are dropped and counted, and `vmnet doctor` says so. The kernel puts an identifier of its own into what is sent
and gives the socket what comes back with it; the guest's is put back in the reply. The reply leaves when the answer
came, so the guest measures the real round trip, with the TTL that the answer had.

One socket serves one guest's identifier towards one destination. Time-exceeded and unreachable messages about a request
are carried back from the router that sent them, so traceroute with ICMP works beyond the first hop.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from openvmnet.kernel import sockets
from openvmnet.kernel.loop import BROKEN, READ
from openvmnet.uplink import hosterror
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane

IDLE = 30.0  # s; conntrack's nf_conntrack_icmp_timeout
LIMIT = 512  # identifiers at once
_ECHO = struct.Struct("!BBHHH")
_IP_RECVTTL = 12
_REPLIES = 16  # taken in one turn


class EchoFlow:
    """One guest's echo identifier towards one destination."""

    __slots__ = ("_icmp", "guest", "identifier", "last", "sock", "target", "ttl")

    def __init__(self, icmp: IcmpUplink, guest: bytes, target: bytes, identifier: int, sock: socket.socket) -> None:
        self._icmp = icmp
        self.guest = guest
        self.target = target
        self.identifier = identifier
        self.sock = sock
        self.last = 0.0
        self.ttl = 0

    def on_event(self, mask: int) -> None:
        """An answer, or an error."""
        if self.sock.fileno() < 0:
            return
        if mask & BROKEN:
            self._icmp.report(self)
        if mask & READ:
            self._icmp.answer(self)


class IcmpUplink:
    """All echo requests of a network's guests; `write` puts an IPv4 packet into the TUN."""

    def __init__(self, lane: Lane, write: Callable[[bytes], object]) -> None:
        self._lane = lane
        self._write = write
        self._flows: OrderedDict[bytes, EchoFlow] = OrderedDict()
        self.counters = {"icmp_requests": 0, "icmp_replies": 0, "icmp_errors": 0, "icmp_forbidden": 0}

    def __len__(self) -> int:
        return len(self._flows)

    def open(self, packet: bytes, header: ip.Header) -> None:
        """An echo request, as a whole IPv4 packet."""
        offset = header.payload
        if header.total < offset + 8 or packet[offset] != ip.ECHO_REQUEST:
            return
        _, _, _, identifier, sequence = _ECHO.unpack_from(packet, offset)
        key = packet[12:20] + packet[offset + 4 : offset + 6]
        flow = self._flows.get(key)
        if flow is None:
            flow = self._make(key, header, identifier)
            if flow is None:
                return
        else:
            self._flows.move_to_end(key)
        flow.last = time.monotonic()
        self.counters["icmp_requests"] += 1
        if flow.ttl != header.ttl:
            flow.ttl = header.ttl
            sockets.set_option(flow.sock.fileno(), socket.SOL_IP, socket.IP_TTL, header.ttl)
        message = _ECHO.pack(ip.ECHO_REQUEST, 0, 0, 0, sequence) + packet[offset + 8 : header.total]
        for last in (False, True):
            try:
                flow.sock.send(message)
            except OSError as error:
                if not self.report(flow) and error.errno in hosterror.UNREACHABLE:
                    code = hosterror.UNREACHABLE[error.errno]
                    self._write(ip.build_error(header.dst, packet, ip.UNREACHABLE, code))
                    return
                if not last:
                    continue  # an earlier request's error stood in for this one
            return

    def answer(self, flow: EchoFlow) -> None:
        """Pass the echo replies on."""
        for _ in range(_REPLIES):
            try:
                data, ancillary, _, _ = flow.sock.recvmsg(65535, 64)
            except OSError:
                return
            if len(data) < 8:
                continue
            ttl = next((struct.unpack("=i", value)[0] for _, kind, value in ancillary if kind == socket.IP_TTL), 64)
            sequence = struct.unpack_from("!H", data, 6)[0]
            self.counters["icmp_replies"] += 1
            # From here to the guest the packet is forwarded once by the namespace and once was by this host.
            self._write(
                ip.build_echo_reply(flow.target, flow.guest, flow.identifier, sequence, data[8:], ttl=max(2, ttl))
            )

    def report(self, flow: EchoFlow) -> int:
        """Carry errors about requests back; how many there were."""
        errors = hosterror.read(flow.sock.fileno())
        for error in errors:
            self.counters["icmp_errors"] += 1
            sequence = struct.unpack_from("!H", error.data, 6)[0] if len(error.data) >= 8 else 0
            quoted = ip.build_echo_request(flow.guest, flow.target, flow.identifier, sequence, error.data[8:])
            message = hosterror.as_icmp(error, quoted=quoted, destination=flow.target)
            if message is not None:
                self._write(message)
        return len(errors)

    def sweep(self) -> None:
        """Every few seconds: end the identifiers that idle."""
        now = time.monotonic()
        for key in [key for key, flow in self._flows.items() if now - flow.last > IDLE]:
            self._end(key)

    def forget_guest(self, address: bytes) -> None:
        """The guest at `address` (4 octets) is gone."""
        for key in [key for key, flow in self._flows.items() if flow.guest == address]:
            self._end(key)

    def close(self) -> None:
        """End everything."""
        for key in list(self._flows):
            self._end(key)

    def _make(self, key: bytes, header: ip.Header, identifier: int) -> EchoFlow | None:
        if len(self._flows) >= LIMIT:
            self._end(next(iter(self._flows)))
        sock = None
        try:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
            sock.setsockopt(socket.SOL_IP, _IP_RECVTTL, 1)
            sock.setsockopt(socket.SOL_IP, sockets.IP_RECVERR, 1)
            sock.connect((socket.inet_ntoa(header.dst), 0))
        except OSError as error:
            if sock is not None:
                sock.close()
            if sock is None and error.errno in (errno.EACCES, errno.EPERM):
                self.counters["icmp_forbidden"] += 1
            elif error.errno in hosterror.UNREACHABLE:
                self.counters["icmp_errors"] += 1
                quoted = ip.build_echo_request(header.src, header.dst, identifier, 0, b"")
                self._write(ip.build_error(header.dst, quoted, ip.UNREACHABLE, hosterror.UNREACHABLE[error.errno]))
            return None
        flow = EchoFlow(self, header.src, header.dst, identifier, sock)
        self._flows[key] = flow
        self._lane.watch(sock.fileno(), READ, flow.on_event)
        return flow

    def _end(self, key: bytes) -> None:
        flow = self._flows.pop(key)
        self._lane.dropped(flow.sock.fileno())
        flow.sock.close()


def allowed() -> bool:
    """Whether this process may open a ping socket."""
    try:
        fd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).detach()
    except OSError:
        return False
    os.close(fd)
    return True
