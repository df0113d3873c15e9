"""What answers at the gateway of a network over IPv6: the router, DHCPv6, and the names of IPv6 addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openvmnet import state
from openvmnet.service.dhcp6 import Dhcp6Config, Dhcp6Server
from openvmnet.service.dhcp6_socket import Dhcp6Service
from openvmnet.service.dns_zone import Names
from openvmnet.service.leases6 import LeaseBook6
from openvmnet.service.names6 import Names6
from openvmnet.service.newcomers import Newcomers
from openvmnet.service.router import RouterService, advertisement

if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv6Network

    from openvmnet.config import NetworkConfig
    from openvmnet.engine.linux.engine import LinuxEngine
    from openvmnet.kernel.loop import Lane
    from openvmnet.network.port import Port
    from openvmnet.service.leases import LeaseBook


class Gateway6:
    """The services of `prefix` on the engine's sockets; `leases` is the book of IPv4, which has the guests' names."""

    def __init__(
        self,
        lane: Lane,
        engine: LinuxEngine,
        config: NetworkConfig,
        prefix: IPv6Network,
        leases: LeaseBook,
        ports: Iterable[Port],
        *,
        domain: str,
    ) -> None:
        gateway, mac = prefix[1], bytes.fromhex(engine.mac.replace(":", ""))
        self._macs = {port.mark: port.packed_mac for port in ports}
        settings = Dhcp6Config(prefix, mac, (gateway,), domain=domain)
        path = state.remembered(config.name) / "leases6.json"
        self.leases = LeaseBook6(*settings.pool, path, live_ports=self._macs.keys())
        self._server = Dhcp6Server(settings, self.leases, lambda port: self._macs.get(port, b""))
        self._names = Names6(
            prefix, leases, self.leases, lambda: ((one.address, one.mac) for one in engine.neighbours6())
        )
        self.names = Names(prefix, gateway, self._names.forward, self._names.reverse)
        raw, udp, heard, ifindex = engine.services6()
        told = advertisement(prefix, gateway, mac, config.mtu, domain=domain, routed=config.outside)
        self._router = RouterService(lane, raw, ifindex, told)
        self._newcomers = Newcomers(lane, heard, raw, prefix)
        self._service = Dhcp6Service(lane, udp, ifindex, self._server)
        try:
            self._service.start()
            self._router.start()
            self._newcomers.start()
        except BaseException:
            self.close()
            raise

    def generation(self) -> int:
        """A number that changes whenever names or addresses may have, those of IPv4 among them."""
        return self._names.generation()

    def port_added(self, port: Port) -> None:
        """A port is there."""
        self._macs[port.mark] = port.packed_mac
        self._server.port_added(port.mark)

    def port_gone(self, port: Port) -> set[str]:
        """A port is gone; the addresses that its guest had by lease."""
        addresses = {str(lease.ip) for lease in self.leases if lease.client.port == port.mark}
        self._macs.pop(port.mark, None)
        self._server.port_gone(port.mark)
        self._router.port_gone(port.mark)
        self._newcomers.port_gone(port.mark)
        return addresses

    def addresses(self, port: Port) -> list[str]:
        """The addresses that a port's guest has of this network, the leased ones first."""
        return [str(one) for one in self._names.of(port.packed_mac, port.mark)] if port.mac else []

    def counters(self) -> dict[str, int]:
        """What the services counted."""
        counters = {f"router_{name}": count for name, count in self._router.counters.items()}
        return counters | {f"dhcp6_{name}": count for name, count in self._server.counters.items()}

    def close(self) -> None:
        """Say farewell, and stop answering."""
        self._newcomers.close()
        self._router.close()
        self._service.close()
