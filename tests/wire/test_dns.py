"""DNS messages: reading queries, building answers, measuring other servers' answers."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.errors import Malformed
from openvmnet.wire import dns

NAME = b"\3wWw\7Example\3com\0"
OPT = b"\0" + struct.pack("!HHIH", dns.OPT, 4096, 0, 0)


def message(
    question=NAME + b"\0\1\0\1", flags=dns.RD, answers=b"", authority=b"", additional=b"", counts=(1, 0, 0, 0)
) -> bytes:
    return struct.pack("!HHHHHH", 0xABCD, flags, *counts) + question + answers + authority + additional


def record(kind, ttl, data, name=b"\xc0\x0c") -> bytes:
    return name + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def response(answers=(), authority=(), additional=(), flags=dns.QR | dns.RD | dns.RA) -> bytes:
    return message(
        flags=flags,
        answers=b"".join(answers),
        authority=b"".join(authority),
        additional=b"".join(additional),
        counts=(1, len(answers), len(authority), len(additional)),
    )


SOA = dns.soa(b"\2ns\0", b"\4post\0", 7, 60)


class TestQuery:
    def test_parts(self):
        query = dns.parse_query(message(additional=OPT, counts=(1, 0, 0, 1)))
        assert query.id == b"\xab\xcd"
        assert query.question == NAME + b"\0\1\0\1"
        assert query.name == NAME.lower()
        assert (query.type, query.klass, query.opcode) == (dns.A, dns.IN, 0)
        assert query.edns == dns.Edns(4096, 0, dnssec_ok=False)

    @pytest.mark.parametrize(
        ("size", "limit"), [(None, 512), (0, 512), (511, 512), (1000, 1000), (1232, 1232), (65535, 1232)]
    )
    def test_limit(self, size, limit):
        opt = b"" if size is None else b"\0" + struct.pack("!HHIH", dns.OPT, size, 0, 0)
        assert dns.parse_query(message(additional=opt, counts=(1, 0, 0, int(bool(opt))))).limit == limit

    def test_edns_flags_and_version(self):
        opt = b"\0" + struct.pack("!HHIH", dns.OPT, 1232, 0x00058000, 4) + b"\0\x0a\0\0"
        edns = dns.parse_query(message(additional=opt, counts=(1, 0, 0, 1))).edns
        assert edns == dns.Edns(1232, 5, dnssec_ok=True)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            message()[:11],
            message()[:-1],
            message()[:-4],
            message(flags=dns.QR),
            message(counts=(0, 0, 0, 0)),
            message(counts=(2, 0, 0, 0)),
            message(counts=(1, 0, 0, 1)),
            message(additional=OPT[:-1], counts=(1, 0, 0, 1)),
            message(additional=OPT + OPT, counts=(1, 0, 0, 2)),
            message(answers=OPT, counts=(1, 1, 0, 0)),
            message(additional=b"\1a" + OPT, counts=(1, 0, 0, 1)),
            message(additional=b"\0" + struct.pack("!HHIH", dns.OPT, 1232, 0, 9), counts=(1, 0, 0, 1)),
            message(question=b"\xc0\x0c\0\1\0\1"),
            message(question=b"\xc0\x00\0\1\0\1"),
            message(question=b"\3www\xc0\x04\0\1\0\1"),
            message(question=b"\x40a\0\0\1\0\1"),
            message(question=(b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1"),
        ],
    )  # fmt: skip
    def test_malformed(self, data):
        with pytest.raises(Malformed):
            dns.parse_query(data)

    def test_the_longest_name(self):
        name = (b"\x3f" + b"a" * 63) * 3 + b"\x3d" + b"b" * 61 + b"\0"
        assert len(name) == 255
        assert dns.parse_query(message(question=name + b"\0\1\0\1")).name == name

    def test_records_beside_the_opt_are_walked_over(self):
        tsig = record(250, 0, b"x" * 20)
        query = dns.parse_query(message(additional=OPT + tsig, counts=(1, 0, 0, 2)))
        assert query.edns is not None

    def test_key_ignores_case_and_what_concerns_one_hop(self):
        plain = dns.parse_query(message())
        assert plain.key == dns.parse_query(message(question=NAME.upper() + b"\0\1\0\1")).key
        other_size = b"\0" + struct.pack("!HHIH", dns.OPT, 512, 0, 5) + b"\0\x0a\0\1x"
        with_opt = dns.parse_query(message(additional=OPT, counts=(1, 0, 0, 1)))
        assert with_opt.key == dns.parse_query(message(additional=other_size, counts=(1, 0, 0, 1))).key

    def test_key_differs_where_the_answer_may(self):
        do = b"\0" + struct.pack("!HHIH", dns.OPT, 1232, 0x8000, 0)
        queries = [
            message(),
            message(question=NAME + b"\0\x1c\0\1"),
            message(question=NAME + b"\0\1\0\3"),
            message(question=b"\0\0\1\0\1"),
            message(flags=0),
            message(flags=dns.RD | dns.CD),
            message(flags=dns.RD | dns.AD),
            message(additional=OPT, counts=(1, 0, 0, 1)),
            message(additional=do, counts=(1, 0, 0, 1)),
        ]
        assert len({dns.parse_query(query).key for query in queries}) == len(queries)


class TestNames:
    @given(
        st.lists(st.text("abcxyz019-_", min_size=1, max_size=63), max_size=6).filter(lambda x: sum(map(len, x)) < 240)
    )
    def test_round_trip(self, labels):
        wire = dns.encode_name(".".join(labels))
        assert dns.labels(wire) == [label.encode() for label in labels]
        assert dns.read_name(b"junk" + wire + b"more", 4) == (wire, 4 + len(wire))

    @pytest.mark.parametrize("text", ["a..b", ".a", "é.com", "a" * 64, ".".join(["a" * 50] * 5 + ["b"])])
    def test_not_a_name(self, text):
        with pytest.raises(Malformed):
            dns.encode_name(text)

    def test_lower_case(self):
        assert dns.encode_name("WWW.Example.COM.") == NAME.lower()

    def test_pointers(self):
        data = b"\3com\0" + b"\7example\xc0\x00" + b"\3www\xc0\x05"
        assert dns.read_name(data, 15) == (b"\3www\7example\3com\0", 21)

    @pytest.mark.parametrize(
        ("data", "at"),
        [
            (b"\xc0\x00", 0),
            (b"\1a\xc0\x00", 0),
            (b"\1a\xc0\x00", 2),
            (b"\xc0\x02\xc0\x00", 0),
            (b"\xc0\x02\xc0\x00", 2),
            (b"\1a\xc0", 0),
            (b"\x80", 0),
            (b"\3ab", 0),
            (b"", 0),
        ],
    )
    def test_loops_and_tears(self, data, at):
        with pytest.raises(Malformed):
            dns.read_name(data, at)

    def test_a_chain_of_pointers_ends(self):
        data = b"\0" + b"".join((0xC000 | max(0, at - 2)).to_bytes(2, "big") for at in range(1, 8001, 2))
        assert dns.read_name(data[:1] + b"\xc0\x00" + data[3:], 1) == (b"\0", 3)


class TestAnswers:
    query = dns.parse_query(message(flags=dns.RD | dns.CD, additional=OPT, counts=(1, 0, 0, 1)))

    def test_upstream_query_has_our_own_opt(self):
        cookie = b"\0" + struct.pack("!HHIH", dns.OPT, 4096, 0x8000, 12) + b"\0\x0a\0\x08cookiecc"
        query = dns.parse_query(message(additional=cookie, counts=(1, 0, 0, 1), flags=dns.RD | dns.AD))
        sent = dns.ask(query, b"\1\2")
        again = dns.parse_query(sent)
        assert sent[:2] == b"\1\2"
        assert again.question == query.question
        assert again.flags == dns.RD | dns.AD
        assert again.edns == dns.Edns(dns.MAX_UDP, 0, dnssec_ok=True)
        assert b"cookiecc" not in sent

    def test_upstream_query_without_edns(self):
        assert dns.parse_query(dns.ask(dns.parse_query(message()), b"\0\0")).edns is None

    def test_extended_rcode(self):
        answer = dns.build(self.query, dns.BADVERS)
        assert answer[3] & 15 == 0
        assert answer[-6:-2] == bytes((1, 0, 0, 0))

    def test_refuse(self):
        answer = dns.refuse(message(flags=0x2800 | dns.RD), dns.NOTIMP)
        assert answer is not None
        assert answer[:2] == b"\xab\xcd"
        assert int.from_bytes(answer[2:4], "big") == dns.QR | 0x2800 | dns.RD | dns.RA | dns.NOTIMP
        assert answer[4:] == bytes(8)

    @pytest.mark.parametrize("data", [b"", message()[:11], response()])
    def test_silence(self, data):
        assert dns.refuse(data, dns.FORMERR) is None

    def test_truncate(self):
        whole = dns.build(self.query, answers=[dns.Record(self.query.name, dns.TXT, 5, b"x" * 2000)])
        short = dns.truncate(whole, self.query)
        parsed = dns.parse_response(short)
        assert parsed.truncated
        assert parsed.question == self.query.question
        assert len(short) <= 512
        assert short[-11:-8] == OPT[:3]


class TestResponse:
    def test_ttls_are_where_they_are(self):
        data = response(
            [record(dns.CNAME, 300, b"\1x\xc0\x10"), record(dns.A, 60, b"abcd")],
            [record(dns.NS, 900, b"\2ns\xc0\x10")],
            [record(dns.A, 1000, b"efgh"), OPT],
        )
        parsed = dns.parse_response(data)
        assert [int.from_bytes(data[at : at + 4], "big") for at in parsed.ttls] == [300, 60, 900, 1000]
        assert parsed.lifetime == 60
        assert parsed.question == NAME + b"\0\1\0\1"

    @pytest.mark.parametrize(
        ("data", "lifetime"),
        [
            (response([record(dns.A, 0, b"abcd")]), 0),
            (response([record(dns.A, 0x80000000, b"abcd")]), 0),
            (response([record(dns.A, 5, b"abcd")], flags=dns.QR | dns.TC), 0),
            (response([record(dns.A, 5, b"abcd")], flags=dns.QR | dns.SERVFAIL), 0),
            (response(authority=[record(dns.SOA, 900, SOA)]), 60),
            (response(authority=[record(dns.SOA, 30, SOA)]), 30),
            (response(authority=[record(dns.SOA, 900, SOA)], flags=dns.QR | dns.NXDOMAIN), 60),
            (response(authority=[record(dns.SOA, 900, b"short")], flags=dns.QR | dns.NXDOMAIN), 0),
            (response(flags=dns.QR | dns.NXDOMAIN), 0),
            (response(authority=[record(dns.NS, 900, b"\0")]), 0),
            (response([record(dns.CNAME, 300, b"\0")], [record(dns.SOA, 900, SOA)]), 60),
            (response([record(dns.CNAME, 20, b"\0")], [record(dns.SOA, 900, SOA)]), 20),
            (response([record(dns.CNAME, 20, b"\0")]), 0),
            (response(additional=[OPT]), 0),
        ],
    )
    def test_lifetime(self, data, lifetime):
        assert dns.parse_response(data).lifetime == lifetime

    def test_a_failure_without_a_question(self):
        parsed = dns.parse_response(message(question=b"", flags=dns.QR | dns.FORMERR, counts=(0, 0, 0, 0)))
        assert parsed.question == b""
        assert parsed.rcode == dns.FORMERR

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            message(),
            message(question=b"", flags=dns.QR, counts=(0, 0, 0, 0)),
            message(flags=dns.QR, counts=(2, 0, 0, 0)),
            message(flags=dns.QR, counts=(1, 1, 0, 0)),
            response([record(dns.A, 5, b"abcd")])[:-1],
            response([record(dns.A, 5, b"abcd")])[:-5],
            message(flags=dns.QR, question=b"\xc0\x00\0\1\0\1"),
        ],
    )
    def test_malformed(self, data):
        with pytest.raises(Malformed):
            dns.parse_response(data)

    def test_age(self):
        data = response([record(dns.A, 300, b"abcd"), record(dns.A, 10, b"efgh"), record(dns.A, 0x80000001, b"ijkl")])
        ttls = dns.parse_response(data).ttls
        aged = dns.age(data, ttls, 20)
        assert [int.from_bytes(aged[at : at + 4], "big") for at in ttls] == [280, 0, 0]
        assert len(aged) == len(data)
        assert dns.age(data, ttls, 0) == data


@given(st.binary(max_size=300))
def test_any_octets_are_a_value_or_malformed(data):
    for parse in (dns.parse_query, dns.parse_response):
        try:
            parse(data)
        except Malformed:
            continue
    answer = dns.refuse(data, dns.FORMERR)
    assert answer is None or len(answer) == dns.HEADER


WHOLE = [
    message(),
    message(additional=OPT, counts=(1, 0, 0, 1)),
    response([record(dns.A, 9, b"abcd")] * 2, [record(dns.SOA, 9, SOA)]),
]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6),
    st.integers(0, 150),
)
def test_broken_messages_are_a_value_or_malformed(data, changes, cut):
    broken = bytearray(data)
    for at, value in changes:
        broken[at % len(broken)] = value
    broken = bytes(broken[: max(0, len(broken) - cut)])
    for parse in (dns.parse_query, dns.parse_response):
        try:
            parsed = parse(broken)
        except Malformed:
            continue
        if isinstance(parsed, dns.Query):
            assert dns.parse_response(dns.build(parsed)).question == parsed.question
            assert dns.parse_query(dns.ask(parsed, b"\0\0")).key == parsed.key
        else:
            assert len(dns.age(broken, parsed.ttls, 3)) == len(broken)
