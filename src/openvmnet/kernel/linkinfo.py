"""What rtnetlink tells of a link's nature: its kind, its state, and what it is a part of.

Asked of the kernel and not of /sys: a sysfs shows the namespace that it was mounted in, which need not be the caller's.
Source: linux/if_link.h, linux/if_arp.h (Linux 6.1), a frozen ABI.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from openvmnet.kernel import netlink

ETHERNET = 1  # ARPHRD_ETHER
UP, LOOPBACK = 0x1, 0x8  # IFF_*

_GETLINK, _NEWLINK = 18, 16
_HEADER = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS, _IFNAME, _MTU, _LINK, _MASTER, _LINKINFO, _CARRIER, _LINK_NETNSID = 1, 3, 4, 5, 10, 18, 33, 37
_KIND, _DATA, _SLAVE_KIND = 1, 2, 4
_BR_FORWARD_DELAY, _BR_STP_STATE = 1, 5
_USER_HZ = 100  # of the kernel's times towards user space


class LinkInfo(NamedTuple):
    """A link: `kind` is what `ip -d link` calls it, "" for a device with a driver of its own.

    `hardware` is its ARPHRD_* type, `flags` are IFF_*. `lower` is the ifindex of the link it sits on (of a VLAN, a
    macvlan), `master` that of the bridge, bond or VRF it is a part of; 0 for none, and for a `lower` elsewhere, in
    another namespace. `master_kind` says what the master is. `settling` is how long a bridge keeps a new port silent,
    in seconds: its forward delay twice, where it runs the spanning tree protocol.
    """

    ifindex: int
    name: str
    kind: str
    hardware: int
    flags: int
    mtu: int
    mac: str
    carrier: bool
    lower: int
    master: int
    master_kind: str
    settling: float

    @property
    def up(self) -> bool:
        """Whether it is administratively up; `carrier` says whether anything is at the other end."""
        return bool(self.flags & UP)


def links(sock: socket.socket | None = None) -> list[LinkInfo]:
    """All links of the namespace of `sock`, a NETLINK_ROUTE socket; without one, of the caller's own."""
    if sock is None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE) as made:
            made.settimeout(5.0)
            return links(made)
    return [
        _link(body)
        for kind, body in netlink.dump(sock, _GETLINK, _HEADER.pack(0, 0, 0, 0, 0))
        if kind == _NEWLINK and len(body) >= _HEADER.size
    ]


def _link(body: bytes) -> LinkInfo:
    _, hardware, ifindex, flags, _ = _HEADER.unpack_from(body)
    told = netlink.attributes(body, _HEADER.size)
    nature = netlink.attributes(told.get(_LINKINFO, b""), 0)
    kind = netlink.text(nature.get(_KIND, b""))
    data = netlink.attributes(nature.get(_DATA, b""), 0)
    settling = 0.0
    if kind == "bridge" and _number(data, _BR_STP_STATE):
        settling = 2 * _number(data, _BR_FORWARD_DELAY) / _USER_HZ
    return LinkInfo(
        ifindex=ifindex,
        name=netlink.text(told.get(_IFNAME, b"")),
        kind=kind,
        hardware=hardware,
        flags=flags,
        mtu=_number(told, _MTU),
        mac=told.get(_ADDRESS, b"").hex(":") if told.get(_ADDRESS) else "",
        carrier=told.get(_CARRIER, b"\1") != b"\0",
        lower=0 if _LINK_NETNSID in told else _number(told, _LINK),
        master=_number(told, _MASTER),
        master_kind=netlink.text(nature.get(_SLAVE_KIND, b"")),
        settling=settling,
    )


def _number(attributes: dict[int, bytes], kind: int) -> int:
    value = attributes.get(kind, b"")
    return int(struct.unpack("=I", value)[0]) if len(value) == 4 else 0
