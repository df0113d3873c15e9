"""A port of this host's, taken for a published port: a listener, or a UDP socket, with what the host refuses in words.

It is an ordinary socket of the user's in the host's own network namespace. A UDP port is taken without SO_REUSEADDR,
which on Linux would share it with any other program that sets it.
"""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from openvmnet.errors import Conflict, HostError, MissingFeature, OptionError
from openvmnet.kernel.sockets import IP_PKTINFO
from openvmnet.kernel.sockets6 import IPV6_RECVPKTINFO
from openvmnet.netdev.hostfwd import refusal

if TYPE_CHECKING:
    from openvmnet.netdev import Forward

ANY = IPv4Address("0.0.0.0")  # noqa: S104 - what a rule without a host address asks for, as QEMU's
_BACKLOG = 4096
_BUFFER = 1 << 20  # octets; the kernel clamps it to net.core.rmem_max
_PRIVILEGED = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def take(forward: Forward) -> socket.socket:
    """The host's port of `forward`: a TCP listener or a bound UDP socket, non-blocking.

    Raises Conflict where another has it, MissingFeature where this user may not, OptionError for an address that is
    none of the host's, HostError for anything else. The socket tells with each datagram which address it came to.
    """
    address = forward.host or ANY
    family = socket.AF_INET6 if isinstance(address, IPv6Address) else socket.AF_INET
    kind = socket.SOCK_STREAM if forward.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK)
    except OSError as error:
        _refuse(forward, address, error)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), forward.host_port))
            sock.listen(_BACKLOG)
        else:
            told = (socket.IPPROTO_IPV6, IPV6_RECVPKTINFO) if family == socket.AF_INET6 else (socket.SOL_IP, IP_PKTINFO)
            sock.setsockopt(*told, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            sock.bind((str(address), forward.host_port))
    except OSError as error:
        sock.close()
        _refuse(forward, address, error)
    return sock


def _refuse(forward: Forward, address: IPv4Address | IPv6Address, error: OSError) -> NoReturn:
    port = f"{forward.protocol} port {forward.host_port}"
    where = "of this host" if forward.host is None else f"of {address}"
    if error.errno == errno.EADDRINUSE:
        why = f"{port} {where} is in use"
        raise Conflict(refusal(forward, why), hint=f"ss -lnp 'sport = :{forward.host_port}'") from error
    if error.errno in (errno.EACCES, errno.EPERM):
        least = _least()
        why = (
            f"ports below {least} are for root on this host, and {forward.host_port} is one; "
            f"{least} to 65535 would be right"
        )
        hint = f"sudo sysctl net.ipv4.ip_unprivileged_port_start={forward.host_port}"
        raise MissingFeature(refusal(forward, why), hint=hint) from error
    if error.errno == errno.EADDRNOTAVAIL:
        why = f"{address} is no address of this host"
        raise OptionError(refusal(forward, why), option="hostfwd", value=str(forward), hint="ip address") from error
    raise HostError(refusal(forward, error.strerror or os.strerror(error.errno or 0))) from error


def _least() -> int:
    """The lowest port that a user without rights may have: ip(7)."""
    try:
        return int(_PRIVILEGED.read_text())
    except (OSError, ValueError):
        return 1024
