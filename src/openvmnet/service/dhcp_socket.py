"""DHCP's I/O: three sockets that an agent made in the network's namespace, on the event loop's fast lane.

How it works. The UDP socket (0.0.0.0:67, bound to the bridge device) receives every message and sends what goes to a
client or relay that has an address. A client that has none yet cannot answer ARP, so its answer goes out as a whole
frame through a packet socket. A third socket hears the ARP that reaches the bridge, from which the server learns which
addresses are in use.

The firewall marks each frame with the number of the switch port it came in through; SO_RCVMARK gives that mark with the
datagram (Linux 5.19). On older kernels the port is not known, and the server goes by RFC 2131 alone.

An ACK that changed a lease waits for the lease file (see lease_file); everything else leaves at once. A wake takes at
most 64 datagrams; when there were that many, the socket rests for two milliseconds, so that a flood costs its share of
the loop and no more. Sending never blocks: what the kernel has no room for is counted and lost, and the client asks
again, as DHCP provides for.
"""

from __future__ import annotations

import logging
import socket
import struct
import time
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.service.lease_file import Committer
from openvmnet.wire import ethernet, ip
from openvmnet.wire.dhcp4 import SERVER_PORT

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.service.dhcp import DhcpServer, Reply

log = logging.getLogger(__name__)

SO_RCVMARK = 75
"""asm-generic/socket.h, Linux 5.19; Python's socket module has no name for it."""

_SO_MARK = 36
_BATCH = 64  # datagrams a wake
_REST = 0.002  # seconds after a full batch
_MAX_DATAGRAM = 2048  # octets; a DHCP message on a bridge is never fragmented beyond that in practice
_ANCILLARY = socket.CMSG_SPACE(4)
_U32 = struct.Struct("=I")


class DhcpService:
    """The server on its sockets. `arp_sock` is None where nothing shall be learnt from ARP.

    `udp_sock`: UDP, 0.0.0.0:67, SO_BINDTODEVICE to the bridge, SO_BROADCAST. `raw_sock`: AF_PACKET, SOCK_RAW, bound to
    the bridge with protocol 0 (it only sends). `arp_sock`: AF_PACKET, SOCK_RAW, bound to the bridge with ETH_P_ARP.
    All are the service's from here on: `close()` closes them.
    """

    def __init__(
        self,
        lane: Lane,
        udp_sock: socket.socket,
        raw_sock: socket.socket,
        arp_sock: socket.socket | None,
        server: DhcpServer,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.server = server
        self.lost = 0
        self._lane = lane
        self._udp, self._raw, self._arp = udp_sock, raw_sock, arp_sock
        self._clock = clock
        self._gateway = server.config.gateway.packed
        self._gateway_mac = server.config.gateway_mac
        self._committer: Committer[Reply] = Committer(server.leases, server.leases.file, self._send)
        self._closed = False

    def start(self) -> None:
        """Serve from now on; called on the running loop."""
        for sock in self._sockets():
            sock.setblocking(False)
        for receiving in (self._udp, self._arp):
            if receiving is not None:
                ask_for_mark(receiving)
        self._lane.watch(self._udp.fileno(), READ, self._on_udp)
        if self._arp is not None:
            self._lane.watch(self._arp.fileno(), READ, self._on_arp)
        self.server.leases.on_change = self._committer.kick_soon
        self._committer.kick()

    def close(self) -> None:
        """Stop serving, write what is not yet on disk (blocks for it), close the sockets."""
        if self._closed:
            return
        self._closed = True
        for sock in self._sockets():
            self._lane.forget(sock.fileno())
        self.server.leases.on_change = None
        self._committer.close()
        for sock in self._sockets():
            sock.close()

    def _sockets(self) -> list[socket.socket]:
        return [self._udp, self._raw] if self._arp is None else [self._udp, self._raw, self._arp]

    # Receiving.

    def _on_udp(self, _mask: int) -> None:
        server, committer = self.server, self._committer
        now = self._clock()
        for _ in range(_BATCH):
            try:
                payload, ancillary, flags, _ = self._udp.recvmsg(_MAX_DATAGRAM, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # an ICMP error that came back for an earlier answer
                log.debug("DHCP socket: %s", error)
                continue
            if flags & socket.MSG_TRUNC:
                server.counters["malformed"] += 1
                continue
            reply = server.handle(payload, source_mac=None, port=port_of(ancillary), now=now)
            if reply is None:
                continue
            if reply.commit:
                committer.hold(reply)
            else:
                self._send(reply)
        else:
            self._lane.rest(self._udp.fileno(), _REST)
        # One write for the whole batch.
        committer.kick()

    def _on_arp(self, _mask: int) -> None:
        arp_sock = self._arp
        if arp_sock is None:
            return
        now = self._clock()
        for _ in range(_BATCH):
            try:
                frame, ancillary, _, _ = arp_sock.recvmsg(64, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # the device went down, for one
                log.debug("ARP socket: %s", error)
                continue
            try:
                arp = ethernet.parse_arp(frame[14:])
            except Malformed:
                continue
            self.server.seen_arp(arp.sender_ip, arp.sender_mac, port=port_of(ancillary), now=now)
        else:
            self._lane.rest(arp_sock.fileno(), _REST)

    # Sending.

    def _send(self, reply: Reply) -> None:
        try:
            if reply.raw:
                packet = ip.build_udp(self._gateway, reply.ip, SERVER_PORT, reply.port, reply.payload)
                self._raw.send(ethernet.build(reply.mac, self._gateway_mac, ethernet.IPV4, packet))
            else:
                self._udp.sendto(reply.payload, (str(IPv4Address(reply.ip)), reply.port))
        except OSError as error:  # no buffer, the device is down, no route: the client asks again
            self.lost += 1
            log.debug("a DHCP answer was lost: %s", error)


def ask_for_mark(sock: socket.socket) -> None:
    """Have the kernel tell each packet's mark; who made the socket may have done so already, with more rights."""
    try:
        if not sock.getsockopt(socket.SOL_SOCKET, SO_RCVMARK):
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
    except OSError as error:
        log.info("DHCP does not learn which port a packet came through (SO_RCVMARK, Linux 5.19): %s", error)


def port_of(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """The packet's mark as a port number; 0 is no mark."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_MARK and len(data) == _U32.size:
            return int(_U32.unpack(data)[0]) or None
    return None
