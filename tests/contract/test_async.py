"""The asynchronous side of an interface, in one event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface
from openvmnet.errors import LinkError
from tests.contract.conftest import cpu
from tests.contract.engines import MemoryLink, frame, number

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.contract.engines import Rig


async def collect(interface: Interface, got: list[int]) -> None:
    async for frames in interface:
        assert 1 <= len(frames) <= 200
        got.extend(map(number, frames))


async def soon(condition: Callable[[], bool]) -> bool:
    """Whether `condition` comes true within 5 s."""
    for _ in range(5000):
        if condition():
            return True
        await asyncio.sleep(0.001)
    return False


async def test_frames_come_in_order_and_the_iteration_ends_with_the_interface(interface: Interface, rig: Rig) -> None:
    got: list[int] = []
    task = asyncio.create_task(collect(interface, got))
    for first in range(0, 1000, 100):
        rig.send([frame(n) for n in range(first, first + 100)])
        await asyncio.sleep(0.002)
    rig.send([frame(n) for n in range(1000, 2000)])
    assert await soon(lambda: len(got) == 2000)
    assert got == list(range(2000))
    threading.Thread(target=interface.stop).start()
    await asyncio.wait_for(task, 5)


async def test_a_busy_loop_body_is_the_back_pressure_and_costs_nothing(interface: Interface, rig: Rig) -> None:
    rig.send([frame(n) for n in range(500)])
    got: list[int] = []
    async for frames in interface:
        got.extend(map(number, frames))
        if len(got) == 200:
            with cpu() as share:
                await asyncio.sleep(0.5)
                assert share() < 0.02
        if len(got) == 500:
            break
    assert got == list(range(500))


async def test_a_flood_leaves_the_loop_to_others(interface: Interface, rig: Rig) -> None:
    rig.send([frame(n) for n in range(4000)])
    task = asyncio.create_task(collect(interface, got := []))
    turns = 0
    while len(got) < 4000:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 15
    interface.stop()
    await task


async def test_several_tasks_share_the_frames_and_all_end(interface: Interface, rig: Rig) -> None:
    got: list[int] = []
    tasks = [asyncio.create_task(collect(interface, got)) for _ in range(3)]
    await asyncio.sleep(0.01)
    rig.send([frame(n) for n in range(900)])
    assert await soon(lambda: len(got) == 900)
    assert sorted(got) == list(range(900))
    interface.stop()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_a_cancelled_iteration_leaves_no_reader_and_loses_nothing(interface: Interface, rig: Rig) -> None:
    for _ in range(20):
        task = asyncio.create_task(collect(interface, []))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    rig.send([frame(7)])
    with cpu() as share:
        await asyncio.sleep(0.3)
        assert share() < 0.02
    async for frames in interface:
        assert [number(each) for each in frames] == [7]
        break


async def test_an_iteration_that_begins_as_the_interface_stops_ends(rig: Rig) -> None:
    for turn in range(20):
        interface = Interface(rig.link())
        thread = threading.Thread(target=lambda i=interface, t=turn: (time.sleep(t * 0.0002), i.stop()))
        frames = aiter(interface)
        thread.start()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(frames), 5)
        thread.join()


async def test_an_error_of_the_machine_comes_out_of_the_iteration() -> None:
    class Failing(MemoryLink):
        def read(self, limit: int) -> list[bytes]:
            raise LinkError("read failed")

    with Interface(Failing()) as interface, pytest.raises(LinkError, match="read failed"):
        async for _ in interface:
            pass
