"""The thread that tells consumers of packets: one for the whole process, there while anybody wants to be told.

How it works. A `Source` is a descriptor that polls readable while packets wait, and the callback of who consumes them.
The thread sleeps in epoll (kqueue on macOS) on the descriptors of all sources that are armed, level-triggered: while
packets remain the callback is called again, and no event has to be remembered or cleared, so none can be lost between
the two. While a callback runs nobody polls.

A consumer that is not ready is not told, or the thread would turn at full speed for as long as packets wait. A source
stays armed after a call only if the callback read and did not return False. Otherwise it is parked: out of epoll,
without cost. It is armed again by the next read or by `arm()`, from any thread: that is when the consumer drains.

The two decisions may race: the thread parks a source because its callback refused, while the consumer's own thread
becomes ready. Each writes its flag first and then looks at the other's: the thread sets `parked` and then looks at
`asked`, the consumer sets `asked` and then looks at `parked`. Whatever the order, one of them sees the other, and a
source that becomes readable in between is found by epoll itself, which looks at the descriptor when it is added.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


class Source:
    """One descriptor and its consumer; made by `Dispatcher.watch`."""

    __slots__ = ("_dispatcher", "asked", "callback", "fd", "live", "parked", "read_here")

    def __init__(self, dispatcher: Dispatcher, fd: int, callback: Callable[[], object]) -> None:
        self._dispatcher = dispatcher
        self.fd = fd
        self.callback = callback
        self.live = True
        self.parked = False
        self.asked = False  # the consumer became ready on a thread of its own
        self.read_here = False  # the callback read

    def became_ready(self) -> bool:
        """Whether the consumer has said so since the call began."""
        return self.asked

    def was_read(self) -> None:
        """The consumer has read: it is ready for more."""
        if threading.get_ident() == self._dispatcher.ident:
            self.read_here = True
        else:
            self.arm()

    def arm(self) -> None:
        """The consumer is ready."""
        self.asked = True
        if self.parked:
            self._dispatcher.unpark(self)


class Dispatcher:
    """The sources of this process and their thread."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        # Re-entrant: a signal handler or the garbage collector may stop an interface on a thread that is in here.
        self._lock = threading.RLock()
        self._sources: set[Source] = set()
        self._selector: selectors.BaseSelector | None = None
        self._wake = (-1, -1)
        self.ident: int | None = None  # the thread's, while it runs

    def watch(self, fd: int, callback: Callable[[], object]) -> Source:
        """Call `callback` while `fd` is readable, on the thread, until `forget`. `fd` has one source at a time."""
        source = Source(self, fd, callback)
        with self._lock:
            selector = self._selector or self._start()
            selector.register(fd, selectors.EVENT_READ, source)
            self._sources.add(source)
        return source

    def forget(self, source: Source) -> None:
        """No call of its callback begins any more; one that runs is not waited for."""
        with self._lock:
            if not source.live:
                return
            source.live = False
            source.callback = _nobody  # the thread may keep the source until its next event, but not the consumer
            self._sources.discard(source)
            if self._selector is not None and not source.parked:
                self._selector.unregister(source.fd)
            if not self._sources and threading.get_ident() != self.ident:
                self._call_thread()

    def unpark(self, source: Source) -> None:
        """Arm a parked source again."""
        with self._lock:
            if source.live and source.parked and self._selector is not None:
                source.parked = False
                self._selector.register(source.fd, selectors.EVENT_READ, source)

    def forked(self) -> None:
        """In the child of a fork: the thread and the sources are the parent's. Its epoll set must not be changed."""
        selector, wake = self._selector, self._wake
        self._begin()
        if selector is not None:
            selector.close()
            for fd in wake:
                os.close(fd)

    def _start(self) -> selectors.BaseSelector:
        selector = selectors.DefaultSelector()
        read, write = os.pipe()
        try:
            os.set_blocking(write, False)
            selector.register(read, selectors.EVENT_READ, None)
            self._selector, self._wake = selector, (read, write)
            # A daemon: the program's end does not wait for a consumer.
            threading.Thread(target=self._run, args=(selector, read), name="openvmnet events", daemon=True).start()
        except BaseException:
            self._selector, self._wake = None, (-1, -1)
            selector.close()
            os.close(read)
            os.close(write)
            raise
        return selector

    def _call_thread(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is called already
            os.write(self._wake[1], b"\0")

    def _run(self, selector: selectors.BaseSelector, wake: int) -> None:
        self.ident = threading.get_ident()
        while not self._over(selector):
            for key, _ in selector.select():
                source: Source | None = key.data
                if source is None:
                    os.read(wake, 512)
                elif source.live:
                    self._tell(source)

    def _over(self, selector: selectors.BaseSelector) -> bool:
        """Whether nobody wants to be told any more; then what the thread had is closed."""
        with self._lock:
            if self._sources:
                return False
            wake = self._wake
            self._selector, self._wake, self.ident = None, (-1, -1), None
        selector.close()
        for fd in wake:
            os.close(fd)
        return True

    def _tell(self, source: Source) -> None:
        source.asked = source.read_here = False
        try:
            refused = source.callback() is False
        except BaseException:
            if source.live:  # else it met the end of its interface
                log.exception("a callback for available packets failed; it is called again after the next read")
            refused = True
        if source.became_ready() or (source.read_here and not refused):
            return
        with self._lock:
            if source.live and self._selector is not None:
                source.parked = True
                if source.became_ready():
                    source.parked = False
                else:
                    self._selector.unregister(source.fd)


def _nobody() -> None:
    return


dispatcher = Dispatcher()
"""This process's."""
os.register_at_fork(after_in_child=dispatcher.forked)
