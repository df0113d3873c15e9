"""Which names are answered here, and with what; no octet of them ever goes upstream."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import dns.message
import dns.rcode
import dns.reversename
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.dns_zone import NEGATIVE_TTL, TTL, Zone
from openvmnet.wire import dns as wire

GUESTS = {"vm1": IPv4Address("192.168.64.2"), "db-2": IPv4Address("192.168.64.250")}


def zone(subnet="192.168.64.0/24", guests=GUESTS) -> Zone:
    network = IPv4Network(subnet)
    return Zone(
        domain="vmnet.internal",
        subnet=network,
        gateway=network[1],
        forward=guests.get,
        reverse={address: name for name, address in guests.items()}.get,
    )


def ask(name, kind="A", where=None):
    """("NOERROR", ["192.168.64.2"]), or None where the name is not answered here."""
    message = dns.message.make_query(name, kind)
    data = (where or zone()).respond(wire.parse_query(message.to_wire()))
    if data is None:
        return None
    answer = dns.message.from_wire(data)
    return dns.rcode.to_text(answer.rcode()), [str(one) for rrset in answer.answer for one in rrset]


def back(address, where=None):
    return ask(dns.reversename.from_address(address), "PTR", where)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("vm1.vmnet.internal", "A", ["192.168.64.2"]),
        ("vm1.vmnet.internal", "ANY", ["192.168.64.2"]),
        ("VM1.VMNET.internal", "A", ["192.168.64.2"]),
        ("db-2.vmnet.internal", "A", ["192.168.64.250"]),
        ("gateway.vmnet.internal", "A", ["192.168.64.1"]),
        ("vm1.vmnet.internal", "AAAA", []),
        ("vm1.vmnet.internal", "TXT", []),
        ("gateway.vmnet.internal", "AAAA", []),
        ("vmnet.internal", "A", []),
        ("vmnet.internal", "NS", ["gateway.vmnet.internal."]),
        ("none.vmnet.internal", "A", "NXDOMAIN"),
        ("a.vm1.vmnet.internal", "A", "NXDOMAIN"),
        ("wpad.vmnet.internal", "A", "NXDOMAIN"),
        ("localhost", "A", ["127.0.0.1"]),
        ("LocalHost", "AAAA", ["::1"]),
        ("x.localhost", "A", ["127.0.0.1"]),
        ("localhost", "MX", []),
        ("printer.local", "A", "NXDOMAIN"),
        ("b._dns-sd._udp.local", "PTR", "NXDOMAIN"),
        ("local", "A", []),
        ("x.onion", "A", "NXDOMAIN"),
        ("x.alt", "A", "NXDOMAIN"),
        ("a.b.invalid", "A", "NXDOMAIN"),
        ("_dns.resolver.arpa", "TXT", []),
        ("b.e.f.ip6.arpa", "SOA", ["gateway.vmnet.internal. nobody.invalid. 1 3600 1200 604800 3600"]),
    ],
)
def test_names(name, kind, expected):
    assert ask(name, kind) == (("NXDOMAIN", []) if expected == "NXDOMAIN" else ("NOERROR", expected))


@pytest.mark.parametrize(
    "name",
    [
        "www.example.com", ".", "com", "internal", "corp.internal", "xvmnet.internal", "nas.home.arpa", "host.test",
        "notlocal", "local.example.com", "in-addr.arpa", "arpa", "ip6.arpa", "e.f.ip6.arpa", "100.in-addr.arpa",
        "172.in-addr.arpa", "192.in-addr.arpa",
    ],
)  # fmt: skip
def test_names_of_others(name):
    assert ask(name) is None


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.0", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255", "127.0.0.2",
        "0.0.0.0", "0.1.2.3", "169.254.169.254", "192.0.2.1", "198.51.100.1", "203.0.113.9",
        "100.64.0.1", "100.127.255.255", "fd00::1", "fc00::1", "fe80::1", "febf::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses_do_not_leak(address):
    assert back(address) == ("NXDOMAIN", [])


@pytest.mark.parametrize("address", ["255.255.255.255", "::"])
def test_addresses_that_are_zones_exist(address):
    assert back(address) == ("NOERROR", [])


@pytest.mark.parametrize(
    "address",
    ["9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.167.1.1", "192.169.0.1", "100.63.1.1",
     "100.128.0.0", "8.8.8.8", "192.0.3.1", "255.255.255.254", "fec0::1", "2001:db9::1", "2606:4700::1111", "::2"],
)  # fmt: skip
def test_public_addresses_are_forwarded(address):
    assert back(address) is None


@given(st.ip_addresses())
def test_nothing_that_is_not_global_is_forwarded_backwards(address):
    """The private and the link-local addresses of Python's own registry (RFC 6890) are all answered here."""
    local = back(str(address)) is not None
    networks = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "0.0.0.0/8"]
    if address.version == 4 and any(address in IPv4Network(network) for network in networks):
        assert local
    if address.is_global:
        assert not local


def test_backwards():
    assert back("192.168.64.2") == ("NOERROR", ["vm1.vmnet.internal."])
    assert back("192.168.64.1") == ("NOERROR", ["gateway.vmnet.internal."])
    assert back("192.168.64.9") == ("NXDOMAIN", [])
    assert back("127.0.0.1") == ("NOERROR", ["localhost."])
    assert back("::1") == ("NOERROR", ["localhost."])
    assert ask("2.64.168.192.in-addr.arpa", "A") == ("NOERROR", [])


@pytest.mark.parametrize(
    ("name", "rcode"),
    [
        ("64.168.192.in-addr.arpa", "NOERROR"),
        ("168.192.in-addr.arpa", "NOERROR"),
        ("65.168.192.in-addr.arpa", "NXDOMAIN"),
        ("10.in-addr.arpa", "NOERROR"),
        ("1.10.in-addr.arpa", "NXDOMAIN"),
        ("1.2.64.168.192.in-addr.arpa", "NXDOMAIN"),
        ("02.64.168.192.in-addr.arpa", "NXDOMAIN"),
        ("256.64.168.192.in-addr.arpa", "NXDOMAIN"),
        ("x.64.168.192.in-addr.arpa", "NXDOMAIN"),
        ("0-25.64.168.192.in-addr.arpa", "NXDOMAIN"),
    ],
)
def test_parts_of_addresses(name, rcode):
    """RFC 8020: a name above existing names exists."""
    assert ask(name, "PTR") == (rcode, [])


@pytest.mark.parametrize(
    "subnet", ["10.0.0.0/8", "172.16.0.0/12", "192.168.64.0/20", "192.168.64.128/25", "10.1.2.0/30"]
)
def test_subnets_of_any_size(subnet):
    network = IPv4Network(subnet)
    guest = network[2]
    where = zone(subnet, {"vm1": guest})
    assert back(str(guest), where) == ("NOERROR", ["vm1.vmnet.internal."])
    assert back(str(network[1]), where) == ("NOERROR", ["gateway.vmnet.internal."])
    assert back("8.8.8.8", where) is None
    assert back("172.0.0.1", where) is None
    octets = str(guest).split(".")
    for length in (1, 2, 3):
        name = ".".join(reversed(octets[:length])) + ".in-addr.arpa"
        assert ask(name, "PTR", where) in (("NOERROR", []), None)  # None: above the private ranges, not ours


def test_how_long():
    for name, kind, ttl in (
        ("vm1.vmnet.internal", "A", TTL),
        ("none.vmnet.internal", "A", NEGATIVE_TTL),
        ("vm1.vmnet.internal", "AAAA", NEGATIVE_TTL),
        ("9.64.168.192.in-addr.arpa", "PTR", NEGATIVE_TTL),
        ("1.2.3.10.in-addr.arpa", "PTR", 3600),
        ("a.local", "A", 3600),
    ):
        query = wire.parse_query(dns.message.make_query(name, kind).to_wire())
        assert wire.parse_response(zone().respond(query)).lifetime == ttl


def test_a_guest_called_gateway_is_not_the_gateway():
    where = zone(guests={"gateway": IPv4Address("192.168.64.66")})
    assert ask("gateway.vmnet.internal", where=where) == ("NOERROR", ["192.168.64.1"])


def test_reverse_may_give_a_whole_name():
    where = zone(guests={"vm3.vmnet.internal": IPv4Address("192.168.64.3")})
    assert back("192.168.64.3", where) == ("NOERROR", ["vm3.vmnet.internal."])


@given(
    st.lists(st.binary(min_size=1, max_size=20), max_size=4),
    st.sampled_from(["vmnet.internal", "64.168.192.in-addr.arpa", "d.f.ip6.arpa", "local"]),
    st.integers(1, 65535),
)
def test_any_labels_below_ours_are_answered_here(labels, apex, kind):
    name = b"".join(bytes([len(label)]) + label for label in labels) + wire.encode_name(apex)
    query = wire.Query(b"ab", 0, name + kind.to_bytes(2, "big") + b"\0\1", name.lower(), kind, 1, None)
    answer = zone().answer(query)
    assert answer is not None
    assert bool(answer.records) != (answer.soa is not None)


def test_every_zone_of_rfc_6303():
    four = [
        "10", *(f"{octet}.172" for octet in range(16, 32)), "168.192", "0", "127", "254.169", "2.0.192", "100.51.198",
        "113.0.203", "255.255.255.255",
    ]  # fmt: skip
    six = ["0." * 31 + "0", "1." + "0." * 30 + "0", "d.f", "8.e.f", "9.e.f", "a.e.f", "b.e.f", "8.b.d.0.1.0.0.2"]
    for name in [f"{one}.in-addr.arpa" for one in four] + [f"{one}.ip6.arpa" for one in six]:
        rcode, (soa,) = ask(name, "SOA")
        assert rcode == "NOERROR"
        assert " nobody.invalid. " in soa
        assert ask(f"x.{name}", "TXT") == ("NXDOMAIN", [])
