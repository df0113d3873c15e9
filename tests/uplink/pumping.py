"""A flow between two loopback TCP connections, moved step by step: `outer.guest` <-> pump <-> `outer.host`."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from array import array
from collections import deque
from typing import TYPE_CHECKING

from openvmnet.kernel.loop import Lane
from openvmnet.uplink.pipes import PipePool
from openvmnet.uplink.pump import EVENTS, QUIET, Flow

if TYPE_CHECKING:
    from collections.abc import Callable

ADDRESS = socket.inet_aton("192.168.64.2")


def connection(*, buffers: int | None = None) -> tuple[socket.socket, socket.socket]:
    """A loopback TCP connection, both ends non-blocking; socket buffers of `buffers` octets (doubled by the kernel)."""
    with socket.socket() as listener:
        if buffers:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                listener.setsockopt(socket.SOL_SOCKET, option, buffers)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = socket.socket()
        if buffers:
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                one.setsockopt(socket.SOL_SOCKET, option, buffers)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    for end in (one, other):
        end.setblocking(False)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def reset(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class End:
    """An application's end of a connection: what it sent, what it got, and how its stream ended."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent = bytearray()
        self.got = bytearray()
        self.finished = False  # has sent FIN
        self.ended = False  # has got FIN
        self.broken = False  # has got RST

    def write(self, data: bytes) -> int:
        """Send what the buffer takes of `data`; how much that was."""
        with contextlib.suppress(BlockingIOError):
            count = self.sock.send(data)
            self.sent += data[:count]
            return count
        return 0

    def read(self, most: int = 1 << 20) -> int:
        """Take what is there, up to `most`; how much that was."""
        if self.ended or self.broken:
            return 0
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            self.broken = True
            return 0
        self.ended = not data
        self.got += data
        return len(data)

    def finish(self) -> None:
        """Send FIN."""
        self.finished = True
        self.sock.shutdown(socket.SHUT_WR)


class Bench:
    """The pump with its lane, stepped by hand; flows are made with `flow()`."""

    def __init__(self, *, pipes: int = 8, pipe_size: int = 1 << 16) -> None:
        self.lane = Lane()
        self.pool = PipePool(limit=pipes, size=pipe_size)
        self.later: deque[Callable[[], None]] = deque()
        self.ended: list[Flow] = []
        self.ends: list[End] = []
        self.flows: list[Flow] = []

    def flow(self, *, buffers: int | None = None) -> tuple[Flow, End, End]:
        """(flow, the guest's application, the outside's application)."""
        guest, inner_guest = connection(buffers=buffers)
        host, inner_host = connection(buffers=buffers)
        inner_guest.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # in the product, from its listener
        flow = Flow(
            self.lane,
            self.pool,
            inner_guest.detach(),
            inner_host.detach(),
            ADDRESS,
            self.ended.append,
            self.later.append,
        )
        self.flows.append(flow)
        self.lane.watch(flow.guest, QUIET, flow.on_guest)  # as after accept(2)
        self.lane.watch(flow.host, EVENTS, flow.on_host)
        ends = End(guest), End(host)
        self.ends.extend(ends)
        return flow, *ends

    def step(self, wait: float = 0.0) -> None:
        """One turn: what yielded goes on, then events."""
        for _ in range(len(self.later)):
            self.later.popleft()()
        self.lane.select(0.0 if self.later else wait)

    def until(self, condition: Callable[[], object], *, seconds: float = 5.0, read: bool = True) -> None:
        """Step, and read at both ends, until `condition` holds; AssertionError when it does not in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the flow stalled"
            self.step(0.001)
            if read:
                for end in self.ends:
                    end.read()

    def close(self) -> None:
        """End everything, with the check that nothing of the pump is left."""
        for end in self.ends:
            end.sock.close()
        for flow in self.flows:
            flow.abort()
        assert len(self.ended) == len(self.flows)
        assert self.pool.lent == 0
        self.pool.close()
        self.lane.close()


@contextlib.contextmanager
def bench(**options: int):
    """A `Bench`; afterwards no descriptor may be left that was not there before."""
    before = set(os.listdir("/proc/self/fd"))
    made = Bench(**options)
    try:
        yield made
    finally:
        made.close()
    assert set(os.listdir("/proc/self/fd")) == before


def pattern(length: int, seed: int) -> bytes:
    """Octets in which any displacement shows."""
    count = length // 4 + 1
    return array("I", ((seed * 7919 + i) & 0xFFFFFFFF for i in range(count))).tobytes()[:length]
