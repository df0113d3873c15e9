"""The way out of a network: the slow path and the uplinks behind it, as one part with one life."""

from __future__ import annotations

import asyncio
import resource
from typing import TYPE_CHECKING

from openvmnet.uplink import icmp
from openvmnet.uplink.family import IPV6
from openvmnet.uplink.hostside import HostSide
from openvmnet.uplink.slowpath import OTHERS, Refusal, SlowPath
from openvmnet.uplink.tcp import TcpUplink
from openvmnet.uplink.udp import UdpUplink
from openvmnet.wire import ip, ip6

if TYPE_CHECKING:
    from openvmnet.config import NetworkConfig
    from openvmnet.engine.linux.engine import LinuxEngine
    from openvmnet.kernel.loop import Lane
    from openvmnet.netdev import Subnet

_SPARE_FILES = 2500  # descriptors that are no flows: DNS with silent upstreams needs most of them


class Outside:
    """Guest flows to host sockets, for the engine's TUN and listener; `limits` is what it cannot do on this host."""

    def __init__(self, lane: Lane, engine: LinuxEngine, config: NetworkConfig, subnet: Subnet) -> None:
        loop = asyncio.get_running_loop()
        files = _descriptors()
        flows = files - min(_SPARE_FILES, files // 4)
        tcp_limit, udp_limit = flows * 3 // 4 // 2, min(4096, flows // 5 // 2)  # two descriptors each
        self.limits: list[str] = []
        self.slowpath = slowpath = SlowPath(lane, engine.tun)
        self.tcp = TcpUplink(lane, engine.listener, slowpath.write, subnet.gateway.packed, loop.call_soon, tcp_limit)
        self.udp = UdpUplink(lane, engine.transparent, slowpath.write, config.mtu, udp_limit)
        self.udp.turns = self.tcp.turns
        self.udp.later = slowpath.later = loop.call_later
        self.icmp = icmp.IcmpUplink(lane, slowpath.write, config.mtu)
        self.icmp6 = icmp.IcmpUplink(lane, slowpath.write, config.mtu, family=IPV6)
        if not icmp.allowed():
            self.limits.append("guests cannot ping the outside: this host allows no ping sockets (see vmnet doctor)")
        slowpath.uplinks = {ip.TCP: self.tcp, ip.UDP: self.udp, ip.ICMP: self.icmp}
        if engine.prefix is not None and engine.listener6 is not None:
            slowpath.uplinks6 = {
                ip.TCP: self.tcp.serve6(engine.listener6, engine.prefix[1].packed),
                ip.UDP: self.udp.serve6(engine.transparent6),
                ip6.ICMP: self.icmp6,
            }
        slowpath.uplinks[OTHERS] = Refusal(slowpath.write, subnet.gateway.packed, ip, ip.PROTOCOL)
        if engine.prefix is not None:
            slowpath.uplinks6[OTHERS] = Refusal(slowpath.write, engine.prefix[1].packed, ip6, ip6.ADMIN_PROHIBITED)
        gateways = [subnet.gateway.packed, *([engine.prefix[1].packed] if engine.prefix is not None else [])]
        host = HostSide(gateways, outside=config.outside, loopback=config.host_loopback)
        self.tcp.destination = self.udp.destination = host.destination
        self.tcp.second = host.second
        self._uplinks = (self.tcp, self.udp, self.icmp, self.icmp6)

    def start(self) -> None:
        """Begin to take what opens flows."""
        self.slowpath.start()

    def crowd(self, *, crowded: bool) -> None:
        """Guests share the process's time while there are several."""
        self.slowpath.budget.crowded = self.udp.budget.crowded = self.tcp.crowded = crowded

    def sweep(self) -> None:
        """Once in a while: end what is idle or lost."""
        for uplink in self._uplinks:
            uplink.sweep()

    def forget_guest(self, address: bytes) -> None:
        """The guest at `address` is gone, and its flows with it."""
        for uplink in self._uplinks:
            uplink.forget_guest(address)

    def forget_port(self, number: int) -> None:
        """The port is gone, and its flows with it."""
        self.tcp.forget_port(number)
        self.udp.forget_port(number)

    def flows(self) -> dict[str, int]:
        """Flows by kind."""
        return {
            "tcp": len(self.tcp.flows),
            "tcp_opening": self.tcp.pending(),
            "udp": len(self.udp),
            "icmp": len(self.icmp) + len(self.icmp6),
        }

    def counters(self) -> dict[str, int]:
        """What its parts counted."""
        counters: dict[str, int] = {}
        for part in (*self._uplinks, self.slowpath):
            counters |= part.counters
        return counters

    def close(self) -> None:
        """End every flow, and the TUN with the slow path."""
        self.icmp6.close()
        self.icmp.close()
        self.udp.close()
        self.tcp.close()
        self.slowpath.close()


def _descriptors() -> int:
    """Raise the limit of open files as far as the host allows; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(hard, 1 << 17)
