"""How the gateway hears of the IPv6 addresses that guests make for themselves.

How it works. Nobody is told of such an address but the neighbours, which are asked whether one of them has it: before
it uses an address, a guest sends a neighbour solicitation for it from the unspecified address (RFC 4862 section 5.4).
A packet socket on the bridge hears those, and a filter in the kernel keeps all other IPv6 from it. The gateway then
sends an echo request to the address. For that its kernel has to find the address's MAC, again and again for three
seconds, while the guest takes one to find its address free: thereby the address comes into the neighbour table, from
which `names6` has it, as of a guest that had spoken first.

A solicitation is the guest's word only, so each port has a few such questions at once and then one a second.
"""

from __future__ import annotations

import ctypes
import logging
import socket
import struct
import time
from typing import TYPE_CHECKING

from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.service.buckets import Buckets
from openvmnet.service.dhcp_socket import ask_for_mark, port_of
from openvmnet.wire import icmp6, ip6

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv6Network

    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_BATCH = 32  # solicitations a wake
_REST = 0.01  # s after a full batch
_BURST, _REFILL = 8.0, 1.0  # questions because of one port: at once, and a second
_ANCILLARY = socket.CMSG_SPACE(4)
_ICMPV6 = 58
_PACKET = 128  # octets; a solicitation without a source has 64, and options that nobody needs

_LOAD_WORD, _LOAD_BYTE, _EQUAL, _RETURN = 0x20, 0x30, 0x15, 0x06  # linux/bpf_common.h
_TESTS = (
    (_LOAD_BYTE, 6, _ICMPV6),
    (_LOAD_BYTE, 40, icmp6.NEIGHBOUR_SOLICITATION),
    *((_LOAD_WORD, at, 0) for at in (8, 12, 16, 20)),
)
"""What a packet has to have to be heard: a load, the offset in the IPv6 packet, the value."""


class Newcomers:
    """Asks guests with a fresh address of `prefix` for it. `heard`: AF_PACKET, SOCK_DGRAM, bound to the bridge with
    ETH_P_IPV6, and this one's from here on; `echo`: raw ICMPv6, the router's, which only sends for this."""

    def __init__(
        self,
        lane: Lane,
        heard: socket.socket,
        echo: socket.socket,
        prefix: IPv6Network,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lane = lane
        self._heard, self._echo = heard, echo
        self._network, self._gateway = prefix[0].packed[:8], prefix[1].packed
        self._clock = clock
        self._buckets = Buckets(_BURST, _REFILL)

    def start(self) -> None:
        """Listen from now on; called on the running loop."""
        self._heard.setblocking(False)
        listen_to_probes(self._heard)
        ask_for_mark(self._heard)
        self._lane.watch(self._heard.fileno(), READ, self._on_readable)

    def port_gone(self, port: int) -> None:
        """What was counted against a port is void."""
        self._buckets.forget(port)

    def close(self) -> None:
        """Stop."""
        if self._heard.fileno() >= 0:
            self._lane.forget(self._heard.fileno())
            self._heard.close()

    def _on_readable(self, _mask: int) -> None:
        now = self._clock()
        for _ in range(_BATCH):
            try:
                packet, ancillary, _, _ = self._heard.recvmsg(_PACKET, _ANCILLARY)
            except BlockingIOError:
                break
            except OSError as error:  # the device went down, for one
                log.debug("neighbour solicitations: %s", error)
                break
            target = probed(packet)
            if target is not None and target[:8] == self._network and target != self._gateway:
                self._ask(target, port_of(ancillary), now)
        else:
            self._lane.rest(self._heard.fileno(), _REST)

    def _ask(self, target: bytes, port: int | None, now: float) -> None:
        if not self._buckets.take(port, now):
            return
        try:
            request = struct.pack("!BBHHH", ip6.ECHO_REQUEST, 0, 0, 0, 0)  # the kernel adds the checksum
            self._echo.sendto(request, (socket.inet_ntop(socket.AF_INET6, target), 0))
        except OSError as error:  # no buffer, the device is down: it is learnt when the guest speaks
            log.debug("a fresh address was not asked for: %s", error)


def probed(packet: bytes) -> bytes | None:
    """The address that a guest asks its neighbours for before it takes it; None for any other packet."""
    if len(packet) < 64 or packet[6] != _ICMPV6 or packet[7] != 255 or any(packet[8:24]):
        return None
    try:
        neighbour = icmp6.parse_neighbour(packet[40:])
    except Malformed:
        return None
    return neighbour.target if neighbour.kind == icmp6.NEIGHBOUR_SOLICITATION else None


def listen_to_probes(sock: socket.socket) -> None:
    """Have the kernel give the packet socket nothing but what `probed` may know."""
    code = [
        step
        for index, (load, at, value) in enumerate(_TESTS)
        for step in ((load, 0, 0, at), (_EQUAL, 0, 2 * (len(_TESTS) - index) - 1, value))
    ]
    code += [(_RETURN, 0, 0, _PACKET), (_RETURN, 0, 0, 0)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(code), ctypes.addressof(program)))
