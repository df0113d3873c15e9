"""The errors that the outside reports to a host socket, and the ICMP messages a guest gets for them.

With IP_RECVERR the kernel queues each ICMP error about a connected socket with what it said and who said it (ip(7),
struct sock_extended_err). The guest gets the same message about its own packet, from the same router, so that its
kernel, its traceroute and its path MTU discovery see what they would see without us.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from openvmnet.kernel.sockets import IP_RECVERR
from openvmnet.wire import ip

_ERRORS = 16  # read at one go; the queue is bounded by the socket's buffer
_EXTENDED = struct.Struct("=IBBBBII")  # ee_errno, ee_origin, ee_type, ee_code, ee_pad, ee_info, ee_data
_FROM_HOST, _FROM_ICMP = 1, 2  # SO_EE_ORIGIN_LOCAL, SO_EE_ORIGIN_ICMP
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
                if level == socket.SOL_IP and kind == IP_RECVERR and len(payload) >= _EXTENDED.size:
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


def _decode(payload: bytes, data: bytes) -> HostError:
    number, origin, kind, code, _, info, _ = _EXTENDED.unpack_from(payload)
    offender = payload[_EXTENDED.size :]  # struct sockaddr_in, AF_UNSPEC where nobody is known
    known = len(offender) >= 8 and struct.unpack_from("=H", offender)[0] == socket.AF_INET
    from_icmp = origin == _FROM_ICMP
    return HostError(number, kind if from_icmp else None, code, info, offender[4:8] if known else None, data)
