"""A published UDP port: a client's first datagram in Python, the rest between two connected sockets.

The host's port is one socket of the user's. A datagram of a client that is not known yet is read there, with the
address of the host's that it came to, and a flow is made for the client: a host socket bound to that address and the
same port and connected to the client, which the kernel prefers for all that follows; and a socket of the namespace,
connected from the gateway to the guest. The two are a flow of the UDP uplink, moved, bounded, timed out and evicted
with the flows that the VM has opened itself, so whoever floods the port pushes out flows of this VM's alone.

Both sockets share their port with others, so each has SO_REUSEADDR while it is bound, and the host's port itself only
for that moment: another program is refused it all the time. Between bind(2) and connect(2) a socket takes anybody's
datagrams; they are passed on as if they had come to the port.

The namespace's socket is transparent, as a published TCP port's is, and its port is chosen by the kernel while it does
not share: two clients never have the same one.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

from openvmnet.budget import WINDOW
from openvmnet.errors import HostError
from openvmnet.kernel import sockets
from openvmnet.kernel.loop import READ
from openvmnet.kernel.sockets import IP_PKTINFO
from openvmnet.kernel.sockets6 import IPV6_PKTINFO
from openvmnet.notice import Notice
from openvmnet.uplink.family import IPV6, of
from openvmnet.uplink.udp import UdpFlow
from openvmnet.wire import ip, ip6

if TYPE_CHECKING:
    from openvmnet.kernel.loop import Lane
    from openvmnet.uplink.target import Target
    from openvmnet.uplink.udp import UdpUplink

log = logging.getLogger(__name__)

_LARGEST = 65536  # octets
_READS = 32  # datagrams in one turn
_STRAYS = 256  # datagrams of others that are taken out of a socket that was bound a moment before it was connected
_BUFFER = 1 << 20  # octets; the kernel clamps it to net.core.rmem_max
_PKTINFO = struct.Struct("=i4s4s")  # struct in_pktinfo: ifindex, the local address, the header's destination

_Name = tuple[str, int] | tuple[str, int, int, int]


class PublishedUdp:
    """One published port: `host` is this host's. Nothing is read before `start()`."""

    def __init__(self, lane: Lane, udp: UdpUplink, host: socket.socket, target: Target) -> None:
        self._lane = lane
        self._udp = udp
        self._host = host
        self._six = host.family == socket.AF_INET6
        self._name: str = host.getsockname()[0]
        self._host_port: int = host.getsockname()[1]
        self._target = target
        self._owner = target.owner
        self._counters = target.counters
        self._failed = Notice(log)

    def start(self) -> None:
        """Read from now on; what came before has waited."""
        self._lane.watch(self._host.fileno(), READ, self._on_datagram)

    def sweep(self) -> None:
        """Once in a while: nothing, since its flows are swept by the uplink."""

    def close(self) -> None:
        """Give the host's port back; its flows end by `UdpUplink.forget_port`."""
        self._lane.forget(self._host.fileno())
        self._host.close()

    def _on_datagram(self, _: int) -> None:
        budget = self._udp.budget
        budget.begin()
        if not budget.allows(self._owner):
            self._lane.change(self._host.fileno(), 0)
            self._udp.later(WINDOW, self._resume)
            return
        try:
            for _ in range(_READS):
                data, ancillary, _, client = self._host.recvmsg(_LARGEST, 64)
                self._take(data, client, self._local(ancillary))
        except OSError:  # EAGAIN: that was all; an error of a datagram before is nobody's here
            pass
        budget.charge(self._owner)

    def _resume(self) -> None:
        if self._host.fileno() >= 0:
            self._lane.change(self._host.fileno(), READ)

    def _local(self, ancillary: list[tuple[int, int, bytes]]) -> str:
        """The address of the host's that a datagram came to."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_IP, IP_PKTINFO):
                return socket.inet_ntoa(_PKTINFO.unpack_from(data)[1])
            if (level, kind) == (socket.IPPROTO_IPV6, IPV6_PKTINFO):
                return socket.inet_ntop(socket.AF_INET6, data[:16])
        return self._name

    def _take(self, data: bytes, client: _Name, local: str) -> None:
        """A datagram that came to the port, of a new client or of one that has a flow since a moment; and its strays:
        those of anybody that came to the new flow's socket before that was connected."""
        waiting = [(data, client)]
        for data, client in waiting:
            key = self._key(client, local)
            flow = self._udp.find(key)
            if flow is None:
                address = self._target.reach()
                if address is None:
                    self._counters["published_refused"] += 1
                    continue
                try:
                    flow, strays = self._open(key, client, local, address)
                except (OSError, HostError) as error:
                    self._counters["published_dropped"] += 1
                    self._failed.warn("a client of a published UDP port got no flow: %s", error)
                    continue
                waiting += strays
            try:
                os.write(flow.guest, data)
            except OSError:  # its queue is full, or it has refused the one before
                self._counters["published_dropped"] += 1

    def _key(self, client: _Name, local: str) -> bytes:
        """Ports and addresses of both ends: no length that a key of a guest's own flows has, 12 or 36 octets."""
        family = socket.AF_INET6 if self._six else socket.AF_INET
        ends = [socket.inet_pton(family, one.partition("%")[0]) for one in (client[0], local)]
        return struct.pack("!HHI", client[1], self._host_port, client[3] if len(client) == 4 else 0) + b"".join(ends)

    def _open(self, key: bytes, client: _Name, local: str, address: bytes) -> tuple[UdpFlow, list[tuple[bytes, _Name]]]:
        """A flow for `client`, and its strays. Raises OSError or HostError, and leaves nothing then."""
        guest = self._ask(address)
        host = socket.socket(self._host.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._connect(host, client, local)
            flow = self._flow(key, guest, host, address)
            strays = _drain(host)
            self._udp.adopt(flow)
        except BaseException:
            for fd in (guest, host.detach()):
                os.close(fd)
            raise
        host.detach()
        self._counters["published_opened"] += 1
        return flow, strays

    def _connect(self, host: socket.socket, client: _Name, local: str) -> None:
        if self._six:
            host.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        scope = (0, client[3]) if len(client) == 4 else ()
        self._host.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            host.bind((local, self._host_port, *scope))
        finally:
            self._host.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        host.connect(client)

    def _ask(self, address: bytes) -> int:
        """A socket of the namespace, connected to the guest."""
        guest = self._target.connector(len(address))
        sockets.set_option(guest, socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        error = of(address).sockets.connect(guest, self._target.port + address)
        sockets.set_option(guest, socket.SOL_SOCKET, socket.SO_REUSEADDR)
        if error:
            os.close(guest)
            raise OSError(error, os.strerror(error))
        with socket.socket(fileno=guest) as view:
            _drain(view)  # nobody has been asked for anything yet
            view.detach()
        return guest

    def _flow(self, key: bytes, guest: int, host: socket.socket, address: bytes) -> UdpFlow:
        """The flow, as if the guest had sent the first datagram: what it is told of errors is about that one."""
        family = of(address)
        gateway = family.sockets.local(guest)
        ends = int.from_bytes(self._target.port, "big"), int.from_bytes(gateway[:2], "big")
        wire = ip6 if family is IPV6 else ip
        packet = wire.build_udp(address, gateway[2:], *ends, b"")
        header = msgspec.structs.replace(wire.parse(packet), identification=self._owner, dont_fragment=False)
        if self._six == (family is IPV6):  # an error of the one family cannot be told in the other
            host.setsockopt(*family.receive_errors, 1)
        local: str = host.getpeername()[0]
        target = socket.inet_pton(host.family, local.partition("%")[0])
        return UdpFlow(self._udp, family, key, packet, header, guest, host.fileno(), target)


def _drain(sock: socket.socket) -> list[tuple[bytes, _Name]]:
    """What came between bind(2) and connect(2), with its senders."""
    found = []
    try:
        for _ in range(_STRAYS):
            found.append(sock.recvfrom(_LARGEST, socket.MSG_DONTWAIT))  # noqa: PERF401 - what came stays when it raises
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.ECONNREFUSED):
            raise
    return found
