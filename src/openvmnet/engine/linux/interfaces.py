"""Which of this host's links a VM may be bridged to, by which way, and why the rest cannot be.

A VM's frames bear the VM's own MAC, so the link has to carry Ethernet frames of any sender. A Linux bridge takes a TAP
as one more port. Every other wired link takes a macvtap: a second MAC on the NIC, beside the host's own. What a link
is, rtnetlink says, in the caller's namespace; only whether a NIC is a radio has to be found elsewhere: in its sysfs
directory where that is this namespace's, else by a wireless extensions ioctl, which only radios answer.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet.engine.linux import bridge_helper
from openvmnet.errors import OptionError
from openvmnet.kernel import linkinfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from openvmnet.kernel.linkinfo import LinkInfo

How = Literal["bridge", "macvtap"]

MACVTAP_LIMIT = "a VM there and this host do not hear each other"

_USUAL_MTU = 1500  # octets; a guest that is told nothing takes it

_SYSFS = "/sys/class/net"
_SIOCGIWNAME = 0x8B01  # linux/wireless.h
_NET_ADMIN, _SYS_ADMIN, _MKNOD = 12, 21, 27  # linux/capability.h
_STACKED = {"macvlan": "macvlan", "macvtap": "macvtap", "ipvlan": "ipvlan", "ipvtap": "ipvtap"}
_NO_NIC = {
    "vrf": "is a routing domain (VRF), not a NIC",
    "ifb": "is a queueing device (ifb), not a NIC",
    "openvswitch": "belongs to Open vSwitch, whose ports are made by ovs-vsctl",
}


class Interface(msgspec.Struct, frozen=True):
    """A link of the host.

    `how` is the way a VM is bridged to it, None where that cannot be; `reason` then says why. `needs` is what the
    caller still lacks for it, one command or clause; None where it can be used as it is. `note` is what to expect.
    """

    name: str
    kind: str
    how: How | None
    state: Literal["up", "no carrier", "down"]
    mac: str
    mtu: int
    needs: str | None = None
    note: str | None = None
    reason: str | None = None


def inventory(links: Sequence[LinkInfo] | None = None) -> list[Interface]:
    """Every link of the caller's namespace, in the kernel's order."""
    known = linkinfo.links() if links is None else links
    by_index = {link.ifindex: link for link in known}
    radios = {link.ifindex for link in known if not link.kind and link.hardware == linkinfo.ETHERNET and _radio(link)}
    privileged = may_administer()
    return [_interface(link, by_index, wireless=link.ifindex in radios, privileged=privileged) for link in known]


def find(ifname: str, links: Sequence[LinkInfo] | None = None) -> Interface:
    """The link that `ifname` names, when a VM can be bridged to it. Raises OptionError, in QEMU's words, when not."""
    found = inventory(links)
    for interface in found:
        if interface.name == ifname and interface.how is not None:
            return interface
    # Newest first, as QEMU lists them.
    usable = [interface.name for interface in reversed(found) if interface.how is not None]
    listed = f"expected one of [ {' '.join(usable)} ]" if usable else "no supported interfaces available"
    why = next((f"{each.name} {each.reason}" for each in found if each.name == ifname), "no link has that name")
    raise OptionError(
        f"unsupported ifname '{ifname}', {listed}: {why}", option="ifname", value=ifname, hint="vmnet interfaces"
    )


def may_administer() -> bool:
    """Whether this process has CAP_NET_ADMIN, as far as it can tell without doing anything with it."""
    return bool(capabilities() >> _NET_ADMIN & 1)


def may_make_nodes() -> bool:
    """Whether this process may make a macvtap: a network namespace for it, and the device's node.

    A user namespace's root may not make nodes, whatever capability it is shown to have.
    """
    held = capabilities()
    everything = _read("/proc/self/uid_map").split() == ["0", "0", "4294967295"]
    return everything and all(held >> each & 1 for each in (_NET_ADMIN, _SYS_ADMIN, _MKNOD))


def capabilities() -> int:
    """This process's effective capabilities, as a bit mask."""
    for line in _read("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return int(value, 16)
    return 0


def _interface(link: LinkInfo, by_index: dict[int, LinkInfo], *, wireless: bool, privileged: bool) -> Interface:
    kind = _kind(link, wireless=wireless)
    reason = _refusal(link, by_index, wireless=wireless)
    how: How | None = None
    needs = None
    notes = []
    if reason is None:
        how = "bridge" if link.kind == "bridge" else "macvtap"
        if how == "bridge":
            needs = None if privileged else bridge_helper.lacks(link.name)
            if link.settling:
                notes.append(f"spanning tree: a new port is silent for {link.settling:.0f} s")
        else:
            needs = None if may_make_nodes() else "root"
            notes.append(MACVTAP_LIMIT)
        if link.mtu < _USUAL_MTU:
            notes.append(f"MTU {link.mtu}: tell the guest, by -device virtio-net-pci,host_mtu={link.mtu}")
    state: Literal["up", "no carrier", "down"] = "down"
    if link.up:
        state = "up" if link.carrier else "no carrier"
    return Interface(link.name, kind, how, state, link.mac, link.mtu, needs, "; ".join(notes) or None, reason)


def _kind(link: LinkInfo, *, wireless: bool) -> str:
    if wireless:
        return "wireless"
    if link.flags & linkinfo.LOOPBACK:
        return "loopback"
    if link.kind == "tun" and link.hardware == linkinfo.ETHERNET:
        return "tap"
    return link.kind or ("ethernet" if link.hardware == linkinfo.ETHERNET else "other")


def _refusal(link: LinkInfo, by_index: dict[int, LinkInfo], *, wireless: bool) -> str | None:
    """Why nothing can be bridged to `link`, as the rest of a sentence that begins with its name; None: it can."""
    if link.flags & linkinfo.LOOPBACK:
        return "is the loopback: nothing is at its other end"
    if link.hardware != linkinfo.ETHERNET:
        return "carries no Ethernet frames (it is a tunnel of layer 3 or another medium)"
    if wireless:
        return (
            "is wireless: an access point takes frames of the station's own MAC only (802.11 has three addresses in a "
            "frame), so a VM with a MAC of its own gets no answer; -netdev vmnet-shared works over it"
        )
    if link.kind in _STACKED:
        lower = by_index.get(link.lower)
        instead = f": name {lower.name} instead" if lower else ""
        return f"is itself a {_STACKED[link.kind]} on another NIC{instead}"
    if link.kind in _NO_NIC:
        return _NO_NIC[link.kind]
    if link.master:
        taken = _taken(link, by_index.get(link.master))
        if taken is not None:
            return taken
    if not link.up:
        return f"is down: sudo ip link set {link.name} up"
    return None


def _taken(link: LinkInfo, master: LinkInfo | None) -> str | None:
    """Why a part of `master` cannot be used itself, or None: it can, as a NIC in a VRF."""
    kind = (master.kind if master else "") or link.master_kind
    if kind == "vrf":
        return None
    if kind == "openvswitch":
        return "is a port of Open vSwitch, whose ports are made by ovs-vsctl"
    named = f"{kind} {master.name}: name {master.name} instead" if master else f"a {kind or 'link'} elsewhere"
    return f"is a port of {named}"


def _radio(link: LinkInfo) -> bool:
    """Whether a NIC is a radio. `iw` and udev decide by the same directory."""
    directory = f"{_SYSFS}/{link.name}"
    if _read(f"{directory}/ifindex").strip() == str(link.ifindex) and _read(f"{directory}/address").strip() == link.mac:
        return os.path.exists(f"{directory}/phy80211") or os.path.exists(f"{directory}/wireless")
    return _answers_wireless(link.name)


def _answers_wireless(name: str, ioctl: Callable[[socket.socket, int, bytes], object] = fcntl.ioctl) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            ioctl(sock, _SIOCGIWNAME, struct.pack("16s16x", name.encode()))
        except OSError:
            return False
    return True


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
