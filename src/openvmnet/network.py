"""A network: desired to actual, and back to nothing.

One network is an engine (links, ports, rules), two services (DHCP, DNS) and the uplink (slow path, TCP, UDP, ICMP), all
on one event loop in one process. It comes up as a whole or raises and leaves nothing; it ends when its last VM has gone
and the linger time is over.

What the process has to know of its ports is in RUNTIME/NAME/network.json, written at each change, so that the next
process can take over when this one is killed: the namespace, the bridge and the guests' TAPs live on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import resource
import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec

from openvmnet import control, state
from openvmnet.engine.linux.agent import PORT_PREFIX
from openvmnet.engine.linux.engine import LinuxEngine
from openvmnet.engine.linux.firewall import PORT_MARK
from openvmnet.errors import Conflict, Exhausted, HostError
from openvmnet.netdev import Subnet, stable_mac
from openvmnet.service.dhcp import DhcpConfig, DhcpServer
from openvmnet.service.dhcp_socket import DhcpService
from openvmnet.service.dns import DnsService
from openvmnet.service.dns_zone import Zone
from openvmnet.service.leases import LeaseBook
from openvmnet.uplink import icmp
from openvmnet.uplink.slowpath import SlowPath
from openvmnet.uplink.tcp import TcpUplink
from openvmnet.uplink.udp import UdpUplink
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)

DOMAIN = "vmnet.internal"
MTU = 1500
_NUMBERS = 60000  # port numbers; the firewall has 16 bits for them
PORTS = 1000  # of one network; a bridge has at most 1,024
_SWEEP = 5.0  # s between looks for idle flows
_GUARD = 0.2  # s between looks for leases that the firewall does not know
_GRACE = 10.0  # s that a network without any port yet waits for its first
_SPARE_FILES = 2500  # descriptors that are no flows: DNS with silent upstreams needs most of them


class Port(msgspec.Struct, frozen=True):
    """One VM's NIC: number `number` on the bridge as link vmNUMBER."""

    number: int
    vm: str
    netdev: str
    mac: str
    isolated: bool
    pid: int

    @property
    def link(self) -> str:
        """The TAP's name in the namespace."""
        return f"{PORT_PREFIX}{self.number}"


class Record(msgspec.Struct, frozen=True):
    """RUNTIME/NAME/network.json: enough to take the network over."""

    subnet: Subnet
    pid: int
    agent: int
    linger: float
    ports: list[Port]


class Network:
    """A running network. `agent` is its agent's pid, `before` the record of a process that it takes over from."""

    def __init__(self, lane: Lane, name: str, subnet: Subnet, linger: float, agent: int, before: Record | None) -> None:
        self.name = name
        self.subnet = subnet
        self.ended = asyncio.Event()
        self.agent_died = False
        self.forced = False  # its end does not wait for its VMs
        self.news: list[str] = []  # what happened to it, told once to who started it
        self.limits: list[str] = []  # what it cannot do on this host
        self._lane = lane
        self._linger = linger
        self._agent = agent
        self._before = before
        self._directory = state.runtime(name)
        self._mac = gateway_mac(name)
        self._engine = LinuxEngine(self._directory / "agent.sock", subnet, self._mac, MTU)
        self._ports: dict[str, Port] = {}
        self._next = 1
        self._started = time.monotonic()
        self._lonely: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Coroutine[Any, Any, None] | None]] = []

    async def up(self) -> None:
        """Make it real; on an error everything made so far is unmade and the error goes on."""
        try:
            before = self._before.ports if self._before is not None else []
            await self._engine.up({port.link: port.isolated for port in before})
        except BaseException:
            if self._before is None:  # nobody will ask this agent for anything again
                self._engine.namespace.quit()
            raise
        try:
            self._closers.append(self._engine.down)
            self._engine.watch(self._lane, self._on_departure, self._on_agent_gone)
            self._start_uplink()
            self._adopt()
            self._start_services()
            self._crowd()
            self._slowpath.start()
        except BaseException:
            await self.down()
            raise
        self._save()
        self._spawn(self._sweep())
        self._spawn(self._guard())
        self._consider_end(_GRACE)

    async def plug(self, request: control.PlugRequest) -> tuple[control.PlugReply, int]:
        """A port for one NIC; its answer and the TAP's descriptor, which the caller has to close after sending."""
        if len(self._ports) >= PORTS:
            raise Exhausted(f"network '{self.name}' has {PORTS} ports; it takes no more")
        mac = self._mac_for(request)
        number = self._number()
        port = Port(number, request.vm, request.netdev, mac, request.isolated, request.pid)
        self._ports[port.link] = port
        try:
            _, fd = await self._engine.plug(number, isolated=request.isolated)
        except BaseException:
            self._ports.pop(port.link, None)
            raise
        self._crowd()
        self._dhcp.port_added(PORT_MARK + number)
        self._stay()
        self._save()
        log.info("port %s: VM %s, netdev %s, MAC %s", port.link, port.vm, port.netdev, mac)
        return control.PlugReply(port.link, mac, self.name), fd

    async def view(self) -> control.NetworkView:
        """The network as it is now."""
        links = self._engine.links()
        book = self._dhcp.leases
        neighbours = {one.mac: one.address for one in self._engine.neighbours()}
        ports = []
        for port in self._ports.values():
            lease = book.by_mac(bytes.fromhex(port.mac.replace(":", "")), PORT_MARK + port.number)
            link = links.get(port.link)
            ports.append(
                control.PortView(
                    port=port.link,
                    vm=port.vm,
                    netdev=port.netdev,
                    mac=port.mac,
                    isolated=port.isolated,
                    address=str(lease.ip) if lease else neighbours.get(port.mac),
                    hostname=lease.hostname if lease else None,
                    lease_expires=lease.expires if lease else None,
                    # What the guest receives, its TAP transmits.
                    rx_bytes=link.tx_bytes if link else 0,
                    rx_packets=link.tx_packets if link else 0,
                    tx_bytes=link.rx_bytes if link else 0,
                    tx_packets=link.rx_packets if link else 0,
                    dropped=link.tx_dropped + link.rx_dropped if link else 0,
                    pid=port.pid,
                )
            )
        return control.NetworkView(
            name=self.name,
            mode="shared",
            subnet=str(self.subnet.network),
            gateway=str(self.subnet.gateway),
            pool_start=str(self.subnet.first),
            pool_end=str(self.subnet.last),
            dns=str(self.subnet.gateway),
            domain=DOMAIN,
            mtu=MTU,
            pid=os.getpid(),
            uptime=round(time.monotonic() - self._started, 3),
            ports=ports,
            flows={
                "tcp": len(self._tcp.flows),
                "tcp_opening": self._tcp.pending(),
                "udp": len(self._udp),
                "icmp": len(self._icmp),
            },
            counters=await self._counters(),
            notes=self.news + self.limits,
        )

    def end(self, forced: bool) -> None:
        """Ask for the network's end; whoever runs it takes it down."""
        self.forced = self.forced or forced
        self.ended.set()

    def busy(self) -> bool:
        """Whether any VM is plugged."""
        return bool(self._ports)

    async def down(self) -> None:
        """End everything that `up()` made, in reverse; what fails is logged and the rest goes on."""
        if self._lonely is not None:
            self._lonely.cancel()
        for task in self._tasks:
            task.cancel()
        while self._closers:
            close = self._closers.pop()
            try:
                pending = close()
                if pending is not None:
                    await pending
            except Exception:
                log.exception("ending network '%s': one part failed", self.name)

    def _start_uplink(self) -> None:
        loop = asyncio.get_running_loop()
        files = _descriptors()
        flows = files - min(_SPARE_FILES, files // 4)
        tcp_limit, udp_limit = flows * 3 // 4 // 2, min(4096, flows // 5 // 2)  # two descriptors each
        self._slowpath = slowpath = SlowPath(self._lane, self._engine.tun)
        self._closers.append(slowpath.close)
        self._tcp = TcpUplink(
            self._lane,
            self._engine.listener,
            slowpath.write,
            self.subnet.gateway.packed,
            loop.call_soon,
            tcp_limit,
        )
        self._closers.append(self._tcp.close)
        self._udp = UdpUplink(self._lane, self._engine.transparent, slowpath.write, MTU, udp_limit)
        self._closers.append(self._udp.close)
        self._udp.turns, self._udp.later = self._tcp.turns, loop.call_later
        self._icmp = icmp.IcmpUplink(self._lane, slowpath.write)
        self._closers.append(self._icmp.close)
        if not icmp.allowed():
            self.limits.append("guests cannot ping the outside: this host allows no ping sockets (see vmnet doctor)")
        slowpath.uplinks = {ip.TCP: self._tcp, ip.UDP: self._udp, ip.ICMP: self._icmp}

    def _start_services(self) -> None:
        subnet = self.subnet
        live = {PORT_MARK + port.number for port in self._ports.values()}
        book = LeaseBook(state.remembered(self.name) / "leases.json", live_ports=live)
        config = DhcpConfig(
            gateway=subnet.gateway,
            prefixlen=subnet.prefixlen,
            first=subnet.first,
            last=subnet.last,
            gateway_mac=bytes.fromhex(self._mac.replace(":", "")),
            dns=(subnet.gateway,),
            domain=DOMAIN,
            mtu=MTU,
        )
        self._dhcp = DhcpServer(config, book)
        for mark in live:
            self._dhcp.port_added(mark)
        udp, raw, arp = self._engine.dhcp_sockets()
        service = DhcpService(self._lane, udp, raw, arp, self._dhcp)
        service.start()
        self._closers.append(service.close)
        zone = Zone(
            domain=DOMAIN,
            subnet=subnet.network,
            gateway=subnet.gateway,
            forward=book.by_name,
            reverse=book.name_of,
            generation=book.generation,
        )
        udp, tcp = self._engine.dns_sockets()
        self._dns = DnsService(self._lane, udp, tcp, zone=zone)
        self._dns.start()
        self._closers.append(self._dns.close)

    def _crowd(self) -> None:
        """Guests share the process's time while there are several."""
        for budget in (self._slowpath.budget, self._udp.budget, self._dns.budget):
            budget.crowded = len(self._ports) > 1

    def _adopt(self) -> None:
        """Take over the ports of guests that outlived the process before this one."""
        before = self._before
        if before is None:
            return
        known = {port.link: port for port in before.ports}
        for link in self._engine.adopted:
            number = int(link.removeprefix(PORT_PREFIX))
            self._ports[link] = known.get(link) or Port(number, "unknown", "", "", isolated=True, pid=0)
            self._next = max(self._next, number % _NUMBERS + 1)
        self.news.append(
            f"the network's process {before.pid} had died; process {os.getpid()} took over "
            f"with {len(self._ports)} of its {len(before.ports)} ports, and their open connections were lost"
        )
        log.warning("%s", self.news[-1])

    def _mac_for(self, request: control.PlugRequest) -> str:
        used = {port.mac for port in self._ports.values()} | {self._mac}
        if request.mac is not None:
            mac = request.mac.lower()
            if mac in used:
                raise Conflict(
                    f"mac={request.mac} is in use on network '{self.name}'; two NICs with one MAC reach nothing",
                    hint="leave mac= out for a unique one",
                )
            return mac
        attempt = 0
        while (mac := stable_mac(request.identity, request.index, attempt)) in used:
            attempt += 1
        return mac

    def _number(self) -> int:
        """The next free port number; one is used again as late as can be."""
        while True:
            number = self._next
            self._next = number % _NUMBERS + 1
            if f"{PORT_PREFIX}{number}" not in self._ports:
                return number

    def _on_departure(self, link: str) -> None:
        port = self._ports.pop(link, None)
        if port is None:
            return
        log.info("port %s: VM %s has gone", link, port.vm)
        addresses = {one.address for one in self._engine.neighbours() if one.mac == port.mac}
        if port.mac:
            mark, mac = PORT_MARK + port.number, bytes.fromhex(port.mac.replace(":", ""))
            # Its own MAC's lease, and what it took through this port with other MACs (nested guests).
            addresses |= {str(lease.ip) for lease in self._dhcp.leases if lease.port == mark or lease.mac == mac}
            self._dhcp.leases.release_mac(mac)
            self._dhcp.port_gone(mark)
        for address in addresses:
            packed = socket.inet_aton(address)
            for uplink in (self._tcp, self._udp, self._icmp):
                uplink.forget_guest(packed)
        self._crowd()
        self._save()
        self._spawn(self._engine.unplug(link))
        self._consider_end(self._linger)

    def _on_agent_gone(self) -> None:
        self.agent_died = True
        log.error(
            "the agent of network '%s' (process %d) is gone, and with it the way into the network's namespace; "
            "the network ends, its guests keep only each other",
            self.name,
            self._agent,
        )
        self.end(forced=True)

    def _consider_end(self, seconds: float) -> None:
        if self._ports or self._lonely is not None:
            return
        self._lonely = asyncio.get_running_loop().call_later(seconds, self._end)

    def _stay(self) -> None:
        if self._lonely is not None:
            self._lonely.cancel()
            self._lonely = None

    def _end(self) -> None:
        self._lonely = None
        if not self._ports:
            log.info("network '%s' has no VM any more and ends", self.name)
            self.end(forced=False)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP)
            for uplink in (self._tcp, self._udp, self._icmp):
                uplink.sweep()

    async def _guard(self) -> None:
        """Keep the firewall's sets of leased addresses in step with the leases."""
        book, seen, installed = self._dhcp.leases, -1, set[tuple[str, str]]()
        while True:
            if book.moves != seen:
                seen = book.moves
                links = {PORT_MARK + port.number: port.link for port in self._ports.values()}
                wanted = {(str(lease.ip), links[lease.port]) for lease in book if lease.port in links}
                try:
                    if wanted != installed:
                        await self._engine.guard(wanted - installed, installed - wanted)
                        installed = wanted
                except HostError as error:
                    log.error("leased addresses are not guarded: %s", error)  # noqa: TRY400 - its sentence says it all
            await asyncio.sleep(_GUARD)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("network '%s': %s", self.name, task.exception())

    def _save(self) -> None:
        record = Record(self.subnet, os.getpid(), self._agent, self._linger, list(self._ports.values()))
        state.write(self._directory / "network.json", record, durable=False)

    async def _counters(self) -> dict[str, int]:
        counters: dict[str, int] = {}
        for part in (self._tcp, self._udp, self._icmp, self._slowpath):
            counters |= part.counters
        counters |= {f"dhcp_{name}": count for name, count in self._dhcp.counters.items()}
        counters |= {f"dns_{name}": count for name, count in self._dns.stats.items()}
        with contextlib.suppress(Exception):
            counters |= {f"firewall_{name}": count for name, count in (await self._engine.counters()).items()}
        return counters


def gateway_mac(name: str) -> str:
    """A locally administered MAC for the gateway of network `name`: the same each time, so guests' ARP caches hold."""
    return "5a:" + hashlib.sha256(f"openvmnet gateway {name}".encode()).digest()[:5].hex(":")


def read_record(path: Path) -> Record | None:
    """The record of the process before, or None where there is none to read."""
    try:
        return state.decode(path.read_bytes(), Record)
    except (OSError, msgspec.DecodeError):
        return None


def _descriptors() -> int:
    """Raise the limit of open files as far as the host allows; what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(hard, 1 << 17)
