"""Answers from upstream, kept as the octets they came in.

An entry is found by what decides the answer (`Query.key`: name in lower case, type, class, the flags RD, AD, CD, and
whether and how EDNS was used). It holds the message, the places of the TTLs in it, and the second in which it ends.
Read again, its TTLs are lowered by its age (RFC 1035 section 7.3), once a second at the most; the id and the question
are written over with the asker's, so that a resolver which mixes upper and lower case to be sure of its answer
(draft-vixie-dnsext-dns0x20) gets back what it sent.

Negative answers are kept as RFC 2308 says, at most MAX_NEGATIVE; failures are not kept at all, since the next question
may find the network repaired. The cache is bounded in entries and in octets; what was not read for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from openvmnet.wire import dns

if TYPE_CHECKING:
    from openvmnet.wire.dns import Query, Response

MAX_TTL = 86_400  # s; RFC 8767 section 4 suggests days at the most
MAX_NEGATIVE = 3600  # s; RFC 2308 section 5 suggests one to three hours
MAX_MESSAGE = 4096  # octets
_OVERHEAD = 400  # octets of an entry beside its message, about


class Entry:
    """One answer; `stored` and `expires` are seconds of the service's clock."""

    __slots__ = ("_aged", "_aged_at", "_message", "_ttls", "expires", "size", "stored")

    def __init__(self, message: bytes, response: Response, now: int, lifetime: int) -> None:
        self.stored = now
        self.expires = now + lifetime
        self.size = len(message) + 8 * len(response.ttls) + _OVERHEAD
        self._message = message
        self._ttls = response.ttls
        self._aged = message
        self._aged_at = now

    def answer(self, query: Query, now: int) -> bytes:
        """The whole message for `query`, as of second `now`."""
        if now != self._aged_at:
            self._aged = dns.age(self._message, self._ttls, now - self.stored)
            self._aged_at = now
        return readdress(self._aged, query)


class Cache:
    """At most `entries` answers of `octets` together."""

    def __init__(self, entries: int = 8192, octets: int = 6 << 20) -> None:
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._limit = entries
        self._room = octets
        self._used = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def octets(self) -> int:
        """The memory that the entries take, about."""
        return self._used

    def get(self, key: bytes, now: int) -> Entry | None:
        """The entry of `key` if it still holds."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires <= now:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry

    def put(self, key: bytes, message: bytes, response: Response, now: int) -> Entry | None:
        """Keep `message`, which parsed as `response`; None if it may not be kept or is too large."""
        negative = response.rcode == dns.NXDOMAIN or not int.from_bytes(message[6:8], "big")
        lifetime = min(response.lifetime, MAX_NEGATIVE if negative else MAX_TTL)
        if lifetime <= 0 or len(message) > MAX_MESSAGE:
            return None
        if key in self._entries:
            self._drop(key)
        entry = self._entries[key] = Entry(message, response, now, lifetime)
        self._used += entry.size
        while len(self._entries) > self._limit or self._used > self._room:
            self._drop(next(iter(self._entries)))
        return entry

    def clear(self) -> None:
        """Forget everything: the resolvers have changed, and with them perhaps what is true."""
        self._entries.clear()
        self._used = 0

    def _drop(self, key: bytes) -> None:
        self._used -= self._entries.pop(key).size


def readdress(message: bytes, query: Query) -> bytes:
    """`message`, which answers the same question in any case, with the id and the very question of `query`."""
    end = dns.HEADER + len(query.question)
    return query.id + message[2 : dns.HEADER] + query.question + message[end:]
