"""A network as commands show it."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from openvmnet import messages
from openvmnet.netdev import hostfwd
from openvmnet.network.gateway import DOMAIN

if TYPE_CHECKING:
    from openvmnet.network.life import Network
    from openvmnet.network.port import Port


async def view(network: Network) -> messages.NetworkView:
    """What is known of `network` now."""
    config, gateway, outside = network.config, network.gateway, network.outside
    subnet = config.subnet
    counters: dict[str, int] = {}
    for part in (outside, gateway):
        if part is not None:
            counters |= part.counters()
    if network.published is not None:
        counters |= network.published.counters
    with contextlib.suppress(Exception):
        counters |= {f"firewall_{name}": count for name, count in (await network.engine.counters()).items()}
    return messages.NetworkView(
        name=network.name,
        mode=config.mode,
        subnet=str(subnet.network) if subnet else None,
        gateway=str(subnet.gateway) if subnet else None,
        pool_start=str(subnet.first) if subnet else None,
        pool_end=str(subnet.last) if subnet else None,
        dns=str(subnet.gateway) if subnet else None,
        domain=DOMAIN if subnet else None,
        mtu=config.mtu,
        net_uuid=config.net_uuid,
        host_loopback=config.host_loopback,
        prefix6=str(config.prefix) if config.prefix else None,
        gateway6=str(config.gateway6) if config.gateway6 else None,
        pid=os.getpid(),
        uptime=round(time.monotonic() - network.started, 3),
        ports=_ports(network),
        flows=outside.flows() if outside else {},
        counters=counters,
        notes=network.news + (outside.limits if outside else []),
    )


def _published(network: Network, port: Port) -> list[messages.PublishedView]:
    if network.published is None:
        return []
    forwards = hostfwd.parse_all(port.hostfwd)
    return [messages.PublishedView.of(forward, network.published.guest(port, forward)) for forward in forwards]


def _ports(network: Network) -> list[messages.PortView]:
    links = network.engine.links()
    neighbours = {one.mac: one.address for one in network.engine.neighbours()}
    six = network.gateway.six if network.gateway is not None else None
    views = []
    for port in network.ports.values():
        lease = network.gateway.lease_of(port) if network.gateway is not None else None
        link = links.get(port.link)
        views.append(
            messages.PortView(
                port=port.link,
                vm=port.vm,
                netdev=port.netdev,
                mac=port.mac,
                isolated=port.isolated,
                address=str(lease.ip) if lease else neighbours.get(port.mac),
                addresses6=six.addresses(port) if six else [],
                hostname=lease.hostname if lease else None,
                lease_expires=lease.expires if lease else None,
                # What the guest receives, its TAP transmits.
                rx_bytes=link.tx_bytes if link else 0,
                rx_packets=link.tx_packets if link else 0,
                tx_bytes=link.rx_bytes if link else 0,
                tx_packets=link.rx_packets if link else 0,
                dropped=link.tx_dropped + link.rx_dropped if link else 0,
                pid=port.pid,
                published=_published(network, port),
                reservation=str(port.reservation) if port.reservation else None,
            )
        )
    return views
