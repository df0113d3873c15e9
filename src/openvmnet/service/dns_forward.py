"""Questions that go to the host's resolvers.

One *exchange* per question in flight, however many guests ask it: the first asker starts it, those who ask the same
meanwhile wait with it. Each attempt of an exchange is a socket of its own, connected to one server, with a random id:
the kernel chooses the port at random (about 14 bits beside the id's 16, RFC 5452), drops what comes from elsewhere, and
reports at once when the server is not there. An answer counts if id and question match; other datagrams are ignored.

When a server has not answered after RETRY seconds, the next is asked, and the earlier socket stays open, because a late
answer is as good as any. A refusal moves on at once. So does an answer that says the server could not do it (SERVFAIL,
REFUSED, NOTIMP, FORMERR), which is kept for the case that no other knows better. After ATTEMPTS time-outs, or as soon
as nobody is left to ask, the askers get that answer or SERVFAIL.

A question by TCP, which guests ask after a truncated answer, is asked by TCP of the servers in turn.

All time-outs are equally long, so they end in the order in which they began: one queue and one timer serve them all.
Guests fill three tables, each bounded: exchanges, askers in all, and askers of one guest. What exceeds them is dropped,
not refused: a client that hears nothing asks again, one that is refused gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple

from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.kernel.sockets import IP_RECVERR
from openvmnet.notice import Notice
from openvmnet.wire import dns

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.service.dns_cache import Cache
    from openvmnet.service.dns_upstream import Resolvers, Server
    from openvmnet.wire.dns import Query, Response

log = logging.getLogger(__name__)

RETRY = 1.0  # s
_TICK = 0.01  # s; timers may fire a clock's resolution early
ATTEMPTS = 4
MAX_EXCHANGES = 1024
MAX_WAITING = 4096
MAX_PER_CLIENT = 256
_TCP_EACH = 3.0  # s a server has to answer by TCP
_TCP_ALL = 8.0  # s for all servers together: less than a client's connection may idle
_LARGEST = 4096  # octets of an answer by UDP; we ask for no more than 1,232
_IPV6_RECVERR = 25  # ipv6(7), as IP_RECVERR of ip(7): "no route" and the like become errors of the socket


class Waiter(NamedTuple):
    """One asker: its question, the guest that it is, its address with its port, and where an answer goes, whatever its
    id."""

    query: Query
    client: bytes
    source: bytes
    deliver: Callable[[bytes], None]


class Exchange:
    """A question in flight."""

    __slots__ = ("attempts", "fallback", "generation", "key", "open", "query", "queue", "task", "timeouts", "waiters")

    def __init__(self, key: bytes, query: Query, generation: int) -> None:
        self.key = key
        self.query = query
        self.generation = generation
        self.waiters: list[Waiter] = []
        self.queue: deque[Server] = deque()
        self.open: list[Attempt] = []
        self.attempts = 0
        self.timeouts = 0
        self.fallback: bytes | None = None
        self.task: asyncio.Task[None] | None = None


class Attempt:
    """One query on the way to one server."""

    __slots__ = ("_forwarder", "asked", "exchange", "id", "server", "sock")

    def __init__(
        self, forwarder: Forwarder, exchange: Exchange, server: Server, sock: socket.socket, now: float
    ) -> None:
        self._forwarder = forwarder
        self.exchange = exchange
        self.server = server
        self.sock = sock
        self.id = os.urandom(2)
        self.asked = now

    def on_readable(self, _mask: int) -> None:
        """An answer, somebody's attempt at one, or the news that the server is not there."""
        if self.sock.fileno() < 0:
            return
        try:
            data = self.sock.recv(_LARGEST)
        except BlockingIOError:
            return
        except OSError:
            self._forwarder.refused(self)
            return
        self._forwarder.received(self, data)


class Forwarder:
    """All exchanges. `stats` are counters that it adds to; `loop` is the running event loop."""

    def __init__(
        self,
        lane: Lane,
        loop: asyncio.AbstractEventLoop,
        resolvers: Resolvers,
        cache: Cache,
        stats: Counter[str],
        clock: Callable[[], float],
    ) -> None:
        self._lane = lane
        self._loop = loop
        self._resolvers = resolvers
        self._cache = cache
        self._stats = stats
        self._clock = clock
        self._exchanges: dict[bytes, Exchange] = {}
        self._clients: Counter[bytes] = Counter()
        self._waiting = 0
        self._timeouts: deque[tuple[float, Exchange, int]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._full = Notice(log)

    def __len__(self) -> int:
        return len(self._exchanges)

    def ask(self, waiter: Waiter, *, tcp: bool) -> bool:
        """Have the question answered; `deliver` may be called before this returns. False for one over the bounds,
        which will not be."""
        key = (b"t" if tcp else b"u") + waiter.query.key
        exchange = self._exchanges.get(key)
        if exchange is not None and any(
            one.source == waiter.source and one.query.id == waiter.query.id for one in exchange.waiters
        ):
            return True  # the same query sent again: it has its answer coming
        full = exchange is None and len(self._exchanges) >= MAX_EXCHANGES
        if full or self._waiting >= MAX_WAITING or self._clients[waiter.client] >= MAX_PER_CLIENT:
            self._overflow()
            return False
        self._clients[waiter.client] += 1
        self._waiting += 1
        if exchange is not None:
            exchange.waiters.append(waiter)
            self._stats["coalesced"] += 1
            return True
        self._stats["forwarded"] += 1
        exchange = self._exchanges[key] = Exchange(key, waiter.query, self._resolvers.generation)
        exchange.waiters.append(waiter)
        if tcp:
            exchange.task = self._loop.create_task(self._by_tcp(exchange))
            return True
        servers, together = self._resolvers.order(self._loop.time())
        exchange.queue.extend(servers * (ATTEMPTS if len(servers) == 1 else 2))
        self._try_next(exchange)
        if together and len(servers) > 1 and not self._is_over(exchange):
            self._try_next(exchange)
        return True

    def received(self, attempt: Attempt, data: bytes) -> None:
        """A datagram on an attempt's socket."""
        exchange = attempt.exchange
        response = self._match(attempt.id, exchange.query, data)
        if response is None:
            self._stats["mismatched"] += 1
            return
        attempt.server.heard(self._loop.time())
        if self._is_over(exchange):
            self._close_attempt(attempt)
            return
        if response.rcode in dns.FAILURES:
            exchange.fallback = _whole(exchange.query, data, response)
            self._give_up_on(attempt)
            return
        self._keep(exchange, data, response)
        self._finish(exchange, data)

    def refused(self, attempt: Attempt) -> None:
        """The attempt's server is not there."""
        self._stats["upstream_refused"] += 1
        if attempt.server.probing:
            attempt.server.silent(attempt.asked, self._loop.time())
        self._give_up_on(attempt)

    def close(self) -> None:
        """End all exchanges without an answer."""
        if self._timer is not None:
            self._timer.cancel()
        for exchange in list(self._exchanges.values()):
            exchange.waiters.clear()
            if exchange.task is not None:
                exchange.task.cancel()
            self._finish(exchange, b"")
        for _, exchange, _ in self._timeouts:
            for attempt in exchange.open[:]:
                self._close_attempt(attempt)
        self._timeouts.clear()

    def _try_next(self, exchange: Exchange) -> None:
        """Send to the next server that can be sent to; with nobody left and nothing on the way, it is over."""
        now = self._loop.time()
        while exchange.queue:
            server = exchange.queue.popleft()
            attempt = self._send(exchange, server, now)
            if attempt is not None:
                exchange.open.append(attempt)
                exchange.attempts += 1
                self._arm(now + RETRY, exchange)
                return
            self._stats["upstream_refused"] += 1
            _without(exchange, server)
        if not exchange.open:
            self._fail(exchange)

    def _send(self, exchange: Exchange, server: Server, now: float) -> Attempt | None:
        sock: socket.socket | None = None
        try:
            sock = socket.socket(server.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            if server.family == socket.AF_INET:
                sock.setsockopt(socket.SOL_IP, IP_RECVERR, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
            sock.connect(server.sockaddr)
            attempt = Attempt(self, exchange, server, sock, now)
            sock.send(dns.ask(exchange.query, attempt.id))
            self._lane.watch(sock.fileno(), READ, attempt.on_readable)
        except OSError:
            if sock is not None:
                sock.close()
            return None
        return attempt

    def _give_up_on(self, attempt: Attempt) -> None:
        exchange = attempt.exchange
        self._close_attempt(attempt)
        if not self._is_over(exchange):
            _without(exchange, attempt.server)
            self._try_next(exchange)

    def _arm(self, due: float, exchange: Exchange) -> None:
        self._timeouts.append((due, exchange, exchange.attempts))
        if self._timer is None:
            self._timer = self._loop.call_at(due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._timeouts and self._timeouts[0][0] <= now + _TICK:
            _, exchange, attempts = self._timeouts.popleft()
            if self._is_over(exchange):
                self._mark_silent(exchange, now)
                for attempt in exchange.open[:]:
                    self._close_attempt(attempt)
            elif exchange.attempts == attempts:
                self._timed_out(exchange, now)
        if self._timeouts:
            self._timer = self._loop.call_at(self._timeouts[0][0], self._on_timer)

    def _timed_out(self, exchange: Exchange, now: float) -> None:
        self._stats["upstream_timeouts"] += 1
        exchange.timeouts += 1
        self._mark_silent(exchange, now)
        if exchange.timeouts >= ATTEMPTS:
            self._fail(exchange)
            return
        if not exchange.queue:  # all were asked twice: wait for a late answer until the time is over
            self._timeouts.append((now + RETRY, exchange, exchange.attempts))
            return
        self._try_next(exchange)

    @staticmethod
    def _mark_silent(exchange: Exchange, now: float) -> None:
        for attempt in exchange.open:
            if now - attempt.asked >= RETRY - _TICK:
                attempt.server.silent(attempt.asked, now)

    async def _by_tcp(self, exchange: Exchange) -> None:
        servers = self._resolvers.ranked()
        query = exchange.query
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TCP_ALL):
                for server in servers:
                    ident = os.urandom(2)
                    try:
                        data = await _exchange_tcp(self._loop, server, dns.ask(query, ident))
                    except (OSError, TimeoutError, asyncio.IncompleteReadError):
                        self._stats["upstream_refused"] += 1
                        continue
                    response = self._match(ident, query, data)
                    if response is None:
                        self._stats["mismatched"] += 1
                    elif response.rcode in dns.FAILURES:
                        exchange.fallback = _whole(query, data, response)
                    else:
                        server.heard(self._loop.time())
                        self._keep(exchange, data, response)
                        self._finish(exchange, data)
                        return
        self._fail(exchange)

    def _match(self, ident: bytes, query: Query, data: bytes) -> Response | None:
        """What `data` says, if it is the answer to `query` under the id `ident`."""
        if data[:2] != ident:
            return None
        try:
            response = dns.parse_response(data)
        except Malformed:
            return None
        return response if response.question.lower() in {query.question.lower(), b""} else None

    def _keep(self, exchange: Exchange, data: bytes, response: Response) -> None:
        if exchange.generation == self._resolvers.generation:
            self._cache.put(exchange.query.key, data, response, int(self._clock()))

    def _fail(self, exchange: Exchange) -> None:
        if exchange.fallback is None:
            self._stats["servfail"] += len(exchange.waiters)
        self._finish(exchange, exchange.fallback or dns.build(exchange.query, dns.SERVFAIL))

    def _is_over(self, exchange: Exchange) -> bool:
        return self._exchanges.get(exchange.key) is not exchange

    def _finish(self, exchange: Exchange, message: bytes) -> None:
        del self._exchanges[exchange.key]
        for attempt in exchange.open[:]:
            if not attempt.server.probing:  # whether that one is back is still to be learnt
                self._close_attempt(attempt)
        for waiter in exchange.waiters:
            self._waiting -= 1
            self._clients[waiter.client] -= 1
            if self._clients[waiter.client] <= 0:
                del self._clients[waiter.client]
        for waiter in exchange.waiters:
            waiter.deliver(message)

    def _close_attempt(self, attempt: Attempt) -> None:
        attempt.exchange.open.remove(attempt)
        self._lane.dropped(attempt.sock.fileno())
        attempt.sock.close()

    def _overflow(self) -> None:
        self._stats["dropped"] += 1
        self._full.warn("%d DNS questions wait for an answer; more are dropped", self._waiting)


def _without(exchange: Exchange, server: Server) -> None:
    exchange.queue = deque(one for one in exchange.queue if one is not server)


def _whole(query: Query, data: bytes, response: Response) -> bytes:
    """A failure as an answer with a question, which a bare header lacks."""
    return data if response.question else dns.build(query, response.rcode)


async def _exchange_tcp(loop: asyncio.AbstractEventLoop, server: Server, message: bytes) -> bytes:
    """One query and its answer by TCP (RFC 7766), on a connection of its own."""
    sock = socket.socket(server.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    with sock:
        async with asyncio.timeout(_TCP_EACH):
            await loop.sock_connect(sock, server.sockaddr)
            await loop.sock_sendall(sock, len(message).to_bytes(2, "big") + message)
            length = int.from_bytes(await _exactly(loop, sock, 2), "big")
            return await _exactly(loop, sock, length)


async def _exactly(loop: asyncio.AbstractEventLoop, sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = await loop.sock_recv(sock, count - len(data))
        if not piece:
            raise asyncio.IncompleteReadError(data, count)
        data += piece
    return data
