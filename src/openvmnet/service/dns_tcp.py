"""Questions by TCP (RFC 7766): each message has two octets of length before it.

A guest may keep its connection and send several questions without waiting; they are answered as the answers come. What
it may hold of us is bounded: connections in all and per address, questions in flight and unread answers per connection
(reading stops until they drain), and IDLE seconds without a whole question, so that one who sends an octet a second is
no better off. A connection over the bound is closed at once; the client will find that out and come back.

A guest that has used up its budget of the thread's time waits: its connections are not read for a while. In one turn a
connection has TURN questions answered, however many are there.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from typing import TYPE_CHECKING

from openvmnet.budget import WINDOW
from openvmnet.kernel.loop import BROKEN, READ, WRITE

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from openvmnet.budget import Budget
    from openvmnet.kernel.loop import Lane

    Handler = Callable[[bytes, bytes, Callable[[bytes], None]], bytes | None]
    """handler(query, who the client is, deliver): the answer, None where `deliver` will bring it, or nothing (b"")
    where the message deserves none and the connection is better closed."""

log = logging.getLogger(__name__)

IDLE = 10.0  # s
MAX_CONNECTIONS = 128
MAX_PER_CLIENT = 16
TURN = 16  # questions
_MAX_IN_FLIGHT = 32  # questions of one connection
_MAX_UNREAD = 128 << 10  # octets of answers
_CHUNK = 16384  # octets
_LENGTH = 2
_ACCEPTS = 32  # connections a turn
_EVERY = 1.0  # s between looks for idle ones


class Connection:
    """One client's connection."""

    __slots__ = ("_events", "_input", "_output", "_pending", "_resting", "_server", "_sock", "client", "last", "open")

    def __init__(self, server: TcpServer, sock: socket.socket, client: bytes, now: float) -> None:
        self._server = server
        self._sock = sock
        self._input = bytearray()
        self._output = bytearray()
        self._pending = 0
        self._events = READ
        self._resting = False
        self.client = client
        self.last = now
        self.open = True

    def on_event(self, mask: int) -> None:
        """The client has sent something, can take more, or is gone."""
        if not self.open:
            return
        if mask & BROKEN:  # reset: there is nobody to answer
            self._server.ended(self, at_once=True)
            return
        if mask & WRITE:
            self._flush()
        if self.open and mask & READ and not self._resting:
            try:
                piece = self._sock.recv(_CHUNK)
            except BlockingIOError:
                piece = None
            except OSError:
                piece = b""
            if piece:
                self._input += piece
            elif piece is not None:
                # A half-closed client still gets the answers that are on their way (RFC 7766 section 6.2.4).
                self._input.clear()
                self._server.ended(self, at_once=not self._pending and not self._output)
        if self.open:
            self._work()

    def _work(self) -> None:
        """Take whole messages from the input as long as there is room for their answers, and budget."""
        server, budget, owner = self._server, self._server.budget, int.from_bytes(self.client)
        budget.begin()
        for _ in range(TURN):
            if not self.open or self._resting or not self._has_room() or (message := self._message()) is None:
                break
            if not budget.allows(owner):
                self._rest(WINDOW)
                break
            del self._input[: _LENGTH + len(message)]
            self.last = server.now()
            self._pending += 1
            answer = server.handler(message, self.client, self._deliver)
            budget.charge(owner)
            if answer == b"":
                server.ended(self, at_once=True)
            elif answer is not None:
                self._deliver(answer)
        else:
            self._rest()
        self._arm()

    def _rest(self, seconds: float = 0.0) -> None:
        """Let others have a turn, or more than one."""
        self._resting = True
        self._server.later(self._go_on, seconds)

    def _go_on(self) -> None:
        self._resting = False
        if self.open:
            self._work()

    def _has_room(self) -> bool:
        return self._pending < _MAX_IN_FLIGHT and len(self._output) < _MAX_UNREAD

    def _message(self) -> bytes | None:
        """The first message of the input, which keeps it; None while it is not whole."""
        data = self._input
        if len(data) < _LENGTH:
            return None
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
        return bytes(data[_LENGTH:end]) if len(data) >= end else None

    def _deliver(self, answer: bytes) -> None:
        if not self.open:
            return
        self._pending -= 1
        self._output += len(answer).to_bytes(_LENGTH, "big") + answer
        self._flush()

    def _flush(self) -> None:
        if self._output:
            try:
                sent = self._sock.send(self._output)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._server.ended(self, at_once=True)
                return
            del self._output[:sent]
        if not self._output and not self._pending and self._server.is_leaving(self):
            self._server.ended(self, at_once=True)
            return
        self._arm()

    def _arm(self) -> None:
        if not self.open:
            return
        room = self._has_room() and not self._resting
        events = (READ if room and not self._server.is_leaving(self) else 0) | (WRITE if self._output else 0)
        if events != self._events:
            self._events = events
            self._server.change(self._sock, events)
            if room and self._input:
                self._server.later(self._work)

    def shut(self, lane: Lane) -> None:
        """Close it; what was not sent is lost."""
        self.open = False
        lane.dropped(self._sock.fileno())
        self._sock.close()


class TcpServer:
    """All connections of one listener. `stats` gets `tcp_connections` and `tcp_turned_away`; `budget` is the service's,
    and `port_of` tells the port of a connection, if anything does."""

    def __init__(
        self,
        lane: Lane,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        handler: Handler,
        stats: Counter[str],
        *,
        budget: Budget,
        port_of: Callable[[socket.socket], int] | None = None,
    ) -> None:
        self.handler = handler
        self.budget = budget
        self._port_of = port_of
        self.now = loop.time
        self._lane = lane
        self._loop = loop
        self._listener = listener
        self._stats = stats
        self._connections: dict[Connection, None] = {}
        self._leaving: set[Connection] = set()
        self._clients: Counter[bytes] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._told = False
        listener.setblocking(False)
        lane.watch(listener.fileno(), READ, self._on_listener)

    def __len__(self) -> int:
        return len(self._connections)

    def later(self, work: Callable[[], None], seconds: float = 0.0) -> None:
        """Run `work` in the loop's next turn, or after a while."""
        if seconds:
            self._loop.call_later(seconds, work)
        else:
            self._loop.call_soon(work)

    def change(self, sock: socket.socket, events: int) -> None:
        """Wait for other events of a connection."""
        self._lane.change(sock.fileno(), events)

    def is_leaving(self, connection: Connection) -> bool:
        """The client has sent its last question and waits for answers."""
        return connection in self._leaving

    def ended(self, connection: Connection, *, at_once: bool) -> None:
        """The client has closed its side, or all of it."""
        if not at_once:
            self._leaving.add(connection)
            return
        connection.shut(self._lane)
        del self._connections[connection]
        self._leaving.discard(connection)
        self._clients[connection.client] -= 1
        if not self._clients[connection.client]:
            del self._clients[connection.client]

    def close(self) -> None:
        """Close the listener and all connections."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._connections):
            self.ended(connection, at_once=True)
        self._lane.forget(self._listener.fileno())
        self._listener.close()

    def _on_listener(self, _mask: int) -> None:
        if self._listener.fileno() < 0:
            return
        for _ in range(_ACCEPTS):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                # No descriptors: without a pause the waiting connection would keep the loop busy.
                self._tell(f"a DNS connection cannot be accepted: {error.strerror}")
                self._lane.change(self._listener.fileno(), 0)
                self._arm()
                return
            client = self._port_of(sock).to_bytes(4) if self._port_of is not None else address[0].encode()
            if len(self._connections) >= MAX_CONNECTIONS or self._clients[client] >= MAX_PER_CLIENT:
                self._stats["tcp_turned_away"] += 1
                self._tell(f"{len(self._connections)} DNS connections are open; one more of {address[0]} is closed")
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, sock, client, self.now())
            self._connections[connection] = None
            self._clients[client] += 1
            self._stats["tcp_connections"] += 1
            self._lane.watch(sock.fileno(), READ, connection.on_event)
            self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(_EVERY, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        self._lane.change(self._listener.fileno(), READ)
        limit = self.now() - IDLE
        for connection in [one for one in self._connections if one.last < limit]:
            self.ended(connection, at_once=True)
        if self._connections:
            self._arm()
        else:
            self._told = False

    def _tell(self, message: str) -> None:
        if not self._told:
            self._told = True
            log.warning("%s", message)
