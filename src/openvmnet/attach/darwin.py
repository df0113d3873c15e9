"""A VM's ports on macOS: a relay process for each vmnet netdev of its command, and no rights left for the VM.

The stable MAC is the NIC's, as on Linux, and the interface's id follows from it: bootpd gives the same lease again, and
vmnet the same identity.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import entitlement, launch, reservation
from openvmnet.engine.darwin.mac import Mac
from openvmnet.errors import OptionError
from openvmnet.netdev import stable_mac

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.attach.command import Plan, PlannedNetdev
    from openvmnet.engine.darwin.launch import Port

_NAMESPACE = uuid.UUID("6f1d3b1c-4f6d-5d0e-9a53-0d2f8a4b7c11")  # our own, for ids that follow from MACs


def refuse(name: str | None, *, host_loopback: bool) -> None:
    """Raise OptionError for what a network of vmnet.framework cannot be told."""
    if name is not None:
        raise OptionError(
            f"'--name {name}' is for Linux: on macOS a network is known by its mode and addresses",
            option="name",
            value=name,
        )
    if host_loopback:
        raise OptionError(
            "'--host-loopback' is for Linux: on macOS a guest reaches what listens on all of the host's addresses",
            option="host-loopback",
            value="on",
        )


def plug(
    planned: Plan, *, mac_os: Mac | None = None, command: Sequence[str] | None = None
) -> tuple[list[Port], list[str]]:
    """A relay for each netdev, and its MAC. Raises what the first one says that cannot start; the others end then.

    `command` starts a relay instead of the interpreter that may use vmnet.
    """
    for netdev in planned.netdevs:
        reservation.refuse(netdev.options, mac_os or Mac())
    vm, identity = planned.vm_name, planned.identity()
    ports: list[Port] = []
    macs = [netdev.mac or stable_mac(identity, netdev.index) for netdev in planned.netdevs]
    try:
        for netdev, mac in zip(planned.netdevs, macs, strict=True):
            ports.append(_start(netdev, vm, mac, mac_os, command))
    except BaseException:
        for port in ports:
            port.close()
        raise
    return ports, macs


def _start(netdev: PlannedNetdev, vm: str, mac: str, mac_os: Mac | None, command: Sequence[str] | None) -> Port:
    options = netdev.options
    if options.id is None:  # the relay reads it as a -netdev, which has one
        import msgspec

        options = msgspec.structs.replace(options, id=netdev.name)
    return launch.start(
        options.format(),
        vm=vm,
        netdev=netdev.name,
        interface_id=uuid.uuid5(_NAMESPACE, mac),
        mac=mac,
        mac_os=mac_os,
        command=command,
    )


def become_user() -> None:
    """Give up root's rights for good before the VM is started, where sudo(8) says whose it is."""
    user = entitlement.sudo_user() if os.geteuid() == 0 else None
    if user is None:
        return
    entitlement.drop(*user)
    changed = entitlement.user_environment(user[0])
    for gone in set(os.environ) - set(changed):
        del os.environ[gone]
    os.environ.update(changed)
