"""Questions by TCP: pipelined, in pieces, never ending, too many."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

import dns.message
import dns.rcode
import pytest

from openvmnet.budget import WINDOW
from openvmnet.service import dns_forward, dns_tcp
from openvmnet.service.dns import BURST, SHARE
from tests.service.dns_world import answer, play, query


def framed(message) -> bytes:
    data = message if isinstance(message, bytes) else message.to_wire()
    return len(data).to_bytes(2, "big") + data


@contextlib.asynccontextmanager
async def connected(world):
    reader, writer = await asyncio.open_connection(*world.where)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def read(reader) -> dns.message.Message:
    length = await asyncio.wait_for(reader.readexactly(2), 3)
    return dns.message.from_wire(await asyncio.wait_for(reader.readexactly(int.from_bytes(length, "big")), 3))


async def ended(reader) -> bool:
    with contextlib.suppress(ConnectionError):
        return await asyncio.wait_for(reader.read(), 3) == b""
    return True


def test_one_after_the_other_on_one_connection(tmp_path):
    async def scenario(world):
        async with connected(world) as (reader, writer):
            for name in ("vm1.vmnet.internal", "www.example.com", "x.local", "www.example.com"):
                question = query(name)
                writer.write(framed(question))
                assert question.is_response(await read(reader))
        assert world.stats["tcp_connections"] == 1
        assert world.stats["cached"] == 1

    play(scenario, tmp_path)


def test_all_at_once_and_answered_as_they_come(tmp_path):
    async def scenario(world):
        world.upstream.delay = 0.1
        questions = [query("slow.example.com", id=1), query("vm1.vmnet.internal", id=2), query("x.local", id=3)]
        messages = await world.ask_tcp(*questions)
        assert [message.id for message in messages] == [2, 3, 1]

    play(scenario, tmp_path)


def test_more_at_once_than_are_taken(tmp_path):
    """Beyond the bound, reading stops; every question is answered in the end."""

    async def scenario(world):
        world.upstream.delay = 0.05
        questions = [query(f"n{number}.example.com", id=number) for number in range(200)]
        messages = await world.ask_tcp(*questions)
        assert sorted(message.id for message in messages) == list(range(200))

    play(scenario, tmp_path)


def test_in_pieces(tmp_path):
    async def scenario(world):
        async with connected(world) as (reader, writer):
            for octet in framed(query("vm1.vmnet.internal")):
                writer.write(bytes([octet]))
                await asyncio.sleep(0.001)
            assert (await read(reader)).answer

    play(scenario, tmp_path)


def test_half_closed_clients_get_their_answers(tmp_path):
    async def scenario(world):
        world.upstream.delay = 0.1
        async with connected(world) as (reader, writer):
            writer.write(framed(query("a.example.com")) + framed(query("b.example.com")))
            writer.write_eof()
            assert (await read(reader)).answer
            assert (await read(reader)).answer
            assert await ended(reader)
        assert len(world.service._tcp[0]) == 0

    play(scenario, tmp_path)


def test_the_client_that_goes_away(tmp_path):
    async def scenario(world):
        world.upstream.delay = 0.1
        for _ in range(5):
            async with connected(world) as (_, writer):
                writer.write(framed(query("a.example.com")))
        sock = socket.create_connection(world.where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.send(framed(query("b.example.com")))
        await asyncio.sleep(0.05)
        sock.close()  # with a RST
        await asyncio.sleep(0.3)
        assert len(world.service._tcp[0]) == 0
        assert not world.service._tcp[0]._clients
        assert not world.service._tcp[0]._leaving

    play(scenario, tmp_path)


def test_malformed(tmp_path):
    async def scenario(world):
        async with connected(world) as (reader, writer):
            for data in (b"\x12\x34\1\0\0\1\0\0\0\0\0\0", b"\x12\x34\1\0\0\2\0\0\0\0\0\0"):
                writer.write(framed(data))
                assert (await read(reader)).rcode() == dns.rcode.FORMERR
            question = query("www.example.com")
            question.set_opcode(dns.opcode.UPDATE)
            writer.write(framed(question))
            assert (await read(reader)).rcode() == dns.rcode.NOTIMP

    play(scenario, tmp_path)


@pytest.mark.parametrize("nonsense", [b"", b"x", answer(query("a.example.com"), "192.0.2.1").to_wire()])
def test_what_deserves_no_answer_ends_the_connection(tmp_path, nonsense):
    async def scenario(world):
        async with connected(world) as (reader, writer):
            writer.write(framed(nonsense) + framed(query("vm1.vmnet.internal")))
            assert await ended(reader)
        assert world.stats["ignored"] == 1
        assert len(world.service._tcp[0]) == 0

    play(scenario, tmp_path)


def test_what_cannot_be_forwarded_is_answered(tmp_path, monkeypatch):
    """A question over the bounds is dropped by UDP, where it is sent again; a connection waits for its answers."""
    monkeypatch.setattr(dns_forward, "MAX_EXCHANGES", 3)

    async def scenario(world):
        world.upstream.delay = 0.1
        messages = await world.ask_tcp(*(query(f"n{number}.example.com") for number in range(5)))
        rcodes = [message.rcode() for message in messages]
        assert rcodes == [dns.rcode.SERVFAIL] * 2 + [dns.rcode.NOERROR] * 3

    play(scenario, tmp_path)


def test_idle_connections_end(tmp_path, monkeypatch):
    monkeypatch.setattr(dns_tcp, "IDLE", 0.3)
    monkeypatch.setattr(dns_tcp, "_EVERY", 0.1)

    async def scenario(world):
        async with connected(world) as (idle, _), connected(world) as (slow, writer):
            started = asyncio.get_running_loop().time()
            with contextlib.suppress(ConnectionError):  # it ends in the midst of it
                for octet in framed(query("vm1.vmnet.internal"))[:-1]:
                    writer.write(bytes([octet]))
                    await writer.drain()
                    await asyncio.sleep(0.03)
            assert await ended(idle)
            assert await ended(slow)
            assert asyncio.get_running_loop().time() - started < 1.5
        assert len(world.service._tcp[0]) == 0

    play(scenario, tmp_path)


def test_connections_are_bounded(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dns_tcp, "MAX_CONNECTIONS", 6)
    monkeypatch.setattr(dns_tcp, "MAX_PER_CLIENT", 4)

    async def scenario(world):
        async with contextlib.AsyncExitStack() as stack:
            mine = [await stack.enter_async_context(connected(world)) for _ in range(6)]
            await asyncio.sleep(0.1)
            assert len(world.service._tcp[0]) == 4
            assert world.stats["tcp_turned_away"] == 2
            for reader, _ in mine[4:]:
                assert await ended(reader)
            mine[0][1].write(framed(query("vm1.vmnet.internal")))
            assert (await read(mine[0][0])).answer
            others = []
            for number in range(4):
                sock = socket.socket()
                stack.callback(sock.close)
                sock.bind((f"127.0.1.{number + 1}", 0))
                sock.connect(world.where)
                others.append(sock)
            await asyncio.sleep(0.1)
            assert len(world.service._tcp[0]) == 6
        await asyncio.sleep(0.1)
        assert len(world.service._tcp[0]) == 0
        (message,) = await world.ask_tcp(query("vm1.vmnet.internal"))
        assert message.answer
        assert len([record for record in caplog.records if "one more of" in record.message]) == 1

    play(scenario, tmp_path)


def test_unread_answers_stop_the_reading(tmp_path):
    """A client that sends and never reads fills a bounded buffer, and nothing else."""

    async def scenario(world):
        text = '"' + "x" * 250 + '"'
        world.upstream.reply = lambda asked: answer(asked, *(text[:-1] + f'{x}"' for x in range(14)), kind="TXT")
        await world.ask_tcp(query("big.example.com", "TXT"))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(world.where)
        sock.setblocking(False)
        data = framed(query("big.example.com", "TXT")) * 200
        stalled = 0
        while stalled < 20:
            try:
                sock.send(data)
                stalled = 0
            except BlockingIOError:
                stalled += 1
            await asyncio.sleep(0.01 if stalled else 0)
        (connection,) = world.service._tcp[0]._connections
        assert len(connection._output) < 140_000
        assert len(connection._input) < 20_000
        (message,) = await world.ask_tcp(query("vm1.vmnet.internal"))
        assert message.answer
        # Once it reads, it is served on.
        received = 0
        for _ in range(200):
            try:
                received += len(sock.recv(1 << 16))
            except BlockingIOError:
                await asyncio.sleep(0.005)
        assert received > 400_000
        sock.close()

    play(scenario, tmp_path)


def test_no_descriptors_left_is_a_pause_and_no_spin(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dns_tcp, "_EVERY", 0.2)

    async def scenario(world):
        server = world.service._tcp[0]
        real, calls = server._listener, []

        class Exhausted:
            def accept(self):
                calls.append(1)
                raise OSError(errno.EMFILE, "Too many open files")

            def __getattr__(self, name):
                return getattr(real, name)

        server._listener = Exhausted()
        asking = asyncio.create_task(world.ask_tcp(query("vm1.vmnet.internal")))
        await asyncio.sleep(0.1)
        assert len(calls) == 1
        server._listener = real
        (message,) = await asking
        assert message.answer
        assert "cannot be accepted" in caplog.text

    play(scenario, tmp_path)


@pytest.mark.parametrize("count", [1, 40])
def test_closing_with_connections_open(tmp_path, count):
    async def scenario(world):
        world.upstream.reply = lambda _asked: None
        world.upstream.reply_tcp = lambda _asked: []
        world.upstream.delay = 0.1
        async with connected(world) as (_, writer):
            for number in range(count):
                writer.write(framed(query(f"n{number}.example.com")))
            await asyncio.sleep(0.05)
            world.service._tcp[0].close()

    play(scenario, tmp_path)


def test_a_guest_over_its_budget_waits_and_others_do_not(tmp_path):
    async def scenario(world):
        budget = world.service.budget
        budget.crowded = True
        budget.begin()
        budget.spend(int.from_bytes(b"127.0.0.1"), budget_of(4))
        async with connected(world) as (reader, writer):
            writer.write(framed(query("vm1.vmnet.internal")) * 3)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), WINDOW)
            other = await asyncio.open_connection(*world.where, local_addr=("127.0.0.2", 0))
            other[1].write(framed(query("vm1.vmnet.internal")))
            await read(other[0])
            other[1].close()
            for _ in range(3):
                await read(reader)

    play(scenario, tmp_path)


def test_one_connections_questions_are_taken_in_turns(tmp_path, monkeypatch):
    """Not all that are there: who has asked meanwhile is not behind them."""
    monkeypatch.setattr(dns_tcp, "TURN", 2)

    async def scenario(world):
        async with connected(world) as (one, first), connected(world) as (two, second):
            first.write(framed(query("vm1.vmnet.internal")) * 400)
            second.write(framed(query("vm1.vmnet.internal")))
            await read(two)
            assert world.stats["queries"] < 400
            for _ in range(400):
                await read(one)

    play(scenario, tmp_path)


def test_ports_are_told_apart_where_they_can_be(tmp_path):
    """Whatever address a guest has taken: its connections count together."""

    async def scenario(world):
        world.service._tcp[0]._port_of = lambda _: 0x1001
        async with contextlib.AsyncExitStack() as keep:
            for number in range(dns_tcp.MAX_PER_CLIENT + 2):
                where = (f"127.0.0.{2 + number}", 0)
                _, writer = await asyncio.open_connection(*world.where, local_addr=where)
                keep.callback(writer.close)
            await asyncio.sleep(0.05)
            assert world.stats["tcp_turned_away"] == 2

    play(scenario, tmp_path)


def budget_of(windows: int) -> float:
    """Processor time after which a guest has to wait so many windows."""
    return WINDOW * (SHARE * BURST + windows * SHARE)
