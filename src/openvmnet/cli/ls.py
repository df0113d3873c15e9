"""`vmnet ls`: the running networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from openvmnet import control, engine
from openvmnet.cli import render
from openvmnet.cli.render import Column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.engine.linux.bridged_record import BridgedPort
    from openvmnet.errors import VmnetError
    from openvmnet.messages import NetworkView

_COLUMNS = (
    Column("NETWORK"),
    Column("MODE"),
    Column("SUBNET"),
    Column("GATEWAY"),
    Column("VMS", right=True),
    Column("UPTIME", right=True),
    Column("PID", right=True),
)
_BRIDGED = (
    Column("BRIDGED VM"),
    Column("NETDEV"),
    Column("IFNAME"),
    Column("HOW"),
    Column("MAC"),
    Column("ISOLATED"),
    Column("PID", right=True),
)


@click.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
def command(as_json: bool) -> None:
    """List the running networks, and the VMs that are bridged past them.

    A network whose process died is taken over, or its remains are removed; a note says so. One that does not answer
    within ten seconds is an error, after all others are listed.
    Of bridged VMs, --json tells in vmnet interfaces.
    """
    silent: list[VmnetError] = []
    if engine.DARWIN:
        from openvmnet.attach import relays

        views = relays.networks()
    else:
        views, silent = control.list_networks()
    if as_json:
        render.json(views)
    else:
        _print(views, _bridged_ports(), complete=not silent)
    for error in silent[1:]:
        click.echo(f"note: {error.message}", err=True)
    if silent:
        raise silent[0]


def _print(views: Sequence[NetworkView], bridged: Sequence[BridgedPort], *, complete: bool) -> None:
    if complete and not views and not bridged:
        click.echo("no network is running", err=True)
    if views:
        _networks(views)
    if views and bridged:
        click.echo()
    if bridged:
        render.table(
            _BRIDGED,
            [
                (port.vm, port.netdev, port.ifname, port.how, port.mac, "yes" if port.isolated else "no", port.pid)
                for port in bridged
            ],
        )


def _bridged_ports() -> list[BridgedPort]:
    """The VMs that are on no network of ours; on macOS these are networks like others."""
    if engine.DARWIN:
        return []
    from openvmnet.engine.linux import bridged_record

    return bridged_record.ports()


def _networks(views: Sequence[NetworkView]) -> None:
    render.table(
        _COLUMNS,
        [
            (
                view.name,
                view.mode,
                view.subnet,
                view.gateway,
                len({port.pid for port in view.ports}),
                render.duration(view.uptime),
                view.pid,
            )
            for view in views
        ],
    )
    for view in views:
        for note in view.notes:
            click.echo(f"note: {view.name}: {render.clean(note)}", err=True)
