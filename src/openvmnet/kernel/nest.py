"""Descriptors that take their turn together: an epoll instance within the lane's.

What is ready stands in epoll's queue. Where one owner has thousands of descriptors ready, whoever becomes ready next
waits for all of them. In a nest they are one entry of the lane's queue, of which each turn serves a few, and one call
lets all of them rest.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from openvmnet.kernel.watches import FAILED, READ, Watches

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane

log = logging.getLogger(__name__)


class Nest(Watches):
    """`on_ready()` is called by the lane when a descriptor is ready, and calls `serve()` or `rest()`."""

    def __init__(self, lane: Lane, on_ready: Callable[[], None]) -> None:
        super().__init__()
        self._lane = lane
        try:
            lane.watch(self._epoll.fileno(), READ, lambda _: on_ready())
        except BaseException:
            self._epoll.close()
            raise

    def serve(self, most: int) -> None:
        """Give `most` of the descriptors that are ready their turn; the others come first in the next one."""
        handlers, fresh = self._handlers, self._fresh
        fresh.clear()
        for fd, mask in self._epoll.poll(0, most):
            handler = handlers.get(fd)
            if handler is None or fd in fresh:
                continue
            try:
                handler(mask)
            except Exception:
                log.exception(FAILED, fd)
                self._failed(fd, handler)

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
