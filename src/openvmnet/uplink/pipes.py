"""Pipes for splice(2), lent to a flow only while bytes are in them.

A pipe that holds a megabyte costs nothing while empty, but an unprivileged user may have 64 MiB of pipe buffers in all
(/proc/sys/fs/pipe-user-pages-soft, 16,384 pages), and a flow that idles needs none. So the pool keeps few and lends
them; where it has no more, a flow copies through user space instead, which is slower and always works.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict

F_SETPIPE_SZ = 1031
SIZE = 1 << 20  # octets; what one splice(2) may carry
LIMIT = 48  # pipes: 48 MiB of the user's 64


class PipePool:
    """At most `limit` pipes of `size` octets."""

    def __init__(self, limit: int = LIMIT, size: int = SIZE) -> None:
        self.size = size
        self.lent = 0
        self.turns: defaultdict[int, int] = defaultdict(int)  # of the pump, by owner: whose TCP is moving
        self._limit = limit
        self._free: list[tuple[int, int]] = []

    def borrow(self) -> tuple[int, int] | None:
        """An empty pipe (read end, write end), or None when all are lent or the user may have no more."""
        if self._free:
            self.lent += 1
            return self._free.pop()
        if self.lent >= self._limit:
            return None
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            self.size = min(self.size, fcntl.fcntl(pipe[1], F_SETPIPE_SZ, self.size))
        except OSError:  # the user's pages are used up: a pipe of the default size would be slower than copying
            self.discard(pipe)
            return None
        self.lent += 1
        return pipe

    def give_back(self, pipe: tuple[int, int]) -> None:
        """Return an empty pipe."""
        self.lent -= 1
        self._free.append(pipe)

    def lose(self, pipe: tuple[int, int]) -> None:
        """Return a pipe that still holds a broken flow's bytes: it is closed."""
        self.lent -= 1
        self.discard(pipe)

    def close(self) -> None:
        """Close the pipes that are not lent."""
        while self._free:
            self.discard(self._free.pop())

    @staticmethod
    def discard(pipe: tuple[int, int]) -> None:
        """Close both ends."""
        os.close(pipe[0])
        os.close(pipe[1])
