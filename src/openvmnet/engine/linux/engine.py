"""The Linux engine: one network's namespace, its bridge and ports, and the sockets that its services answer on.

A port is a TAP whose descriptor goes to the VM. The device is not persistent: when the last holder of the descriptor is
gone, however it went, the kernel removes the device and tells on the netlink socket here. That is the end of the port;
no pid is watched, and a VM that forks (`-daemonize`) or an aborted `vmnet run` needs no case of its own.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import TYPE_CHECKING

from openvmnet.engine.linux import firewall, steps
from openvmnet.engine.linux.names import BRIDGE, PORT_MARK, PORT_PREFIX, is_port
from openvmnet.errors import HostError
from openvmnet.kernel import netlink
from openvmnet.kernel.loop import READ
from openvmnet.kernel.sockets6 import IPV6_RECVFRAGSIZE
from openvmnet.uplink.tcp import GUEST_SIDE
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable
    from ipaddress import IPv6Address, IPv6Network

    from openvmnet.config import NetworkConfig, PortKind
    from openvmnet.engine.linux.namespace import Namespace
    from openvmnet.engine.linux.steps import Option
    from openvmnet.kernel.loop import Lane
    from openvmnet.netdev import Subnet

_SO_RCVMARK = 75  # Linux 5.19; without it DHCP and DNS cannot tell ports apart
_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_STOCK = 32  # transparent sockets fetched at a time: one round trip to the agent for as many flows
_DATAGRAM_BUFFER = 1 << 20  # octets; the kernel clamps it to net.core.rmem_max
_DATAGRAMS: list[Option] = [
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_BUFFER),
]
_TCP_SAVE_SYN, _TCP_SAVED_SYN = 27, 28  # tcp(7), Linux 4.2
_LARGEST_SYN = 512  # octets of its headers
_NETLINK_BUFFER = 1 << 17


class LinuxEngine:
    """A network's `namespace`, and what is made in it; `mac` is the gateway's MAC."""

    def __init__(self, namespace: Namespace, config: NetworkConfig, mac: str) -> None:
        self.config = config
        self.mac = mac
        self.namespace = namespace
        self.tun = -1
        self.listener: socket.socket
        self.listener6: socket.socket | None = None
        self.prefix: IPv6Network | None = config.prefix
        self.adopted: list[str] = []  # ports of guests that were here before this process
        self._netlink: socket.socket
        self._events: socket.socket
        self._stock: dict[tuple[int, int], list[int]] = {}  # fresh sockets by family and kind
        self._isolated: dict[str, bool] = {}
        self._first: tuple[PortKind, int] | None = None  # a port that came with the network, and its TAP's descriptor

    async def up(self, isolated: dict[str, bool], first: PortKind | None = None) -> None:
        """Make the namespace a network, or take over the one that is there.

        `isolated` says of the ports of a process before this one whether they are; a port that nobody knows is. The
        rules and all that is known of the ports come in one transaction: nothing is open in between. Where the agent
        has begun already (`Namespace.begun`), with the steps for a fresh namespace and `first`, this is their end.
        """
        if self.namespace.begun:
            replies = await self.namespace.finish()
        else:
            present = (await self.namespace.ask("links")).values["links"]
            self.adopted = [name for name in present if is_port(name)]
            self._isolated = {link: isolated.get(link, True) for link in self.adopted}
            replies = await self.namespace.all(steps.network(self.config, self.mac, present, self._isolated, first))
        fds = [fd for reply in replies for fd in reply.fds]
        if first is not None:
            self._first = first, fds.pop()
            self._isolated[steps.FIRST] = first.isolated
        if self.config.subnet is not None:
            self.tun = fds.pop(0)
            self.listener, *others = (socket.socket(fileno=fd) for fd in fds)
            self.listener6 = others[0] if others else None
        (self._netlink,) = self.namespace.sockets(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE)
        self._netlink.settimeout(1.0)
        (self._events,) = self.namespace.sockets(
            socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_ROUTE, bind=(0, netlink.GROUP_LINK)
        )

    @property
    def subnet(self) -> Subnet:
        """The network's addresses; nobody asks where it has none."""
        if self.config.subnet is None:
            raise HostError(f"network '{self.config.name}' has no addresses of the host")
        return self.config.subnet

    def watch(self, lane: Lane, on_departure: Callable[[str], None], on_agent_gone: Callable[[], None]) -> None:
        """Tell of ports whose VM has gone, and of the agent's death."""

        def events(_: int) -> None:
            for name in self._departures():
                on_departure(name)

        def gone(_: int) -> None:
            lane.forget(self.namespace.watch_fd())
            on_agent_gone()

        self._on_departure = on_departure
        lane.watch(self._events.fileno(), READ, events)
        lane.watch(self.namespace.watch_fd(), READ, gone)
        self._lane = lane

    def _departures(self) -> list[str]:
        """The links that have gone since the last look."""
        gone: list[str] = []
        try:
            while True:
                gone += netlink.departures(self._events.recv(_NETLINK_BUFFER))
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS, netlink(7): more happened than the buffer holds, so look at what is left
            gone += self._isolated.keys() - self.links().keys()
        return gone

    async def plug(self, number: int, kind: PortKind) -> tuple[str, int]:
        """Make port `number`; its link's name and the TAP's descriptor. A failure leaves no device behind."""
        link = f"{PORT_PREFIX}{number}"
        if self._first is not None:
            (made_as, fd), self._first = self._first, None
            if (link, kind) == (steps.FIRST, made_as):
                return link, fd
            await self._drop_first(fd)
        self._isolated[link] = kind.isolated
        try:
            made, *_ = await self.namespace.all(steps.port(link, self.config, kind, self._isolated))
        except BaseException:
            del self._isolated[link]
            raise
        return link, made.fds[0]

    async def _drop_first(self, fd: int) -> None:
        """Somebody else came first: the port that was made for the starter is of no use."""
        os.close(fd)  # the device is gone and the news of it here when this returns: it is no port's that comes now
        for link in self._departures():
            if link != steps.FIRST:
                self._on_departure(link)
        await self.unplug(steps.FIRST)

    async def unplug(self, link: str) -> None:
        """Take a departed port out of the rules."""
        isolated = self._isolated.pop(link, False)
        text = firewall.remove_port(link, isolated=isolated, ip6=self.prefix is not None)
        await self.namespace.run(["nft", "-f", "-"], text + self._as_they_are())

    def _as_they_are(self) -> str:
        return steps.as_they_are(self._isolated, ip6=self.prefix is not None)

    async def guard(self, added: set[tuple[str, str]], removed: set[tuple[str, str]]) -> None:
        """Tie leased addresses to the links of their ports: pairs of address and link."""
        await self.namespace.run(["nft", "-f", "-"], firewall.guard(sorted(added), sorted(removed)))

    def transparent(self) -> int:
        """A fresh transparent UDP socket of the namespace: non-blocking, with address reuse, unbound."""
        return self._stocked(socket.AF_INET, socket.SOCK_DGRAM, [steps.TRANSPARENT[4], *_DATAGRAMS])

    def transparent6(self) -> int:
        """The same for IPv6; it tells of fragments."""
        fragments = (socket.IPPROTO_IPV6, IPV6_RECVFRAGSIZE, 1)
        return self._stocked(socket.AF_INET6, socket.SOCK_DGRAM, [steps.TRANSPARENT[16], fragments, *_DATAGRAMS])

    def connector(self, size: int) -> int:
        """A fresh transparent TCP socket of the namespace, as what the pump's listener accepts is; `size` is that of
        the addresses, in octets."""
        family = socket.AF_INET if size == 4 else socket.AF_INET6
        return self._stocked(family, socket.SOCK_STREAM, [steps.TRANSPARENT[size], *GUEST_SIDE])

    def _stocked(self, family: int, kind: int, options: list[Option]) -> int:
        """One of a stock, since to ask the agent takes longer than to open a flow; what is of one kind is alike."""
        stock = self._stock.setdefault((family, kind), [])
        if not stock:
            stock += self.namespace.descriptors(family, kind, count=_STOCK, options=options)
        return stock.pop()

    def dhcp_sockets(self) -> tuple[socket.socket, socket.socket, socket.socket]:
        """DHCP's three: the server's UDP socket, a raw one to send frames, and one that hears ARP."""
        gateway: tuple[str | int, ...] = ("0.0.0.0", 67)  # noqa: S104 - of the bridge only, by SO_BINDTODEVICE
        options: list[Option] = [
            (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
            (socket.SOL_SOCKET, socket.SO_BROADCAST, 1),
            (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, BRIDGE),
            (socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_BUFFER),
        ]
        udp = self._marked(socket.AF_INET, socket.SOCK_DGRAM, 0, options, gateway)
        (raw,) = self.namespace.sockets(socket.AF_PACKET, socket.SOCK_RAW, 0, bind=(BRIDGE, 0))
        # The protocol comes with bind(2): a socket that hears already would wait for an RCU grace period there.
        arp = self._marked(socket.AF_PACKET, socket.SOCK_RAW, 0, [], (BRIDGE, _ETH_P_ARP))
        return udp, raw, arp

    def dns_sockets(self) -> tuple[socket.socket, socket.socket]:
        """DNS's two on the gateway's address: UDP, and TCP listening."""
        return self._dns(socket.AF_INET, str(self.subnet.gateway))

    def dns_sockets6(self, gateway: IPv6Address) -> tuple[socket.socket, socket.socket]:
        """The same for IPv6."""
        return self._dns(socket.AF_INET6, str(gateway))

    def _dns(self, family: int, address: str) -> tuple[socket.socket, socket.socket]:
        where: tuple[str | int, ...] = (address, 53)
        udp = self._marked(family, socket.SOCK_DGRAM, 0, _DATAGRAMS, where)
        options: list[Option] = [*_DATAGRAMS[:1], (socket.IPPROTO_TCP, _TCP_SAVE_SYN, 1)]
        (tcp,) = self.namespace.sockets(family, socket.SOCK_STREAM, options=options, bind=where, listen=128)
        return udp, tcp

    @staticmethod
    def opened_by(sock: socket.socket) -> int:
        """The mark of the port that a connection to the name server came from; 0 where that cannot be told, as with a
        SYN cookie. The firewall has written the port's number into the SYN, and the kernel has kept that."""
        number = ip.port_of(sock.getsockopt(socket.IPPROTO_TCP, _TCP_SAVED_SYN, _LARGEST_SYN))
        return PORT_MARK + number if number else 0

    def services6(self) -> tuple[socket.socket, socket.socket, socket.socket, int]:
        """The bridge's sockets for router solicitations (raw ICMPv6), DHCPv6 and whatever IPv6 comes (AF_PACKET), and
        the bridge's ifindex."""
        (ifindex,) = (link.ifindex for link in netlink.links(self._netlink) if link.name == BRIDGE)
        device: list[Option] = [(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, BRIDGE)]
        udp: list[Option] = [
            (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
            (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1),
        ]
        router = self._marked(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, device, ("::", 0))
        dhcp = self._marked(socket.AF_INET6, socket.SOCK_DGRAM, 0, device + udp, ("::", 547))
        heard = self._marked(socket.AF_PACKET, socket.SOCK_DGRAM, 0, [], (BRIDGE, _ETH_P_IPV6))
        return router, dhcp, heard, ifindex

    def _marked(
        self,
        family: int,
        kind: int,
        protocol: int,
        options: list[Option],
        bind: tuple[str | int, ...],
    ) -> socket.socket:
        """A socket that tells with each packet which port it came through, where the kernel can."""
        try:
            marked = [*options, (socket.SOL_SOCKET, _SO_RCVMARK, 1)]
            (sock,) = self.namespace.sockets(family, kind, protocol, options=marked, bind=bind)
        except HostError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOPROTOOPT, errno.EPERM):
                raise
            (sock,) = self.namespace.sockets(family, kind, protocol, options=options, bind=bind)
        return sock

    def links(self) -> dict[str, netlink.Link]:
        """The guests' links with their counters, by name."""
        return {link.name: link for link in netlink.links(self._netlink) if is_port(link.name)}

    def neighbours(self) -> list[netlink.Neighbour]:
        """The guests' IPv4 addresses and MACs that the namespace has resolved."""
        return netlink.neighbours(self._netlink)

    def neighbours6(self) -> list[netlink.Neighbour]:
        """The same for IPv6, link-local addresses among them."""
        return netlink.neighbours(self._netlink, socket.AF_INET6)

    async def counters(self) -> dict[str, int]:
        """What the firewall counted, in packets."""
        text = await self.namespace.run(["nft", "-j", "list", "counters"], "")
        return firewall.counters(json.loads(text).get("nftables", []))

    def down(self) -> None:
        """End the namespace: its agent goes, and with the last VM's TAP the namespace itself."""
        for sock in (self._netlink, self._events):
            self._lane.forget(sock.fileno())
            sock.close()
        self._lane.forget(self.namespace.watch_fd())
        if self._first is not None:
            os.close(self._first[1])
        for stock in self._stock.values():
            while stock:
                os.close(stock.pop())
        self.namespace.quit()
