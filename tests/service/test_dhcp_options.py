"""What the server's answers carry, and the names that it gives."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from msgspec.structs import replace

from openvmnet.wire import dhcp4
from openvmnet.wire.dhcp4 import Fqdn
from tests.service.dhcp_guest import CONFIG, GATEWAY, NOW, World, packed


@pytest.fixture
def world() -> World:
    return World()


# Options.


def test_parameters_come_in_the_order_asked_for(world):
    guest = world.guest(1)
    answer = guest.send(dhcp4.DISCOVER, {55: bytes([15, 108, 26, 6, 3, 1, 119, 66, 3])}, now=world.now)
    assert list(answer.options) == [53, 54, 51, 58, 59, 1, 15, 26, 6, 3, 119]


def test_ipv6_only_is_not_claimed_for_a_network_that_has_ipv4(world):
    answer = world.guest(1).send(dhcp4.DISCOVER, {55: bytes([108, 3]), 108: bytes(4)}, now=world.now)
    assert answer.type() == dhcp4.OFFER
    assert 108 not in answer.options


def test_classless_routes_hold_the_default_route_too():
    world = World(replace(CONFIG, routes=((IPv4Network("10.20.0.0/16"), IPv4Address("192.168.64.9")),)))
    answer = world.guest(1).send(dhcp4.DISCOVER, {55: bytes([121, 3])}, now=world.now)
    assert dhcp4.decode_routes(answer.options[121]) == [
        (IPv4Address("0.0.0.0"), 0, IPv4Address(GATEWAY)),
        (IPv4Address("10.20.0.0"), 16, IPv4Address("192.168.64.9")),
    ]
    assert answer.address(3) == packed(GATEWAY)


def test_a_network_that_leads_nowhere_gives_no_router():
    for routes in ((), ((IPv4Network("10.20.0.0/16"), IPv4Address("192.168.64.9")),)):
        world = World(replace(CONFIG, routed=False, routes=routes))
        answer = world.guest(1).send(dhcp4.DISCOVER, {55: bytes([3, 121, 6])}, now=world.now)
        assert 3 not in answer.options
        given = dhcp4.decode_routes(answer.options[121]) if routes else []
        assert [network for network, _, _ in given] == [network.network_address for network, _ in routes]
        assert 6 in answer.options


def crowded() -> World:
    """A configuration whose options do not fit into 576 octets."""
    search = tuple(f"{letter * 60}.example" for letter in "abcdefgh")
    routes = tuple((IPv4Network(f"10.{n}.0.0/16"), IPv4Address(GATEWAY)) for n in range(30))
    return World(replace(CONFIG, search=search, routes=routes))


def test_where_space_is_short_the_essential_options_are_there():
    guest = crowded().guest(1)
    answer = guest.send(dhcp4.DISCOVER, {55: bytes([119, 15, 28, 26, 6, 121, 3])}, now=NOW)
    assert len(guest.reply.payload) <= 548
    assert {53, 54, 51, 1, 3, 6, 121, 26} <= answer.options.keys()
    assert 119 not in answer.options


@pytest.mark.parametrize(("size", "largest"), [(1000, 972), (1400, 1372), (9000, 1372), (100, 548)])
def test_the_clients_message_size_is_used_up_to_the_mtu(size, largest):
    guest = crowded().guest(1)
    answer = guest.send(dhcp4.DISCOVER, {57: size.to_bytes(2, "big"), 55: bytes([3, 6, 121, 119])}, now=NOW)
    assert len(guest.reply.payload) <= largest
    assert (119 in answer.options) == (largest > 1000)


# Names.


def test_a_host_name_is_registered_and_given_back(world):
    guest = world.guest(1)
    guest.options = {12: b"Web", 55: bytes([12])}
    assert guest.send(dhcp4.DISCOVER, now=world.now).options[12] == b"web"
    assert world.book.by_name("web") is None
    guest.lease(world.now)
    assert world.book.by_name("web") == IPv4Address(guest.ip)
    other = world.guest(2)
    other.options = guest.options
    other.lease(world.now)
    assert world.book.by_name("web-2") == IPv4Address(other.ip)
    assert guest.renew(guest.ip, world.now).options[12] == b"web"
    assert other.renew(other.ip, world.now).options[12] == b"web-2"
    assert other.discover(world.now) == other.ip
    assert dhcp4.parse(other.reply.payload).options[12] == b"web-2"


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (Fqdn("web.example.", server_updates=True), Fqdn("web.vmnet.internal.", server_updates=True)),
        (Fqdn("web"), Fqdn("web.vmnet.internal.", server_updates=True, overridden=True)),
        (
            Fqdn("web", server_updates=True, canonical=False),
            Fqdn("web.vmnet.internal", server_updates=True, canonical=False),
        ),
        (Fqdn("web.example.", no_updates=True), Fqdn("web.example.", no_updates=True)),
    ],
)
def test_the_client_fqdn_is_answered_as_in_rfc_4702(world, asked, answered):
    guest = world.guest(1)
    guest.options = {81: dhcp4.encode_fqdn(asked, rcode=0), 12: b"other"}
    guest.lease(world.now)
    answer = guest.renew(guest.ip, world.now)
    assert dhcp4.decode_fqdn(answer.options[81]) == answered
    assert answer.options[81][1:3] == b"\xff\xff"
    assert (world.book.by_name("web") is None) == asked.no_updates
    assert world.book.by_name("other") is None


def test_a_torn_fqdn_counts_as_absent(world):
    guest = world.guest(1)
    guest.options = {81: b"\4\0\0\x20web", 12: b"other"}
    guest.lease(world.now)
    assert world.book.by_name("other") is not None
    assert 81 not in guest.renew(guest.ip, world.now).options
