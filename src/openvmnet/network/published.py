"""The published ports of a network's VMs: taken when a VM's port is plugged, given back when it is gone.

A rule's guest is looked up for each client: the address that it names, or the one that the VM has by DHCP then.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

from openvmnet.errors import VmnetError
from openvmnet.netdev import hostfwd
from openvmnet.uplink import hostport
from openvmnet.uplink.published import PublishedTcp
from openvmnet.uplink.published_udp import PublishedUdp
from openvmnet.uplink.target import Target

if TYPE_CHECKING:
    from ipaddress import IPv6Address

    from openvmnet.engine.linux.engine import LinuxEngine
    from openvmnet.kernel.loop import Lane
    from openvmnet.netdev import Forward, Subnet
    from openvmnet.network.gateway import Gateway
    from openvmnet.network.outside import Outside
    from openvmnet.network.port import Port

log = logging.getLogger(__name__)


class PublishedPorts:
    """All of them; `name` is the network's."""

    def __init__(
        self, lane: Lane, engine: LinuxEngine, outside: Outside, gateway: Gateway, name: str, subnet: Subnet
    ) -> None:
        self._lane = lane
        self._engine = engine
        self._outside = outside
        self._gateway = gateway
        self._name = name
        self._subnet = subnet
        self._by_link: dict[str, list[PublishedTcp | PublishedUdp]] = {}
        self.counters = {"published_opened": 0, "published_refused": 0, "published_dropped": 0}

    def take(self, port: Port) -> None:
        """Take the host's ports for a VM's; nobody is served before `start`. All of them, or it raises."""
        forwards = hostfwd.parse_all(port.hostfwd)
        for forward in forwards:
            self._check(forward)
        taken: list[PublishedTcp | PublishedUdp] = []
        try:
            for forward in forwards:
                taken.append(self._publish(port, forward))  # noqa: PERF401 - what was taken is given back
        except BaseException:
            for one in taken:
                one.close()
            raise
        if taken:
            self._by_link[port.link] = taken

    def start(self, link: str) -> None:
        """The VM's port is there: serve its clients."""
        for one in self._by_link.get(link, ()):
            one.start()

    def take_again(self, port: Port) -> list[str]:
        """The same for a VM that outlived the process before this one; the sentences of what is lost."""
        try:
            self.take(port)
        except VmnetError as error:
            return [f"VM {port.vm} has lost its published ports: {error}"]
        self.start(port.link)
        return []

    def give_back(self, port: Port) -> None:
        """The VM's port is gone: with it go the host's ports, and the flows."""
        for one in self._by_link.pop(port.link, ()):
            one.close()
        self._outside.forget_port(port.number)

    def guest(self, port: Port, forward: Forward) -> IPv4Address | IPv6Address | None:
        """Where a client of `forward` would be led now; None: nowhere."""
        if forward.guest is not None:
            return forward.guest
        lease = self._gateway.lease_of(port)
        return None if lease is None else lease.ip

    def sweep(self) -> None:
        """Once in a while: what had to rest goes on."""
        for ports in self._by_link.values():
            for one in ports:
                one.sweep()

    def close(self) -> None:
        """Give every port of the host's back."""
        for ports in self._by_link.values():
            for one in ports:
                one.close()
        self._by_link.clear()

    def _publish(self, port: Port, forward: Forward) -> PublishedTcp | PublishedUdp:
        def reach() -> bytes | None:
            address = self.guest(port, forward)
            return None if address is None else address.packed

        sock = hostport.take(forward)
        guest_port = forward.guest_port.to_bytes(2, "big")
        if forward.protocol == "tcp":
            target = Target(port.number, guest_port, reach, self._engine.connector, self.counters)
            return PublishedTcp(self._lane, self._outside.tcp, sock, target)
        target = Target(port.number, guest_port, reach, self._datagrams, self.counters)
        return PublishedUdp(self._lane, self._outside.udp, sock, target)

    def _datagrams(self, size: int) -> int:
        return self._engine.transparent() if size == 4 else self._engine.transparent6()

    def _check(self, forward: Forward) -> None:
        """Raise OptionError for a guest's address that no guest of this network has."""
        address = forward.guest
        if address is None:
            return
        subnet, prefix = self._subnet, self._engine.prefix
        if isinstance(address, IPv4Address):
            network = subnet.network
            apart = {subnet.gateway, network.network_address, network.broadcast_address}
            fine = address in network and address not in apart
            right = f"an address of {network} that is not the gateway's"
        else:
            fine = prefix is not None and address in prefix and address not in (prefix[0], prefix[1])
            right = "an IPv4 address, since it has no IPv6" if prefix is None else f"an address of {prefix}"
        if not fine:
            hostfwd.refuse(
                forward,
                f"{address} is no guest's address on network '{self._name}'; {right} would be right, or none for the "
                "one that the VM gets by DHCP",
            )
