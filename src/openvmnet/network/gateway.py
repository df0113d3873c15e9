"""What answers at the gateway of a network: DHCP, DNS and, over IPv6, the router, as one part with one life."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from openvmnet import state
from openvmnet.network.gateway6 import Gateway6
from openvmnet.service.dhcp import DhcpConfig, DhcpServer
from openvmnet.service.dhcp_socket import DhcpService
from openvmnet.service.dns import DnsService
from openvmnet.service.dns_zone import Zone
from openvmnet.service.leases import LeaseBook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from openvmnet.config import NetworkConfig
    from openvmnet.engine.linux.engine import LinuxEngine
    from openvmnet.kernel.loop import Lane
    from openvmnet.netdev import Subnet
    from openvmnet.network.port import Port
    from openvmnet.service.leases import Lease

DOMAIN = "vmnet.internal"


class Gateway:
    """The services on the engine's sockets; `ports` are those of guests that were there before this process."""

    def __init__(
        self, lane: Lane, engine: LinuxEngine, config: NetworkConfig, subnet: Subnet, ports: Iterable[Port]
    ) -> None:
        self._closers: list[Callable[[], object]] = []
        self.six: Gateway6 | None = None  # where the network has IPv6
        ports = list(ports)
        live = {port.mark for port in ports}
        self.leases = LeaseBook(state.remembered(config.name) / "leases.json", live_ports=live)
        self.dhcp = DhcpServer(
            DhcpConfig(
                gateway=subnet.gateway,
                prefixlen=subnet.prefixlen,
                first=subnet.first,
                last=subnet.last,
                gateway_mac=bytes.fromhex(engine.mac.replace(":", "")),
                dns=(subnet.gateway,),
                domain=DOMAIN,
                mtu=config.mtu,
                routed=config.outside,
            ),
            self.leases,
        )
        for port in ports:
            self._admit(port)
        try:
            udp, raw, arp = engine.dhcp_sockets()
            service = DhcpService(lane, udp, raw, arp, self.dhcp)
            service.start()
            self._closers.append(service.close)
            if engine.prefix is not None:
                self.six = Gateway6(lane, engine, config, engine.prefix, self.leases, ports, domain=DOMAIN)
                self._closers.append(self.six.close)
            zone = Zone(
                domain=DOMAIN,
                subnet=subnet.network,
                gateway=subnet.gateway,
                forward=self.leases.by_name,
                reverse=self.leases.name_of,
                generation=self.six.generation if self.six else self.leases.generation,
                ip6=self.six.names if self.six else None,
            )
            udp, tcp = engine.dns_sockets()
            sockets6 = engine.dns_sockets6(engine.prefix[1]) if engine.prefix is not None else None
            self.dns = DnsService(
                lane, udp, tcp, zone=zone, forwards=config.outside, sockets6=sockets6, port_of=engine.opened_by
            )
            self.dns.start()
            self._closers.append(self.dns.close)
        except BaseException:
            self.close()
            raise

    def port_added(self, port: Port) -> None:
        """A port is there."""
        self._admit(port)
        if self.six is not None:
            self.six.port_added(port)

    def _admit(self, port: Port) -> None:
        self.dhcp.port_added(port.mark)
        if port.reservation is not None:
            self.dhcp.reserve(port.reservation, port.packed_mac, port.mark)

    def port_gone(self, port: Port) -> set[str]:
        """A port is gone; the addresses that its guest had by lease, its own MAC's and those of guests in it."""
        mac = port.packed_mac
        addresses = {str(lease.ip) for lease in self.leases if lease.port == port.mark or lease.mac == mac}
        self.leases.release_mac(mac)
        self.dhcp.port_gone(port.mark)
        if self.six is not None:
            addresses |= self.six.port_gone(port)
        return addresses

    def lease_of(self, port: Port) -> Lease | None:
        """What the port's MAC has; where nobody knows that, what came through the port last."""
        if port.mac:
            return self.leases.by_mac(port.packed_mac, port.mark)
        of_port = (lease for lease in self.leases if lease.port == port.mark)
        return max(of_port, key=lambda lease: lease.expires, default=None)

    def moves(self) -> int:
        """A number that changes with each address that came into or out of use."""
        own = self.leases.moves + self.dhcp.pool.reservations.moves
        return own + (self.six.leases.moves if self.six else 0)

    def leased(self) -> list[tuple[str, int]]:
        """Every leased address, and every one that is kept, with the mark of its port, where that is known."""
        pairs: list[tuple[str, int | None]] = [(str(lease.ip), lease.port) for lease in self.leases]
        pairs += [(str(IPv4Address(address)), port) for address, port in self.dhcp.pool.reservations]
        pairs += [(str(lease.ip), lease.client.port) for lease in (self.six.leases if self.six else ())]
        return [(address, port) for address, port in pairs if port is not None]

    def crowd(self, *, crowded: bool) -> None:
        """Guests share the process's time while there are several."""
        self.dns.budget.crowded = crowded

    def counters(self) -> dict[str, int]:
        """What the services counted."""
        counters = {f"dhcp_{name}": count for name, count in self.dhcp.counters.items()}
        if self.six is not None:
            counters |= self.six.counters()
        return counters | {f"dns_{name}": count for name, count in self.dns.stats.items()}

    def close(self) -> None:
        """Stop answering."""
        while self._closers:
            self._closers.pop()()
