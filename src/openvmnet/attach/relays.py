"""The networks of a Mac, put together from its relays' records and bootpd's leases: what `ls` and `show` print."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import leases, records
from openvmnet.errors import NotFound
from openvmnet.messages import NetworkView, PortView, PublishedView
from openvmnet.netdev import hostfwd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.engine.darwin.leases import Lease
    from openvmnet.engine.darwin.records import Record

_DOMAIN = None  # bootpd gives the host's own search domains


def networks(running: Sequence[Record] | None = None, given: Sequence[Lease] | None = None) -> list[NetworkView]:
    """Every network that a relay of this user's is on, oldest first."""
    running = records.read() if running is None else running
    given = leases.read() if given is None else given
    together: dict[str, list[Record]] = {}
    for record in running:
        together.setdefault(record.network, []).append(record)
    return [_view(name, members, given) for name, members in together.items()]


def network(name: str) -> NetworkView:
    """The network of that name. Raises NotFound, which names those that run."""
    views = networks()
    for view in views:
        if view.name == name:
            return view
    names = ", ".join(view.name for view in views) or "none"
    raise NotFound(f"no network '{name}' is running; there are: {names}", hint="vmnet ls")


def _view(name: str, members: list[Record], given: Sequence[Lease]) -> NetworkView:
    first = members[0]
    subnet, gateway = first.subnet, first.gateway
    end = first.parameters.get("vmnet_end_address")
    notes = []
    if first.mode == "bridged":
        notes.append(f"bridged to {first.parameters.get('vmnet_shared_interface_name')}: its addresses are the LAN's")
    prefix = first.parameters.get("vmnet_nat66_prefix")
    uuid = first.parameters.get("vmnet_network_identifier")
    return NetworkView(
        name=name,
        mode=first.mode,
        subnet=None if subnet is None else str(subnet),
        gateway=None if gateway is None else str(gateway),
        pool_start=None if gateway is None else str(gateway + 1),
        pool_end=None if end is None else str(end),
        dns=None if gateway is None else str(gateway),
        domain=_DOMAIN,
        mtu=int(first.parameters.get("vmnet_mtu", 1500)),
        pid=first.pid,
        uptime=time.time() - first.started,
        ports=[_port(record, given) for record in members],
        notes=notes,
        net_uuid=None if uuid is None else str(uuid),
        prefix6=None if prefix is None else f"{prefix}/64",
    )


def _port(record: Record, given: Sequence[Lease]) -> PortView:
    lease = None if record.mac is None else leases.address_of(record.mac, list(given), time.time())
    counters = record.counters
    address = None if lease is None else str(lease.address)
    return PortView(
        port=str(record.pid),
        vm=record.vm,
        netdev=record.netdev,
        mac=record.mac or "",
        isolated=record.isolated,
        address=address,
        hostname=None if lease is None else lease.name,
        lease_expires=None if lease is None else float(lease.expires),
        rx_bytes=counters.down_octets,
        rx_packets=counters.down_packets,
        tx_bytes=counters.up_octets,
        tx_packets=counters.up_packets,
        dropped=counters.down_dropped + counters.up_dropped,
        pid=record.vm_pid,
        published=[
            PublishedView.of(forward, forward.guest or record.reservation or address)
            for forward in hostfwd.parse_all(record.hostfwd)
        ],
        reservation=record.reservation,
    )
