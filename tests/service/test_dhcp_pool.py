"""Fairness and bounds, seen from the server."""

from __future__ import annotations

import logging
from ipaddress import IPv4Address

from msgspec.structs import replace

from openvmnet.service.dhcp import DhcpServer
from openvmnet.service.leases import LeaseBook
from openvmnet.wire import dhcp4
from tests.service.dhcp_guest import CONFIG, NOW, Guest, World, packed, small


def leased(world: World, numbers: range, port: int | None) -> list[Guest]:
    """Guests of a port that ask for a lease; those that got one."""
    guests = [world.guest(number, port=port) for number in numbers]
    for guest in guests:
        offered = guest.discover(world.now)
        if offered is not None:
            guest.select(offered, world.now)
    return [guest for guest in guests if guest.ip is not None]


def ported(world: World, *ports: int) -> World:
    for port in ports:
        world.server.port_added(port)
    return world


def test_exhaustion_is_logged_once_and_refused_politely(caplog):
    world = small(9)
    with caplog.at_level(logging.WARNING):
        guests = leased(world, range(20), None)
        assert len(guests) == 8
        assert len({guest.ip for guest in guests}) == 8
        assert world.server.counters["refused"] == 12
        assert world.guest(99).select(guests[0].ip, NOW).type() == dhcp4.NAK
        assert len(caplog.records) == 1
        # Space is back, and gone again: news once more.
        guests[0].release(NOW)
        assert leased(world, range(30, 31), None)
        assert not leased(world, range(31, 40), None)
        assert len(caplog.records) == 1
        for guest in guests[1:4]:
            guest.release(NOW)
        assert len(leased(world, range(40, 42), None)) == 2
        leased(world, range(42, 60), None)
        assert len(caplog.records) == 2


def test_one_port_may_take_the_whole_pool_while_it_is_alone():
    assert len(leased(ported(small(41), 1), range(60), 1)) == 40


def test_leases_of_unknown_ports_are_no_second_port():
    world = small(41)
    leased(world, range(100, 102), None)
    assert len(leased(world, range(60), 1)) == 38


def test_one_port_may_take_half_of_the_pool_when_there_are_two():
    world = ported(small(41), 1, 2)
    assert len(leased(world, range(60), 1)) == 20
    assert len(leased(world, range(100, 160), 2)) == 20


def test_one_port_may_always_have_eight():
    world = ported(small(11), 1, 2)
    assert len(leased(world, range(20), 1)) == 8


def test_remembered_addresses_are_no_way_around_the_half():
    world = ported(small(41), 1, 2)
    for start in (0, 100):
        for guest in leased(world, range(start, start + 20), 1):
            guest.release(NOW)
    assert len(world.book) == 40
    again = [*leased(world, range(20), 1), *leased(world, range(100, 120), 1)]
    assert len(again) == 20
    for number in range(100, 120):
        assert world.guest(number, port=1).reboot("192.168.64.40", NOW).type() == dhcp4.NAK


def test_the_port_with_most_leases_gives_way_when_nothing_is_left():
    world = ported(small(31), 1, 2, 3)
    first, second = leased(world, range(15), 1), leased(world, range(100, 115), 2)
    assert (len(first), len(second)) == (15, 15)
    world.now += 60
    oldest = first[0]
    for guest in first[1:]:
        guest.renew(guest.ip, world.now)
    newcomer = world.guest(200, port=3)
    assert newcomer.lease(world.now) == oldest.ip
    assert world.server.counters["evicted"] == 1
    assert oldest.renew(oldest.ip, world.now).type() == dhcp4.NAK
    assert first[1].renew(first[1].ip, world.now).type() == dhcp4.ACK


def test_nobody_is_evicted_below_an_equal_share():
    world = ported(small(31), 1, 2, 3)
    for port in (1, 2, 3):
        assert len(leased(world, range(port * 100, port * 100 + 10), port)) == 10
    assert not leased(world, range(900, 905), 3)
    assert world.server.counters["evicted"] == 0


def test_a_victim_that_renews_before_the_newcomer_selects_is_still_evicted_only_by_fairness():
    world = ported(small(31), 1, 2, 3)
    first = leased(world, range(15), 1)
    leased(world, range(100, 115), 2)
    newcomer = world.guest(200, port=3)
    offered = newcomer.discover(NOW)
    assert offered == first[0].ip
    for guest in first[1:9]:
        guest.release(NOW)
    # Port 1 is within its share now, and addresses are free: its lease stays.
    assert newcomer.select(offered, NOW).type() == dhcp4.NAK
    assert world.book.by_ip(IPv4Address(first[0].ip)).mac == first[0].mac


def test_a_flood_of_discovers_takes_nothing_from_another_port():
    world = ported(small(41), 1, 2)
    for number in range(5000):
        world.guest(number, port=1).discover(NOW)
    assert len(world.server.pool._offers) <= 20
    assert len(leased(world, range(6000, 6020), 2)) == 20


def test_a_flood_of_discovers_on_the_only_port_lets_a_quick_client_through():
    world = ported(small(11), 1)
    for number in range(100):
        world.guest(number, port=1).discover(NOW)
    assert world.guest(200, port=1).lease(NOW)


def test_outstanding_offers_are_bounded_in_a_large_pool():
    world = World(replace(CONFIG, prefixlen=16, last=IPv4Address("192.168.127.254")))
    for number in range(2000):
        assert world.guest(number, port=1).discover(NOW) is not None
    pool = world.server.pool
    assert len(pool._offers) == len(pool._offered) == 256


def test_a_pool_larger_than_the_book_is_used_up_to_the_books_bound():
    book = LeaseBook(clock=lambda: NOW, bound=50)
    server = DhcpServer(replace(CONFIG, prefixlen=16, last=IPv4Address("192.168.127.254")), book)
    guests = [Guest(server, b"\x52\x54\0\0" + number.to_bytes(2, "big")) for number in range(60)]
    offers = [guest.discover(NOW) for guest in guests]
    answers = [guest.select(offer, NOW) for guest, offer in zip(guests, offers, strict=True) if offer]
    assert sum(answer.type() == dhcp4.ACK for answer in answers) == 50
    assert guests[-1].discover(NOW) is None
    guests[0].release(NOW)
    assert guests[-1].lease(NOW)
    assert len(book) == 50


# What ARP tells.


def test_an_address_in_use_is_not_offered(caplog):
    world = small(3)
    world.server.seen_arp(packed("192.168.64.2"), b"\x02\0\0\0\0\x99", port=1, now=NOW)
    assert world.guest(1).lease(NOW) == "192.168.64.3"
    assert world.guest(2).discover(NOW) is None
    # The static guest itself may lease what it uses.
    assert Guest(world.server, b"\x02\0\0\0\0\x99", 1).lease(NOW) == "192.168.64.2"


def test_arp_about_an_active_lease_or_the_gateway_changes_nothing():
    world = small(9)
    guest = world.guest(1)
    address = guest.lease(NOW)
    world.server.seen_arp(packed(address), b"\x02\0\0\0\0\x99", port=2, now=NOW)
    assert guest.renew(address, NOW).type() == dhcp4.ACK
    assert guest.discover(NOW) == address
    world.server.seen_arp(packed("192.168.64.1"), b"\x02\0\0\0\0\x99", port=2, now=NOW)
    world.server.seen_arp(packed("192.168.64.9"), CONFIG.gateway_mac, port=2, now=NOW)
    world.server.seen_arp(packed("10.0.0.1"), b"\x02\0\0\0\0\x99", port=2, now=NOW)
    assert not world.server.pool._conflicts


def test_what_arp_told_is_over_after_the_time_of_a_lease():
    world = small(2)
    world.server.seen_arp(packed("192.168.64.2"), b"\x02\0\0\0\0\x99", now=NOW)
    assert world.guest(1).discover(NOW + 86_399) is None
    assert world.guest(1).discover(NOW + 86_400) == "192.168.64.2"


def test_arp_seen_again_keeps_the_address_back_for_longer():
    world = small(2)
    for now in (NOW, NOW + 50_000):
        world.server.seen_arp(packed("192.168.64.2"), b"\x02\0\0\0\0\x99", now=now)
    assert world.guest(1).discover(NOW + 100_000) is None


def test_a_guest_that_claims_every_address_by_arp_gets_its_share_of_them():
    world = ported(small(41), 1, 2)
    for last in range(2, 42):
        world.server.seen_arp(packed(f"192.168.64.{last}"), bytes([2, 0, 0, 0, 0, last]), port=1, now=NOW)
    assert len(leased(world, range(40), 2)) == 20
    world.server.port_gone(1)
    assert not world.server.pool._conflicts


def test_declining_address_after_address_does_not_empty_the_pool():
    world = ported(small(41), 1, 2)
    for number in range(200):
        hostile = world.guest(number, port=1)
        offered = hostile.discover(NOW)
        if offered is not None:
            hostile.select(offered, NOW)
            hostile.decline(offered, NOW)
    assert len(leased(world, range(300, 340), 2)) >= 20
