"""asyncio on the lane's selector, and the lane beside asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time

import pytest

from openvmnet.kernel.loop import BROKEN, EDGE, HANGUP, READ, WRITE, Lane, run


class Drain:
    """A handler that reads what is there, and remembers."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.data = b""
        self.calls = 0

    def __call__(self, mask: int) -> None:
        self.calls += 1
        with contextlib.suppress(BlockingIOError):
            self.data += self._sock.recv(65536)


@contextlib.contextmanager
def busy(lane: Lane):
    """Keep the lane busy: a descriptor that is always ready, as one fast flow would."""
    one, other = socket.socketpair()
    other.send(b"x")
    calls = [0]

    def handler(_: int) -> None:
        calls[0] += 1

    with one, other:
        lane.watch(one.fileno(), READ, handler)
        try:
            yield calls
        finally:
            lane.forget(one.fileno())


def test_handlers_are_called_with_the_mask(pair):
    one, other = pair
    seen = []

    async def main(lane: Lane) -> None:
        done = asyncio.Event()

        def handler(mask: int) -> None:
            seen.append(mask)
            one.recv(10)
            done.set()

        lane.watch(one.fileno(), READ, handler)
        other.send(b"x")
        await asyncio.wait_for(done.wait(), 2)
        lane.forget(one.fileno())

    run(main)
    assert seen == [READ]


@pytest.mark.parametrize("is_busy", [False, True])
def test_timers_are_on_time(is_busy):
    async def main(lane: Lane) -> list[float]:
        late = []
        with busy(lane) if is_busy else contextlib.nullcontext() as calls:
            for delay in (0.0, 0.0005, 0.003, 0.02, 0.05):
                begin = time.monotonic()
                await asyncio.sleep(delay)
                late.append(time.monotonic() - begin - delay)
            if calls is not None:
                assert calls[0] > 100  # the lane did go on meanwhile
        return late

    late = run(main)
    assert min(late) >= 0
    assert sorted(late)[2] < 0.01
    assert max(late) < 0.1  # what a busy machine may add


def test_timers_keep_their_order_under_load():
    async def main(lane: Lane) -> list[int]:
        order: list[int] = []
        loop = asyncio.get_running_loop()
        with busy(lane):
            for number in (3, 1, 2, 0):
                loop.call_later(0.01 + number * 0.005, order.append, number)
            await asyncio.sleep(0.06)
        return order

    assert run(main) == [0, 1, 2, 3]


def test_an_idle_loop_waits_without_spinning():
    async def main(lane: Lane) -> float:
        before = time.process_time()
        await asyncio.sleep(0.3)
        return time.process_time() - before

    assert run(main) < 0.05


@pytest.mark.parametrize("how", ["call_soon", "call_later", "future", "task", "event"])
def test_work_that_a_handler_gives_to_asyncio_is_done_at_once(pair, how):
    """Also with no timer and no descriptor of asyncio's that would end the wait."""
    one, other = pair

    async def main(lane: Lane) -> float:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        event = asyncio.Event()

        async def work() -> None:
            done.set_result(None)

        tasks = []

        def handler(_: int) -> None:
            one.recv(10)
            if how == "call_soon":
                loop.call_soon(done.set_result, None)
            elif how == "call_later":
                loop.call_later(0.001, done.set_result, None)
            elif how == "task":
                tasks.append(loop.create_task(work()))
            elif how == "event":
                event.set()
            else:
                done.set_result(None)

        lane.watch(one.fileno(), READ, handler)
        threading.Timer(0.05, other.send, (b"x",)).start()  # when the loop is idle
        begin = time.monotonic()
        await (event.wait() if how == "event" else done)
        lane.forget(one.fileno())
        return time.monotonic() - begin

    assert run(main) < 0.5


def test_a_timer_set_by_a_handler_is_earlier_than_the_wait_under_way(pair):
    one, other = pair

    async def main(lane: Lane) -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(30, lambda: None)  # what the loop sleeps for
        done = asyncio.Event()

        def handler(_: int) -> None:
            one.recv(10)
            loop.call_later(0.02, done.set)

        lane.watch(one.fileno(), READ, handler)
        threading.Timer(0.02, other.send, (b"x",)).start()
        begin = time.monotonic()
        await done.wait()
        lane.forget(one.fileno())
        return time.monotonic() - begin

    assert 0.03 < run(main) < 0.5


@pytest.mark.parametrize("is_busy", [False, True])
def test_other_threads_are_heard(is_busy):
    async def main(lane: Lane) -> float:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        with busy(lane) if is_busy else contextlib.nullcontext():
            threading.Timer(0.02, lambda: loop.call_soon_threadsafe(done.set)).start()
            begin = time.monotonic()
            await done.wait()
            return time.monotonic() - begin

    assert run(main) < 0.5


@pytest.mark.parametrize("is_busy", [False, True])
def test_signal_handlers(is_busy):
    async def main(lane: Lane) -> float:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR1, done.set)
        with busy(lane) if is_busy else contextlib.nullcontext():
            threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            begin = time.monotonic()
            await done.wait()
            loop.remove_signal_handler(signal.SIGUSR1)
            return time.monotonic() - begin

    assert run(main) < 0.5


def test_subprocesses():
    async def main(lane: Lane) -> tuple[bytes, int | None]:
        with busy(lane):
            process = await asyncio.create_subprocess_exec(
                "sh", "-c", "cat; exit 3", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            out, _ = await asyncio.wait_for(process.communicate(b"hello"), 5)
            return out, process.returncode

    assert run(main) == (b"hello", 3)


def test_asyncio_streams_beside_the_lane():
    async def main(lane: Lane) -> bytes:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with server:
            with busy(lane):
                reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
                sent = os.urandom(1 << 20)
                writer.write(sent)
                writer.write_eof()
                back = await asyncio.wait_for(reader.read(-1), 10)
                writer.close()
                await writer.wait_closed()
        assert back == sent
        return back

    assert len(run(main)) == 1 << 20


def test_asyncio_and_lane_wait_for_the_same_descriptors_apart(pair):
    """add_reader and add_writer on one descriptor, removed one after the other, with a lane descriptor beside it."""
    one, other = pair

    async def main(lane: Lane) -> list[str]:
        loop = asyncio.get_running_loop()
        seen: list[str] = []
        readable, writable = asyncio.Event(), asyncio.Event()

        def on_read() -> None:
            seen.append("r" + one.recv(10).decode())
            readable.set()

        def on_write() -> None:
            seen.append("w")
            loop.remove_writer(one)
            writable.set()

        loop.add_reader(one, on_read)
        loop.add_writer(one, on_write)
        await asyncio.wait_for(writable.wait(), 2)
        other.send(b"1")
        await asyncio.wait_for(readable.wait(), 2)
        assert loop.remove_reader(one)
        other.send(b"2")
        await asyncio.sleep(0.02)
        return seen

    assert run(main) == ["w", "r1"]


def test_a_handler_that_raises_is_forgotten_and_said(pair, caplog):
    one, other = pair
    calls = []

    async def main(lane: Lane) -> None:
        def handler(mask: int) -> None:
            calls.append(mask)
            raise ZeroDivisionError

        with busy(lane) as others:
            lane.watch(one.fileno(), READ, handler)
            other.send(b"x")
            await asyncio.sleep(0.03)
            before = others[0]
            await asyncio.sleep(0.03)
            assert others[0] > before
        lane.watch(one.fileno(), READ, Drain(one))  # it is free for another owner
        lane.forget(one.fileno())

    with caplog.at_level(logging.ERROR):
        run(main)
    assert len(calls) == 1
    assert len([record for record in caplog.records if "no longer watched" in record.message]) == 1


def test_a_descriptor_closed_by_an_earlier_handler_of_the_batch():
    """Its event is passed over; and where its number has a new owner, that one bears a spurious call."""

    async def main(lane: Lane) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        spurious = []
        closed = []

        def close_other(index: int):
            def handler(_: int) -> None:
                if closed:
                    return
                victim = pairs[1 - index][0]
                closed.append(victim.fileno())
                lane.dropped(victim.fileno())
                victim.close()
                pairs[index][0].recv(10)

            return handler

        for index in range(2):
            pairs[index][0].setblocking(False)
            lane.watch(pairs[index][0].fileno(), READ, close_other(index))
            pairs[index][1].send(b"x")
        await asyncio.sleep(0.02)
        assert len(closed) == 1
        new = socket.socketpair()  # the lowest free number is the closed one's
        assert closed[0] in (new[0].fileno(), new[1].fileno())
        mine = new[0] if new[0].fileno() == closed[0] else new[1]
        lane.watch(mine.fileno(), READ, spurious.append)
        await asyncio.sleep(0.02)
        assert spurious == []
        lane.forget(mine.fileno())
        for sock in (*new, *(sock for both in pairs for sock in both)):
            if sock.fileno() >= 0:
                lane.forget(sock.fileno())
                sock.close()

    run(main)


def test_forget_bears_unknown_and_closed_descriptors(pair):
    one, _ = pair
    lane = Lane()
    lane.forget(one.fileno())
    lane.dropped(one.fileno())
    copy = one.dup()
    lane.watch(copy.fileno(), READ, lambda _: None)
    number = copy.fileno()
    copy.close()
    lane.forget(number)
    lane.close()


def test_change_and_hand_over(pair):
    one, other = pair

    async def main(lane: Lane) -> None:
        first, second = [], []
        fd = one.fileno()
        lane.watch(fd, 0, first.append)
        other.send(b"x")
        await asyncio.sleep(0.01)
        assert first == []  # disarmed
        lane.change(fd, READ | EDGE)
        await asyncio.sleep(0.01)
        assert first == [READ]  # once: edge-triggered, and nobody reads
        lane.hand_over(fd, second.append)
        await asyncio.sleep(0.01)
        assert (first, second) == ([READ], [])  # the edge was the first one's
        other.send(b"y")
        await asyncio.sleep(0.01)
        assert (first, second) == ([READ], [READ])
        lane.change(fd, WRITE | EDGE)
        await asyncio.sleep(0.01)
        assert second[1:] == [WRITE]
        lane.change(fd, HANGUP | EDGE)
        other.close()
        await asyncio.sleep(0.01)
        assert second[-1] & HANGUP
        assert second[-1] & BROKEN
        lane.forget(fd)

    run(main)


def test_more_ready_descriptors_than_one_batch_all_get_their_turn():
    async def main(lane: Lane) -> int:
        pairs = [socket.socketpair() for _ in range(400)]
        handlers = [Drain(one) for one, _ in pairs]
        for (one, other), handler in zip(pairs, handlers, strict=True):
            one.setblocking(False)
            lane.watch(one.fileno(), READ, handler)
            other.send(b"x")
        with busy(lane):
            await asyncio.sleep(0.1)
        for one, other in pairs:
            lane.forget(one.fileno())
            one.close()
            other.close()
        return sum(handler.data == b"x" for handler in handlers)

    assert run(main) == 400


def test_the_selector_answers_as_selectors_document(pair):
    one, other = pair
    lane = Lane()
    key = lane.register(one, 1, "data")
    assert (key.fileobj, key.fd, key.events, key.data) == (one, one.fileno(), 1, "data")
    assert dict(lane.get_map()) == {one: key}
    assert lane.get_key(one) == lane.get_key(one.fileno()) == key
    with pytest.raises(KeyError):
        lane.register(one, 1)
    other.send(b"x")
    assert lane.select(0) == [(key, 1)]
    changed = lane.modify(one, 3, "more")
    assert lane.select(0) == [(changed, 3)]
    assert lane.unregister(one) == changed
    with pytest.raises(KeyError):
        lane.unregister(one)
    begin = time.monotonic()
    assert lane.select(0.01) == []
    assert time.monotonic() - begin >= 0.01
    lane.close()


def test_run_gives_the_result_and_the_exception_and_closes_the_epoll():
    before = set(os.listdir("/proc/self/fd"))

    async def fine(_: Lane) -> int:
        return 7

    async def wrong(_: Lane) -> int:
        raise LookupError("x")

    assert run(fine) == 7
    with pytest.raises(LookupError):
        run(wrong)
    assert set(os.listdir("/proc/self/fd")) == before


def test_cancelling_and_timeouts_work():
    async def main(lane: Lane) -> str:
        with busy(lane):
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.02)
            except TimeoutError:
                task = asyncio.create_task(asyncio.sleep(30))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                return "cancelled" if task.cancelled() else "not"
        return "no timeout"

    assert run(main) == "cancelled"
