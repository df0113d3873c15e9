"""The leases that macOS's DHCP server gave: /var/db/dhcpd_leases, which everybody may read.

    {
        name=guest
        ip_address=192.168.64.2
        hw_address=1,52:54:0:12:34:56
        identifier=1,52:54:0:12:34:56
        lease=0x672a1c3f
    }

bootpd writes octets without leading zeros, the hardware type before them, and the end of the lease in seconds since
1970. A guest that sends a client identifier of another kind (RFC 4361, type 0xff) is known by that, and its
`hw_address` begins with ff: its MAC is not in the file. The host name is the guest's own word.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

import msgspec

PATH = Path("/var/db/dhcpd_leases")
_ENTRY = re.compile(r"\{([^{}]*)\}")
AGAIN = 60.0  # s until an unchanged file is read again
_MOST = 65536  # entries; bootpd's pools are smaller
_ETHERNET, _OCTETS = 1, 6


class Lease(msgspec.Struct, frozen=True):
    """One lease: `mac` in lower case with two digits an octet, None where bootpd knows the guest by an identifier."""

    address: IPv4Address
    mac: str | None
    identifier: str
    name: str | None
    expires: int


def stamp() -> int:
    """A number that changes when the file does; 0 where there is none."""
    try:
        return PATH.stat().st_mtime_ns
    except OSError:
        return 0


def read(path: Path | None = None) -> list[Lease]:
    """Every lease in the file (PATH, if none is given), in its order (bootpd: newest first); [] where there is none."""
    try:
        text = (path or PATH).read_text("utf-8", "replace")
    except OSError:
        return []
    return parse(text)


def parse(text: str) -> list[Lease]:
    """The leases of a file's content; entries that are none are left out, whatever they are."""
    found = []
    for match in _ENTRY.finditer(text):
        parts = (line.partition("=") for line in match[1].splitlines())
        values = {name.strip(): value.strip() for name, mark, value in parts if mark}
        lease = _lease(values)
        if lease is not None:
            found.append(lease)
        if len(found) == _MOST:
            break
    return found


def _lease(values: dict[str, str]) -> Lease | None:
    try:
        address = IPv4Address(values["ip_address"])
        expires = int(values.get("lease", "0"), 16)
    except (KeyError, AddressValueError, ValueError):
        return None
    hardware = values.get("hw_address", "")
    return Lease(address, _mac(hardware), values.get("identifier", hardware), values.get("name") or None, expires)


def _mac(hardware: str) -> str | None:
    kind, _, octets = hardware.partition(",")
    parts = octets.split(":")
    try:
        if int(kind, 16) != _ETHERNET or len(parts) != _OCTETS:
            return None
        numbers = [int(part, 16) for part in parts]
    except ValueError:
        return None
    if any(not 0 <= number <= 255 for number in numbers):
        return None
    return ":".join(f"{number:02x}" for number in numbers)


def address_of(mac: str, leases: list[Lease], now: float) -> Lease | None:
    """The lease of the guest with `mac` that lasts longest, if one is still good at `now` (seconds since 1970)."""
    good = [lease for lease in leases if lease.mac == mac.lower() and lease.expires > now]
    return max(good, key=lambda lease: lease.expires, default=None)
