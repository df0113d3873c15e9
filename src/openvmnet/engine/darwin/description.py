"""What an interface is started with: the options of a netdev, and what else vmnet can, as the keys of a dictionary.

A network's private UUID (`net-uuid`) with addresses means the host's own address there, which are keys of their own;
the pool's end says nothing then, since such a network has no DHCP.
"""

from __future__ import annotations

import ipaddress
import uuid
from typing import TYPE_CHECKING

import msgspec

from openvmnet.engine.darwin import symbols
from openvmnet.engine.darwin.framework import Mode
from openvmnet.errors import MissingFeature, OptionError
from openvmnet.netdev import Bridged, Host, Shared

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.xpc import Scalar

_MTU_LEAST, _MTU_MOST = 1280, 65520


class Extras(msgspec.Struct, frozen=True):
    """What a client asks for that no netdev option says. The offloads are for clients that take such frames.

    `tso`: frames of up to 64 KB both ways. `checksum_offload` and `virtio_header` exclude each other: with the one,
    checksums are left to the other side; with the other every frame has a struct virtio_net_hdr of 12 octets before it.
    `host_ipv6` is the host's address on a private network.
    """

    interface_id: uuid.UUID | None = None
    allocate_mac_address: bool = False
    tso: bool = False
    checksum_offload: bool = False
    virtio_header: bool = False
    host_ipv6: str | None = None


def mode(options: Shared | Host | Bridged) -> Mode:
    """The operating mode of a netdev."""
    if isinstance(options, Bridged):
        return Mode.BRIDGED
    return Mode.HOST if isinstance(options, Host) else Mode.SHARED


def describe(framework: Framework, options: Shared | Host | Bridged, extras: Extras) -> dict[str, Scalar]:
    """The dictionary for vmnet_start_interface, by the names of `symbols.KEYS`.

    Raises OptionError for what vmnet would refuse, MissingFeature for what this macOS does not have.
    """
    options.validate()
    desc: dict[str, Scalar] = {"vmnet_operation_mode": mode(options)}
    if isinstance(options, Bridged):
        desc["vmnet_shared_interface_name"] = options.ifname or ""
    elif isinstance(options, Host):
        _describe_host(desc, options, extras)
    else:
        _describe_addresses(desc, options)
        if options.nat66_prefix is not None:
            prefix = ipaddress.IPv6Network(options.nat66_prefix.partition("/")[0] + "/64")
            desc["vmnet_nat66_prefix"] = str(prefix.network_address)
    if not isinstance(options, Bridged) and options.mtu is not None:
        desc["vmnet_mtu"] = options.mtu
    if extras.interface_id is not None:
        desc["vmnet_interface_id"] = extras.interface_id
    desc["vmnet_allocate_mac_address"] = extras.allocate_mac_address
    desc |= describe_offloads(extras)
    if options.isolated:
        desc["vmnet_enable_isolation"] = True
    _check(framework, desc)
    return desc


def describe_offloads(extras: Extras) -> dict[str, Scalar]:
    """The keys of the offloads that are asked for. Raises OptionError for two that exclude each other."""
    if extras.checksum_offload and extras.virtio_header:
        raise OptionError(
            "'checksum_offload' and 'virtio_header' exclude each other: the virtio header says what is left undone",
            option="virtio_header",
            value="true",
        )
    wanted = {
        "vmnet_enable_tso": extras.tso,
        "vmnet_enable_checksum_offload": extras.checksum_offload,
        "vmnet_enable_virtio_header": extras.virtio_header,
    }
    return {key: True for key, value in wanted.items() if value}


def _describe_host(desc: dict[str, Scalar], options: Host, extras: Extras) -> None:
    identifier = options.uuid
    if identifier is None:
        _describe_addresses(desc, options)
        return
    desc["vmnet_network_identifier"] = uuid.UUID(identifier)
    subnet = options.subnet
    if subnet is not None:
        desc["vmnet_host_ip_address"] = str(subnet.gateway)
        desc["vmnet_host_subnet_mask"] = str(subnet.mask)
    if extras.host_ipv6 is not None:
        desc["vmnet_host_ipv6_address"] = extras.host_ipv6


def _describe_addresses(desc: dict[str, Scalar], options: Shared | Host) -> None:
    subnet = options.subnet
    if subnet is not None:
        desc["vmnet_start_address"] = str(subnet.gateway)
        desc["vmnet_end_address"] = str(subnet.last)
        desc["vmnet_subnet_mask"] = str(subnet.mask)


_MEANING = {
    "vmnet_network_identifier": "net-uuid",
    "vmnet_host_ip_address": "a host address with net-uuid",
    "vmnet_host_ipv6_address": "a host address with net-uuid",
    "vmnet_enable_isolation": "isolated=on",
    "vmnet_enable_tso": "TSO",
    "vmnet_enable_checksum_offload": "checksum offload",
    "vmnet_enable_virtio_header": "the virtio header",
}


def _check(framework: Framework, desc: dict[str, Scalar]) -> None:
    for name in desc:
        if not framework.has(name):
            key = symbols.KEYS[name]
            raise MissingFeature(
                f"{_MEANING.get(name, name)} needs macOS {key.since} or later: {key.symbol} is missing"
            )
