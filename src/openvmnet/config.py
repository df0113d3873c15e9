"""What a network is to be, resolved: every choice made, nothing left open.

`messages.Spec` is what a command asks for; `addressing` makes this of it; the network process is given it, and writes
it into its record so that the next process takes over the same network.
"""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Network
from typing import Literal

import msgspec

from openvmnet import state
from openvmnet.netdev import Subnet

DEFAULT_MTU = 1500

Mode = Literal["shared", "host"]


class NetworkConfig(msgspec.Struct, frozen=True):
    """One network: `subnet` is None where the host has no address on it, `prefix` (a /64) where it has no IPv6.

    `host_loopback`: guests reach what listens on this host's loopback only, at the gateway's address. `linger` is how
    long it stays without a VM, in seconds; `mtu` in octets of IP.
    """

    name: str
    mode: Mode = "shared"
    subnet: Subnet | None = None
    prefix: IPv6Network | None = None
    mtu: int = DEFAULT_MTU
    net_uuid: str | None = None
    host_loopback: bool = False
    linger: float = 5.0

    @property
    def gateway6(self) -> IPv6Address | None:
        """The gateway's IPv6 address: the first of the prefix."""
        return None if self.prefix is None else self.prefix[1]

    @property
    def outside(self) -> bool:
        """Whether guests reach what is beyond the host."""
        return self.mode == "shared"


class PortKind(msgspec.Struct, frozen=True):
    """What a port is to its VM: `isolated` from the others, and whether frames bear a virtio_net_hdr (`offloads`)."""

    isolated: bool
    offloads: bool


class _Record(msgspec.Struct, frozen=True):
    """What is of interest here in RUNTIME/NAME/network.json."""

    config: NetworkConfig


def running_config(name: str) -> NetworkConfig | None:
    """What running network `name` is, from its record; None where none is written, or none of this version."""
    try:
        return state.decode((state.runtime_root() / name / "network.json").read_bytes(), _Record).config
    except (OSError, msgspec.DecodeError):
        return None
