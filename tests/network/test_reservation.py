"""Whether an address can be kept on a network: each obstacle by name, and none where there is none."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from openvmnet.config import NetworkConfig
from openvmnet.errors import Conflict, OptionError
from openvmnet.netdev import Subnet
from openvmnet.network.port import Port
from openvmnet.network.reservation import reserve
from openvmnet.service.leases import Lease, LeaseBook

NOW = 1_700_000_000
SUBNET = Subnet(IPv4Address("192.168.64.1"), IPv4Address("192.168.64.2"), IPv4Address("192.168.64.100"), 24)
CONFIG = NetworkConfig("lab", subnet=SUBNET)
MAC = "52:54:00:00:00:01"
WEB = Port(1, "web", "net0", "52:54:00:00:00:02", False, 9, reservation=IPv4Address("192.168.64.50"))
DB = Port(2, "db", "net1", "52:54:00:00:00:03", False, 9)


@pytest.fixture
def book() -> LeaseBook:
    """A lease of VM db, one of nobody's, one that is over, and one of our own MAC."""
    made = LeaseBook(clock=lambda: NOW)
    for mac, address, expires, port in (
        (DB.packed_mac, "192.168.64.60", NOW + 60, DB.mark),
        (b"\x52\x54\0\0\0\x09", "192.168.64.61", NOW + 60, None),
        (b"\x52\x54\0\0\0\x09", "192.168.64.62", NOW, DB.mark),
        (bytes.fromhex(MAC.replace(":", "")), "192.168.64.63", NOW + 60, None),
    ):
        made.grant(Lease(mac, b"", IPv4Address(address), "", expires, port), "", NOW)
    return made


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (
            "192.168.64.1",
            "address=192.168.64.1 is the gateway's on network 'lab', which gives 192.168.64.2 to 192.168.64.100",
        ),
        *(
            (
                address,
                f"address={address} is not in the DHCP pool on network 'lab', which gives {SUBNET.pool}",
            )
            for address in ("192.168.64.101", "192.168.64.255", "10.0.0.5")
        ),
        ("192.168.64.50", "address=192.168.64.50 is kept for VM 'web' (net0, 52:54:00:00:00:02) on network 'lab'"),
        ("192.168.64.60", "address=192.168.64.60 is leased to VM 'db' (net1, 52:54:00:00:00:03) on network 'lab'"),
        ("192.168.64.61", "address=192.168.64.61 is leased to 52:54:00:00:00:09 on network 'lab'"),
    ],
)
def test_each_obstacle_is_a_conflict_that_names_it(book: LeaseBook, address: str, sentence: str) -> None:
    with pytest.raises(Conflict) as caught:
        reserve(address, MAC, CONFIG, [WEB, DB], book)
    assert caught.value.message == sentence
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("address", ["192.168.64.2", "192.168.64.62", "192.168.64.63", "192.168.64.100"])
def test_a_free_one_is_kept(book: LeaseBook, address: str) -> None:
    assert reserve(address, MAC, CONFIG, [WEB, DB], book) == IPv4Address(address)


def test_what_is_no_address_is_the_callers_mistake(book: LeaseBook) -> None:
    with pytest.raises(OptionError, match="an IPv4 address"):
        reserve("nonsense", MAC, CONFIG, [WEB, DB], book)
