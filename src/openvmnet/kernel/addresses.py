"""This host's own IP addresses, asked of the kernel by rtnetlink(7)."""

from __future__ import annotations

import socket
import struct
import sys

from openvmnet.kernel import netlink

_GETADDR, _NEWADDR = 22, 20
_MESSAGE = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_UNIVERSE = 0  # RT_SCOPE_UNIVERSE: neither of this host alone nor of one link
_UNUSABLE = 0x08 | 0x20 | 0x40  # IFA_F_DADFAILED, DEPRECATED, TENTATIVE


def own(family: int) -> list[bytes]:
    """The addresses of `family` (AF_INET, AF_INET6) that others could reach this host at, as the kernel lists them.

    Loopback and link-local ones are not among them, nor those that are not in use yet or any more.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, netlink.NETLINK_ROUTE) as sock:
        sock.settimeout(1.0)
        found = []
        for kind, body in netlink.dump(sock, _GETADDR, _MESSAGE.pack(family, 0, 0, 0, 0)):
            if kind != _NEWADDR or body[0] != family:
                continue
            _, _, flags, scope, _ = _MESSAGE.unpack_from(body)
            told = netlink.attributes(body, _MESSAGE.size)
            flags |= int.from_bytes(told.get(_IFA_FLAGS, b""), sys.byteorder)
            address = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS, b"")
            # 127.0.0.0/8 has host scope on every usual host, but nobody has to keep to that.
            if scope == _UNIVERSE and not flags & _UNUSABLE and not address.startswith(b"\x7f") and address:
                found.append(address)
    return found
