"""Socket calls on bare descriptors, by ctypes.

A `socket.socket` costs the data path memory (two objects a flow for as long as it lives) and system calls that it has
no use for: `accept()` follows accept4(2) with getsockname(2) and an ioctl(2) for O_NONBLOCK. Here accept4(2) does it
in one call, and addresses stay the bytes they are in packets: a *peer* below is 6 octets, port and IPv4 address in
network order, as they lie in struct sockaddr_in and, swapped around, in a packet's header.
Every call raises OSError with the kernel's errno, except where its docstring says otherwise.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

_libc = ctypes.CDLL(None, use_errno=True)

_FAMILY = struct.pack("=H", socket.AF_INET)
_PADDING = bytes(8)
_SOCKADDR = 16  # sizeof(struct sockaddr_in)
_TCP_CLOSE = 7  # include/net/tcp_states.h
NONBLOCK = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC

IP_TRANSPARENT = 19
IP_PKTINFO = 8
IP_RECVERR = 11
IP_RECVTTL = 12
IP_MTU_DISCOVER = 10
IP_PMTUDISC_DONT, IP_PMTUDISC_WANT, IP_PMTUDISC_DO = 0, 1, 2

_address = ctypes.create_string_buffer(_SOCKADDR)
_length = ctypes.c_uint32(_SOCKADDR)
_length_ref = ctypes.byref(_length)
_one = ctypes.c_int(1)
_one_ref = ctypes.byref(_one)
_value = ctypes.c_int()
_value_ref = ctypes.byref(_value)
_octet = ctypes.c_uint8()
_octet_ref = ctypes.byref(_octet)
_linger_now = struct.pack("=ii", 1, 0)

# Without `argtypes`: ctypes knows an int, bytes and a reference by itself, in half the time that a declaration takes.
libc_socket = _libc.socket
libc_connect = _libc.connect
libc_bind = _libc.bind
libc_accept4 = _libc.accept4
libc_getsockname = _libc.getsockname
_shutdown = _libc.shutdown
_setsockopt = _libc.setsockopt
_getsockopt = _libc.getsockopt


def tcp() -> int:
    """A non-blocking IPv4 TCP socket."""
    return made(libc_socket(socket.AF_INET, socket.SOCK_STREAM | NONBLOCK, 0))


def udp() -> int:
    """A non-blocking IPv4 UDP socket."""
    return made(libc_socket(socket.AF_INET, socket.SOCK_DGRAM | NONBLOCK, 0))


def ping() -> int:
    """A non-blocking ICMP ping socket: icmp(7), net.ipv4.ping_group_range."""
    return made(libc_socket(socket.AF_INET, socket.SOCK_DGRAM | NONBLOCK, socket.IPPROTO_ICMP))


def connect(fd: int, peer: bytes) -> int:
    """Connect to `peer`; gives 0, EINPROGRESS, or the errno of the refusal (it raises nothing)."""
    if libc_connect(fd, _FAMILY + peer + _PADDING, _SOCKADDR) == 0:
        return 0
    return ctypes.get_errno()


def bind(fd: int, peer: bytes) -> None:
    """Bind to the address and port of `peer`."""
    if libc_bind(fd, _FAMILY + peer + _PADDING, _SOCKADDR) != 0:
        raise error()


def accept(listener: int) -> tuple[int, bytes] | None:
    """One waiting connection, non-blocking, with its peer; None when none waits or the one that did is gone."""
    _length.value = _SOCKADDR
    fd = libc_accept4(listener, _address, _length_ref, NONBLOCK)
    if fd < 0:
        refuse_unless_gone()
        return None
    return fd, _address.raw[2:8]


def local(fd: int) -> bytes:
    """The socket's own end: for an accepted transparent connection, where the guest wanted to go."""
    _length.value = _SOCKADDR
    if libc_getsockname(fd, _address, _length_ref) != 0:
        raise error()
    return _address.raw[2:8]


def shut_write(fd: int) -> None:
    """Send FIN; a connection that is gone already is no error."""
    _shutdown(fd, socket.SHUT_WR)


def set_option(fd: int, level: int, option: int, value: int = 1) -> None:
    """setsockopt(2) of an int; a socket that cannot take it keeps its default (it raises nothing)."""
    if value == 1:
        _setsockopt(fd, level, option, _one_ref, 4)
    else:
        _value.value = value
        _setsockopt(fd, level, option, _value_ref, 4)


def pending_error(fd: int) -> int:
    """SO_ERROR: the errno of what went wrong behind the scenes, 0 for nothing; reading clears it."""
    _length.value = 4
    _getsockopt(fd, socket.SOL_SOCKET, socket.SO_ERROR, _value_ref, _length_ref)
    return _value.value


def is_closed(fd: int) -> bool:
    """Whether a TCP socket that was connected is no more: reset, timed out, or through with everything (tcp(7))."""
    _length.value = 1
    _getsockopt(fd, socket.IPPROTO_TCP, socket.TCP_INFO, _octet_ref, _length_ref)  # tcpi_state comes first
    return _octet.value == _TCP_CLOSE


def abort(fd: int) -> None:
    """Close with a RST instead of a FIN: what was not read or sent is thrown away (socket(7), SO_LINGER)."""
    _setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, _linger_now, 8)
    os.close(fd)


def made(fd: int) -> int:
    """The descriptor that a call of libc's gave, unless it is an error."""
    if fd < 0:
        raise error()
    return int(fd)


def refuse_unless_gone() -> None:
    """Raise what accept4(2) failed with, unless no connection waits or the one that did is gone."""
    failure = error()
    if failure.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR):
        raise failure


def error() -> OSError:
    """What errno says of libc's last call that failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
