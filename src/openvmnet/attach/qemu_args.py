"""QEMU's command line, read as QEMU reads it: which words are options, and which are their arguments.

An option begins with one or two dashes; its argument is the next word, whatever that looks like (`-append -netdev` is
a kernel command line), never a part after `=`. A word that is neither is a disk image. Which options take an argument
is QEMU's list up to 11.0; of one that is not in the list, a following word without a dash is taken for its argument.

The command may be any wrapper (`taskset -c 1 qemu-system-x86_64 ...`): reading begins after the first word that is
called like QEMU, or, where none is, after the first word.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from openvmnet import netdev
from openvmnet.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_QEMU = re.compile(r"(?:.*/)?(?:qemu(?:-system-[^/]+|-kvm)?|kvm)", re.DOTALL)
_FLAGS = """
    h help version S s async-teardown audio-help daemonize enable-kvm enable-sync-profile full-screen mem-prealloc
    no-acpi no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config nodefaults nographic only-migratable portrait
    preconfig singlestep one-insn-per-tb snapshot usb win2k-hack xen-attach xen-domid-restrict semihosting old-param
    enable-fips curses sdl alt-grab ctrl-grab no-quit no-frame nodefconfig
"""
_OPTIONS = """
    D L M accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev chroot compat cpu d
    debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg g gdb global hda hdb hdc hdd
    icount incoming initrd iscsi k kernel loadvm m machine mem-path mon monitor msg mtdblock name net netdev nic numa
    object option-rom overcommit parallel pflash pidfile plugin prom-env qmp qmp-pretty qtest qtest-log readconfig
    rotate rtc run-with runas sandbox sd seed semihosting-config serial set shim smbios smp spice tpmdev trace
    usbdevice uuid vga virtfs vnc watchdog watchdog-action xen-domid
"""
_WITHOUT_ARGUMENT, _WITH_ARGUMENT = frozenset(_FLAGS.split()), frozenset(_OPTIONS.split())
_DISKS = ("hda", "hdb", "hdc", "hdd", "sd", "mtdblock")


class Argument(msgspec.Struct, frozen=True):
    """The argument of `option` (dashes off) at `position` of the command; an image has no option, it is ''."""

    option: str
    value: str
    position: int


def arguments(argv: Sequence[str]) -> Iterator[Argument]:
    """Each option with an argument, and each disk image, in order; options without an argument are passed over."""
    begin = next((at for at, word in enumerate(argv) if _QEMU.fullmatch(word)), None)
    at = 1 if begin is None else begin + 1
    while at < len(argv):
        word = argv[at]
        at += 1
        if not word.startswith("-"):
            if begin is not None:
                yield Argument("", word, at - 1)
            continue
        option = word.removeprefix("-").removeprefix("-")
        if option in _WITHOUT_ARGUMENT or at == len(argv):
            continue
        if option in _WITH_ARGUMENT or not argv[at].startswith("-"):
            yield Argument(option, argv[at], at)
            at += 1


def guest_name(args: Sequence[Argument]) -> str | None:
    """The VM's name from `-name NAME` or `-name guest=NAME`, the last one given."""
    found = None
    for arg in args:
        if arg.option == "name":
            items = netdev.split(arg.value)
            named = netdev.lookup(items, "guest")
            if named is None and items and items[0][0] is None:
                named = items[0][1]
            found = named or found
    return found


def first_disk(args: Sequence[Argument]) -> str | None:
    """The image that tells this VM from others: the first one it may write to, else the first it reads from.

    Firmware in flash (`if=pflash`) is no disk: every VM of a host may have the same.
    """
    read_only = None
    for arg in args:
        path, writable = _disk(arg)
        if path and writable:
            return path
        read_only = read_only or path
    return read_only


def _disk(arg: Argument) -> tuple[str | None, bool]:
    if arg.option == "" or arg.option in _DISKS:
        return arg.value, True
    if arg.option == "cdrom":
        return arg.value, False
    if arg.option == "blockdev" and arg.value.startswith("{"):
        return _disk_of_json(arg.value)
    if arg.option not in ("drive", "blockdev"):
        return None, False
    items = netdev.split(arg.value)
    look = {key: netdev.lookup(items, key) for key in ("if", "media", "readonly", "read-only", "node-name")}
    path = netdev.lookup(items, "file") if arg.option == "drive" else None
    path = path or netdev.lookup(items, "filename") or netdev.lookup(items, "file.filename")
    if look["if"] == "pflash" or "pflash" in (look["node-name"] or ""):
        return None, False
    fixed = look["media"] == "cdrom" or (look["readonly"] or look["read-only"] or "off") not in ("off", "no", "false")
    return path, not fixed


def _disk_of_json(text: str) -> tuple[str | None, bool]:
    try:
        members = netdev.load_json(text)
    except OptionError:
        return None, False
    if "pflash" in str(members.get("node-name")):
        return None, False
    below = members.get("file")
    path = members.get("filename") or members.get("file.filename")
    if path is None and isinstance(below, dict):
        path = below.get("filename")
    return (path if isinstance(path, str) else None), members.get("read-only") is not True
