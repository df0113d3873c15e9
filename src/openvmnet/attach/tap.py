"""A port of a Linux network for this very process: the link that `openvmnet.start` puts the vmnet contract over."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sys
from typing import TYPE_CHECKING

import msgspec

from openvmnet import control, messages
from openvmnet.config import running_config
from openvmnet.contract.interface import HEADER, Parameters
from openvmnet.engine.linux.tap import HeadedTapLink, TapLink
from openvmnet.errors import HostError, OptionError
from openvmnet.netdev import Bridged, stable_mac

if TYPE_CHECKING:
    from openvmnet.config import NetworkConfig
    from openvmnet.contract.interface import LinkRequest
    from openvmnet.netdev import Host, Shared

log = logging.getLogger(__name__)

_TUNSETOFFLOAD = 0x400454D0
_bridged_count = itertools.count()  # tells the records of this process's bridged ports apart


def open_link(request: LinkRequest) -> TapLink:
    """Join the network that is asked for, starting it where it does not run, and take a port. Leaves nothing on errors.

    Raises VmnetError, as `vmnet run` does for the same options.
    """
    options = request.options
    if isinstance(options, Bridged):
        return _bridged(request, options)
    return _network(request, options)


def _network(request: LinkRequest, options: Shared | Host) -> TapLink:
    base = messages.Spec(name=request.name, force=request.force, linger=request.linger)
    wanted = _plug_request(request)
    client = control.open_network(messages.Spec.of(options, base), first=wanted.kind, progress=log.info)
    try:
        reply, fd = client.plug(wanted)
    finally:
        client.close()
    try:
        config = running_config(reply.network)
        if config is None:
            raise HostError(f"network '{reply.network}' left no record of its addresses; its log has the reason")
        return TapLink(_ready(fd), _parameters(request, config, reply.mac or None))
    except BaseException:
        os.close(fd)
        raise


def _bridged(request: LinkRequest, options: Bridged) -> TapLink:
    """A TAP or macvtap on the LAN, as it is opened for QEMU: each frame bears a header, which stays empty."""
    from openvmnet.attach import bridged
    from openvmnet.engine.linux import interfaces

    ifname = options.ifname or ""
    found = interfaces.find(ifname)
    if found.how == "macvtap" and not request.allocate_mac_address:
        raise OptionError(
            f"allocate_mac_address=False does not go with ifname '{ifname}': a macvtap hears one MAC only, "
            "which has to be known; a bridge hears all",
            option="allocate_mac_address",
            value="False",
        )
    mac = stable_mac(_identity(request), 0)
    plugged = bridged.plug(ifname, msgspec.structs.replace(_plug_request(request), mac=mac, index=next(_bridged_count)))
    try:
        fcntl.ioctl(plugged.fd, _TUNSETOFFLOAD, 0)  # a macvtap gives frames over the MTU by default
        parameters = Parameters(
            mtu=found.mtu,
            max_packet_size=found.mtu + HEADER,
            interface_id=request.interface_id,
            mac_address=mac if request.allocate_mac_address else None,
        )
        return HeadedTapLink(_ready(plugged.fd), parameters, plugged.record)
    except BaseException:
        os.close(plugged.fd)
        os.close(plugged.record)
        raise


def _plug_request(request: LinkRequest) -> messages.PlugRequest:
    return messages.PlugRequest(
        vm=_program(),
        netdev=request.options.id or "interface",
        mac=None,
        identity=_identity(request),
        index=0,
        isolated=request.options.isolated,
        pid=os.getpid(),
        offloads=False,
        allocate_mac=request.allocate_mac_address,
        hostfwd=request.options.hostfwd,
        address=request.options.address,
    )


def _identity(request: LinkRequest) -> str:
    return f"interface {request.interface_id}"


def _ready(fd: int) -> int:
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    return fd


def _parameters(request: LinkRequest, config: NetworkConfig, mac: str | None) -> Parameters:
    subnet, prefix = config.subnet, config.prefix
    return Parameters(
        mtu=config.mtu,
        max_packet_size=config.mtu + HEADER,
        interface_id=request.interface_id,
        mac_address=mac,
        start_address=str(subnet.gateway) if subnet else None,
        end_address=str(subnet.last) if subnet else None,
        subnet_mask=str(subnet.mask) if subnet else None,
        nat66_prefix=str(prefix.network_address) if prefix else None,
        network=config.name,
    )


def _program() -> str:
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name if name and not name.startswith("-") else f"python-{os.getpid()}"
