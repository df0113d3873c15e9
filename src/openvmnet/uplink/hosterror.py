"""The errors that the outside reports to a host socket, and the ICMP messages a guest gets for them.

With IP_RECVERR or IPV6_RECVERR the kernel queues each ICMP error about a connected socket with what it said and who
said it (ip(7), struct sock_extended_err). The guest gets the same message about its own packet, from the same router,
so that its kernel, its traceroute and its path MTU discovery see what they would see without us.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from openvmnet.kernel.sockets import IP_RECVERR
from openvmnet.kernel.sockets6 import IPV6_RECVERR
from openvmnet.wire import ip, ip6

_ERRORS = 16  # read at one go; the queue is bounded by the socket's buffer
_EXTENDED = struct.Struct("=IBBBBII")  # ee_errno, ee_origin, ee_type, ee_code, ee_pad, ee_info, ee_data
_FROM_ICMP = (2, 3)  # SO_EE_ORIGIN_ICMP, SO_EE_ORIGIN_ICMP6; the host's own kernel is SO_EE_ORIGIN_LOCAL
_QUEUES = ((socket.SOL_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR))
_MSG_ERRQUEUE = 0x2000

# A local errno as the code of ICMP "destination unreachable", where the kernel refused without asking the network.
UNREACHABLE = {
    errno.ENETUNREACH: ip.NET,
    errno.EHOSTUNREACH: ip.HOST,
    errno.EHOSTDOWN: ip.HOST,
    errno.ECONNREFUSED: ip.PORT,
    errno.EACCES: ip.ADMIN_PROHIBITED,
    errno.EPERM: ip.ADMIN_PROHIBITED,
    errno.EINVAL: ip.NET,
    errno.ENOPROTOOPT: ip.PROTOCOL,
}
# The same for ICMPv6. A host without IPv6 has no such sockets, or no address to send from.
UNREACHABLE6 = {
    errno.ENETUNREACH: ip6.NO_ROUTE,
    errno.EAFNOSUPPORT: ip6.NO_ROUTE,
    errno.EHOSTUNREACH: ip6.ADDRESS,
    errno.EHOSTDOWN: ip6.ADDRESS,
    errno.ECONNREFUSED: ip6.PORT,
    errno.EACCES: ip6.ADMIN_PROHIBITED,
    errno.EPERM: ip6.ADMIN_PROHIBITED,
    errno.EINVAL: ip6.NO_ROUTE,
}


class HostError(NamedTuple):
    """One queued error: `kind` and `code` as in ICMP (kind None: the kernel's own), `offender` its sender, `data` the
    start of the payload it is about."""

    number: int
    kind: int | None
    code: int
    info: int
    offender: bytes | None
    data: bytes


def read(fd: int) -> list[HostError]:
    """Take what is in the error queue of socket `fd`, and clear SO_ERROR."""
    found: list[HostError] = []
    view = socket.socket(fileno=fd)
    try:
        view.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        while len(found) < _ERRORS:
            data, ancillary, _, _ = view.recvmsg(64, 512, _MSG_ERRQUEUE | socket.MSG_DONTWAIT)
            for level, kind, payload in ancillary:
                if (level, kind) in _QUEUES and len(payload) >= _EXTENDED.size:
                    found.append(_decode(payload, data))
    except OSError:  # EAGAIN: the queue is empty
        pass
    finally:
        view.detach()
    return found


def as_icmp(error: HostError, *, quoted: bytes, destination: bytes) -> bytes | None:
    """The IPv4 packet that tells a guest of `error` about its packet `quoted` (header and eight octets) sent to
    `destination`; None where there is nothing to tell."""
    source = error.offender or destination
    if error.number == errno.EMSGSIZE:
        return ip.build_error(source, quoted, ip.UNREACHABLE, ip.FRAGMENTATION_NEEDED, rest=error.info & 0xFFFF)
    if error.kind in (ip.UNREACHABLE, ip.TIME_EXCEEDED):
        return ip.build_error(source, quoted, error.kind, error.code)
    code = UNREACHABLE.get(error.number)
    return None if code is None else ip.build_error(source, quoted, ip.UNREACHABLE, code)


def as_icmp6(error: HostError, *, quoted: bytes, destination: bytes) -> bytes | None:
    """The IPv6 packet that tells a guest of `error` about its packet `quoted`, sent to `destination`; or None."""
    source = error.offender or destination
    if error.number == errno.EMSGSIZE:
        return ip6.build_error(source, quoted, ip6.PACKET_TOO_BIG, 0, rest=error.info)
    if error.kind in (ip6.UNREACHABLE, ip6.TIME_EXCEEDED):
        return ip6.build_error(source, quoted, error.kind, error.code)
    code = UNREACHABLE6.get(error.number)
    return None if code is None else ip6.build_error(source, quoted, ip6.UNREACHABLE, code)


def _decode(payload: bytes, data: bytes) -> HostError:
    number, origin, kind, code, _, info, _ = _EXTENDED.unpack_from(payload)
    # struct sockaddr_in or sockaddr_in6; AF_UNSPEC where nobody is known
    where = payload[_EXTENDED.size :]
    family = struct.unpack_from("=H", where)[0] if len(where) >= 8 else socket.AF_UNSPEC
    offender = None
    if family == socket.AF_INET:
        offender = where[4:8]
    elif family == socket.AF_INET6 and len(where) >= 24:
        offender = where[8:24]
    return HostError(number, kind if origin in _FROM_ICMP else None, code, info, offender, data)
