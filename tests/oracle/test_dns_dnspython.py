"""DNS: dnspython reads what we build, and we read what dnspython builds."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.reversename
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.dns_zone import Zone
from openvmnet.wire import dns as wire

LABEL = st.binary(min_size=1, max_size=63)
NAMES = st.lists(LABEL, max_size=3).map(lambda labels: dns.name.Name([*labels, b""]))
LOCAL = st.sampled_from(
    [
        "vm1.vmnet.internal", "VM1.Vmnet.Internal", "none.vmnet.internal", "a.b.vmnet.internal", "vmnet.internal",
        "gateway.vmnet.internal", "1.64.168.192.in-addr.arpa", "2.64.168.192.in-addr.arpa", "9.64.168.192.in-addr.arpa",
        "64.168.192.in-addr.arpa", "168.192.in-addr.arpa", "3.2.1.10.in-addr.arpa", "1.0.0.127.in-addr.arpa",
        "localhost", "a.localhost", "printer.local", "x.onion", "b.e.f.ip6.arpa", "_dns.resolver.arpa",
    ]
)  # fmt: skip
TYPES = st.sampled_from(["A", "AAAA", "PTR", "SOA", "NS", "TXT", "MX", "ANY", "DS"])


def zone() -> Zone:
    addresses = {"vm1": IPv4Address("192.168.64.2")}
    return Zone(
        domain="vmnet.internal",
        subnet=IPv4Network("192.168.64.0/24"),
        gateway=IPv4Address("192.168.64.1"),
        forward=addresses.get,
        reverse={address: name for name, address in addresses.items()}.get,
    )


@given(
    NAMES,
    st.integers(1, 65535),
    st.integers(0, 65535),
    st.booleans(),
    st.sampled_from([None, 512, 1232, 4096]),
    st.booleans(),
)
def test_queries(name, kind, ident, recursion, payload, want_dnssec):  # fmt: skip
    message = dns.message.make_query(
        name,
        kind,
        use_edns=payload is not None,
        payload=payload or 0,
        want_dnssec=want_dnssec and payload is not None,
        id=ident,
        flags=dns.flags.RD if recursion else 0,
    )
    data = message.to_wire()
    query = wire.parse_query(data)
    assert query.id == ident.to_bytes(2, "big")
    assert query.name == name.to_wire().lower()
    assert query.type == kind
    assert bool(query.flags & wire.RD) == recursion
    if payload is None:
        assert query.edns is None
    else:
        assert query.edns == wire.Edns(payload, 0, want_dnssec)
    again = dns.message.from_wire(wire.ask(query, b"\x12\x34"))
    assert again.question == message.question
    assert again.flags == message.flags
    assert again.edns == message.edns
    assert again.ednsflags == message.ednsflags


@given(LOCAL, TYPES, st.sampled_from([None, 512, 1232]))
def test_zone_answers(name, kind, payload):
    message = dns.message.make_query(name, kind, use_edns=payload is not None, payload=payload or 0)
    query = wire.parse_query(message.to_wire())
    said = zone().answer(query)
    data = zone().respond(query)
    assert said is not None
    assert data is not None
    answer = dns.message.from_wire(data)  # raises on trailing octets and on any torn record
    assert message.is_response(answer)
    assert answer.rcode() == said.rcode
    assert answer.flags & dns.flags.AA
    assert answer.flags & dns.flags.RA
    assert (answer.edns >= 0) == (payload is not None)
    if answer.answer:
        assert not answer.authority
        assert all(rrset.name == message.question[0].name for rrset in answer.answer)
    else:
        (soa,) = answer.authority
        assert soa.rdtype == dns.rdatatype.SOA
        assert message.question[0].name.is_subdomain(soa.name)
        assert wire.parse_response(data).lifetime == min(soa.ttl, soa[0].minimum) > 0


@given(st.integers(0, 16), st.booleans(), st.booleans())
def test_errors(rcode, edns, want_dnssec):
    message = dns.message.make_query("example.com", "A", use_edns=edns, want_dnssec=want_dnssec and edns)
    query = wire.parse_query(message.to_wire())
    answer = dns.message.from_wire(wire.build(query, rcode))
    assert message.is_response(answer)
    assert answer.rcode() == (rcode if edns else rcode & 15)
    assert bool(answer.ednsflags & dns.flags.DO) == (want_dnssec and edns)
    short = dns.message.from_wire(wire.truncate(wire.build(query), query), raise_on_truncation=False)
    assert short.flags & dns.flags.TC
    assert short.question == message.question


@pytest.mark.parametrize("opcode", [dns.opcode.STATUS, dns.opcode.NOTIFY, dns.opcode.UPDATE])
def test_refusals(opcode):
    message = dns.message.make_query("example.com", "A")
    message.set_opcode(opcode)
    answer = dns.message.from_wire(wire.refuse(message.to_wire(), wire.NOTIMP))
    assert answer.rcode() == dns.rcode.NOTIMP
    assert answer.opcode() == opcode
    assert answer.id == message.id


RRSETS = st.lists(
    st.tuples(
        st.sampled_from(["www.example.com.", "a.example.com.", "com."]),
        st.integers(0, 0x7FFFFFFF),
        st.sampled_from(
            [
                ("A", "192.0.2.1"), ("AAAA", "2001:db8::1"), ("CNAME", "b.example.com."),
                ("MX", "5 mail.example.com."), ("TXT", '"some text"'), ("SRV", "1 2 80 www.example.com."),
                ("SOA", "ns.example.com. x.example.com. 1 2 3 4 600"),
            ]
        ),
    ),
    max_size=5,
)  # fmt: skip


@given(RRSETS, RRSETS, st.integers(0, 100_000), st.booleans())
def test_ageing(answers, authority, seconds, edns):
    """After ageing, dnspython reads the same message with lower TTLs."""
    query = dns.message.make_query("www.example.com", "A", use_edns=edns)
    message = dns.message.make_response(query)
    for section, rrsets in ((message.answer, answers), (message.authority, authority)):
        for name, ttl, (kind, text) in rrsets:
            if not any(
                one.name == dns.name.from_text(name) and one.rdtype == dns.rdatatype.from_text(kind) for one in section
            ):
                section.append(dns.rrset.from_text(name, ttl, "IN", kind, text))
    data = message.to_wire()
    parsed = wire.parse_response(data)
    aged = dns.message.from_wire(wire.age(data, parsed.ttls, seconds))
    before = [rrset for section in message.sections for rrset in section]
    after = [rrset for section in aged.sections for rrset in section]
    assert [(one.name, one.rdtype, list(one)) for one in before] == [(one.name, one.rdtype, list(one)) for one in after]
    for one, other in zip(message.answer + message.authority, aged.answer + aged.authority, strict=True):
        assert other.ttl == max(0, one.ttl - seconds)


@pytest.mark.parametrize("address", ["192.168.64.2", "192.168.64.1"])
def test_reverse_names_are_dnspythons(address):
    query = wire.parse_query(dns.message.make_query(dns.reversename.from_address(address), "PTR").to_wire())
    answer = dns.message.from_wire(zone().respond(query))
    assert str(answer.answer[0][0]) in {"vm1.vmnet.internal.", "gateway.vmnet.internal."}
