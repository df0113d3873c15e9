"""Names of IPv6 addresses, and the zones they are answered in."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import dns.message
import dns.rcode
import pytest

from openvmnet.service.dns_zone import Names, Zone
from openvmnet.service.leases import Lease, LeaseBook
from openvmnet.service.leases6 import Client, LeaseBook6
from openvmnet.service.names6 import PER_MAC, Names6
from openvmnet.wire import dns as wire

PREFIX = IPv6Network("fd00:1122:3344:5566::/64")
WEB, DB = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
SLAAC = PREFIX[0x505400FFFE000001]


class Setting:
    def __init__(self) -> None:
        self.now = 1000.0
        self.book = LeaseBook(clock=lambda: self.now)
        self.book6 = LeaseBook6(PREFIX[0x10000], PREFIX[0x1FFFF], clock=lambda: self.now)
        self.table: list[tuple[str, str]] = []
        self.names = Names6(PREFIX, self.book, self.book6, lambda: self.table, clock=lambda: self.now)
        self.zone = Zone(
            domain="vmnet.internal",
            subnet=IPv4Network("192.168.64.0/24"),
            gateway=IPv4Address("192.168.64.1"),
            forward=self.book.by_name,
            reverse=self.book.name_of,
            generation=self.names.generation,
            ip6=Names(PREFIX, PREFIX[1], self.names.forward, self.names.reverse),
        )
        self.book.grant(Lease(WEB, b"", IPv4Address("192.168.64.7"), "", 90000, 7), "web", self.now)

    def learn(self, *pairs: tuple[IPv6Address, bytes]) -> None:
        self.table = [(str(address), mac.hex(":")) for address, mac in pairs]
        self.now += 1.5

    def ask(self, name: str, kind: str) -> list[str] | str | None:
        query = dns.message.make_query(name, kind)
        answer = self.zone.respond(wire.parse_query(query.to_wire()))
        if answer is None:
            return None
        message = dns.message.from_wire(answer)
        if message.rcode() != dns.rcode.NOERROR:
            return dns.rcode.to_text(message.rcode())
        return sorted(item.to_text() for rrset in message.answer for item in rrset)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def reverse(address: IPv6Address) -> str:
    return address.reverse_pointer


def test_the_address_that_a_guest_made_has_its_name(setting):
    assert setting.ask("web.vmnet.internal", "AAAA") == []
    before = setting.names.generation()
    setting.learn((SLAAC, WEB), (IPv6Address("fe80::1"), WEB))
    assert setting.names.generation() != before
    assert setting.ask("web.vmnet.internal", "AAAA") == [str(SLAAC)]
    assert setting.ask("web.vmnet.internal", "A") == ["192.168.64.7"]
    assert setting.ask("web.vmnet.internal", "ANY") == sorted(["192.168.64.7", str(SLAAC)])
    assert setting.ask(reverse(SLAAC), "PTR") == ["web.vmnet.internal."]


def test_the_address_by_dhcp_has_it_too(setting):
    setting.book6.grant(Client(b"duid", b"iaid", WEB, 7), int(PREFIX[0x10007]), "other", 90000, setting.now)
    assert setting.ask("web.vmnet.internal", "AAAA") == [str(PREFIX[0x10007])]
    assert setting.ask(reverse(PREFIX[0x10007]), "PTR") == ["web.vmnet.internal."]


def test_a_guest_without_ipv4_has_the_name_that_it_gave(setting):
    setting.book6.grant(Client(b"duid", b"iaid", DB, 8), int(PREFIX[0x10008]), "db", 90000, setting.now)
    setting.learn((PREFIX[0x99], DB))
    assert setting.ask("db.vmnet.internal", "AAAA") == sorted([str(PREFIX[0x10008]), str(PREFIX[0x99])])
    assert setting.ask("db.vmnet.internal", "A") == []
    assert setting.ask(reverse(PREFIX[0x99]), "PTR") == ["db.vmnet.internal."]
    setting.book6.release_port(8)
    setting.learn()
    assert setting.ask("db.vmnet.internal", "AAAA") == "NXDOMAIN"


def test_a_name_by_ipv4_is_not_taken_over_by_ipv6(setting):
    for name in ("web", "gateway"):
        setting.book6.grant(Client(b"duid", name.encode(), DB, 8), int(PREFIX[0x10009]), name, 90000, setting.now)
    assert setting.ask("web.vmnet.internal", "AAAA") == []
    assert setting.ask("gateway.vmnet.internal", "AAAA") == [str(PREFIX[1])]


def test_an_address_stays_with_its_first_mac_and_a_mac_has_not_too_many(setting):
    setting.learn((SLAAC, WEB))
    assert setting.ask("web.vmnet.internal", "AAAA") == [str(SLAAC)]
    setting.learn((SLAAC, DB))
    assert setting.ask("web.vmnet.internal", "AAAA") == [str(SLAAC)]
    setting.learn(*((PREFIX[0x1000 + one], WEB) for one in range(100)))
    assert len(setting.ask("web.vmnet.internal", "AAAA")) == PER_MAC


def test_reverse_zones(setting):
    assert setting.ask(reverse(PREFIX[1]), "PTR") == ["gateway.vmnet.internal."]
    assert setting.ask(reverse(PREFIX[0x77]), "PTR") == "NXDOMAIN"
    zone = ".".join(reverse(PREFIX[0]).split(".")[16:])
    assert setting.ask(f"0.0.{zone}", "PTR") == []  # part of an address: something may be below it
    assert setting.ask(".".join(zone.split(".")[4:]), "PTR") == []
    assert setting.ask(f"x.{zone}", "PTR") == "NXDOMAIN"
    assert setting.ask(f"00.{zone}", "PTR") == "NXDOMAIN"
    assert setting.ask(f"1.{reverse(PREFIX[1])}", "PTR") == "NXDOMAIN"
    assert setting.ask(zone, "SOA") != []
    for private in ("fd99::1", "fe80::5", "fc00::1"):  # nobody outside is asked
        assert setting.ask(reverse(IPv6Address(private)), "PTR") == "NXDOMAIN"
    assert setting.ask(reverse(IPv6Address("2001:4860::1")), "PTR") is None
