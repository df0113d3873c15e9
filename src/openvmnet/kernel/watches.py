"""Descriptors watched by one epoll instance, and who is called for them: what the lane and the nests in it share.

Rules for a handler: it never blocks, and it takes the epoll mask as its only argument. When one handler closes a
descriptor, the next may get its number before the batch of events is through; what the batch still holds for the number
is the old owner's, so an event for a descriptor that came to be watched during the batch is passed over.
A handler that raises is forgotten, with a log line, so that its descriptor cannot spin the loop.
"""

from __future__ import annotations

import logging
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
URGENT = select.EPOLLPRI
EDGE = select.EPOLLET
HANGUP = select.EPOLLRDHUP
BROKEN = select.EPOLLERR | select.EPOLLHUP

FAILED = "the handler of descriptor %d failed; it is no longer watched"


class Watches:
    """An epoll instance with a handler for each descriptor; whoever has it polls and calls them."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._fresh: set[int] = set()  # watched since the batch in hand was fetched

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler(mask)` whenever one of `events` (READ | WRITE | EDGE | HANGUP) holds on `fd`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def change(self, fd: int, events: int) -> None:
        """Wait for other events on a watched `fd`; 0 disarms it but for errors and hang-ups."""
        self._epoll.modify(fd, events)

    def hand_over(self, fd: int, handler: Callable[[int], None]) -> None:
        """Give a watched `fd` another handler. An edge that the old one saw is not reported again."""
        self._handlers[fd] = handler

    def forget(self, fd: int) -> None:
        """Stop watching `fd` (call it before closing the descriptor); unknown ones are ignored."""
        if self._handlers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:  # closed already: the kernel has dropped it by itself
                log.debug("descriptor %d was closed before it was forgotten", fd)

    def dropped(self, fd: int) -> None:
        """Forget an `fd` that the caller closes right now: spares epoll_ctl(2), since close(2) does its work.

        Only for a descriptor of which no duplicate exists, in this process or another.
        """
        self._handlers.pop(fd, None)

    def _failed(self, fd: int, handler: Callable[[int], None]) -> None:
        """`handler` has raised: it goes, unless it has given the number to another by then."""
        if self._handlers.get(fd) is handler:
            self.forget(fd)
