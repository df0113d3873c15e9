"""Socket calls on bare descriptors for IPv6: the twins of what `kernel.sockets` has for IPv4.

A *peer* here is 18 octets: port and IPv6 address in network order. There is no scope: link-local addresses are nobody's
destination outside. A kernel takes `::ffff:0:0/96` for IPv4, with the host's own loopback in it (RFC 4291, 2.5.5.2):
`connect()` refuses these without asking it.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct

from openvmnet.kernel.sockets import (
    NONBLOCK,
    error,
    libc_accept4,
    libc_bind,
    libc_connect,
    libc_getsockname,
    libc_socket,
    made,
    refuse_unless_gone,
)

IPV6_TRANSPARENT = 75
IPV6_RECVPKTINFO, IPV6_PKTINFO = 49, 50
IPV6_RECVERR = 25
IPV6_MTU_DISCOVER = 23
IPV6_RECVFRAGSIZE = 77

_FAMILY = struct.pack("=H", socket.AF_INET6)
_FLOW, _SCOPE = bytes(4), bytes(4)
_SOCKADDR = 28  # sizeof(struct sockaddr_in6)
_MAPPED = bytes(10) + b"\xff\xff"  # the first twelve octets of an IPv4 address in IPv6's clothes

_address = ctypes.create_string_buffer(_SOCKADDR)
_length = ctypes.c_uint32(_SOCKADDR)
_length_ref = ctypes.byref(_length)


def tcp() -> int:
    """A non-blocking IPv6 TCP socket."""
    return made(libc_socket(socket.AF_INET6, socket.SOCK_STREAM | NONBLOCK, 0))


def udp() -> int:
    """A non-blocking IPv6 UDP socket."""
    return made(libc_socket(socket.AF_INET6, socket.SOCK_DGRAM | NONBLOCK, 0))


def ping() -> int:
    """A non-blocking ICMPv6 ping socket: icmp(7), net.ipv4.ping_group_range."""
    return made(libc_socket(socket.AF_INET6, socket.SOCK_DGRAM | NONBLOCK, socket.IPPROTO_ICMPV6))


def connect(fd: int, peer: bytes) -> int:
    """Connect to `peer`; gives 0, EINPROGRESS, or the errno of the refusal (it raises nothing)."""
    if peer[2:14] == _MAPPED:
        return errno.ENETUNREACH
    if libc_connect(fd, _FAMILY + peer[:2] + _FLOW + peer[2:] + _SCOPE, _SOCKADDR) == 0:
        return 0
    return ctypes.get_errno()


def bind(fd: int, peer: bytes) -> None:
    """Bind to the address and port of `peer`."""
    if libc_bind(fd, _FAMILY + peer[:2] + _FLOW + peer[2:] + _SCOPE, _SOCKADDR) != 0:
        raise error()


def accept(listener: int) -> tuple[int, bytes] | None:
    """One waiting connection, non-blocking, with its peer; None when none waits or the one that did is gone."""
    _length.value = _SOCKADDR
    fd = libc_accept4(listener, _address, _length_ref, NONBLOCK)
    if fd < 0:
        refuse_unless_gone()
        return None
    raw = _address.raw
    return fd, raw[2:4] + raw[8:24]


def local(fd: int) -> bytes:
    """The socket's own end: for an accepted transparent connection, where the guest wanted to go."""
    _length.value = _SOCKADDR
    if libc_getsockname(fd, _address, _length_ref) != 0:
        raise error()
    raw = _address.raw
    return raw[2:4] + raw[8:24]
