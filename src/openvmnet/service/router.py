"""The router advertiser: it tells guests the prefix, the way out, the MTU and the name server (RFC 4861, RFC 8106).

How it works. On a raw ICMPv6 socket of the bridge, on which the kernel lets through router solicitations alone, each
solicitation is answered at once. RFC 4861 section 6.2.6 has a router wait up to half a second, lest several routers
answer at the same time, and three seconds between advertisements to everybody; here is one router, and a guest that
boots waits for its answer. So a guest with an address is answered by unicast, which is nobody else's work, and one
without (source ::) by multicast.

What a guest may ask for is bounded by its port: a few answers at once, then one a second, and of answers to everybody
the network as a whole gets no more than it could bear from that many guests that boot. What is beyond is counted and
not answered: a client asks three times, four seconds apart.

Everybody hears an advertisement every few minutes, long before the last one's lifetimes end, and one last with lifetime
zero when the network ends, so that guests do not send into nothing. Both of M and O are set beside the prefix's A flag:
who configures itself is content with that, and who speaks DHCPv6 is served too.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.notice import Notice
from openvmnet.service.buckets import Bucket, Buckets
from openvmnet.service.dhcp_socket import port_of
from openvmnet.wire import icmp6
from openvmnet.wire.icmp6 import Advertisement, Prefix

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv6Address, IPv6Network

    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)

INTERVAL = (200.0, 600.0)
"""Seconds between unsolicited advertisements: at random in between, RFC 4861 section 6.2.1's defaults."""
LIFETIME = 1800
"""Seconds that a guest relies on the router, and on its name server, without hearing of it: three long intervals."""
_VALID, _PREFERRED = 86400, 14400  # s, of the prefix; renewed with each advertisement
_INITIAL = (0.2, 16.0, 16.0)  # s between the first ones (RFC 4861 section 6.2.4): guests of a process before this one

_ALL_NODES, _ALL_ROUTERS = "ff02::1", "ff02::2"
_ICMP6_FILTER = 1  # linux/icmpv6.h
_RECVHOPLIMIT, _HOPLIMIT = 51, 52  # linux/in6.h: IPV6_RECVHOPLIMIT, IPV6_HOPLIMIT
_BATCH = 32  # solicitations a wake
_REST = 0.01  # s after a full batch
_BURST, _REFILL = 4.0, 1.0  # answers of one port: at once, and a second
_EVERYBODY_BURST, _EVERYBODY_REFILL = 64.0, 16.0  # answers by multicast, of all ports together
_ANCILLARY = 2 * socket.CMSG_SPACE(4)


def advertisement(
    prefix: IPv6Network, dns: IPv6Address, mac: bytes, mtu: int, *, domain: str, routed: bool
) -> Advertisement:
    """What a network with this prefix tells; `routed` says whether there is a way out."""
    return Advertisement(
        lifetime=LIFETIME if routed else 0,
        prefixes=(Prefix(prefix.network_address.packed, prefix.prefixlen, _VALID, _PREFERRED),),
        managed=True,
        other=True,
        mtu=mtu,
        mac=mac,
        dns=(dns.packed,),
        search=(domain,),
        dns_lifetime=LIFETIME,
    )


class RouterService:
    """Advertises `advertisement` on `sock`: AF_INET6, SOCK_RAW, ICMPv6, bound to the bridge device `ifindex`."""

    def __init__(
        self,
        lane: Lane,
        sock: socket.socket,
        ifindex: int,
        advertisement: Advertisement,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = dict.fromkeys(("solicitations", "advertisements", "malformed", "limited", "lost"), 0)
        self._lane = lane
        self._sock = sock
        self._ifindex = ifindex
        self._clock = clock
        self._message = icmp6.build_advertisement(advertisement)
        # The name server goes with the router (RFC 8106 section 5.1); the prefix stays the guests' own.
        self._farewell = icmp6.build_advertisement(msgspec.structs.replace(advertisement, lifetime=0, dns_lifetime=0))
        self._buckets = Buckets(_BURST, _REFILL)
        self._everybody = Bucket(_EVERYBODY_BURST, _EVERYBODY_REFILL, clock())
        self._limited = Notice(log)
        self._timer: asyncio.TimerHandle | None = None
        self._sent = 0

    def start(self) -> None:
        """Advertise from now on; called on the running loop."""
        prepare(self._sock, self._ifindex)
        self._lane.watch(self._sock.fileno(), READ, self._on_readable)
        self._unsolicited()

    def port_gone(self, port: int) -> None:
        """What was counted against a port is void."""
        self._buckets.forget(port)

    def close(self) -> None:
        """Say that the router goes, and stop."""
        if self._sock.fileno() < 0:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._lane.forget(self._sock.fileno())
        self._send(self._farewell, _ALL_NODES)
        self._sock.close()

    def _unsolicited(self) -> None:
        self._send(self._message, _ALL_NODES)
        initial = _INITIAL[self._sent] if self._sent < len(_INITIAL) else None
        self._sent += 1
        delay = initial if initial is not None else random.uniform(*INTERVAL)
        self._timer = asyncio.get_running_loop().call_later(delay, self._unsolicited)

    def _on_readable(self, _mask: int) -> None:
        now = self._clock()
        everybody = False
        for _ in range(_BATCH):
            try:
                message, ancillary, _, sender = self._sock.recvmsg(1500, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # the device went down, for one
                log.debug("router solicitations: %s", error)
                break
            self.counters["solicitations"] += 1
            source = str(sender[0]).partition("%")[0]
            try:
                _check(message, source, ancillary)
            except Malformed as error:
                self.counters["malformed"] += 1
                log.debug("a malformed router solicitation: %s", error)
                continue
            if not self._admit(port_of(ancillary), now):
                self.counters["limited"] += 1
            elif source.startswith("fe80:"):
                self._send(self._message, source)
            else:
                everybody = True
        else:
            self._lane.rest(self._sock.fileno(), _REST)
        if everybody:  # one for all that this batch asked for
            if self._everybody.take(now):
                self._send(self._message, _ALL_NODES)
            else:
                self.counters["limited"] += 1
                self._limited.warn("guests ask for more router advertisements to everybody than there may be")

    def _admit(self, port: int | None, now: float) -> bool:
        if self._buckets.take(port, now):
            return True
        self._limited.warn("port %s asks for more router advertisements than it may", port)
        return False

    def _send(self, message: bytes, where: str) -> None:
        try:
            self._sock.sendto(message, (where, 0, 0, self._ifindex))
        except OSError as error:  # no buffer, the device is down: the guest asks again
            self.counters["lost"] += 1
            log.debug("a router advertisement was lost: %s", error)
        else:
            self.counters["advertisements"] += 1


def prepare(sock: socket.socket, ifindex: int) -> None:
    """Have the kernel let router solicitations through alone, tell their hop limit, and send with the right one."""
    sock.setblocking(False)
    words = [0xFFFFFFFF] * 8  # a bit for each type, set where it is held back: RFC 3542 section 3.2
    words[icmp6.ROUTER_SOLICITATION >> 5] &= ~(1 << (icmp6.ROUTER_SOLICITATION & 31)) & 0xFFFFFFFF
    sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))
    sock.setsockopt(socket.IPPROTO_IPV6, _RECVHOPLIMIT, 1)
    for option in (socket.IPV6_MULTICAST_HOPS, socket.IPV6_UNICAST_HOPS):
        sock.setsockopt(socket.IPPROTO_IPV6, option, 255)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
    join(sock, _ALL_ROUTERS, ifindex)


def join(sock: socket.socket, group: str, ifindex: int) -> None:
    """Hear a multicast group on one device; that a process before this one's socket did so is no matter."""
    packed = socket.inet_pton(socket.AF_INET6, group) + struct.pack("=I", ifindex)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, packed)


def _check(message: bytes, source: str, ancillary: list[tuple[int, int, bytes]]) -> None:
    """RFC 4861 section 6.1.1."""
    mac = icmp6.parse_solicitation(message)
    if source == "::" and mac is not None:
        raise Malformed("a solicitation without a source that tells a link-layer address")
    hops = [data for level, kind, data in ancillary if level == socket.IPPROTO_IPV6 and kind == _HOPLIMIT]
    if not hops or int.from_bytes(hops[0], sys.byteorder) != 255:
        raise Malformed("a solicitation that has been forwarded")
