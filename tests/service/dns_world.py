"""A name server of ours and made-up upstream servers, on loopback addresses and one port, in one event loop.

`play(scenario)` runs `await scenario(world)` there. Clients and servers in it are plain sockets; messages are
dnspython's.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from ipaddress import IPv4Address, IPv4Network
from typing import TYPE_CHECKING

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from openvmnet.kernel.loop import Lane, run
from openvmnet.service.dns import DnsService
from openvmnet.service.dns_zone import Zone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from dns.message import Message

SUBNET = IPv4Network("192.168.64.0/24")
PRIMARY, SECONDARY, THIRD = "127.0.0.2", "127.0.0.3", "127.0.0.4"


def query(name: str, kind: str = "A", **options: object) -> Message:
    return dns.message.make_query(name, kind, **options)


def answer(question: Message, *texts: str, ttl: int = 300, kind: str = "A") -> Message:
    """A positive answer with these records."""
    message = dns.message.make_response(question, recursion_available=True)
    if texts:
        message.answer.append(dns.rrset.from_text_list(question.question[0].name, ttl, "IN", kind, texts))
    return message


def nothing(question: Message, *, ttl: int = 300, minimum: int = 300) -> Message:
    """A negative answer."""
    message = dns.message.make_response(question)
    message.set_rcode(dns.rcode.NXDOMAIN)
    soa = f"ns.example.com. post.example.com. 1 3600 600 86400 {minimum}"
    message.authority.append(dns.rrset.from_text("example.com.", ttl, "IN", "SOA", soa))
    return message


class Upstream(asyncio.DatagramProtocol):
    """One upstream server. `reply(question)` gives a message, octets, a list of them, or None for silence."""

    def __init__(self, address: str, port: int) -> None:
        self.address = address
        self.port = port
        self.asked: list[Message] = []
        self.asked_tcp: list[Message] = []
        self.sources: list[tuple[str, int]] = []
        self.reply: Callable[[Message], object] = lambda question: answer(question, "192.0.2.1")
        self.reply_tcp: Callable[[Message], object] | None = None
        self.delay = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self.running = False

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=(self.address, self.port))
        self._server = await asyncio.start_server(self._serve, self.address, self.port)
        self.running = True

    async def stop(self) -> None:
        """End it: who asks now is refused by the kernel."""
        if self.running:
            self.running = False
            self._transport.close()
            self._server.close()
            for writer in self._writers:
                writer.transport.abort()
            for _ in range(3):  # transports close in the loop's next turns
                await asyncio.sleep(0)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        question = dns.message.from_wire(data)
        self.asked.append(question)
        self.sources.append(addr)
        for octets in _octets(self.reply(question)):
            asyncio.get_running_loop().call_later(self.delay, self._transport.sendto, octets, addr)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
            question = dns.message.from_wire(data)
            self.asked_tcp.append(question)
            for octets in _octets((self.reply_tcp or self.reply)(question)):
                writer.write(len(octets).to_bytes(2, "big") + octets)
            await writer.drain()
            await asyncio.sleep(self.delay)
        self._writers.discard(writer)
        writer.close()


def _octets(reply: object) -> list[bytes]:
    replies = reply if isinstance(reply, list) else [] if reply is None else [reply]
    return [one if isinstance(one, bytes) else one.to_wire(max_size=65535) for one in replies]


class World:
    """What a scenario has in hands."""

    def __init__(self, lane: Lane, directory: Path, *, forwards: bool = True) -> None:
        self.port = _free_port()
        self.addresses = {"vm1": IPv4Address("192.168.64.2"), "vm2": IPv4Address("192.168.64.3")}
        self.changes = 0
        self.skipped = 0.0
        self.resolv_conf = directory / "resolv.conf"
        self.upstreams = {address: Upstream(address, self.port) for address in (PRIMARY, SECONDARY, THIRD)}
        self.upstream = self.upstreams[PRIMARY]
        self.zone = Zone(
            domain="vmnet.internal",
            subnet=SUBNET,
            gateway=SUBNET[1],
            forward=self.addresses.get,
            reverse=lambda ip: next((name for name, one in self.addresses.items() if one == ip), None),
            generation=lambda: self.changes,
        )
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind(("127.0.0.1", self.port))
        tcp.listen(256)
        self.where = ("127.0.0.1", self.port)
        self.service = DnsService(
            lane,
            udp,
            tcp,
            zone=self.zone,
            resolv_conf=self.resolv_conf,
            upstream_port=self.port,
            forwards=forwards,
            clock=lambda: time.clock_gettime(time.CLOCK_BOOTTIME) + self.skipped,
        )
        self._socks: list[socket.socket] = []

    @property
    def stats(self) -> dict[str, int]:
        return self.service.stats

    def resolvers(self, *addresses: str) -> None:
        self.resolv_conf.write_text("".join(f"nameserver {address}\n" for address in addresses))

    def later(self, seconds: float) -> None:
        """Turn the service's clock forward, not the world's."""
        self.skipped += seconds

    def client(self, address: str = "127.0.0.1") -> socket.socket:
        """A UDP socket that asks."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.bind((address, 0))
        sock.connect(self.where)
        self._socks.append(sock)
        return sock

    async def receive(self, sock: socket.socket, patience: float = 3.0) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65535), patience)

    async def raw(self, data: bytes, patience: float = 3.0) -> bytes:
        """Send octets, and what comes back."""
        sock = self.client()
        sock.send(data)
        return await self.receive(sock, patience)

    async def ask(
        self, question: Message | str, kind: str = "A", *, patience: float = 6.0, **options: object
    ) -> Message:
        """Ask by UDP; the answer has been checked to be one."""
        if isinstance(question, str):
            question = query(question, kind, **options)
        data = await self.raw(question.to_wire(), patience)
        message = dns.message.from_wire(data)
        assert question.is_response(message)
        return message

    async def ask_tcp(self, *questions: Message, patience: float = 6.0) -> list[Message]:
        """Ask by TCP, all questions at once on one connection; the answers in the order of their coming."""
        reader, writer = await asyncio.open_connection(*self.where)
        try:
            for question in questions:
                data = question.to_wire()
                writer.write(len(data).to_bytes(2, "big") + data)
            messages = []
            for _ in questions:
                length = await asyncio.wait_for(reader.readexactly(2), patience)
                data = await asyncio.wait_for(reader.readexactly(int.from_bytes(length, "big")), patience)
                messages.append(dns.message.from_wire(data))
            return messages
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def silent(self, sock: socket.socket, seconds: float = 0.2) -> None:
        """Nothing comes for a while."""
        with contextlib.suppress(TimeoutError):
            data = await self.receive(sock, seconds)
            raise AssertionError(f"came: {data!r}")

    def _close(self) -> None:
        self.service.close()
        for sock in self._socks:
            sock.close()


def play(
    scenario: Callable[[World], Awaitable[None]], directory: Path, *, upstreams: int = 1, forwards: bool = True
) -> None:
    """Run a scenario, with the first so many upstream servers running and named in resolv.conf."""

    async def main(lane: Lane) -> None:
        world = World(lane, directory, forwards=forwards)
        started = list(world.upstreams.values())[:upstreams]
        for upstream in started:
            await upstream.start()
        world.resolvers(*(upstream.address for upstream in started))
        world.service.start()
        try:
            await scenario(world)
        finally:
            world._close()
            for upstream in world.upstreams.values():
                await upstream.stop()

    run(main)


def _free_port() -> int:
    """A port that is free for TCP and UDP on all our loopback addresses, as far as one can know."""
    for _ in range(100):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, socket.socket() as other:
            probe.bind(("0.0.0.0", 0))
            port: int = probe.getsockname()[1]
            try:
                other.bind(("0.0.0.0", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")
