"""`vmnet interfaces`: what a VM can be bridged to on this host, and why not to the rest."""

from __future__ import annotations

import click
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


@click.command("interfaces")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
def command(as_json: bool) -> None:
    """List what a VM can be bridged to: the values of ifname= for -netdev vmnet-bridged.

    HOW is bridge, a port in a Linux bridge, or macvtap, a second MAC on a wired NIC; where it is empty, REMARK says
    why nothing can be bridged there, else what you lack for it. VMS are yours that are bridged there now.

    Over macvtap a VM and its own host do not hear each other, though both reach everyone else on the LAN: where they
    have to, put the NIC into a bridge and name that.
    """
    report = Report(interfaces.inventory(), bridged_record.ports())
    if as_json:
        render.json(report)
        return
    render.table(_COLUMNS, [_row(each, report.ports) for each in report.interfaces])


def _row(interface: Interface, ports: list[BridgedPort]) -> tuple[object, ...]:
    vms = ", ".join(dict.fromkeys(port.vm for port in ports if port.ifname == interface.name))
    remarks = [interface.reason, interface.needs and f"needs {interface.needs}", interface.note]
    remark = "; ".join(each for each in remarks if each)
    how = interface.how or ""
    return interface.name, interface.kind, interface.state, how, interface.mtu, vms, remark
