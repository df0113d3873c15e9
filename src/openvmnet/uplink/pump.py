"""The pump: bytes between the two sockets of a TCP connection, until both directions have ended.

A flow has two directions. Each moves bytes from its source socket to its sink until the source is empty or the sink is
full, and is called again when epoll says that this has changed. All descriptors are watched edge-triggered, so no
epoll_ctl(2) follows, at the price that a direction has to go on until it meets EAGAIN. Room in an accepted socket is
asked for once it has been missed (`asked`): before that, "there is room" would be an event that says nothing new.

A direction begins by copying: one read into a shared buffer, one write. That is all a short exchange needs, with no
pipe and no memory of its own. A read that fills the buffer is bulk, and the direction changes to splice(2), socket to
pipe to socket, which copies nothing; it borrows a pipe while bytes are in it. What a full sink refuses stays in the
pipe, or, from the copying mode, in `spill`, and the source is not read again before that has left: back pressure goes
through to the sender by TCP's own window.

End of stream is carried as FIN, once everything before it has been written, so half-closed connections work; a reset
or an error on one side becomes a RST on the other, once what came before it has been written (`lost` says since when
that is waited for). A direction that has moved ROUNDS full loads yields to the rest of
the loop and goes on in its next turn, so that one fast flow cannot starve the others.
"""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING

from openvmnet.kernel import sockets
from openvmnet.kernel.loop import BROKEN, EDGE, HANGUP, READ, URGENT, WRITE

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.watches import Watches
    from openvmnet.uplink.pipes import PipePool

QUIET = READ | URGENT | HANGUP | EDGE  # of a socket that is connected: it has room until a write says otherwise
EVENTS = QUIET | WRITE
ROUNDS = 16  # loads of up to a megabyte in one turn

_COPY = 1 << 16  # octets
_NONBLOCK = 2  # SPLICE_F_NONBLOCK, with SPLICE_F_MOVE = 1 of no effect since Linux 2.6.21
_ENDING = HANGUP | BROKEN | URGENT
_buffer = bytearray(_COPY)
_view = memoryview(_buffer)
_vector = (_buffer,)


class Direction:
    """One way of a flow: from descriptor `source` to descriptor `sink`."""

    __slots__ = (
        "asked",
        "bulk",
        "done",
        "ending",
        "held",
        "marked",
        "moved",
        "pipe",
        "sink",
        "source",
        "spill",
        "writes",
    )

    def __init__(self, source: int, sink: int) -> None:
        self.source = source
        self.sink = sink
        self.pipe: tuple[int, int] | None = None
        self.held = 0  # octets in the pipe
        self.spill = b""  # octets read by copying that the sink did not take
        self.moved = 0  # octets since the flow began
        self.writes = 0
        self.bulk = False
        self.asked = False  # the lane tells when the sink has room
        self.marked = False  # the source has sent urgent data: splice(2) would stop at its mark, copying goes past it
        self.ending = False  # the end of the stream is there, or a mark that reads stop at: read until EAGAIN
        self.done = False  # end of stream was seen and passed on

    def blocked(self) -> bool:
        """Whether the sink owes room before the source may be read again."""
        return bool(self.held or self.spill)


class Flow:
    """A TCP connection of a guest: descriptor `guest` in the namespace, `host` outside, and the two directions.

    `guest_address` is the guest's, 4 or 16 octets. `on_end(flow)` is called once, when both sockets are closed.
    """

    __slots__ = (
        "_lane",
        "_on_end",
        "_pool",
        "_resume",
        "down",
        "guest",
        "guest_address",
        "host",
        "kept",
        "key",
        "lost",
        "owner",
        "up",
    )

    def __init__(
        self,
        lane: Watches,
        pool: PipePool,
        guest: int,
        host: int,
        guest_address: bytes,
        on_end: Callable[[Flow], None],
        resume: Callable[[Callable[[], None]], object],
    ) -> None:
        self._lane = lane
        self._pool = pool
        self._on_end = on_end
        self._resume = resume
        self.guest = guest
        self.host = host
        self.guest_address = guest_address
        self.up = Direction(guest, host)
        self.down = Direction(host, guest)
        self.owner = 0  # whose bounds it counts to; set by who makes it
        self.key = b""  # of the opening that it was, where a SYN of the guest's opened it
        self.kept = False  # keep-alive is set on the host's side
        self.lost = 0.0  # when one side was reset while the other took nothing; 0 for never
        # What is urgent to the sender stays in the stream; the guest's side has this from its listener.
        sockets.set_option(host, socket.SOL_SOCKET, socket.SO_OOBINLINE)

    def on_guest(self, mask: int) -> None:
        """Readiness of the guest's side."""
        self._on_event(mask, self.up, self.down)

    def on_host(self, mask: int) -> None:
        """Readiness of the host's side."""
        self._on_event(mask, self.down, self.up)

    def abort(self) -> None:
        """End it now, with a RST to both sides."""
        if self.guest < 0:
            return
        for fd in (self.guest, self.host):
            self._lane.dropped(fd)
            sockets.abort(fd)
        self._end()

    def _on_event(self, mask: int, out: Direction, back: Direction) -> None:
        if self.guest < 0:  # closed by an earlier event of the same batch
            return
        try:
            if mask & WRITE and (back.held or back.spill):
                self._move(back)
            if mask & _ENDING:
                out.ending = True
                if mask & URGENT:
                    out.marked = True
                    out.bulk = False
            if mask & (READ | _ENDING) and self.guest >= 0 and not (out.done or out.held or out.spill):
                self._move(out)
            if mask & BROKEN and self.guest >= 0:
                self._on_broken(mask, out)
        except OSError:  # reset, timed out, unreachable: whatever ended one side ends the other
            self.abort()

    def _on_broken(self, mask: int, way: Direction) -> None:
        """A reset of `way`'s source that no read shows: after its FIN, or while the sink takes nothing."""
        if way.done:
            if sockets.pending_error(way.source):
                self.abort()
        elif way.blocked() and mask & select.EPOLLERR:
            self.lost = time.monotonic()

    def _move(self, way: Direction) -> None:
        """Move what there is, pass on the end of the stream, and close the flow when it was the second one."""
        self._pool.turns[self.owner] += 1
        if not (self._splice(way) if way.bulk else self._copy(way)):
            if (way.held or way.spill) and not way.asked:
                way.asked = True
                self._lane.change(way.sink, EVENTS)  # which tells at once when there is room again by now
            return
        way.done = True
        if self.up.done and self.down.done:
            self._close()
        else:
            sockets.shut_write(way.sink)

    def _copy(self, way: Direction) -> bool:
        """Read and write; True at the end of the stream."""
        if (way.held or way.spill) and not self._settled(way):
            return False
        for _ in range(ROUNDS):
            try:
                count = os.readv(way.source, _vector)
            except BlockingIOError:
                return False
            if count == 0:
                return True
            try:  # as _write(), but for the call: this is the way of every short exchange
                sent = os.write(way.sink, _view[:count])
            except BlockingIOError:
                sent = 0
            way.moved += count
            way.writes += 1
            if way.writes == 2:
                # The first segment leaves at once with or without it; a second shows that the flow has more to say.
                sockets.set_option(way.sink, socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if sent < count:
                way.spill = bytes(_view[sent:count])
                return False
            if count < _COPY and not way.ending:
                return False  # epoll(7): a short read of a stream means that it is empty
            if count == _COPY and not way.marked:
                way.pipe = self._pool.borrow()
                if way.pipe is not None:
                    way.bulk = True
                    return self._splice(way)
        self._resume(lambda: self._go_on(way))
        return False

    def _splice(self, way: Direction) -> bool:
        """Move by pipe; True at the end of the stream."""
        if way.spill:
            return self._copy(way)
        pool = self._pool
        if way.pipe is None:
            way.pipe = pool.borrow()
            if way.pipe is None:
                way.bulk = False
                return self._copy(way)
        read, write = way.pipe
        rounds = 0
        while True:
            try:
                count = os.splice(way.source, write, pool.size, flags=_NONBLOCK)
                if count == 0 and way.held == 0:
                    # The end of the stream, or an urgent mark with a FIN somewhere behind it: read(2) tells them apart.
                    self._return_pipe(way)
                    way.bulk = False
                    return self._copy(way)
                way.held += count
                way.moved += count
            except BlockingIOError:
                # An empty source, or a pipe whose slots are all taken: only with nothing held is it surely the first.
                if way.held == 0:
                    self._return_pipe(way)
                    return False
            try:
                way.held -= os.splice(read, way.sink, way.held, flags=_NONBLOCK)
            except BlockingIOError:
                return False
            rounds += 1
            if rounds >= ROUNDS:
                self._resume(lambda: self._go_on(way))
                return False

    def _go_on(self, way: Direction) -> None:
        """Another turn for a direction that yielded: its source was not empty, and no edge will tell."""
        if self.guest < 0 or way.done:
            return
        try:
            self._move(way)
        except OSError:
            self.abort()

    def _settled(self, way: Direction) -> bool:
        """Write what the sink is owed before the source may be read; whether all of it went."""
        if way.held and not self._empty_pipe(way):
            return False
        if way.spill:
            way.spill = way.spill[_write(way.sink, way.spill) :]
        return not way.spill

    def _empty_pipe(self, way: Direction) -> bool:
        """Write what is left in the pipe of a direction that has gone back to copying; whether all of it went."""
        if way.pipe is None:
            return True
        try:
            while way.held:
                way.held -= os.splice(way.pipe[0], way.sink, way.held, flags=_NONBLOCK)
        except BlockingIOError:
            return False
        self._return_pipe(way)
        return True

    def _return_pipe(self, way: Direction) -> None:
        if way.pipe is not None:
            self._pool.give_back(way.pipe)
            way.pipe = None

    def _close(self) -> None:
        for fd in (self.guest, self.host):
            self._lane.dropped(fd)
            os.close(fd)
        self._end()

    def _end(self) -> None:
        self.guest = self.host = -1
        for way in (self.up, self.down):
            if way.pipe is not None:
                (self._pool.lose if way.held else self._pool.give_back)(way.pipe)
                way.pipe = None
                way.held = 0
            way.spill = b""
        self._on_end(self)


def _write(fd: int, data: bytes | memoryview) -> int:
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0
