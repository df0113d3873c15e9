"""The name server on the gateway's address.

Most questions have been asked before, octet for octet: resolvers build their queries always alike. So what a query is
looked up by first is itself, all of it but the two octets of its id, and what is found is the answer without its id:

    recvmmsg     up to 64 queries, each in its slot
    per query    octets behind the id -> dict -> octets of the answer, written into the same slot
    sendmmsg     back to where the kernel says each query came from

An answer in this *hot* table is good for the present second and the present generation of the local names; together
they are one number, the stamp. An entry with an older stamp is renewed when it is asked for: a forwarded answer gets
its TTLs lowered, a local one is made anew if names have changed since. A query that the table does not know takes the
long way: parse, zone, cache, forwarder.

Long way: what is no query gets FORMERR or silence, what we do not do NOTIMP or REFUSED, a name that is ours the zone's
answer, the rest what the cache has or the host's resolvers say. An answer larger than the client takes by UDP is
replaced by an empty one with the TC flag, and so is any answer to "all there is of this name" (ANY, RFC 8482), which by
UDP would serve to send large answers to a forged address.

Who asks for names without end is stopped by budget, and told apart by port, for which the firewall's mark stands: an
address may be made up. While somebody is over the budget the socket is read at most every REST, so that it is not the
reading of what is dropped that takes the time.

The answers that come from upstream are theirs, octet for octet, but for the id and the upper and lower case of the
question. One query never gets more than one answer.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

from openvmnet.budget import Budget
from openvmnet.errors import Malformed
from openvmnet.kernel.loop import READ
from openvmnet.kernel.mmsg import Batch
from openvmnet.service.dns_cache import Cache, Entry, readdress
from openvmnet.service.dns_forward import Forwarder, Waiter
from openvmnet.service.dns_tcp import TcpServer
from openvmnet.service.dns_upstream import Resolvers
from openvmnet.wire import dns

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from openvmnet.kernel.loop import Lane
    from openvmnet.service.dns_zone import Zone
    from openvmnet.wire.dns import Query

log = logging.getLogger(__name__)

boottime = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)

# Of the thread's time, for one guest's questions on the long way: some 600 new names a second, and as many at once, as
# a browser that opens a session asks for. The answers, and the host's resolver, cost about as much again each.
SHARE, BURST = 0.05, 10
REST = 0.002  # s
FORWARDED_BY_TCP = 0.0003  # s of the thread's time, for the connection that it takes and all that follows
_BATCH = 64  # queries
_SLOT = 4096  # octets; a longer query is cut, and then malformed
_HOT_ENTRIES = 8192
_SOCKADDR_IN = 16  # octets of IPv4's struct sockaddr
_HOT_QUERY = 300  # octets of the longest query that is kept: a name and an OPT record have room
_RECEIVE_BUFFER = 1 << 20  # octets
_NO_TRANSFER = frozenset({dns.OPT, 249, 250, dns.IXFR, dns.AXFR})  # 249 and 250: TKEY and TSIG (RFC 8945)

STATS = (
    "queries",
    "hot",
    "local",
    "cached",
    "forwarded",
    "coalesced",
    "servfail",
    "formerr",
    "refused",
    "ignored",
    "dropped",
    "over_budget",
    "unsent",
    "truncated",
    "mismatched",
    "upstream_timeouts",
    "upstream_refused",
    "tcp_connections",
    "tcp_turned_away",
    "failed",
)


class _Hot:
    """An answer in the hot table: `tail` is all of it but the id."""

    __slots__ = ("entry", "generation", "query", "second", "stamp", "tail")

    def __init__(self, query: Query, entry: Entry | None) -> None:
        self.query = query
        self.entry = entry
        self.tail = b""
        self.stamp = 0
        self.second = 0
        self.generation = 0


class DnsService:
    """Answers on `udp_sock` and `tcp_listener`, and the same two of IPv6, bound and from then on its own.

    `resolv_conf` names the host's resolvers, which are asked on `upstream_port`; without `forwards` nobody is asked,
    and what is not the zone's is refused. `port_of()` tells an accepted connection's port by its mark, 0 where that is
    not known; without it, connections are told apart by address. `clock` counts seconds, also those that the host
    sleeps."""

    def __init__(
        self,
        lane: Lane,
        udp_sock: socket.socket,
        tcp_listener: socket.socket,
        *,
        zone: Zone,
        resolv_conf: Path = Path("/etc/resolv.conf"),
        upstream_port: int = 53,
        forwards: bool = True,
        sockets6: tuple[socket.socket, socket.socket] | None = None,
        port_of: Callable[[socket.socket], int] | None = None,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.stats: Counter[str] = Counter(dict.fromkeys(STATS, 0))
        self._lane = lane
        self._udp = udp_sock
        self._udp6 = sockets6[0] if sockets6 is not None else udp_sock
        self._listeners = [tcp_listener, *([sockets6[1]] if sockets6 is not None else [])]
        self._zone = zone
        self._forwards = forwards
        self._port_of = port_of
        self._clock = clock
        self._resolvers = Resolvers(resolv_conf, upstream_port)
        self._cache = Cache()
        self._hot: dict[bytes, _Hot] = {}
        self._batch = Batch(_BATCH, _SLOT, names=True, marks=True)
        self._late = Batch(1, dns.MAX_UDP, names=True)
        # A slice of a mapping is a bytes object at once, a slice of a memoryview takes two steps to it.
        self._data = cast("mmap.mmap", self._batch.data.obj)
        self.budget = Budget(SHARE, BURST)
        self._stamp = 0
        self._second = -1
        self._generation = -1

    def start(self) -> None:
        """Begin to answer; the event loop runs."""
        loop = self._loop = asyncio.get_running_loop()
        self._forwarder = Forwarder(self._lane, loop, self._resolvers, self._cache, self.stats, self._clock)
        self._tcp = [
            TcpServer(self._lane, loop, one, self._answer_tcp, self.stats, budget=self.budget, port_of=self._port_of)
            for one in self._listeners
        ]
        for sock in {self._udp, self._udp6}:
            sock.setblocking(False)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < _RECEIVE_BUFFER:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._lane.watch(sock.fileno(), READ, functools.partial(self._on_udp, sock.fileno()))

    def close(self) -> None:
        """Stop answering and close the sockets."""
        for sock in {self._udp, self._udp6}:
            self._lane.forget(sock.fileno())
            sock.close()
        for server in self._tcp:
            server.close()
        self._forwarder.close()

    def _on_udp(self, fd: int, _mask: int) -> None:
        batch = self._batch
        try:
            count = batch.recv(fd)
        except OSError:  # an ICMP error about an answer, or a spurious call: the next call tells
            return
        self._tick()
        data, lengths, get, stamp = self._data, batch.lengths, self._hot.get, self._stamp
        dropped = self.stats["over_budget"]
        unanswered: list[int] = []
        missed = 0
        at = 0
        for i, length in enumerate(batch.received[:count].tolist()):
            hot = get(data[at + 2 : at + length])
            if hot is not None and (hot.stamp == stamp or self._renew(hot)):
                tail = hot.tail
                size = len(tail) + 2
                data[at + 2 : at + size] = tail
                lengths[i] = size
            else:
                missed += 1
                answer = self._within_budget(data[at : at + length], i, missed)
                if answer is None:
                    unanswered.append(i)
                else:
                    size = len(answer)
                    data[at : at + size] = answer
                    lengths[i] = size
            at += _SLOT
        stats = self.stats
        stats["queries"] += count
        stats["hot"] += count - missed
        if stats["over_budget"] > dropped:
            self._lane.rest(fd, REST)
        if not unanswered:
            self._send(fd, 0, count)
            return
        start = 0
        for i in (*unanswered, count):
            if i > start:
                self._send(fd, start, i)
            start = i + 1

    def _send(self, fd: int, start: int, end: int) -> None:
        """Send the messages from `start` up to `end`, and leave out those that the kernel does not take."""
        while start < end:
            try:
                sent = self._batch.send(fd, end - start, start)
            except OSError:  # no route back to this one client
                sent = 0
            if not sent:
                self.stats["unsent"] += 1
                sent = 1
            start += sent

    def _tick(self) -> None:
        """Notice that a second has passed or names have changed: the stamp of fresh answers is another one then."""
        second = int(self._clock())
        generation = self._zone.generation()
        if second == self._second and generation == self._generation:
            return
        self._stamp += 1
        self._second = second
        self._generation = generation
        if self._resolvers.check(self._loop.time()):
            self._cache.clear()
            self._hot.clear()

    def _renew(self, hot: _Hot) -> bool:
        """Make an entry with an older stamp good for now; False if it has ended, or names have changed."""
        if hot.entry is None:
            if hot.generation != self._generation:
                return False
        elif hot.second != self._second:
            if hot.entry.expires <= self._second:
                return False
            hot.tail = self._fit(hot.query, hot.entry.answer(hot.query, self._second))[2:]
            hot.second = self._second
        hot.stamp = self._stamp
        return True

    def _within_budget(self, packet: bytes, index: int, missed: int) -> bytes | None:
        """The long way, as far as the asker's share of the thread goes: a guest that asks for names without end is
        not to slow the others. What is over it gets silence, as a packet lost on the way."""
        budget = self.budget
        if missed == 1:
            budget.begin()
        asker = self._asker(index)
        owner = int.from_bytes(asker)
        if not budget.allows(owner):
            self.stats["over_budget"] += 1
            return None
        answer = self._answer_udp(packet, index, asker)
        budget.charge(owner)
        return answer

    def _asker(self, index: int) -> bytes:
        """Who sent message `index`: its port, or its address where the kernel does not tell the port."""
        mark = self._batch.mark(index)
        return mark.to_bytes(4) if mark else _host(self._batch.name(index))

    def _answer_udp(self, packet: bytes, index: int, asker: bytes) -> bytes | None:
        """The long way for message `index` of the batch, which `asker` has sent. None for no answer, or none yet."""
        answer = self._answer(packet, tcp=False)
        if isinstance(answer, dns.Query):
            name = self._batch.name(index)
            deliver = functools.partial(self._deliver_udp, name, answer)
            self._forwarder.ask(Waiter(answer, asker, name, deliver), tcp=False)
            return None
        return answer

    def _answer_tcp(self, packet: bytes, client: bytes, deliver: Callable[[bytes], None]) -> bytes | None:
        self._tick()
        self.stats["queries"] += 1
        answer = self._answer(packet, tcp=True)
        if isinstance(answer, dns.Query):
            query = answer
            waiter = Waiter(query, client, b"", lambda message: deliver(readdress(message, query)))
            if not self._forwarder.ask(waiter, tcp=True):
                return dns.build(query, dns.SERVFAIL)
            self.budget.spend(int.from_bytes(client), FORWARDED_BY_TCP)
            return None
        return answer or b""

    def _answer(self, packet: bytes, *, tcp: bool) -> Query | bytes | None:
        """The answer, or None for silence, or the query if it has to be forwarded."""
        try:
            query = self._accept(packet)
            if not isinstance(query, dns.Query):
                return query
            local = self._zone.respond(query)
            entry = self._cache.get(query.key, self._second) if local is None else None
            if local is not None:
                self.stats["local"] += 1
                answer = local
            elif query.type == dns.ANY and not tcp:
                return dns.truncate(dns.build(query), query)
            elif entry is not None:
                self.stats["cached"] += 1
                answer = entry.answer(query, self._second)
            elif self._forwards:
                return query
            else:
                self.stats["refused"] += 1
                answer = dns.build(query, dns.REFUSED)
            if tcp:
                return answer
            answer = self._fit(query, answer)
            if len(packet) <= _HOT_QUERY and (local is None or answer[3] & 15 == dns.NOERROR):
                # Local names that do not exist stay out: there is no end of them, and they are made quickly.
                self._heat(packet[2:], query, entry, answer)
        except Exception:  # a mistake of ours, met by one query, ends neither the service nor the guest's patience
            self.stats["failed"] += 1
            if self.stats["failed"] == 1:
                log.exception("the DNS query %s failed; further failures are only counted", packet[:300].hex())
            return dns.refuse(packet, dns.SERVFAIL)
        return answer

    def _accept(self, packet: bytes) -> Query | bytes | None:
        """The query, or the answer that turns it down, or None for silence."""
        if len(packet) >= dns.HEADER and packet[2] & 0x78 and not packet[2] & 0x80:
            self.stats["refused"] += 1
            return dns.refuse(packet, dns.NOTIMP)
        try:
            query = dns.parse_query(packet)
        except Malformed:
            answer = dns.refuse(packet, dns.FORMERR)
            self.stats["ignored" if answer is None else "formerr"] += 1
            return answer
        rcode = dns.NOERROR
        if query.edns is not None and query.edns.version:
            rcode = dns.BADVERS
        elif query.klass != dns.IN or query.type in _NO_TRANSFER:
            rcode = dns.REFUSED
        if rcode:
            self.stats["refused"] += 1
            return dns.build(query, rcode)
        return query

    def _heat(self, key: bytes, query: Query, entry: Entry | None, answer: bytes) -> None:
        """Keep the answer to this very packet in the hot table."""
        if len(self._hot) >= _HOT_ENTRIES:
            self._hot.clear()  # cheap to fill again; an order of use would cost every hit something
        hot = self._hot[key] = _Hot(query, entry)
        hot.tail = answer[2:]
        hot.stamp, hot.second, hot.generation = self._stamp, self._second, self._generation

    def _fit(self, query: Query, answer: bytes) -> bytes:
        """`answer`, or in its place one that says it is too long for this client's UDP."""
        if len(answer) <= query.limit:
            return answer
        self.stats["truncated"] += 1
        return dns.truncate(answer, query)

    def _deliver_udp(self, name: bytes, query: Query, message: bytes) -> None:
        late = self._late
        late.set_payload(0, self._fit(query, readdress(message, query)))
        late.set_name(0, name)
        try:
            sent = late.send((self._udp if len(name) == _SOCKADDR_IN else self._udp6).fileno(), 1)
        except OSError:
            sent = 0
        if not sent:
            self.stats["unsent"] += 1


def _host(name: bytes) -> bytes:
    """The address in a raw struct sockaddr_in or sockaddr_in6, without the port."""
    return name[4:8] if len(name) == _SOCKADDR_IN else name[8:24]
