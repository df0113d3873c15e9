"""The ports of a network, and what is kept of them for the process that may have to take the network over."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING

import msgspec

from openvmnet import state
from openvmnet.config import NetworkConfig
from openvmnet.engine.linux.firewall import PORT_MARK
from openvmnet.engine.linux.names import PORT_PREFIX

if TYPE_CHECKING:
    from pathlib import Path


class Port(msgspec.Struct, frozen=True):
    """One VM's NIC: number `number` on the bridge as link vmNUMBER; `mac` is empty where nobody knows it.

    `hostfwd` has the rules of its published ports, `reservation` is the address that DHCP keeps for it.
    """

    number: int
    vm: str
    netdev: str
    mac: str
    isolated: bool
    pid: int
    hostfwd: tuple[str, ...] = ()
    reservation: IPv4Address | None = None

    @property
    def link(self) -> str:
        """The TAP's name in the namespace."""
        return f"{PORT_PREFIX}{self.number}"

    @property
    def mark(self) -> int:
        """The mark that the firewall stamps on what comes from it."""
        return PORT_MARK + self.number

    @property
    def packed_mac(self) -> bytes:
        """The MAC as it is on the wire; empty where nobody knows it."""
        return bytes.fromhex(self.mac.replace(":", ""))


class Record(msgspec.Struct, frozen=True):
    """RUNTIME/NAME/network.json: enough to take the network over."""

    config: NetworkConfig
    pid: int
    agent: int
    ports: list[Port]


def read_record(path: Path) -> Record | None:
    """The record of the process before, or None where there is none to read."""
    try:
        return state.decode(path.read_bytes(), Record)
    except (OSError, msgspec.DecodeError):
        return None
