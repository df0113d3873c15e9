"""The cache by itself: keys, ages, bounds."""

from __future__ import annotations

import dns.message
import dns.rrset
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service import dns_cache
from openvmnet.service.dns_cache import Cache, readdress
from openvmnet.wire import dns as wire


def query(name="www.example.com", **options) -> wire.Query:
    return wire.parse_query(dns.message.make_query(name, "A", **options).to_wire())


def put(cache, asked, now=0, ttl=100, records=1):
    name = dns.message.from_wire(wire.ask(asked, b"\0\0")).question[0].name
    message = dns.message.make_response(dns.message.from_wire(wire.ask(asked, b"\0\0")))
    message.answer.append(dns.rrset.from_text_list(name, ttl, "IN", "A", [f"192.0.2.{x}" for x in range(records)]))
    data = message.to_wire(max_size=65535)
    return cache.put(asked.key, data, wire.parse_response(data), now)


def ttl_of(data: bytes) -> int:
    return dns.message.from_wire(data).answer[0].ttl


def test_age_and_end():
    cache = Cache()
    asked = query()
    put(cache, asked, now=1000, ttl=100)
    assert [ttl_of(cache.get(asked.key, now).answer(asked, now)) for now in (1000, 1001, 1099)] == [100, 99, 1]
    assert cache.get(asked.key, 1100) is None
    assert len(cache) == 0
    assert cache.octets == 0


def test_the_answer_is_the_askers():
    cache = Cache()
    asked, other = query("www.example.com", id=1), query("WWW.Example.Com", id=0xBEEF)
    put(cache, asked)
    answer = cache.get(other.key, 0).answer(other, 0)
    assert answer[:2] == b"\xbe\xef"
    assert answer[12 : 12 + len(other.question)] == other.question
    assert readdress(answer, asked) == cache.get(asked.key, 0).answer(asked, 0)


def test_ttl_bounds():
    cache = Cache()
    assert put(cache, query("a"), ttl=0) is None
    entry = put(cache, query("b"), ttl=0x7FFFFFFF)
    assert entry.expires == dns_cache.MAX_TTL
    big = query("c", use_edns=0)
    assert put(cache, big, records=256) is None  # 4 kB and more


def test_least_recently_read_goes_first():
    cache = Cache(entries=3)
    names = [query(f"n{x}") for x in range(4)]
    for one in names[:3]:
        put(cache, one)
    assert cache.get(names[0].key, 0)
    put(cache, names[3])
    assert [cache.get(one.key, 0) is not None for one in names] == [True, False, True, True]


def test_replaced_and_cleared():
    cache = Cache()
    put(cache, query(), ttl=10)
    size = cache.octets
    put(cache, query(), ttl=20)
    assert (len(cache), cache.octets) == (1, size)
    cache.clear()
    assert (len(cache), cache.octets) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100), st.integers(1, 200)), max_size=200))
def test_bounds_hold(operations):
    cache = Cache(entries=10, octets=8000)
    for now, (number, records, ttl) in enumerate(operations):
        put(cache, query(f"n{number}"), now, ttl, records)
        assert len(cache) <= 10
        assert 0 <= cache.octets <= 8000
        entry = cache.get(query(f"n{(number * 7) % 31}").key, now)
        assert entry is None or entry.expires > now
    assert (cache.octets == 0) == (len(cache) == 0)
