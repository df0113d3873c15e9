"""`async for` over an interface: the reader of an event loop, without a thread between."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from openvmnet.errors import Stopped
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.contract.ending import Ending


# Of each loop, who awaits which descriptor: a loop takes one reader for each.
_waiting: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, list[asyncio.Future[None]]]] = WeakKeyDictionary()


class Frames:
    """An asynchronous iterator over `read()`: each item is a list of at least one frame; it ends with `ending`.

    The loop polls `fd` only while an item is awaited: a consumer that is busy is the back pressure. Several tasks of
    a loop may iterate over one interface; each frame goes to one of them.
    """

    def __init__(self, read: Callable[[], list[bytes]], fd: int, ending: Ending) -> None:
        self._read = read
        self._fd = fd
        self._ending = ending
        self._at_once = False

    def __aiter__(self) -> Frames:
        return self

    async def __anext__(self) -> list[bytes]:
        if self._at_once:
            await asyncio.sleep(0)  # frames that come faster than they are consumed must not hold the loop
        self._at_once = True
        try:
            while not (frames := self._read()):
                self._at_once = False
                await self._readable()
        except Stopped as error:
            if error.status is not Status.SETUP_INCOMPLETE:
                raise
            raise StopAsyncIteration from None
        return frames

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        waiters = _waiting.setdefault(loop, {})
        queue = waiters.setdefault(self._fd, [])
        queue.append(waiter)

        def ended() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_resolve_all, [waiter])

        try:
            if len(queue) == 1:
                loop.add_reader(self._fd, _resolve_all, queue)
            with self._ending.waking(ended):
                await waiter
        except OSError:
            if not self._ending.ended:  # else it was stopped in between, and the descriptor is none any more
                raise
        finally:
            queue.remove(waiter)
            if not queue:
                del waiters[self._fd]
                loop.remove_reader(self._fd)


def _resolve_all(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
