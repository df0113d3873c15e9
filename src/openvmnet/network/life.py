"""A network: desired to actual, and back to nothing.

One network is an engine (links, ports, rules), two services (DHCP, DNS) and the uplink (slow path, TCP, UDP, ICMP), all
on one event loop in one process. It comes up as a whole or raises and leaves nothing; it ends when its last VM has gone
and the linger time is over.

What the process has to know of its ports is in RUNTIME/NAME/network.json, written at each change, so that the next
process can take over when this one is killed: the namespace, the bridge and the guests' TAPs live on without it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from openvmnet import messages, state
from openvmnet.engine.linux.engine import LinuxEngine
from openvmnet.engine.linux.names import PORT_PREFIX
from openvmnet.errors import Conflict, Exhausted, HostError
from openvmnet.netdev import gateway_mac, hostfwd, stable_mac
from openvmnet.network.gateway import Gateway
from openvmnet.network.outside import Outside
from openvmnet.network.port import Port, Record
from openvmnet.network.published import PublishedPorts
from openvmnet.network.reservation import reserve
from openvmnet.network.view import view

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from openvmnet.config import NetworkConfig, PortKind
    from openvmnet.engine.linux.namespace import Namespace
    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)

_NUMBERS = 60000  # port numbers; the firewall has 16 bits for them
PORTS = 1000  # of one network; a bridge has at most 1,024
_SWEEP = 5.0  # s between looks for idle flows
_GUARD = 0.2  # s between looks for leases that the firewall does not know
_GRACE = 10.0  # s that a network without any port yet waits for its first


class Network:
    """A running network in `namespace`, whose agent is process `agent`; `before` is the record of a process whose place
    this one takes, `first` the port that the agent of a new one has begun to make with the rest."""

    def __init__(
        self,
        lane: Lane,
        config: NetworkConfig,
        namespace: Namespace,
        agent: int,
        before: Record | None,
        first: PortKind | None,
    ) -> None:
        self.config = config
        self.name = config.name
        self.ended = asyncio.Event()
        self.agent_died = False
        self.forced = False  # its end does not wait for its VMs
        self.news: list[str] = []  # what happened to it, told once to who started it
        self.started = time.monotonic()
        self.ports: dict[str, Port] = {}
        self.gateway: Gateway | None = None
        self.outside: Outside | None = None
        self.published: PublishedPorts | None = None
        self._lane = lane
        self._agent = agent
        self._before = before
        self._first = first
        self._directory = state.runtime(self.name)
        self._mac = gateway_mac(self.name)
        self.engine = LinuxEngine(namespace, config, self._mac)
        self._next = 1
        self._lived_in = before is not None  # it has, or has had, a VM
        self._lonely: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closers: list[Callable[[], Coroutine[Any, Any, None] | None]] = []

    async def up(self) -> None:
        """Make it real; on an error everything made so far is unmade and the error goes on."""
        try:
            before = self._before.ports if self._before is not None else []
            await self.engine.up({port.link: port.isolated for port in before}, self._first)
        except BaseException:
            if self._before is None:  # nobody will ask this agent for anything again
                self.engine.namespace.quit()
            raise
        try:
            self._closers.append(self.engine.down)
            self.engine.watch(self._lane, self._on_departure, self._on_agent_gone)
            self._adopt()
            self._open()
            self._crowd()
            if self.outside is not None:
                self.outside.start()
            self._write()
        except BaseException:
            await self.down()
            raise
        self._spawn(self._sweep())
        self._spawn(self._guard())
        self._consider_end(_GRACE)

    async def plug(self, request: messages.PlugRequest) -> tuple[messages.PlugReply, int]:
        """A port for one NIC; its answer and the TAP's descriptor, which the caller has to close after sending."""
        try:
            plugged = await self._plug(request)
        except BaseException:
            if not self._lived_in:  # it was started for this VM, and nobody else is there to wait for
                self._stay()
                self._consider_end(0)
            raise
        self._lived_in = True
        return plugged

    async def _plug(self, request: messages.PlugRequest) -> tuple[messages.PlugReply, int]:
        if len(self.ports) >= PORTS:
            raise Exhausted(f"network '{self.name}' has {PORTS} ports; it takes no more")
        mac = self._mac_for(request) if request.allocate_mac else ""
        reservation = self._reservation_for(request, mac)
        number = self._number()
        port = Port(
            number, request.vm, request.netdev, mac, request.isolated, request.pid, request.hostfwd, reservation
        )
        self._publish(port)
        self.ports[port.link] = port
        if self.gateway is not None:
            self.gateway.port_added(port)  # before the first wait: nobody else is given its address meanwhile
        try:
            _, fd = await self.engine.plug(number, request.kind)
        except BaseException:
            self.ports.pop(port.link, None)
            if self.published is not None:
                self.published.give_back(port)
            if self.gateway is not None:
                self.gateway.port_gone(port)
            raise
        if self.published is not None:
            self.published.start(port.link)
        self._crowd()
        self._stay()
        self._save()
        log.info("port %s: VM %s, netdev %s, MAC %s", port.link, port.vm, port.netdev, mac)
        return messages.PlugReply(port.link, mac, self.name), fd

    async def view(self) -> messages.NetworkView:
        """The network as it is now."""
        return await view(self)

    def end(self, forced: bool) -> None:
        """Ask for the network's end; whoever runs it takes it down."""
        self.forced = self.forced or forced
        self.ended.set()

    def busy(self) -> bool:
        """Whether any VM is plugged."""
        return bool(self.ports)

    async def down(self) -> None:
        """End everything that `up()` made, in reverse; what fails is logged and the rest goes on."""
        if self._lonely is not None:
            self._lonely.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # none of them is to find its sockets closed
        while self._closers:
            close = self._closers.pop()
            try:
                pending = close()
                if pending is not None:
                    await pending
            except Exception:
                log.exception("ending network '%s': one part failed", self.name)

    def _open(self) -> None:
        """Start what guests find at the gateway and behind it, where the host has an address on the network."""
        subnet = self.config.subnet
        if subnet is None:
            return
        self.outside = Outside(self._lane, self.engine, self.config, subnet)
        self._closers.append(self.outside.close)
        self.gateway = Gateway(self._lane, self.engine, self.config, subnet, self.ports.values())
        self._closers.append(self.gateway.close)
        self.published = PublishedPorts(self._lane, self.engine, self.outside, self.gateway, self.name, subnet)
        self._closers.append(self.published.close)
        for port in self.ports.values():
            self.news += self.published.take_again(port)

    def _publish(self, port: Port) -> None:
        """Take the host's ports that a VM's port publishes. Raises where that cannot be."""
        if self.published is not None:
            self.published.take(port)
        elif port.hostfwd:
            hostfwd.refuse(port.hostfwd[0], f"the host is not on network '{self.name}'")

    def _crowd(self) -> None:
        """Guests share the process's time while there are several."""
        for part in (self.outside, self.gateway):
            if part is not None:
                part.crowd(crowded=len(self.ports) > 1)

    def _adopt(self) -> None:
        """Take over the ports of guests that outlived the process before this one."""
        before = self._before
        if before is None:
            return
        known = {port.link: port for port in before.ports}
        for link in self.engine.adopted:
            number = int(link.removeprefix(PORT_PREFIX))
            self.ports[link] = known.get(link) or Port(number, "unknown", "", "", isolated=True, pid=0)
            self._next = max(self._next, number % _NUMBERS + 1)
        self.news.append(
            f"the network's process {before.pid} had died; process {os.getpid()} took over "
            f"with {len(self.ports)} of its {len(before.ports)} ports, and their open connections were lost"
        )
        log.warning("%s", self.news[-1])

    def _mac_for(self, request: messages.PlugRequest) -> str:
        used = {port.mac for port in self.ports.values()} | {self._mac}
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

    def _reservation_for(self, request: messages.PlugRequest, mac: str) -> ipaddress.IPv4Address | None:
        if request.address is None:
            return None
        if self.gateway is None or not mac:
            lacks = "DHCP, since the host has no address on it" if mac else "MAC for this NIC"
            raise Conflict(f"address={request.address} cannot be kept on network '{self.name}': there is no {lacks}")
        return reserve(request.address, mac, self.config, self.ports.values(), self.gateway.leases)

    def _number(self) -> int:
        """The next free port number; one is used again as late as can be."""
        while True:
            number = self._next
            self._next = number % _NUMBERS + 1
            if f"{PORT_PREFIX}{number}" not in self.ports:
                return number

    def _on_departure(self, link: str) -> None:
        port = self.ports.pop(link, None)
        if port is None:
            return
        log.info("port %s: VM %s has gone", link, port.vm)
        neighbours = self.engine.neighbours() + self.engine.neighbours6()
        addresses = {one.address for one in neighbours if one.mac == port.mac}
        if self.gateway is not None:
            addresses |= self.gateway.port_gone(port)
        if self.outside is not None:
            for address in addresses:
                self.outside.forget_guest(ipaddress.ip_address(address).packed)
        if self.published is not None:
            self.published.give_back(port)
        self._crowd()
        self._save()
        self._spawn(self.engine.unplug(link))
        self._consider_end(self.config.linger)

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
        if self.ports or self._lonely is not None:
            return
        self._lonely = asyncio.get_running_loop().call_later(seconds, self._end)

    def _stay(self) -> None:
        if self._lonely is not None:
            self._lonely.cancel()
            self._lonely = None

    def _end(self) -> None:
        self._lonely = None
        if not self.ports:
            log.info("network '%s' has no VM any more and ends", self.name)
            self.end(forced=False)

    async def _sweep(self) -> None:
        while self.outside is not None:
            await asyncio.sleep(_SWEEP)
            self.outside.sweep()
            if self.published is not None:
                self.published.sweep()

    async def _guard(self) -> None:
        """Keep the firewall's sets of leased addresses in step with the leases."""
        if self.gateway is None:
            return
        gateway, seen, installed = self.gateway, -1, set[tuple[str, str]]()
        while True:
            if gateway.moves() != seen:
                seen = gateway.moves()
                links = {port.mark: port.link for port in self.ports.values()}
                wanted = {(address, links[mark]) for address, mark in gateway.leased() if mark in links}
                try:
                    if wanted != installed:
                        await self.engine.guard(wanted - installed, installed - wanted)
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

    def _write(self) -> None:
        record = Record(self.config, os.getpid(), self._agent, list(self.ports.values()))
        state.write(self._directory / "network.json", record, durable=False)

    def _save(self) -> None:
        """Write down what has changed. A full disk is no port's trouble: only who takes over would know less."""
        try:
            self._write()
        except HostError as error:
            log.error("the ports of network '%s' are not written down: %s", self.name, error)  # noqa: TRY400
