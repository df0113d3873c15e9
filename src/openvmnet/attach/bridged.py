"""A port of vmnet-bridged for a VM that is about to start.

There is no network to ask: the port is made by this process, which becomes the VM, and its MAC follows from the VM
alone. Whoever else is on that LAN is not known, so a MAC that is taken there is not noticed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.engine.linux import bridged, bridged_record
from openvmnet.errors import HostError
from openvmnet.netdev import stable_mac

if TYPE_CHECKING:
    from openvmnet.engine.linux.interfaces import How
    from openvmnet.messages import PlugRequest


class Plugged(NamedTuple):
    """The MAC that the NIC has to use, and two descriptors for the VM to inherit: its port, and the port's record.

    Over a macvtap (`how`) the NIC hears no other MAC. Where there is no place for a record, `record` stands for none
    and `unlisted` says why: the VM runs without.
    """

    mac: str
    fd: int
    record: int
    how: How
    unlisted: str | None = None


def plug(ifname: str, request: PlugRequest) -> Plugged:
    """A port on bridge or NIC `ifname`. Raises as `bridged.open_port`."""
    mac = request.mac or stable_mac(request.identity, request.index)
    port = bridged.open_port(ifname, mac, isolated=request.isolated)
    told = bridged_record.BridgedPort(
        vm=request.vm,
        netdev=request.netdev,
        ifname=ifname,
        how=port.how,
        link=port.link,
        mac=mac,
        isolated=request.isolated,
        pid=request.pid,
    )
    try:
        record = bridged_record.write(told, request.index)
    except (OSError, HostError) as error:
        nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return Plugged(mac, port.fd, nowhere, port.how, str(error))
    except BaseException:
        os.close(port.fd)
        raise
    return Plugged(mac, port.fd, record, port.how)
