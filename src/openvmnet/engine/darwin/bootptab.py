"""DHCP reservations before macOS 26: lines of /etc/bootptab, which bootpd(8) reads.

    %%
    # name      hwtype   hwaddr              ipaddr           bootfile
    openvmnet-1 1        52:54:00:12:34:56   192.168.64.50

Everything up to the line `%%` is the head. Whoever else keeps lines there keeps them: ours are known by their names.
Only root writes the file; bootpd has to be told (`launchctl kickstart`). From macOS 26 on a reservation belongs to a
network object, and is made there (`network26`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from openvmnet.engine.darwin.network26 import Reservation
from openvmnet.errors import HostError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

PATH = Path("/etc/bootptab")
RELOAD = "sudo launchctl kickstart -k system/com.apple.bootpd"
_MARK = "%%"
_PREFIX = "openvmnet-"
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_FIELDS = 4


def parse(text: str) -> list[Reservation]:
    """The reservations of the file, whoever's they are; lines that are none are left out."""
    _, mark, body = text.partition(f"{_MARK}\n")
    found = []
    for line in (body if mark else "").splitlines():
        fields = line.split()
        if len(fields) < _FIELDS or fields[0].startswith("#"):
            continue
        with contextlib.suppress(AddressValueError):
            found.append(Reservation(fields[2].lower(), IPv4Address(fields[3])))
    return found


def merge(text: str, reservations: Iterable[Reservation]) -> str:
    """The file's text with our lines replaced by `reservations`, and everybody else's as they were.

    Raises OptionError for a MAC that is none, or for an address or a MAC that another line has.
    """
    head, mark, body = text.partition(f"{_MARK}\n")
    kept = [line for line in body.splitlines() if not line.startswith(_PREFIX)] if mark else []
    others = parse(f"{_MARK}\n" + "\n".join(kept))
    lines = []
    for number, reservation in enumerate(reservations, 1):
        mac = reservation.mac.lower()
        if not _MAC.fullmatch(mac):
            raise OptionError(f"a MAC is six bytes such as 52:54:00:12:34:56, not '{mac}'", option="mac", value=mac)
        for other in others:
            if other.address == reservation.address or other.mac == mac:
                taken = f"{other.mac} has {other.address}"
                raise OptionError(f"{PATH} reserves for somebody else already: {taken}", option="mac", value=mac)
        others.append(Reservation(mac, reservation.address))
        lines.append(f"{_PREFIX}{number} 1 {mac} {reservation.address}")
    return "\n".join([*([head.rstrip("\n")] if head.strip() and mark else []), _MARK, *kept, *lines, ""])


def write(reservations: Iterable[Reservation], path: Path = PATH) -> None:
    """Have `reservations` be ours in the file, in one step. Raises HostError for anybody but root."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        text = ""
    merged = merge(text, reservations)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".bootptab-")
        with os.fdopen(descriptor, "w") as file:
            file.write(merged)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except PermissionError as error:
        raise HostError(f"{path} is root's to write: DHCP reservations before macOS 26 are its lines") from error
