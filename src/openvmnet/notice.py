"""A log line that a guest can provoke at will, said at most once in a while.

A bound that is reached has to be said; a guest that reaches it a thousand times a second must not fill the disk.
The next time it is said, it is said how often it went unsaid.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable

QUIET = 60.0  # s


class Notice:
    """One such line, for `logger`."""

    __slots__ = ("_clock", "_last", "_log", "_unsaid")

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = logger
        self._clock = clock
        self._last = -QUIET
        self._unsaid = 0

    def warn(self, message: str, *arguments: object) -> None:
        """Log `message % arguments` as a warning, or count it."""
        now = self._clock()
        if now - self._last < QUIET:
            self._unsaid += 1
            return
        self._last = now
        suffix = f" ({self._unsaid} times more since it was last said)" if self._unsaid else ""
        self._unsaid = 0
        self._log.warning(message + suffix, *arguments)
