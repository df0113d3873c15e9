"""`vmnet show NAME`: one network's addresses, ports, leases, flows and counters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from openvmnet import control, engine
from openvmnet.cli import render
from openvmnet.cli.render import Column

if TYPE_CHECKING:
    from openvmnet.messages import NetworkView, PortView, PublishedView

_COLUMNS = (
    Column("PORT"),
    Column("VM"),
    Column("NETDEV"),
    Column("MAC"),
    Column("ADDRESS"),
    Column("NAME"),
    Column("LEASE", right=True),
    Column("RECEIVED", right=True),
    Column("SENT", right=True),
    Column("DROPPED", right=True),
    Column("ISOLATED"),
    Column("PID", right=True),
)


@click.command("show")
@click.argument("name", metavar="NETWORK")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is known, as JSON.")
def command(name: str, as_json: bool) -> None:
    """Show a running network: addresses, ports with leases and counters, flows by kind.

    RECEIVED and SENT are a VM's own: what came to it, and from it. LEASE is how long its address is still its own.
    Flows and counters of zero are left out; --json has them all.
    """
    view = _view(name)
    if as_json:
        render.json(view)
    else:
        _print(view)


def _view(name: str) -> NetworkView:
    if engine.DARWIN:
        from openvmnet.attach import relays

        return relays.network(name)
    client = control.connect(name)
    try:
        return client.show()
    finally:
        client.close()


def _print(view: NetworkView) -> None:
    render.fields(
        [
            ("network", view.name),
            ("mode", view.mode),
            *([("UUID", view.net_uuid)] if view.net_uuid else []),
            ("subnet", view.subnet),
            ("gateway", view.gateway),
            ("pool", f"{view.pool_start} to {view.pool_end}" if view.pool_start else None),
            *([("IPv6 prefix", view.prefix6), ("IPv6 gateway", view.gateway6)] if view.prefix6 else []),
            ("DNS", view.dns),
            ("domain", view.domain),
            ("MTU", view.mtu),
            ("flows", _counts(view.flows)),
            *_counters(view.counters),
            ("uptime", render.duration(view.uptime)),
            ("pid", view.pid),
        ]
    )
    for note in view.notes:
        click.echo(f"note: {render.clean(note)}")
    click.echo()
    if view.ports:
        render.table(_COLUMNS, [_row(port) for port in view.ports])
        for port in view.ports:
            if port.addresses6:
                click.echo(f"{port.port} over IPv6: {', '.join(port.addresses6)}")
            for published in port.published:
                click.echo(f"{port.port} publishes {_published(published)}")
            if port.reservation:
                click.echo(f"{port.port} has {port.reservation} reserved")
    else:
        click.echo("no VM is plugged in")


def _published(port: PublishedView) -> str:
    """`tcp 0.0.0.0:2222 to 192.168.64.2:22`."""
    host, guest = (f"[{one}]" if one and ":" in one else one for one in (port.host_address, port.guest_address))
    return f"{port.protocol} {host}:{port.host_port} to {guest or '(no address yet)'}:{port.guest_port}"


def _counters(counters: dict[str, int]) -> list[tuple[str, object]]:
    """A line for each part of the network that counts: `dns  6 queries, 2 local`."""
    parts: dict[str, dict[str, int]] = {}
    for name, count in counters.items():
        part, _, kind = name.partition("_")
        if count:
            parts.setdefault(part, {})[kind or part] = count
    return [(part, _counts(counts)) for part, counts in parts.items()] or [("counters", "none")]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def _row(port: PortView) -> tuple[object, ...]:
    lease = None if port.lease_expires is None else render.duration(port.lease_expires - time.time())
    return (
        port.port,
        port.vm,
        port.netdev,
        port.mac,
        port.address,
        port.hostname,
        lease,
        render.size(port.rx_bytes),
        render.size(port.tx_bytes),
        port.dropped,
        "yes" if port.isolated else "no",
        port.pid,
    )
