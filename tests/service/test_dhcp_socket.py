"""The service on sockets of the loopback and on socket pairs: no namespace is needed."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from openvmnet.kernel.loop import Lane, run
from openvmnet.service.dhcp import DhcpServer
from openvmnet.service.dhcp_socket import DhcpService
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4, ethernet, ip
from openvmnet.wire.dhcp4 import Message
from tests.service.dhcp_guest import CONFIG, GATEWAY, packed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

MAC = b"\x52\x54\0\0\0\1"


class Wire:
    """The service, and the other ends of its sockets."""

    def __init__(self, lane: Lane, path: Path | None = None) -> None:
        self.book = LeaseBook(path)
        self.server = DhcpServer(CONFIG, self.book)
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", 0))
        self.guest = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.guest.connect(udp.getsockname())
        raw, self.frames = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        arp, self.arp = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.frames.setblocking(False)
        self.sockets = (udp, raw, arp)
        self.service = DhcpService(lane, udp, raw, arp, self.server)
        self.service.start()

    def close(self) -> None:
        self.service.close()
        for sock in (self.guest, self.frames, self.arp):
            sock.close()

    def send(self, kind: int, options: dict[int, bytes] | None = None, mac: bytes = MAC) -> None:
        message = Message(op=1, xid=7, chaddr=mac, options={53: bytes([kind])} | (options or {}))
        self.guest.send(dhcp4.build(message)[0])

    async def answer(self) -> Message:
        frame = ethernet.parse(await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.frames, 2048), 5))
        assert frame.src == CONFIG.gateway_mac
        header = ip.parse(frame.payload)
        assert (header.src, header.protocol) == (packed(GATEWAY), ip.UDP)
        assert frame.payload[header.payload : header.payload + 4] == bytes([0, 67, 0, 68])
        message = dhcp4.parse(frame.payload[header.payload + 8 : header.total])
        assert (frame.dst, header.dst) == (MAC, message.yiaddr)
        return message


def on_the_wire(test: Callable[[Wire], Awaitable[None]], path: Path | None = None) -> None:
    async def main(lane: Lane) -> None:
        wire = Wire(lane, path)
        try:
            await test(wire)
        finally:
            wire.close()

    run(main)


def test_a_client_without_an_address_is_answered_by_a_frame():
    async def test(wire: Wire) -> None:
        wire.send(dhcp4.DISCOVER)
        offer = await wire.answer()
        assert offer.type() == dhcp4.OFFER
        wire.send(dhcp4.REQUEST, {50: offer.yiaddr, 54: packed(GATEWAY)})
        assert (await wire.answer()).type() == dhcp4.ACK

    on_the_wire(test)


def test_an_ack_leaves_when_the_file_is_written_and_an_offer_before(tmp_path):
    async def test(wire: Wire) -> None:
        assert wire.book.file is not None
        write, go = wire.book.file.write, threading.Event()
        wire.book.file.write = lambda data: (go.wait(10), write(data))
        wire.send(dhcp4.DISCOVER)
        offer = await wire.answer()
        wire.send(dhcp4.REQUEST, {50: offer.yiaddr, 54: packed(GATEWAY)})
        wire.send(dhcp4.DISCOVER, {12: b"later"})
        assert (await wire.answer()).type() == dhcp4.OFFER
        with pytest.raises(BlockingIOError):
            wire.frames.recv(2048)
        assert not (tmp_path / "leases").exists()
        go.set()
        assert (await wire.answer()).type() == dhcp4.ACK
        assert LeaseBook(tmp_path / "leases").by_mac(MAC) is not None

    on_the_wire(test, tmp_path / "leases")


def test_a_batch_is_bounded_and_the_rest_is_served_after_a_pause():
    async def test(wire: Wire) -> None:
        handled, batches = [], []
        real = wire.server.handle

        def handle(payload: bytes, **known: object) -> None:
            handled.append(payload)
            real(payload, **known)

        wire.server.handle = handle
        for _ in range(150):
            wire.guest.send(b"x")
        while sum(batches) < 150:
            before = len(handled)
            await asyncio.sleep(0)
            if len(handled) > before:
                batches.append(len(handled) - before)
        assert batches == [64, 64, 22]
        assert wire.server.counters["malformed"] == 150

    on_the_wire(test)


def test_arp_is_heard_and_what_is_no_arp_is_not_minded():
    async def test(wire: Wire) -> None:
        arp = ethernet.Arp(1, b"\x02\0\0\0\0\x99", packed("192.168.64.9"), bytes(6), packed(GATEWAY))
        for frame in (b"", b"x" * 13, b"x" * 60):
            wire.arp.send(frame)
        wire.arp.send(ethernet.build(ethernet.BROADCAST, arp.sender_mac, ethernet.ARP, ethernet.build_arp(arp)))
        await asyncio.sleep(0.01)
        wire.send(dhcp4.DISCOVER, {50: packed("192.168.64.9")})
        assert (await wire.answer()).yiaddr != packed("192.168.64.9")

    on_the_wire(test)


def test_an_answer_that_cannot_be_sent_is_counted_and_the_next_one_served():
    async def test(wire: Wire) -> None:
        _udp, raw, _ = wire.sockets
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        for number in range(60):
            wire.send(dhcp4.DISCOVER, mac=b"\x52\x54\0\0\1" + bytes([number]))
        await asyncio.sleep(0.05)
        assert wire.service.lost > 0
        assert wire.server.counters["offer"] == 60
        # The lease is made although its answer is lost; the client would ask again.
        wire.send(dhcp4.DISCOVER, {80: b""})
        await asyncio.sleep(0.05)
        assert wire.book.by_mac(MAC) is not None

    on_the_wire(test)


def test_what_ends_outside_of_a_message_is_written_too(tmp_path):
    async def test(wire: Wire) -> None:
        wire.send(dhcp4.DISCOVER, {80: b""})
        await wire.answer()
        wire.book.release_mac(MAC)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if LeaseBook(tmp_path / "leases").by_mac(MAC) is None:
                break
        again = LeaseBook(tmp_path / "leases")
        assert again.by_mac(MAC) is None
        assert len(again) == 1

    on_the_wire(test, tmp_path / "leases")


def test_closing_sends_what_waits_and_closes_the_sockets(tmp_path):
    async def test(wire: Wire) -> None:
        wire.send(dhcp4.DISCOVER, {80: b""})
        for _ in range(1000):
            await asyncio.sleep(0)
            if wire.server.counters["ack"]:
                break
        wire.service.close()
        wire.service.close()
        assert (await wire.answer()).type() == dhcp4.ACK
        assert [sock.fileno() for sock in wire.sockets] == [-1, -1, -1]

    on_the_wire(test, tmp_path / "leases")
