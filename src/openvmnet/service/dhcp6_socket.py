"""DHCPv6's I/O: one UDP socket that an agent made in the network's namespace, bound to the bridge and port 547.

As DHCPv4's (dhcp_socket), but simpler: every client has a link-local address, to which the answer goes. An answer that
changed a lease waits for the lease file. Who asks is known by the mark of the port, where the kernel tells it.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.kernel.loop import READ
from openvmnet.service.dhcp_socket import ask_for_mark, port_of
from openvmnet.service.lease_file import Committer
from openvmnet.service.router import join
from openvmnet.wire import dhcp6

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.service.dhcp6 import Dhcp6Server

log = logging.getLogger(__name__)

_GROUP = socket.inet_ntop(socket.AF_INET6, dhcp6.SERVERS)
_BATCH = 64  # datagrams a wake
_REST = 0.002  # s after a full batch
_MAX_DATAGRAM = 2048  # octets
_ANCILLARY = socket.CMSG_SPACE(4)


class _Outgoing(NamedTuple):
    payload: bytes
    where: str


class Dhcp6Service:
    """The server on `sock`, which is the service's from here on: AF_INET6, UDP, [::]:547 of the bridge `ifindex`."""

    def __init__(
        self,
        lane: Lane,
        sock: socket.socket,
        ifindex: int,
        server: Dhcp6Server,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.server = server
        self.lost = 0
        self._lane = lane
        self._sock = sock
        self._ifindex = ifindex
        self._clock = clock
        self._committer: Committer[_Outgoing] = Committer(server.leases, server.leases.file, self._send)

    def start(self) -> None:
        """Serve from now on; called on the running loop."""
        self._sock.setblocking(False)
        ask_for_mark(self._sock)
        join(self._sock, _GROUP, self._ifindex)
        self._lane.watch(self._sock.fileno(), READ, self._on_readable)
        self.server.leases.on_change = self._committer.kick_soon
        self._committer.kick()

    def close(self) -> None:
        """Stop serving, write what is not yet on disk (blocks for it), close the socket."""
        if self._sock.fileno() < 0:
            return
        self._lane.forget(self._sock.fileno())
        self.server.leases.on_change = None
        self._committer.close()
        self._sock.close()

    def _on_readable(self, _mask: int) -> None:
        server, committer, now = self.server, self._committer, self._clock()
        for _ in range(_BATCH):
            try:
                payload, ancillary, flags, sender = self._sock.recvmsg(_MAX_DATAGRAM, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # an ICMP error that came back for an earlier answer
                log.debug("DHCPv6 socket: %s", error)
                continue
            if flags & socket.MSG_TRUNC:
                server.counters["malformed"] += 1
                continue
            where = str(sender[0]).partition("%")[0]
            source = socket.inet_pton(socket.AF_INET6, where)
            reply = server.handle(payload, source=source, port=port_of(ancillary), now=now)
            if reply is None:
                continue
            if reply.commit:
                committer.hold(_Outgoing(reply.payload, where))
            else:
                self._send(_Outgoing(reply.payload, where))
        else:
            self._lane.rest(self._sock.fileno(), _REST)
        committer.kick()

    def _send(self, outgoing: _Outgoing) -> None:
        try:
            self._sock.sendto(outgoing.payload, (outgoing.where, dhcp6.CLIENT_PORT, 0, self._ifindex))
        except OSError as error:  # no buffer, the device is down: the client asks again
            self.lost += 1
            log.debug("a DHCPv6 answer was lost: %s", error)
