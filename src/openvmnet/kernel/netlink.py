"""What rtnetlink tells: links with their counters, neighbours, and links that go away.

Reading only. Links, addresses and rules are written by `ip -batch -`, which a network engineer can read; but a dump by
a subprocess costs milliseconds and a fork, and the end of a port has to be seen when it happens. The socket is made in
the network's namespace by the agent and tells of that namespace, whoever holds it.
Sources: rtnetlink(7); linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h (Linux 6.1), a frozen ABI.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

NETLINK_ROUTE = 0
GROUP_LINK = 1  # RTMGRP_LINK

_NEWLINK, _DELLINK, _GETLINK = 16, 17, 18
_NEWNEIGH, _GETNEIGH = 28, 30
_ERROR, _DONE = 2, 3
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_LINK = struct.Struct("=BxHiII")  # ifinfomsg
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # ndmsg
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF  # NLA_TYPE_MASK: without "nested" and "network byte order"
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_STATS64 = 1, 3, 23
_NDA_DST, _NDA_LLADDR = 1, 2
_BUFFER = 1 << 17


class Link(NamedTuple):
    """A link and its counters since it was made, as the namespace sees them (rx: what came from the guest)."""

    name: str
    ifindex: int
    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_dropped: int
    tx_dropped: int


class Neighbour(NamedTuple):
    """An IP address that the namespace has resolved, and the MAC it has."""

    address: str
    mac: str
    link: int


def links(sock: socket.socket) -> list[Link]:
    """All links of the socket's namespace."""
    found = []
    for kind, body in dump(sock, _GETLINK, _LINK.pack(0, 0, 0, 0, 0)):
        if kind != _NEWLINK:
            continue
        told = attributes(body, _LINK.size)
        counters = struct.unpack_from("=8Q", told.get(_IFLA_STATS64, bytes(64)))
        ifindex = _LINK.unpack_from(body)[2]
        rx_packets, tx_packets, rx_bytes, tx_bytes, _, _, rx_dropped, tx_dropped = counters
        name = text(told.get(_IFLA_IFNAME, b""))
        found.append(Link(name, ifindex, rx_packets, tx_packets, rx_bytes, tx_bytes, rx_dropped, tx_dropped))
    return found


def neighbours(sock: socket.socket, family: int = socket.AF_INET) -> list[Neighbour]:
    """All neighbours of the socket's namespace in `family` (AF_INET or AF_INET6) that have a MAC."""
    found, size = [], 4 if family == socket.AF_INET else 16
    for kind, body in dump(sock, _GETNEIGH, _NEIGHBOUR.pack(family, 0, 0, 0, 0)):
        told = attributes(body, _NEIGHBOUR.size)
        address, mac = told.get(_NDA_DST, b""), told.get(_NDA_LLADDR, b"")
        if kind == _NEWNEIGH and len(address) == size and len(mac) == 6:
            where = socket.inet_ntop(family, address)
            found.append(Neighbour(where, mac.hex(":"), _NEIGHBOUR.unpack_from(body)[1]))
    return found


def departures(data: bytes) -> list[str]:
    """The names of links that went away, from what a socket in GROUP_LINK received.

    A link that only leaves its bridge is told of by the same message, with family AF_BRIDGE; it is still there.
    """
    return [
        text(attributes(body, _LINK.size).get(_IFLA_IFNAME, b""))
        for kind, body in _messages(data)
        if kind == _DELLINK and len(body) >= _LINK.size and body[0] == socket.AF_UNSPEC
    ]


def dump(sock: socket.socket, kind: int, body: bytes) -> Iterator[tuple[int, bytes]]:
    """Every message that answers dump request `kind`: type and payload. Raises HostError where the kernel refuses."""
    sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST_DUMP, 1, 0) + body)
    while True:
        for answer, payload in _messages(sock.recv(_BUFFER)):
            if answer == _DONE:
                return
            if answer == _ERROR:
                code = -struct.unpack_from("=i", payload)[0]
                raise HostError(f"rtnetlink refused request {kind}: error {code}")
            yield answer, payload


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield kind, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(body: bytes, offset: int) -> dict[int, bytes]:
    """The attributes that follow `offset` octets of `body`, by type; of a nested one, take its value apart likewise."""
    found = {}
    while offset + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = body[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def text(value: bytes) -> str:
    """A name as the kernel gives it, with the NUL at its end."""
    return value.rstrip(b"\0").decode(errors="replace")
