"""An address kept for one NIC, seen from the server: what its guest is given, and what nobody else is."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.service.dhcp import DhcpServer
from openvmnet.service.dhcp_pool import Client
from openvmnet.service.dhcp_reservations import Reservations
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4
from tests.service.dhcp_guest import CONFIG, NOW, Guest, World, packed, small

KEPT = "192.168.64.50"
OTHER = "192.168.64.77"


@pytest.fixture
def world() -> World:
    made = World()
    for port in (1, 2, 3):
        made.server.port_added(port)
    return made


def keep(world: World, guest: Guest, address: str = KEPT) -> Guest:
    assert guest.port is not None
    world.server.reserve(IPv4Address(address), guest.mac, guest.port)
    return guest


def test_its_guest_is_offered_exactly_this_address(world):
    guest = keep(world, world.guest(1, port=1))
    assert guest.discover(world.now) == KEPT
    assert guest.discover(world.now, {dhcp4.REQUESTED_ADDRESS: packed(OTHER)}) == KEPT
    assert guest.lease(world.now) == KEPT
    assert guest.renew(KEPT, world.now).type() == dhcp4.ACK
    assert guest.reboot(KEPT, world.now).type() == dhcp4.ACK


def test_a_request_for_another_address_is_refused_in_every_state(world):
    guest = keep(world, world.guest(1, port=1))
    for ask in (guest.select, guest.reboot, guest.renew):
        answer = ask(OTHER, world.now)
        assert answer.type() == dhcp4.NAK
        assert answer.options[dhcp4.MESSAGE_TEXT] == b"another one is kept for you"
    # And one that it was never offered is granted, since nobody else can have it.
    assert guest.reboot(KEPT, world.now).type() == dhcp4.ACK


def test_nobody_else_is_given_it(world):
    guest = keep(world, world.guest(1, port=1))
    other = world.guest(2, port=2)
    asked = {dhcp4.REQUESTED_ADDRESS: packed(KEPT)}
    assert other.discover(world.now, asked) not in (None, KEPT)
    for ask in (other.select, other.reboot, other.renew):
        assert ask(KEPT, world.now).type() == dhcp4.NAK
    rapid = other.send(dhcp4.DISCOVER, asked | {dhcp4.RAPID_COMMIT: b""}, now=world.now)
    assert rapid.yiaddr != packed(KEPT)
    assert guest.lease(world.now) == KEPT
    guest.release(world.now)
    assert other.reboot(KEPT, world.now).type() == dhcp4.NAK


def test_a_neighbour_that_poses_under_its_mac_and_identifier_is_given_another(world):
    guest = keep(world, world.guest(1, port=1, client_id=b"\xff01234567"))
    thief = world.guest(1, port=2, client_id=b"\xff01234567")
    assert thief.lease(world.now) != KEPT
    assert thief.reboot(KEPT, world.now).type() == dhcp4.NAK
    assert guest.lease(world.now) == KEPT
    assert thief.lease(world.now) != KEPT


def test_another_guest_behind_the_same_port_is_given_another(world):
    keep(world, world.guest(1, port=1))
    nested = world.guest(9, port=1)
    assert nested.lease(world.now) != KEPT


def test_every_voice_of_its_guest_is_given_it(world):
    keep(world, world.guest(1, port=1))
    for client_id in (b"", b"\xff01234567", b"\xff76543210", b""):
        assert world.guest(1, port=1, client_id=client_id).lease(world.now) == KEPT
    assert world.server.counters["evicted"] == 0
    assert [str(lease.ip) for lease in world.book] == [KEPT]


def test_a_lease_from_before_is_refused_at_renewal_and_moved_at_the_next_discover(world):
    guest = world.guest(1, port=1)
    before = guest.lease(world.now)
    assert before != KEPT
    keep(world, guest)
    assert guest.renew(before, world.now).type() == dhcp4.NAK
    assert guest.lease(world.now) == KEPT
    assert [str(lease.ip) for lease in world.book] == [KEPT]


def test_an_offer_of_it_from_before_is_void(world):
    other = world.guest(2, port=2)
    assert other.discover(world.now, {dhcp4.REQUESTED_ADDRESS: packed(KEPT)}) == KEPT
    guest = keep(world, world.guest(1, port=1))
    assert guest.discover(world.now) == KEPT
    assert other.select(KEPT, world.now).type() == dhcp4.NAK
    assert guest.select(KEPT, world.now).type() == dhcp4.ACK


def test_who_had_it_once_is_given_another(world):
    other = world.guest(2, port=2)
    assert other.discover(world.now, {dhcp4.REQUESTED_ADDRESS: packed(KEPT)}) == KEPT
    other.select(KEPT, world.now)
    other.release(world.now)
    keep(world, world.guest(1, port=1))
    assert other.discover(world.now) != KEPT
    assert other.reboot(KEPT, world.now).type() == dhcp4.NAK


def test_a_lease_under_its_mac_through_another_port_ends(world):
    thief = world.guest(1, port=2)
    thief.discover(world.now, {dhcp4.REQUESTED_ADDRESS: packed(KEPT)})
    thief.select(KEPT, world.now)
    guest = keep(world, world.guest(1, port=1))
    assert world.book.by_ip(IPv4Address(KEPT)) is None
    assert thief.renew(KEPT, world.now).type() == dhcp4.NAK
    assert guest.lease(world.now) == KEPT


def test_neither_arp_nor_its_own_decline_takes_it_away(world):
    guest = keep(world, world.guest(1, port=1))
    world.server.seen_arp(packed(KEPT), b"\x52\x54\0\0\0\x09", port=2, now=world.now)
    assert guest.lease(world.now) == KEPT
    guest.decline(KEPT, world.now)
    assert guest.lease(world.now) == KEPT


def test_it_goes_with_the_port_and_the_lease_is_remembered_like_any_other(world):
    guest = keep(world, world.guest(1, port=1))
    guest.lease(world.now)
    world.server.port_gone(1)
    assert world.book.by_mac(guest.mac) is None
    world.server.port_added(4)
    again, other = world.guest(1, port=4), world.guest(2, port=2)
    assert other.discover(world.now, {dhcp4.REQUESTED_ADDRESS: packed(KEPT)}) != KEPT  # remembered, so not taken first
    assert again.discover(world.now) == KEPT  # and its own still, as any address that it had
    assert again.select(KEPT, world.now).type() == dhcp4.ACK
    assert len(world.server.pool.reservations) == 0


def test_a_full_pool_still_has_it():
    world = small(9)
    for port in (1, 2):
        world.server.port_added(port)
    guest = keep(world, world.guest(1, port=1), "192.168.64.5")
    others = [world.guest(number, port=None) for number in range(20, 40)]
    given = {other.discover(world.now) and other.lease(world.now) for other in others}
    assert "192.168.64.5" not in given
    assert len(given - {None}) == 7
    assert guest.lease(world.now) == "192.168.64.5"


def test_a_full_book_still_has_room_for_it():
    book = LeaseBook(clock=lambda: NOW, bound=16)
    server = DhcpServer(CONFIG, book)
    for port in (1, 2, 3):
        server.port_added(port)
    guest = Guest(server, b"\x52\x54\0\0\1\1", 1)
    server.reserve(IPv4Address(KEPT), guest.mac, 1)
    for number in range(40):
        other = Guest(server, b"\x52\x54\0\0\2" + bytes([number]), 2 + number % 2)
        offered = other.discover(NOW)
        if offered is not None:
            other.select(offered, NOW)
    assert book.active_count() == 15
    assert guest.lease(NOW) == KEPT
    assert guest.renew(KEPT, NOW).type() == dhcp4.ACK


def test_no_fairness_takes_its_lease():
    world = small(33)  # 32 addresses
    for port in (1, 2):
        world.server.port_added(port)
    guest = keep(world, world.guest(1, port=1), "192.168.64.5")
    guest.lease(world.now)
    for number in range(100, 140):  # port 1 holds most, and its oldest lease is the kept one
        other = world.guest(number, port=1)
        if other.discover(world.now):
            other.select(other.discover(world.now), world.now)
    for number in range(200, 240):
        other = world.guest(number, port=2)
        assert other.discover(world.now) != "192.168.64.5"
    assert guest.renew("192.168.64.5", world.now).type() == dhcp4.ACK


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(10, 14), st.booleans()), max_size=30))
def test_the_two_indices_agree_whatever_comes_and_goes(steps):
    """Against a plain list: who has what, whom it is kept from, and that a change is always counted."""
    found, model = Reservations(), []
    for mac, port, address, goes in steps:
        before = found.moves
        if goes:
            gone = [each for each in model if each[2] == port]
            model = [each for each in model if each[2] != port]
            found.port_gone(port)
            assert (found.moves != before) == bool(gone)
        elif not any(each[0] == address or each[1:] == (mac, port) for each in model):
            model.append((address, mac, port))
            found.add(address, bytes([mac]), port)
            assert found.moves != before
        assert len(found) == len(model)
        assert sorted(found) == sorted((each[0], each[2]) for each in model)
        for client in (Client(bytes([mac]), b"", port), Client(b"\x09", b"", port)):
            own = next((each[0] for each in model if (bytes([each[1]]), each[2]) == (client.mac, client.port)), None)
            assert found.of(client) == own
            for candidate in range(10, 15):
                free = all(each[0] != candidate for each in model)
                assert found.admits(candidate, client) == (candidate == own if own is not None else free)
