"""`vmnet ls`: the running networks."""

from __future__ import annotations

import click

from openvmnet import control
from openvmnet.cli import render
from openvmnet.cli.render import Column

_COLUMNS = (
    Column("NETWORK"),
    Column("MODE"),
    Column("SUBNET"),
    Column("GATEWAY"),
    Column("VMS", right=True),
    Column("UPTIME", right=True),
    Column("PID", right=True),
)


@click.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
def command(as_json: bool) -> None:
    """List the running networks.

    A network whose process died is taken over, or its remains are removed; a note says so.
    """
    views = control.list_networks()
    if as_json:
        render.json(views)
        return
    if not views:
        click.echo("no network is running", err=True)
        return
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
