"""An asyncio event loop with a fast lane.

asyncio wraps each readiness event in a handle, queues it, and calls it in the next turn of the loop: about ten
microseconds, which a data path cannot pay per event. So the loop gets a selector of ours. It owns the one epoll
instance; file descriptors registered through asyncio come back to asyncio as usual, and those given to `watch()`
are dispatched on the spot, inside `select()`. Both share one epoll_wait(2), hence one thread and one order of events.

The rules for handlers are those of `kernel.watches`.
Control goes back to asyncio when a descriptor of its own is ready, a timer is due, or a handler has called it
(`call_soon`, `call_later`, a future's result): the loop's class notes each of these.

To wake a sleeping thread takes longer than to move what it was woken for. Where events come one by one, each some tens
of microseconds after the last was dealt with (requests and answers of one connection), the lane is in a rhythm, and
looks for a moment before it sleeps. Bulk breaks the rhythm, since the next event waits already; so does a pause.
"""

from __future__ import annotations

import asyncio
import logging
import math
import select
import selectors
import time
from typing import TYPE_CHECKING, Any, TypeVar

from openvmnet.kernel.watches import BROKEN, EDGE, FAILED, HANGUP, READ, URGENT, WRITE, Watches

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from _typeshed import FileDescriptorLike

__all__ = ["BROKEN", "EDGE", "HANGUP", "READ", "URGENT", "WRITE", "Lane", "LaneLoop", "run"]

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_SURE = 16  # score of a rhythm; an event in time is one up, one that was waiting two down
_AT_ONCE = 5e-6  # s; what epoll_wait(2) takes, at the most, when the event is there already
_LULL = 80e-6  # s; a relay's answer takes 20 to 50 us on one machine
_BATCH = 256  # events a turn: enough to amortise the system call, few enough to keep turns short


class Lane(Watches, selectors.BaseSelector):
    """The selector: asyncio's descriptors, and beside them those watched directly."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._again: list[Callable[[], None]] = []  # who has more to do than a turn allows
        self._rhythm = 0
        self.wanted = False  # asyncio has been given something to do since select() began

    # The fast lane.

    def rest(self, fd: int, seconds: float) -> None:
        """Leave a watched `fd` alone for a while, then wait for READ again: its buffer fills, and others have a turn.

        Called on the running loop. A descriptor that is forgotten meanwhile stays so, and so does one that has got its
        number since.
        """
        self._epoll.modify(fd, 0)
        asyncio.get_running_loop().call_later(seconds, self._wake, fd, self._handlers[fd])

    def _wake(self, fd: int, handler: Callable[[int], None]) -> None:
        if self._handlers.get(fd) is handler:
            self._epoll.modify(fd, READ)

    def again(self, work: Callable[[], None]) -> None:
        """Call `work` after the events of the next turn, which does not wait for any."""
        self._again.append(work)

    # asyncio's side: selectors.BaseSelector.

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401 - the base class's signature
        fd = _fileno(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        key = selectors.SelectorKey(fileobj, fd, events, data)
        self._epoll.register(fd, _mask(events))
        self._keys[fd] = key
        self._fresh.add(fd)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        key = self._keys.pop(_fileno(fileobj))
        try:
            self._epoll.unregister(key.fd)
        except OSError:  # as in selectors.EpollSelector: the descriptor may be closed already
            log.debug("descriptor %d was closed before it was unregistered", key.fd)
        return key

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:  # noqa: ANN401 - the base class's signature
        old = self._keys[_fileno(fileobj)]
        if events != old.events:
            self._epoll.modify(old.fd, _mask(events))
        key = selectors.SelectorKey(old.fileobj, old.fd, events, data)
        self._keys[old.fd] = key
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.wanted = False
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = self._dispatch(timeout)
            # Back to asyncio only when it has something to do: a turn of its loop costs as much as moving a datagram.
            if ready or self.wanted:
                return ready
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return ready

    def _dispatch(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        # epoll counts in milliseconds; round up, or the last fraction of a wait would spin.
        wait = -1.0 if timeout is None else 0.0 if timeout <= 0 else math.ceil(timeout * 1000) / 1000
        ready = []
        handlers, fresh = self._handlers, self._fresh
        again, self._again = self._again, []
        events = self._wait(0.0 if again else wait)
        fresh.clear()
        for fd, mask in events:
            if fd in fresh:
                continue
            handler = handlers.get(fd)
            if handler is not None:
                try:
                    handler(mask)
                except Exception:
                    log.exception(FAILED, fd)
                    self._failed(fd, handler)
                continue
            key = self._keys.get(fd)
            if key is not None:
                kinds = (selectors.EVENT_READ if mask & ~select.EPOLLOUT else 0) | (
                    selectors.EVENT_WRITE if mask & ~select.EPOLLIN else 0
                )
                ready.append((key, kinds & key.events))
        for work in again:
            try:
                work()
            except Exception:
                log.exception("what was to go on failed")
        return ready

    def _wait(self, wait: float) -> list[tuple[int, int]]:
        """epoll_wait(2) for `wait` seconds (-1: for ever), which does not sleep at once in a rhythm."""
        poll, clock = self._epoll.poll, time.monotonic
        began = clock()
        if self._rhythm < _SURE:
            events = poll(wait, _BATCH)
        else:
            until = began + (_LULL if wait < 0 else min(_LULL, wait))
            events = poll(0, _BATCH)
            while not events and clock() < until:
                events = poll(0, _BATCH)
            if not events and wait:
                events = poll(wait, _BATCH)
        lull = clock() - began
        if lull < _AT_ONCE:
            self._rhythm = max(0, self._rhythm - 2)
        elif len(events) == 1 and lull < _LULL:
            self._rhythm = min(2 * _SURE, self._rhythm + 1)
        else:
            self._rhythm = 0
        return events

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return {key.fileobj: key for key in self._keys.values()}

    def get_key(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._keys[_fileno(fileobj)]

    def close(self) -> None:
        self._epoll.close()
        self._keys.clear()
        self._handlers.clear()


class LaneLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, which tells the lane when a handler has given it work."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        super().__init__(lane)

    # The two doors through which work comes in; everything else of asyncio goes through them.

    def call_soon(self, callback, *args, context=None):  # type: ignore[no-untyped-def, override] # noqa: ANN001, ANN002, ANN201 - typed by the base class
        self._lane.wanted = True
        return super().call_soon(callback, *args, context=context)

    def call_at(self, when, callback, *args, context=None):  # type: ignore[no-untyped-def, override] # noqa: ANN001, ANN002, ANN201 - typed by the base class
        self._lane.wanted = True
        return super().call_at(when, callback, *args, context=context)


def _fileno(fileobj: FileDescriptorLike) -> int:
    return fileobj if isinstance(fileobj, int) else fileobj.fileno()


def _mask(events: int) -> int:
    return (READ if events & selectors.EVENT_READ else 0) | (WRITE if events & selectors.EVENT_WRITE else 0)


def run(main: Callable[[Lane], Coroutine[Any, Any, _T]]) -> _T:
    """Run `main(lane)` to its end in a new event loop that has a fast lane, as `asyncio.run()` does."""
    lane = Lane()
    with asyncio.Runner(loop_factory=lambda: LaneLoop(lane)) as runner:
        return runner.run(main(lane))
