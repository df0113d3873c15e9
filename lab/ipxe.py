"""iPXE as a program that QEMU boots with -kernel: built with IPv6, which the ROMs of the emulated NICs are not.

`python -m lab.ipxe` fetches it into the cache; the lab itself reaches no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lab.unpack import unpacked

if TYPE_CHECKING:
    from pathlib import Path


def ipxe() -> Path:
    """The program's path."""
    found = unpacked("ipxe", lambda: ["ipxe"]) / "boot" / "ipxe.lkrn"
    if not found.is_file():
        raise SystemExit(f"the distribution's package ipxe has no {found.name}")
    return found


if __name__ == "__main__":
    print(ipxe())
