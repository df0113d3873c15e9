"""Whether an address can be kept for a NIC on a running network: the sentence that names who or what is in the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openvmnet.errors import Conflict
from openvmnet.netdev import reservable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Address

    from openvmnet.config import NetworkConfig
    from openvmnet.network.port import Port
    from openvmnet.service.leases import LeaseBook


def reserve(value: str, mac: str, config: NetworkConfig, ports: Iterable[Port], leases: LeaseBook) -> IPv4Address:
    """The address that `address=value` keeps for `mac`, beside `ports` and what is leased already.

    Raises OptionError for what is no private IPv4 address, Conflict for one that this network cannot keep.
    """
    address = reservable(value, None)
    subnet = config.subnet
    if subnet is not None and not subnet.gives(address):
        raise Conflict(
            f"address={address} {subnet.why_not(address)} on network '{config.name}', which gives {subnet.pool}",
            hint="give an address of the pool, or start-address, end-address and subnet-mask for another network",
        )
    known = {port.mark: port for port in ports}
    for port in known.values():
        if port.reservation == address:
            raise _taken(address, config, f"is kept for VM '{port.vm}' ({port.netdev}, {port.mac})")
    lease = leases.by_ip(address)
    if lease is not None and lease.mac.hex(":") != mac:
        holder = known.get(lease.port) if lease.port is not None else None
        whose = f"VM '{holder.vm}' ({holder.netdev}, {lease.mac.hex(':')})" if holder else lease.mac.hex(":")
        raise _taken(address, config, f"is leased to {whose}")
    return address


def _taken(address: IPv4Address, config: NetworkConfig, how: str) -> Conflict:
    return Conflict(f"address={address} {how} on network '{config.name}'", hint=f"vmnet show {config.name}")
