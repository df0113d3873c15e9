"""What of a Linux host a VM can be bridged to, as a table or as JSON."""

from __future__ import annotations

import msgspec

from openvmnet.cli import render
from openvmnet.cli.render import Column
from openvmnet.engine.linux import bridged_record, interfaces
from openvmnet.engine.linux.bridged_record import BridgedPort
from openvmnet.engine.linux.interfaces import Interface

_COLUMNS = (
    Column("IFNAME"),
    Column("KIND"),
    Column("STATE"),
    Column("HOW"),
    Column("MTU", right=True),
    Column("VMS"),
    Column("REMARK"),
)


class Report(msgspec.Struct, frozen=True):
    """Every link of the host, and the bridged ports of this user's VMs."""

    interfaces: list[Interface]
    ports: list[BridgedPort]


def report(*, as_json: bool) -> None:
    """Print it."""
    found = Report(interfaces.inventory(), bridged_record.ports())
    if as_json:
        render.json(found)
        return
    render.table(_COLUMNS, [_row(each, found.ports) for each in found.interfaces])


def _row(interface: Interface, ports: list[BridgedPort]) -> tuple[object, ...]:
    vms = ", ".join(dict.fromkeys(port.vm for port in ports if port.ifname == interface.name))
    needs = interface.needs and f"{'needs' if interface.needs == 'root' else 'first'} {interface.needs}"
    remarks = [interface.reason, needs, interface.note]
    remark = "; ".join(each for each in remarks if each)
    how = interface.how or ""
    return interface.name, interface.kind, interface.state, how, interface.mtu, vms, remark
