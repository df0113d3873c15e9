from __future__ import annotations

import logging
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from openvmnet.service.dhcp import DhcpServer
from openvmnet.wire import dhcp4, ethernet
from openvmnet.wire.dhcp4 import Message
from tests.service.dhcp_guest import CONFIG, GATEWAY, NOW, Guest, World, packed, small


@pytest.fixture
def world() -> World:
    return World()


# The exchange.


def test_discover_offer_request_ack(world):
    guest = world.guest(1)
    offered = guest.discover(world.now)
    assert offered is not None
    assert len(world.book) == 0
    answer = guest.select(offered, world.now)
    assert answer is not None
    assert answer.type() == dhcp4.ACK
    assert guest.ip == offered
    assert answer.number(51, 4) == 86400
    assert answer.number(58, 4) == 43200
    assert answer.number(59, 4) == 75600
    assert answer.address(1) == packed("255.255.255.0")
    assert answer.address(3) == packed(GATEWAY)
    assert answer.options[6] == packed(GATEWAY)
    assert answer.address(28) == packed("192.168.64.255")
    assert answer.number(26, 2) == 1400
    assert answer.options[15] == b"vmnet.internal"
    assert dhcp4.decode_names(answer.options[119]) == ["vmnet.internal", "example.org"]
    assert 121 not in answer.options
    lease = world.book.by_mac(guest.mac)
    assert lease is not None
    assert (str(lease.ip), lease.expires) == (offered, int(NOW) + 86400)
    assert world.server.counters["offer"] == world.server.counters["ack"] == 1


def test_an_ack_waits_for_the_file_and_an_offer_or_nak_does_not(world):
    guest = world.guest(1)
    offered = guest.discover(world.now)
    assert not guest.reply.commit
    assert not world.book.dirty
    guest.select(offered, world.now)
    assert guest.reply.commit
    assert world.book.dirty
    guest.reboot("10.0.0.1", world.now)
    assert not guest.reply.commit


def test_the_same_mac_gets_the_same_address_even_from_an_empty_book():
    first, second = World(), World()
    for world in (first, second):
        for number in range(1, 40) if world is first else range(39, 0, -1):
            world.guest(number).discover(world.now)
    addresses = [world.guest(200).lease(NOW) for world in (World(), World())]
    assert len(set(addresses)) == 1


def test_an_address_is_remembered_after_release_and_expiry_and_restart(world):
    guest, other = world.guest(1), world.guest(2)
    address = guest.lease(world.now)
    guest.release(world.now)
    assert world.book.by_mac(guest.mac) is None
    assert other.discover(world.now, {50: packed(address)}) != address
    world.now += 100_000
    assert guest.lease(world.now) == address
    world.now += 100_000
    guest.server = world.restart()
    assert guest.lease(world.now) == address


def test_a_retransmitted_discover_gets_the_same_offer(world):
    guest = world.guest(1)
    assert guest.discover(world.now) == guest.discover(world.now + 3)


def test_the_requested_address_is_offered_if_nobody_has_it(world):
    assert world.guest(1).discover(world.now, {50: packed("192.168.64.77")}) == "192.168.64.77"
    assert world.guest(2).discover(world.now, {50: packed("192.168.64.77")}) != "192.168.64.77"
    assert world.guest(3).discover(world.now, {50: packed("10.0.0.1")}).startswith("192.168.64.")
    assert world.guest(4).discover(world.now, {50: packed(GATEWAY)}) != GATEWAY


def test_the_pool_never_gives_the_gateway_network_or_broadcast_address():
    world = World(replace(CONFIG, first=IPv4Address("192.168.64.0"), last=IPv4Address("192.168.64.255")))
    given = {world.guest(number).lease(world.now) for number in range(253)}
    assert given == {f"192.168.64.{last}" for last in range(2, 255)}
    assert world.guest(999).discover(world.now) is None


def test_another_servers_offer_was_chosen(world):
    guest, other = world.guest(1), world.guest(2)
    offered = guest.discover(world.now)
    assert guest.send(dhcp4.REQUEST, {50: packed(offered), 54: packed("192.168.64.9")}, now=world.now) is None
    assert other.discover(world.now, {50: packed(offered)}) == offered


def test_a_lease_is_moved_not_doubled_when_its_address_is_in_conflict(world):
    guest = world.guest(1)
    address = guest.lease(world.now)
    world.book.release_mac(guest.mac)
    world.server.seen_arp(packed(address), b"\x02\0\0\0\0\x99", now=world.now)
    moved = guest.lease(world.now)
    assert moved != address
    assert len(world.book) == 1


# Lease time.


@pytest.mark.parametrize(("asked", "given"), [(3600, 3600), (5, 60), (0xFFFFFFFF, 86400), (86401, 86400)])
def test_a_shorter_lease_is_given_if_asked_for(world, asked, given):
    guest = world.guest(1)
    guest.options[51] = asked.to_bytes(4, "big")
    guest.lease(world.now)
    lease = world.book.by_mac(guest.mac)
    assert lease is not None
    assert lease.expires == int(NOW) + given


# REQUEST in its other states.


def test_a_rebooted_client_gets_its_address_back(world):
    guest = world.guest(1)
    address = guest.lease(world.now)
    world.now += 50_000
    assert guest.reboot(address, world.now).type() == dhcp4.ACK
    lease = world.book.by_mac(guest.mac)
    assert lease is not None
    assert lease.expires == int(world.now) + 86400


def test_a_rebooted_client_with_another_address_than_its_own_gets_a_nak(world):
    guest = world.guest(1)
    address = guest.lease(world.now)
    wrong = "192.168.64.200" if address != "192.168.64.200" else "192.168.64.201"
    assert guest.reboot(wrong, world.now).type() == dhcp4.NAK


def test_an_address_of_a_wrong_net_gets_a_nak_to_everybody(world):
    guest = world.guest(1)
    answer = guest.reboot("10.0.2.15", world.now)
    assert answer.type() == dhcp4.NAK
    assert dhcp4.MESSAGE_TEXT in answer.options
    assert answer.yiaddr == answer.ciaddr == answer.siaddr == bytes(4)
    assert dhcp4.LEASE_TIME not in answer.options
    assert (guest.reply.mac, guest.reply.ip, guest.reply.raw) == (ethernet.BROADCAST, b"\xff" * 4, True)
    assert guest.renew("10.0.2.15", world.now).type() == dhcp4.NAK


def test_an_unknown_rebooted_client_gets_a_free_address_at_once(world):
    assert world.guest(1).reboot("192.168.64.88", world.now).type() == dhcp4.ACK
    assert world.guest(2).reboot("192.168.64.88", world.now).type() == dhcp4.NAK


def test_a_server_that_is_not_authoritative_is_silent_to_the_unknown_as_rfc_2131_says():
    world = World(replace(CONFIG, authoritative=False))
    assert world.guest(1).reboot("192.168.64.88", world.now) is None
    assert world.guest(1).renew("192.168.64.88", world.now) is None
    assert world.guest(1).reboot("10.0.0.1", world.now).type() == dhcp4.NAK
    assert world.guest(1).lease(world.now)


def test_a_renewing_client_is_answered_by_udp_at_its_address(world):
    guest = world.guest(1)
    address = guest.lease(world.now)
    world.now += 43_200
    answer = guest.renew(address, world.now)
    assert answer.type() == dhcp4.ACK
    assert answer.ciaddr == answer.yiaddr == packed(address)
    assert (guest.reply.ip, guest.reply.port, guest.reply.raw) == (packed(address), 68, False)
    assert guest.reply.commit
    assert world.book.by_mac(guest.mac).expires == int(world.now) + 86400


def test_a_client_may_not_renew_the_address_of_another(world):
    victim = world.guest(1)
    address = victim.lease(world.now)
    thief = world.guest(2)
    assert thief.renew(address, world.now).type() == dhcp4.NAK
    assert thief.select(address, world.now).type() == dhcp4.NAK
    assert world.book.by_ip(IPv4Address(address)).mac == victim.mac


def test_an_offer_that_is_over_is_still_granted_while_nobody_has_the_address(world):
    guest = world.guest(1)
    offered = guest.discover(world.now)
    assert guest.select(offered, world.now + 60).type() == dhcp4.ACK


def test_an_offer_that_is_over_and_taken_gets_a_nak(world):
    guest, other = world.guest(1), world.guest(2)
    offered = guest.discover(world.now)
    world.now += 11
    assert other.discover(world.now, {50: packed(offered)}) == offered
    assert guest.select(offered, world.now).type() == dhcp4.NAK


def test_a_request_after_a_restart_of_the_server_is_granted(world):
    guest = world.guest(1)
    offered = guest.discover(world.now)
    guest.server = world.restart()
    assert guest.select(offered, world.now).type() == dhcp4.ACK


@pytest.mark.parametrize("options", [{}, {54: packed(GATEWAY)}, {50: b"\1\2\3"}, {50: bytes(4)}])
def test_a_request_for_nothing_is_malformed(world, options):
    assert world.guest(1).send(dhcp4.REQUEST, options, now=world.now) is None
    assert world.server.counters["malformed"] == 1


# INFORM, DECLINE, RELEASE.


def test_inform_gets_options_without_a_lease(world):
    guest = world.guest(1)
    answer = guest.send(dhcp4.INFORM, {55: bytes([6, 15])}, now=world.now, ciaddr=packed("192.168.64.250"))
    assert answer.type() == dhcp4.ACK
    assert answer.yiaddr == bytes(4)
    assert answer.options[6] == packed(GATEWAY)
    assert not {51, 58, 59} & answer.options.keys()
    assert (guest.reply.ip, guest.reply.raw, guest.reply.commit) == (packed("192.168.64.250"), False, False)
    assert len(world.book) == 0


@pytest.mark.parametrize("ciaddr", ["0.0.0.0", "8.8.8.8", GATEWAY])
def test_inform_from_elsewhere_is_ignored(world, ciaddr):
    assert world.guest(1).send(dhcp4.INFORM, now=world.now, ciaddr=packed(ciaddr)) is None
    assert world.server.counters["ignored"] == 1


def test_a_declined_address_is_kept_back_for_ten_minutes(world, caplog):
    guest = world.guest(1)
    address = guest.lease(world.now)
    with caplog.at_level(logging.WARNING):
        guest.decline(address, world.now)
    assert len(caplog.records) == 1
    assert world.book.by_mac(guest.mac) is None
    assert guest.discover(world.now, {50: packed(address)}) != address
    assert world.guest(2).reboot(address, world.now).type() == dhcp4.NAK
    world.now += 601
    assert world.guest(3).discover(world.now, {50: packed(address)}) == address


def test_nobody_declines_or_releases_the_address_of_another(world):
    victim = world.guest(1, port=1)
    address = victim.lease(world.now)
    for thief in (world.guest(2, port=2), world.guest(1, port=2)):
        thief.ip = address
        thief.decline(address, world.now)
        thief.ip = address
        thief.release(world.now)
    assert world.book.by_ip(IPv4Address(address)).mac == victim.mac


def test_a_release_that_names_another_server_is_ignored(world):
    guest = world.guest(1)
    address = guest.lease(world.now)
    guest.send(dhcp4.RELEASE, {54: packed("192.168.64.9")}, now=world.now, ciaddr=packed(address))
    assert world.book.by_mac(guest.mac) is not None


# Rapid commit.


def test_rapid_commit_gives_the_lease_at_once(world):
    guest = world.guest(1)
    answer = guest.send(dhcp4.DISCOVER, {80: b""}, now=world.now)
    assert answer.type() == dhcp4.ACK
    assert answer.options[80] == b""
    assert guest.reply.commit
    assert world.book.by_mac(guest.mac).ip.packed == answer.yiaddr


def test_without_rapid_commit_option_80_is_not_sent(world):
    guest = world.guest(1)
    assert 80 not in guest.send(dhcp4.DISCOVER, now=world.now).options


# Where answers go.


def test_an_offer_goes_to_the_client_or_to_everybody_by_its_flag(world):
    guest = world.guest(1)
    offered = guest.discover(world.now)
    assert (guest.reply.mac, guest.reply.ip, guest.reply.port) == (guest.mac, packed(offered), 68)
    assert guest.reply.raw
    guest.discover(world.now, flags=dhcp4.BROADCAST_FLAG)
    assert (guest.reply.mac, guest.reply.ip, guest.reply.raw) == (ethernet.BROADCAST, b"\xff" * 4, True)


def test_a_relayed_client_is_answered_through_its_relay_with_its_option_82(world):
    guest = world.guest(1)
    relay = {82: b"\1\4port\x97\3abc"}
    answer = guest.send(dhcp4.DISCOVER, relay, now=world.now, giaddr=packed("192.168.64.9"))
    assert answer.options[82] == relay[82]
    assert list(answer.options)[-1] == 82
    assert (guest.reply.ip, guest.reply.port, guest.reply.raw) == (packed("192.168.64.9"), 67, False)
    nak = guest.send(dhcp4.REQUEST, relay | {50: packed("10.0.0.1")}, now=world.now, giaddr=packed("192.168.64.9"))
    assert nak.type() == dhcp4.NAK
    assert nak.broadcast
    assert nak.options[82] == relay[82]


def test_option_82_without_a_relay_is_not_echoed(world):
    guest = world.guest(1)
    assert 82 not in guest.send(dhcp4.DISCOVER, {82: b"\1\1x"}, now=world.now).options


@pytest.mark.parametrize("relay", ["10.0.0.1", GATEWAY])
def test_a_relay_of_another_net_is_ignored(world, relay):
    assert world.guest(1).send(dhcp4.DISCOVER, now=world.now, giaddr=packed(relay)) is None


@pytest.mark.parametrize(
    ("option", "served"),
    [
        (b"\5\4" + packed("192.168.64.0"), True),
        (b"\5\4" + packed("10.0.0.0"), False),
        (b"\1\1x\5\4" + packed("10.0.0.0"), False),
        (b"\5\3\1\2\3", False),
        (b"\1\xff", True),
    ],
)
def test_a_relays_link_selection_is_heeded(world, option, served):
    answer = world.guest(1).send(dhcp4.DISCOVER, {82: option}, now=world.now, giaddr=packed("192.168.64.9"))
    assert (answer is not None) == served


# What is not answered.


def test_bootp_is_counted_and_not_answered(world):
    octets = dhcp4.build(Message(op=1, xid=1, chaddr=b"\x52\x54\0\0\0\1"))[0]
    assert world.server.handle(octets, source_mac=None, port=None, now=NOW) is None
    assert world.server.counters["bootp"] == 1


def test_replies_and_servers_messages_are_ignored(world):
    guest = world.guest(1)
    assert guest.send(dhcp4.DISCOVER, now=NOW, op=dhcp4.BOOTREPLY) is None
    for kind in (dhcp4.OFFER, dhcp4.ACK, dhcp4.NAK, 9, 0):
        assert guest.send(kind, now=NOW) is None
    assert world.server.counters["ignored"] == 6


@pytest.mark.parametrize("mac", [b"\1\0\x5e\0\0\1", b"\xff" * 6, bytes(6), CONFIG.gateway_mac, b""])
def test_impossible_hardware_addresses_are_malformed(world, mac):
    assert Guest(world.server, mac).send(dhcp4.DISCOVER, now=NOW) is None
    assert world.server.counters["malformed"] == 1


def test_hardware_that_is_not_ethernet_is_answered_by_broadcast(world):
    guest = Guest(world.server, bytes(range(1, 9)), client_id=b"\xffinfiniband")
    assert guest.discover(NOW, htype=32) is not None
    assert (guest.reply.mac, guest.reply.ip) == (ethernet.BROADCAST, b"\xff" * 4)


def test_a_client_identifier_that_repeats_the_mac_says_nothing_new(world):
    guest = world.guest(1)
    address = guest.lease(NOW)
    guest.client_id = b"\1" + guest.mac
    assert guest.lease(NOW) == address
    assert len(world.book) == 1


def test_an_endless_client_identifier_is_malformed(world):
    assert world.guest(1, client_id=b"x" * 256).send(dhcp4.DISCOVER, now=NOW) is None


def test_a_port_that_sends_too_much_is_not_heard_and_others_are():
    world = World(replace(CONFIG, rate=50))
    loud, calm = world.guest(1, port=1), world.guest(2, port=2)
    heard = sum(loud.discover(NOW) is not None for _ in range(200))
    assert heard == 50
    assert world.server.counters["limited"] == 150
    assert calm.discover(NOW) is not None
    assert loud.discover(NOW + 0.1) is not None


def test_leases_outside_a_changed_pool_are_forgotten():
    world = World()
    guest = world.guest(1)
    guest.lease(NOW)
    DhcpServer(
        replace(CONFIG, gateway=IPv4Address("10.0.0.1"), first=IPv4Address("10.0.0.2"), last=IPv4Address("10.0.0.9")),
        world.book,
    )
    assert len(world.book) == 0


# Ports.


def test_a_port_that_is_gone_takes_its_leases_along(world):
    guest = world.guest(1, port=1)
    address = guest.lease(NOW)
    world.server.port_added(1)
    world.server.port_gone(1)
    assert list(world.book) == []
    assert world.guest(1, port=2).lease(NOW) == address


def test_a_clone_gets_an_address_of_its_own(world):
    original, clone = world.guest(1, port=1, client_id=b"\xffid"), world.guest(2, port=2, client_id=b"\xffid")
    assert original.lease(NOW) != clone.lease(NOW)
    assert original.renew(original.ip, NOW).type() == dhcp4.ACK
    assert clone.renew(clone.ip, NOW).type() == dhcp4.ACK


def test_boot_loader_and_system_get_the_same_address(world):
    boot = world.guest(1, port=1)
    system = world.guest(1, port=1, client_id=b"\xff\0\0\0\1")
    assert boot.lease(NOW) == system.lease(NOW) == boot.lease(NOW)


# Whatever the bytes.


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10),
            st.dictionaries(
                st.sampled_from([12, 50, 51, 54, 55, 57, 61, 80, 81, 82, 108, 119]),
                st.binary(max_size=40) | st.sampled_from([packed(GATEWAY), packed("192.168.64.9"), bytes(4)]),
                max_size=6,
            ),
            st.sampled_from(["0.0.0.0", "192.168.64.9", "10.0.0.1", "255.255.255.255"]),
            st.sampled_from(["0.0.0.0", "192.168.64.8", "10.0.0.1"]),
            st.binary(min_size=6, max_size=6) | st.binary(max_size=16),
            st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
        ),
        max_size=12,
    )
)
@settings(max_examples=400, deadline=None)
def test_no_message_makes_the_server_fail(messages):
    world = small(5)
    for kind, options, ciaddr, giaddr, mac, edits in messages:
        message = Message(
            op=1, xid=1, chaddr=mac, options={53: bytes([kind])} | options, ciaddr=packed(ciaddr), giaddr=packed(giaddr)
        )
        octets = bytearray(dhcp4.build(message, limit=1472)[0])
        for at, value in edits:
            octets[at % len(octets)] = value
        world.now += 1
        reply = world.server.handle(bytes(octets), source_mac=None, port=1, now=world.now)
        if reply is not None:
            assert dhcp4.parse(reply.payload).op == dhcp4.BOOTREPLY
            assert len(reply.payload) <= CONFIG.mtu - 28
            assert reply.raw or reply.ip not in {bytes(4), b"\xff" * 4, packed(GATEWAY)}
            assert reply.port == (67 if dhcp4.parse(reply.payload).giaddr != bytes(4) else 68)
