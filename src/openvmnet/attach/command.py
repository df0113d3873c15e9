"""A VM's command line, and the same one with a TAP where it asked for vmnet.

How it works. `plan` reads the command and finds each vmnet netdev in it, in the three places where QEMU takes one:

    -netdev vmnet-shared,id=net0 -device X,netdev=net0     ->  -netdev tap,id=net0,fd=N  -device X,netdev=net0,mac=M
    -nic vmnet-shared,model=X                              ->  -nic tap,fd=N,model=X,mac=M
    -net vmnet-shared -net nic                             ->  -net tap,fd=N -net nic,macaddr=M

Nothing is started by then, so a command with a mistake in it leaves no trace. The caller gets a port for each netdev
and has `rewrite` put the descriptors and MACs in. Every other word of the command, and the order, stay as they are.

QEMU numbers its default MACs from 52:54:00:12:34:56 in every process anew, so two VMs that were not told otherwise
collide on one network. Where the command names no MAC one is added, to the NIC that the netdev belongs to. A netdev
without a NIC is left for hot plug. The MAC follows from what stays the same between two runs of one VM: its name, or
else its disk.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet import netdev
from openvmnet.attach import qemu_args
from openvmnet.errors import CallerError, OptionError
from openvmnet.netdev import Bridged, Host, Shared, stable_mac

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.attach.qemu_args import Argument

__all__ = ["Plan", "PlannedNetdev", "plan", "rewrite", "stable_mac"]

_MAC = re.compile(r"[0-9A-Fa-f]{1,2}(?:(?::[0-9A-Fa-f]{1,2}){5}|(?:-[0-9A-Fa-f]{1,2}){5})")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # nbd://host/disk, json:{...}
_EXAMPLE = "vmnet run -- qemu-system-x86_64 -netdev vmnet-shared,id=net0 -device virtio-net-pci,netdev=net0 ..."
_SHOWN = 255  # characters of a VM's name; QEMU sets no limit
_PATH = 4096  # octets of a path, limits.h
_NIC_OWN = ("mac", "model")
_NIC_KEPT = ("id", *_NIC_OWN)


class PlannedNetdev(msgspec.Struct, frozen=True):
    """One vmnet netdev of a command.

    `index` counts the command's vmnet netdevs, `position` is its argument's place in the command; `mac` is what the
    command gives its NIC, in lower case with colons. `mac_position` is the argument that takes a MAC: None where the
    NIC has one or is not there.
    """

    index: int
    options: Shared | Host | Bridged
    mac: str | None
    kind: Literal["netdev", "nic", "net"]
    position: int
    mac_position: int | None

    @property
    def name(self) -> str:
        """The netdev's id, or what it is called where QEMU needs none."""
        return self.options.id or f"{self.kind}{self.index}"


class Plan(msgspec.Struct, frozen=True):
    """What a command asks for: its netdevs, and what tells the VM from others (its name, its first disk)."""

    argv: tuple[str, ...]
    netdevs: tuple[PlannedNetdev, ...]
    name: str | None
    disk: str | None

    @property
    def vm_name(self) -> str:
        """`-name`, else the first disk's file name without its suffix, else the program's and this process's id."""
        name = self.name
        if name is None and self.disk is not None:
            name = os.path.splitext(os.path.basename(self.disk.rstrip("/")))[0]
        return _text(name or f"{os.path.basename(self.argv[0])}-{os.getpid()}")[:_SHOWN]

    def identity(self, directory: str | None = None) -> str:
        """What the MACs follow from: the name, else the disk's absolute path, seen from `directory` (the current one).

        A VM without name and disk is known by its command: the same one again gets the same MACs. What is longer than a
        path may be is known by its SHA-256.
        """
        directory = _directory() if directory is None else directory
        if self.name is not None:
            known = self.name
        elif self.disk is None:
            known = "\0".join((directory, *self.argv))
        elif _PROTOCOL.match(self.disk):
            known = self.disk
        else:
            known = os.path.normpath(os.path.join(directory, self.disk))
        known = _text(known)
        if len(known) <= _PATH:
            return known
        import hashlib

        return hashlib.sha256(known.encode()).hexdigest()


def plan(argv: Sequence[str]) -> Plan:
    """Find the vmnet netdevs of a command whose first word is the program.

    Raises OptionError for a netdev that is wrong, CallerError for a command without a program or without vmnet.
    """
    if not argv:
        raise CallerError("no command is given: after -- comes the VM's own, QEMU first", hint=_EXAMPLE)
    args = list(qemu_args.arguments(argv))
    found = [(arg, options) for arg in args if (options := _options(arg)) is not None]
    if not found:
        raise CallerError(
            f"the command has no vmnet netdev: {argv[0]} gets one by -netdev vmnet-shared,id=net0 "
            "and -device virtio-net-pci,netdev=net0",
            hint=_EXAMPLE,
        )
    _refuse_duplicates(args, {options.id for _, options in found})
    planned = []
    for index, (arg, options) in enumerate(found):
        mac, mac_position = _mac_of(arg, options, args)
        kind: Literal["netdev", "nic", "net"] = "netdev"
        if arg.option == "nic":
            kind = "nic"
        elif arg.option == "net":
            kind = "net"
        planned.append(PlannedNetdev(index, options, mac, kind, arg.position, mac_position))
    return Plan(tuple(argv), tuple(planned), qemu_args.guest_name(args), qemu_args.first_disk(args))


def rewrite(plan: Plan, fds: Sequence[int], macs: Sequence[str], *, datagrams: bool = False) -> list[str]:
    """The command with a descriptor and a MAC for each netdev, in the order of `plan.netdevs`.

    Each descriptor is a TAP, or with `datagrams` a socket that moves a frame in each datagram: for -netdev that is
    QEMU's `dgram` (7.2 on), whose nested options -nic and -net do not take; they get `socket`, which knows its kind.
    """
    argv = list(plan.argv)
    for netdev_, fd, mac in zip(plan.netdevs, fds, macs, strict=True):
        at, mac_at = netdev_.position, netdev_.mac_position
        tap: netdev.Items = [(None, "tap"), ("fd", str(fd))]
        if datagrams:
            tap = [(None, "socket"), ("fd", str(fd))]
            if netdev_.kind == "netdev":
                tap = [(None, "dgram"), ("local.type", "fd"), ("local.str", str(fd))]
        if netdev_.kind == "nic":
            tap += [item for item in netdev.split(argv[at]) if item[0] in _NIC_KEPT]
        elif netdev_.options.id is not None:
            tap.insert(1, ("id", netdev_.options.id))
        argv[at] = netdev.join(tap)
        if mac_at is not None:
            key = "macaddr" if netdev.split(argv[mac_at])[:1] == [(None, "nic")] else "mac"
            argv[mac_at] = _with_mac(argv[mac_at], key, mac)
    return argv


def _text(words: str) -> str:
    """`words` as UTF-8 has them: a file may be called by any octets, and what is no text comes in as surrogates."""
    return words.encode(errors="backslashreplace").decode()


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed, and no relative path leads anywhere
        return "/"


def _options(arg: Argument) -> Shared | Host | Bridged | None:
    """The options if `arg` is a vmnet netdev, else None: it is QEMU's to judge."""
    if arg.option == "netdev" and arg.value.startswith("{"):
        if "vmnet-" not in arg.value:
            return None
        kind = netdev.load_json(arg.value).get("type")
        return netdev.from_json(arg.value) if isinstance(kind, str) and kind.startswith("vmnet-") else None
    if arg.option not in ("netdev", "nic", "net"):
        return None
    items = netdev.split(arg.value)
    if not (netdev.backend(items) or "").startswith("vmnet-"):
        return None
    if arg.option == "nic":
        items = [item for item in items if item[0] not in _NIC_OWN]
    return netdev.from_items(items, need_id=arg.option == "netdev")


def _mac_of(arg: Argument, options: Shared | Host | Bridged, args: Sequence[Argument]) -> tuple[str | None, int | None]:
    """The MAC that the NIC on this netdev has, and the argument that would take one."""
    if arg.option == "nic":
        given = netdev.lookup(netdev.split(arg.value), "mac")
        return (None, arg.position) if given is None else (_mac(given), None)
    for other in args:
        nic = _nic(other)
        if nic is None or nic[0] != (None if arg.option == "net" else options.id):
            continue
        return (None, other.position) if nic[1] is None else (_mac(nic[1]), None)
    return None, None


def _nic(arg: Argument) -> tuple[str | None, str | None] | None:
    """The netdev and the MAC of a NIC, or None for what is none; the hub's own NICs (`-net nic`) have netdev None."""
    if arg.option == "device" and arg.value.startswith("{"):
        try:
            members = netdev.load_json(arg.value)
        except OptionError:
            return None
        mac = members.get("mac")
        return (str(members["netdev"]), None if mac is None else str(mac)) if "netdev" in members else None
    items = netdev.split(arg.value)
    on = netdev.lookup(items, "netdev")
    if arg.option == "device":
        return None if on is None else (on, netdev.lookup(items, "mac"))
    if arg.option == "net" and netdev.backend(items) == "nic":
        return on, netdev.lookup(items, "macaddr")
    return None


def _with_mac(text: str, key: str, mac: str) -> str:
    if text.startswith("{"):
        return f'{{"{key}":"{mac}",{text[1:]}'
    return netdev.join([*netdev.split(text), (key, mac)])


def _mac(value: str) -> str:
    if not _MAC.fullmatch(value):
        raise OptionError(
            f"invalid syntax for ethernet address: 'mac' expects six bytes such as 52:54:00:12:34:56, not '{value}'",
            option="mac",
            value=value,
        )
    parts = [int(part, 16) for part in re.split("[:-]", value)]
    if parts[0] & 1 or not any(parts):
        what = "multicast" if parts[0] & 1 else "all-zero"
        raise OptionError(
            f"NIC cannot have {what} MAC address '{value}': 'mac' expects an even first byte, such as 52",
            option="mac",
            value=value,
        )
    return ":".join(f"{part:02x}" for part in parts)


def _refuse_duplicates(args: Sequence[Argument], ours: set[str | None]) -> None:
    seen: set[str] = set()
    for arg in args:
        if arg.option not in ("netdev", "nic", "net"):
            continue
        if arg.value.startswith("{"):
            try:
                named = netdev.load_json(arg.value).get("id")
            except OptionError:
                continue
        else:
            named = netdev.lookup(netdev.split(arg.value), "id")
        if not isinstance(named, str):
            continue
        if named in seen and named in ours:
            raise OptionError(f"Duplicate ID '{named}' for netdev: each needs its own", option="id", value=named)
        seen.add(named)
