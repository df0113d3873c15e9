"""The end of something that others wait on: it comes once, and wakes them all."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Ending:
    """`ended` turns True once; whoever is inside `waking(call)` at that moment gets `call()`, on the ending thread."""

    def __init__(self) -> None:
        self.ended = False
        # Re-entrant: a signal handler or the garbage collector may end it on a thread that is in here already.
        self._lock = threading.RLock()
        self._calls: dict[int, Callable[[], None]] = {}

    def end(self) -> None:
        """End it; the second time does nothing."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
            for call in list(self._calls.values()):
                call()

    @contextlib.contextmanager
    def waking(self, call: Callable[[], None]) -> Iterator[None]:
        """Have `call` called when it ends, at once if it has; after the block it is not called any more."""
        with self._lock:
            self._calls[id(call)] = call
            if self.ended:
                call()
        try:
            yield
        finally:
            with self._lock:
                del self._calls[id(call)]
