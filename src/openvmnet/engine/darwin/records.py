"""What the running relays say of themselves, each in a file of its own: RUNTIME/relays/PID.json.

There is no network process on macOS, since the network is the kernel's and bootpd's. `vmnet ls` and `vmnet show` put
the relays' records together: those with the same mode and addresses are one network. A file whose process is gone is
removed by whoever meets it. A relay of `sudo vmnet run` is the user's by then, and so is its record, which `sudo vmnet
ls` has to find as well.
"""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet import state
from openvmnet.engine.darwin.datapath import Counters

if TYPE_CHECKING:
    from pathlib import Path


class Record(msgspec.Struct, frozen=True):
    """One relay: its pid, the VM's, the NIC with the rules of its published ports, and what vmnet answered.

    `reservation` is the address that is kept for the NIC.
    """

    pid: int
    vm_pid: int
    vm: str
    netdev: str
    mode: Literal["shared", "host", "bridged"]
    mac: str | None
    isolated: bool
    started: float
    parameters: dict[str, str | int]
    counters: Counters
    hostfwd: tuple[str, ...] = ()
    reservation: str | None = None

    @property
    def network(self) -> str:
        """What tells its network from others: mode and addresses, the private UUID, or the interface bridged to."""
        for key in ("vmnet_network_identifier", "vmnet_shared_interface_name"):
            if key in self.parameters:
                return f"{self.mode}-{self.parameters[key]}"
        return f"{self.mode}-{self.parameters.get('vmnet_start_address', '')}"

    @property
    def subnet(self) -> IPv4Network | None:
        """The IPv4 subnet, where it has one."""
        start, mask = self.parameters.get("vmnet_start_address"), self.parameters.get("vmnet_subnet_mask")
        try:
            return None if start is None else IPv4Network(f"{start}/{mask}", strict=False)
        except ValueError:
            return None

    @property
    def gateway(self) -> IPv4Address | None:
        """The host's address on it."""
        start = self.parameters.get("vmnet_start_address")
        try:
            return None if start is None else IPv4Address(str(start))
        except ValueError:
            return None


def directory() -> Path:
    """Where the records lie, made if missing."""
    path = state.runtime_root() / "relays"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def write(record: Record) -> None:
    """Write a record, or write it anew, in one step."""
    path = directory() / f"{record.pid}.json"
    partial = path.with_suffix(".new")
    partial.write_bytes(msgspec.json.encode(record))
    partial.replace(path)


def remove(pid: int) -> None:
    """Take a record away; it may be gone."""
    (directory() / f"{pid}.json").unlink(missing_ok=True)


def read() -> list[Record]:
    """Every record whose process is there, oldest first; for root those of who became it by sudo(8), too."""
    found = []
    sudoer = state.sudoer_root()
    theirs = [] if sudoer is None else sorted((sudoer / "relays").glob("*.json"))
    for path in [*directory().glob("*.json"), *theirs]:
        try:
            record = msgspec.json.decode(path.read_bytes(), type=Record)
            os.kill(record.pid, 0)
        except PermissionError:
            pass  # the process is there, and another user's
        except (OSError, msgspec.DecodeError):
            path.unlink(missing_ok=True)
            continue
        found.append(record)
    return sorted(found, key=lambda record: record.started)
