"""What differs between IPv4 and IPv6 for who opens flows: sockets, packets, and how errors are told.

The uplinks are written once, over a `Family`. An address is 4 or 16 octets, a *peer* a port and an address (2 octets
more), both in network order, so the tables of an uplink need not know which they hold: no key of the one is a key of
the other.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from openvmnet.kernel import sockets, sockets6
from openvmnet.uplink import hosterror
from openvmnet.wire import ip, ip6


class SocketCalls(Protocol):
    """`kernel.sockets` and its twin."""

    def tcp(self) -> int: ...
    def udp(self) -> int: ...
    def ping(self) -> int: ...
    def connect(self, fd: int, peer: bytes) -> int: ...
    def bind(self, fd: int, peer: bytes) -> None: ...
    def accept(self, listener: int) -> tuple[int, bytes] | None: ...
    def local(self, fd: int) -> bytes: ...


class Packets(Protocol):
    """`wire.ip` and its twin."""

    UNREACHABLE: int
    ECHO_REQUEST: int

    def build_echo_reply(
        self, src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes, *, ttl: int = 64
    ) -> bytes: ...
    def build_echo_request(self, src: bytes, dst: bytes, identifier: int, sequence: int, data: bytes) -> bytes: ...
    def build_reset(self, packet: bytes, header: ip.Header) -> bytes: ...
    def build_error(self, source: bytes, packet: bytes, kind: int, code: int, *, rest: int = 0) -> bytes: ...


class AsIcmp(Protocol):
    """`hosterror.as_icmp` and its twin."""

    def __call__(self, error: hosterror.HostError, *, quoted: bytes, destination: bytes) -> bytes | None: ...


class Family(msgspec.Struct, frozen=True, eq=False):
    """One version of IP. Socket options are pairs of level and name."""

    sockets: SocketCalls
    packets: Packets
    addresses: slice  # source and destination in a packet
    unreachable: Mapping[int, int]  # the code of "destination unreachable" by what the host's kernel said
    as_icmp: AsIcmp
    headers: int  # octets of an IP and a UDP header
    receive_errors: tuple[int, int]
    mtu_discover: tuple[int, int]
    hops: tuple[int, int]
    receive_hops: tuple[int, int]
    hops_received: tuple[int, int]  # the ancillary message that it brings
    text: Callable[[bytes], str]


IPV4 = Family(
    sockets=sockets,
    packets=ip,
    addresses=slice(12, 20),
    unreachable=hosterror.UNREACHABLE,
    as_icmp=hosterror.as_icmp,
    headers=28,
    receive_errors=(socket.SOL_IP, sockets.IP_RECVERR),
    mtu_discover=(socket.SOL_IP, sockets.IP_MTU_DISCOVER),
    hops=(socket.SOL_IP, socket.IP_TTL),
    receive_hops=(socket.SOL_IP, sockets.IP_RECVTTL),
    hops_received=(socket.SOL_IP, socket.IP_TTL),
    text=socket.inet_ntoa,
)
IPV6 = Family(
    sockets=sockets6,
    packets=ip6,
    addresses=slice(8, 40),
    unreachable=hosterror.UNREACHABLE6,
    as_icmp=hosterror.as_icmp6,
    headers=48,
    receive_errors=(socket.IPPROTO_IPV6, sockets6.IPV6_RECVERR),
    mtu_discover=(socket.IPPROTO_IPV6, sockets6.IPV6_MTU_DISCOVER),
    hops=(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    receive_hops=(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT),
    hops_received=(socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT),
    text=lambda address: socket.inet_ntop(socket.AF_INET6, address),
)


def of(address: bytes) -> Family:
    """The family of an address, for what is not in a hurry."""
    return IPV4 if len(address) == 4 else IPV6


def nowhere(_: bytes, __: int) -> bytes | None:
    """No address at all."""
    return None


def itself(address: bytes, _: int) -> bytes | None:
    """Where a guest's destination, an address and a port, is to be found: there."""
    return address
