"""The lease file: replaced whole, and never in the way of the event loop.

How it works. A lease may be promised to a guest only when it is on disk: had the process died between the promise and
the write, a restarted server could promise the same address to another guest. So an ACK that changed a lease is *held*
until the file that contains it is stable.

A write is four steps: a temporary file beside the real one, fsync, rename, fsync of the directory. Whenever the process
or the machine dies, a reader finds the old file or the new one. The temporary has one fixed name, so that nothing piles
up. fsync may take a hundred milliseconds, so a write runs in a thread of its own, at most one at a time. What is held
meanwhile waits for the next write, which contains all of it: the number of writes follows the speed of the disk, not
the number of guests (group commit).

When the disk refuses (full, read-only), the guests are served all the same: a network without addresses is worse than
addresses that are forgotten on a crash. That is logged once, and once more when writing works again.
A file that cannot be read is moved aside, never deleted and never fatal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_MAX_SIZE = 16 << 20  # octets; a full book has about 1 MiB
_MAX_HELD = 4096
_PATIENCE = 0.002  # seconds that a write may take before it is helped
_WAY = 0.0001  # seconds; a thread wakes in about half of it


class LeaseFile:
    """One file that is replaced whole. The directory exists and is ours alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.new")

    def read(self) -> bytes | None:
        """The content; None if there is no file yet. OSError otherwise, also for one beyond 16 MiB."""
        try:
            with self.path.open("rb") as file:
                data = file.read(_MAX_SIZE + 1)
        except FileNotFoundError:
            return None
        if len(data) > _MAX_SIZE:
            raise OSError(f"{self.path} has more than {_MAX_SIZE} octets")
        return data

    def write(self, data: bytes) -> None:
        """Replace the content and wait until it is stable; blocks. OSError if it is not."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(self._temporary, flags, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def set_aside(self, why: str) -> None:
        """Keep a file that is no lease file under another name, out of the way of the next write."""
        aside = self.path.with_name(f"{self.path.name}.damaged")
        try:
            os.replace(self.path, aside)
        except OSError as error:
            log.warning("%s cannot be read as a lease file (%s) and not be moved aside: %s", self.path, why, error)
        else:
            log.warning("%s cannot be read as a lease file (%s); it is kept as %s", self.path, why, aside)


class Journal(Protocol):
    """What the committer writes: `dirty` says whether it differs from the last `snapshot()`."""

    @property
    def dirty(self) -> bool: ...

    def snapshot(self) -> bytes: ...


class Committer(Generic[_T]):
    """Holds what may go out only when the file is stable, and then gives it to `release`, in order."""

    def __init__(self, journal: Journal, file: LeaseFile | None, release: Callable[[_T], None]) -> None:
        self._journal = journal
        self._file = file
        self._release = release
        self._held: list[_T] = []
        self._in_flight: list[_T] = []  # what the write under way contains
        self._writing = False
        self._soon = False  # kick() is called at the end of this turn of the loop
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "leases")
        self._failed = False
        self._full = False
        self.writes = 0

    def hold(self, item: _T) -> None:
        """Keep `item` until the next `kick()`'s write is done. Beyond 4096 it is dropped: a client asks again."""
        if len(self._held) < _MAX_HELD:
            self._held.append(item)
            self._full = False
        elif not self._full:
            self._full = True
            log.warning("%d answers wait for the lease file; more are dropped until the disk has caught up", _MAX_HELD)

    def kick(self) -> None:
        """Start a write if something changed and none is under way; release at once what needs none."""
        if self._writing or self._closed:
            return
        batch, self._held = self._held, []
        if self._file is None or not self._journal.dirty:
            self._let_go(batch)
            return
        data = self._journal.snapshot()
        self.writes += 1
        self._writing, self._in_flight = True, batch
        done = asyncio.get_running_loop().run_in_executor(self._thread, self._file.write, data)
        done.add_done_callback(self._written)
        asyncio.get_running_loop().call_later(_PATIENCE, self._give_way)

    def kick_soon(self) -> None:
        """`kick()` once at the end of this turn of the loop, however often this is called in it: one write for all."""
        if not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._kick_now)

    def _kick_now(self) -> None:
        self._soon = False
        self.kick()

    def _give_way(self) -> None:
        """Let the write's thread have the interpreter, once a turn of the loop.

        A loop that is busy gives the interpreter's lock away with every system call and takes it back microseconds
        later, before a waiting thread is awake: that one may wait for ever, since it asks for the lock by itself only
        when nobody has let it go for five milliseconds.
        """
        if self._writing:
            time.sleep(_WAY)
            asyncio.get_running_loop().call_soon(self._give_way)

    def _written(self, done: asyncio.Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        self._writing = False
        self._tell(error)
        batch, self._in_flight = self._in_flight, []
        self._let_go(batch)
        self.kick()

    def _tell(self, error: BaseException | None) -> None:
        if error is not None and not self._failed:
            log.error("leases are served, but not remembered: the lease file cannot be written: %s", error)
        elif error is None and self._failed:
            log.warning("the lease file is written again")
        self._failed = error is not None

    def _let_go(self, items: list[_T]) -> None:
        for item in items:
            self._release(item)

    def close(self) -> None:
        """End the thread, write what is not yet written, release what is held. Blocks: the process is about to end."""
        if self._closed:
            return
        self._closed = True
        self._thread.shutdown()
        if self._file is not None and self._journal.dirty:
            try:
                self._file.write(self._journal.snapshot())
            except OSError as error:
                self._tell(error)
        batch = [*self._in_flight, *self._held]
        self._in_flight, self._held = [], []
        self._let_go(batch)
