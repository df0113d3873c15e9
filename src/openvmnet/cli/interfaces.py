"""`vmnet interfaces`: what a VM can be bridged to on this host, and why not to the rest."""

from __future__ import annotations

import click

from openvmnet import engine
from openvmnet.cli import render
from openvmnet.cli.render import Column


@click.command("interfaces")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
def command(as_json: bool) -> None:
    """List what a VM can be bridged to: the values of ifname= for -netdev vmnet-bridged.

    HOW is bridge, a port in a Linux bridge, or macvtap, a second MAC on a wired NIC; where it is empty, REMARK says
    why nothing can be bridged there, else what you lack for it. VMS are yours that are bridged there now.

    Over macvtap a VM and its own host do not hear each other, though both reach everyone else on the LAN: where they
    have to, put the NIC into a bridge and name that.
    """
    if engine.DARWIN:
        _of_a_mac(as_json=as_json)
        return
    from openvmnet.cli import interfaces_linux

    interfaces_linux.report(as_json=as_json)


def _of_a_mac(*, as_json: bool) -> None:
    """On macOS vmnet itself says which, and nothing of why not the others."""
    from openvmnet.engine.darwin.bridged import shared_interfaces

    names = shared_interfaces()
    if as_json:
        render.json({"interfaces": [{"name": name, "how": "vmnet"} for name in names], "ports": []})
        return
    if not names:
        click.echo("vmnet names no interface that can be bridged to", err=True)
        return
    render.table((Column("IFNAME"), Column("HOW")), [(name, "vmnet") for name in names])
