"""ICMP echo from a guest to the outside, by the host's ping sockets.

An unprivileged program may send echo requests through a datagram socket of protocol ICMP where the host's
net.ipv4.ping_group_range has its group in it (icmp(7)); with CAP_NET_RAW a host may still forbid it, and then echo
requests are dropped and counted, and `vmnet doctor` says so. The kernel puts an identifier of its own into what is sent
and gives the socket what comes back with it; the guest's is put back in the reply. The reply leaves when the answer
came, so the guest measures the real round trip, with the TTL that the answer had.

One socket serves one guest's identifier towards one destination. Time-exceeded and unreachable messages about a request
are carried back from the router that sent them, so traceroute with ICMP works beyond the first hop.

IPv6 has an uplink of its own of the same class, with counters of its own. No router fragments IPv6, so a request that
the path does not take whole is answered with "packet too big", unless it came in fragments: then it leaves in
fragments. A reply that is larger than the guest's link is split here, where an IPv4 one is by the namespace.
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
from openvmnet.uplink.family import IPV4, IPV6, Family
from openvmnet.wire.fragments6 import split

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.wire import ip

IDLE = 30.0  # s; conntrack's nf_conntrack_icmp_timeout
LIMIT = 512  # identifiers at once
_ECHO = struct.Struct("!BBHHH")
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
    """All echo requests of a network's guests in one version of IP.

    `write` puts an IP packet into the TUN, `mtu` is the guests' link MTU.
    """

    def __init__(self, lane: Lane, write: Callable[[bytes], object], mtu: int = 1500, *, family: Family = IPV4) -> None:
        self._lane = lane
        self._write = write
        self._mtu = mtu
        self._family = family
        self._packets = family.packets
        self._flows: OrderedDict[bytes, EchoFlow] = OrderedDict()
        self._requests, self._replies, self._errors, self._forbidden = names = tuple(
            ("icmp6_" if family is IPV6 else "icmp_") + name for name in ("requests", "replies", "errors", "forbidden")
        )
        self.counters = dict.fromkeys(names, 0)

    def __len__(self) -> int:
        return len(self._flows)

    def open(self, packet: bytes, header: ip.Header) -> None:
        """An echo request, as a whole IP packet."""
        offset = header.payload
        if header.total < offset + 8 or packet[offset] != self._packets.ECHO_REQUEST:
            return
        _, _, _, identifier, sequence = _ECHO.unpack_from(packet, offset)
        key = packet[self._family.addresses] + packet[offset + 4 : offset + 6]
        flow = self._flows.get(key)
        if flow is None:
            flow = self._make(key, header, identifier)
            if flow is None:
                return
        else:
            self._flows.move_to_end(key)
        flow.last = time.monotonic()
        self.counters[self._requests] += 1
        if flow.ttl != header.ttl:
            flow.ttl = header.ttl
            sockets.set_option(flow.sock.fileno(), *self._family.hops, header.ttl)
        message = _ECHO.pack(self._packets.ECHO_REQUEST, 0, 0, 0, sequence) + packet[offset + 8 : header.total]
        if self._family is IPV6:
            whole = sockets.IP_PMTUDISC_DO if header.dont_fragment else sockets.IP_PMTUDISC_DONT
            sockets.set_option(flow.sock.fileno(), *self._family.mtu_discover, whole)
        for last in (False, True):
            try:
                flow.sock.send(message)
            except OSError as error:
                told = self.report(flow, packet)
                if not told and error.errno in self._family.unreachable:
                    self._unreachable(packet, header, error.errno)
                    return
                if not last and all(one.kind is not None for one in told):
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
            wanted = self._family.hops_received
            ttl = next((struct.unpack("=i", value)[0] for *kind, value in ancillary if tuple(kind) == wanted), 64)
            sequence = struct.unpack_from("!H", data, 6)[0]
            self.counters[self._replies] += 1
            build = self._packets.build_echo_reply
            # From here to the guest the packet is forwarded once by the namespace and once was by this host.
            reply = build(flow.target, flow.guest, flow.identifier, sequence, data[8:], ttl=max(2, ttl))
            if self._family is IPV6 and len(reply) > self._mtu:
                for piece in split(reply, self._mtu, flow.identifier << 16 | sequence):
                    self._write(piece)
            else:
                self._write(reply)

    def report(self, flow: EchoFlow, packet: bytes | None = None) -> list[hosterror.HostError]:
        """Carry errors about requests back, and give them. `packet` is what the host's own kernel has refused."""
        errors = hosterror.read(flow.sock.fileno())
        build = self._packets.build_echo_request
        for error in errors:
            self.counters[self._errors] += 1
            sequence = struct.unpack_from("!H", error.data, 6)[0] if len(error.data) >= 8 else 0
            quoted = packet if error.kind is None else None
            quoted = quoted or build(flow.guest, flow.target, flow.identifier, sequence, error.data[8:])
            message = self._family.as_icmp(error, quoted=quoted, destination=flow.target)
            if message is not None:
                self._write(message)
        return errors

    def sweep(self) -> None:
        """Every few seconds: end the identifiers that idle."""
        now = time.monotonic()
        for key in [key for key, flow in self._flows.items() if now - flow.last > IDLE]:
            self._end(key)

    def forget_guest(self, address: bytes) -> None:
        """The guest at `address` (4 or 16 octets) is gone."""
        for key in [key for key, flow in self._flows.items() if flow.guest == address]:
            self._end(key)

    def close(self) -> None:
        """End everything."""
        for key in list(self._flows):
            self._end(key)

    def _make(self, key: bytes, header: ip.Header, identifier: int) -> EchoFlow | None:
        if len(self._flows) >= LIMIT:
            self._end(next(iter(self._flows)))
        family, sock = self._family, None
        try:
            sock = socket.socket(fileno=family.sockets.ping())
            sock.setsockopt(*family.receive_hops, 1)
            sock.setsockopt(*family.receive_errors, 1)
            refused = family.sockets.connect(sock.fileno(), bytes(2) + header.dst)
            if refused:
                raise OSError(refused, os.strerror(refused))
        except OSError as error:
            if sock is not None:
                sock.close()
            if sock is None and error.errno in (errno.EACCES, errno.EPERM):
                self.counters[self._forbidden] += 1
            elif error.errno in family.unreachable:
                self.counters[self._errors] += 1
                quoted = self._packets.build_echo_request(header.src, header.dst, identifier, 0, b"")
                self._unreachable(quoted, header, error.errno)
            return None
        flow = EchoFlow(self, header.src, header.dst, identifier, sock)
        self._flows[key] = flow
        self._lane.watch(sock.fileno(), READ, flow.on_event)
        return flow

    def _unreachable(self, packet: bytes, header: ip.Header, number: int | None) -> None:
        code = self._family.unreachable[number or 0]
        self._write(self._packets.build_error(header.dst, packet, self._packets.UNREACHABLE, code))

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
