"""Descriptors that take their turn together: an epoll instance within the lane's.

What is ready stands in epoll's queue. Where one owner has thousands of descriptors ready, whoever becomes ready next
waits for all of them. In a nest they are one entry of the lane's queue, of which each turn serves a few, and one call
lets all of them rest. The rules for handlers are the lane's.
"""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING

from openvmnet.kernel.loop import READ

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)


class Nest:
    """`on_ready()` is called by the lane when a descriptor is ready, and calls `serve()` or `rest()`."""

    def __init__(self, lane: Lane, on_ready: Callable[[], None]) -> None:
        self._lane = lane
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._fresh: set[int] = set()  # watched since the events in hand were fetched: these are of who had the number
        try:
            lane.watch(self._epoll.fileno(), READ, lambda _: on_ready())
        except BaseException:
            self._epoll.close()
            raise

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(mask)` in a turn in which one of `events` holds on `fd`; they are level-triggered."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def forget(self, fd: int) -> None:
        """Stop watching `fd`."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def dropped(self, fd: int) -> None:
        """Forget an `fd` that the caller closes right now, as `Lane.dropped()`."""
        self._handlers.pop(fd, None)

    def serve(self, most: int) -> None:
        """Give `most` of the descriptors that are ready their turn; the others come first in the next one."""
        self._fresh.clear()
        for fd, mask in self._epoll.poll(0, most):
            handler = self._handlers.get(fd)
            if handler is None or fd in self._fresh:
                continue
            try:
                handler(mask)
            except Exception:
                log.exception("the handler of descriptor %d failed; it is no longer watched", fd)
                if self._handlers.get(fd) is handler:
                    self.forget(fd)

    def rest(self) -> None:
        """Nobody here is served before `go_on()`."""
        self._lane.change(self._epoll.fileno(), 0)

    def go_on(self) -> None:
        """End a rest; a nest that was closed meanwhile stays so."""
        if not self._epoll.closed:
            self._lane.change(self._epoll.fileno(), READ)

    def close(self) -> None:
        """Watch nothing more; the descriptors are not this one's to close."""
        self._lane.forget(self._epoll.fileno())
        self._epoll.close()
        self._handlers.clear()
