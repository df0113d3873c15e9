"""Ports of vmnet-bridged: a VM on the LAN that the host is on, with no process of ours in between.

A port is one descriptor, and lives as long as it is open: a TAP in a Linux bridge, made here with CAP_NET_ADMIN or by
QEMU's setuid helper without it, or a macvtap on a wired NIC. Who answers DHCP there is the LAN's affair.

A TAP takes the bridge's MTU, since a bridge without an MTU of its own sinks to the lowest of its ports; and a MAC that
begins with fe, since such a bridge takes the lowest MAC of its ports for its own, and the host would lose its address.
Both are what QEMU's helper does. IPv6 is off on the TAP: it is the bridge that the host speaks by.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
import subprocess
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.engine.linux import bridge_helper, interfaces, macvtap
from openvmnet.errors import HostError, MissingFeature

if TYPE_CHECKING:
    from openvmnet.engine.linux.interfaces import How, Interface

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, _CAP_NET_ADMIN = 47, 3, 12  # prctl(2), capabilities(7)
_NAMES = b"vmtap%d"  # the kernel puts the first free number in
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_TIMEOUT = 10.0  # s, for what takes milliseconds


class Port(NamedTuple):
    """A VM's port: its descriptor, for `-netdev tap,fd=`; `link` is its name in the bridge, None for a macvtap.

    `ifname` is the bridge or NIC.
    """

    fd: int
    how: How
    ifname: str
    link: str | None


def open_port(ifname: str, mac: str, *, isolated: bool, offloads: bool = True) -> Port:
    """A port on `ifname` for a VM whose NIC has address `mac`. Nothing is left behind when it fails.

    `offloads`: each frame bears a virtio_net_hdr, and may be longer than the MTU or lack its checksum.

    Raises OptionError where nothing can be bridged to `ifname`, MissingFeature for lack of rights or of the kernel's
    support, Conflict where a macvtap on the NIC has the MAC, HostError for what else the kernel refuses.
    """
    interface = interfaces.find(ifname)
    if interface.how == "macvtap":
        fd = macvtap.open_macvtap(interface, mac, isolated=isolated, offloads=offloads)
        return Port(fd, "macvtap", ifname, None)
    try:
        fd, link = _own_tap(interface, mac, isolated=isolated, offloads=offloads)
    except PermissionError as error:
        if isolated:
            raise MissingFeature(
                f"isolated=on on bridge '{ifname}' takes CAP_NET_ADMIN, which uid {os.getuid()} does not have: "
                "QEMU's bridge helper makes no isolated port",
                hint=f"{bridge_helper.with_capability()}; or leave out isolated=on; "
                "or -netdev vmnet-shared,isolated=on",
            ) from error
        fd = bridge_helper.open_tap(ifname, offloads=offloads)
        link = tap_name(fd)
    return Port(fd, "bridge", ifname, link)


def forgo_capability() -> None:
    """Keep CAP_NET_ADMIN from the program that this process becomes, where it would inherit it (ambient)."""
    ctypes.CDLL(None).prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_LOWER, _CAP_NET_ADMIN, 0, 0)


def tap_name(fd: int) -> str:
    """The link of an open TAP."""
    told = fcntl.ioctl(fd, _TUNGETIFF, bytes(40))
    return told[:16].rstrip(b"\0").decode(errors="replace")


def _own_tap(bridge: Interface, mac: str, *, isolated: bool, offloads: bool) -> tuple[int, str]:
    """A TAP in `bridge` and its name. Raises PermissionError for lack of CAP_NET_ADMIN."""
    try:
        fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MissingFeature(f"{_TUN} does not exist", hint="sudo modprobe tun") from error
    try:
        flags = _IFF_TAP | _IFF_NO_PI | (_IFF_VNET_HDR if offloads else 0)
        told = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", _NAMES, flags))
        link = told[:16].rstrip(b"\0").decode()
        with contextlib.suppress(FileNotFoundError), open(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6", "w") as file:
            file.write("1")
        _ip("link", "set", "dev", link, "mtu", str(bridge.mtu), "address", f"fe{mac[2:]}", "master", bridge.name)
        if isolated:
            _ip("link", "set", "dev", link, "type", "bridge_slave", "isolated", "on")
        _ip("link", "set", "dev", link, "up")
    except BaseException:
        os.close(fd)
        raise
    return fd, link


def _ip(*words: str) -> None:
    env = {"PATH": _PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=_TIMEOUT, env=env)
    except FileNotFoundError as error:
        raise MissingFeature("no program 'ip' is there", hint="sudo apt install iproute2") from error
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
    if "not permitted" in said:
        raise PermissionError(said)
    raise HostError(f"'ip {' '.join(words)}' failed: {said}")
