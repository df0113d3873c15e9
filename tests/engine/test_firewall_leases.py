"""Addresses by lease in a real namespace: each is its port's alone; its TCP takes the short way through the rules."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from openvmnet.engine.linux.firewall_bridge import BROADCASTS
from tests.engine.taps import BROADCAST, GATEWAY, GATEWAY_MAC, net

pytestmark = pytest.mark.kernel

OUTSIDE = "203.0.113.1"
ME, MY_IP = "52:54:00:00:00:01", "192.168.64.2"
PAD = Raw(bytes(20))


@pytest.fixture(scope="module")
def world(lab, tmp_path_factory):
    """Two guests that have their addresses by lease."""
    with net(tmp_path_factory.mktemp("net")) as made:
        pairs = {(guest.ip, guest.link) for guest in (made.plug(), made.plug())}
        made.do(made.engine.guard(pairs, set()))
        yield made


@pytest.fixture
def leased(world):
    """The two, with nothing waiting."""
    world.quiet()
    return world.guests


def test_an_address_by_lease_is_its_ports_alone(world, leased):
    a, b = leased
    for packet in (
        IP(src=b.ip, dst="192.168.64.99") / TCP(sport=9, dport=9, flags="S"),
        IP(src=b.ip, dst="192.168.64.99") / UDP(sport=9, dport=9) / PAD,
        ARP(op=2, hwsrc=ME, psrc=b.ip, pdst="192.168.64.99"),
    ):
        assert world.passes(Ether(src=a.mac, dst=BROADCAST) / packet, a, b) == []
        assert world.passes(Ether(src=b.mac, dst=BROADCAST) / packet, b, a) != []


def test_tcp_from_a_leased_address_is_known_by_its_port(world, leased):
    a, b = leased
    segment = TCP(sport=1000, dport=80, flags="S")
    frame = Ether(src=a.mac, dst=b.mac) / IP(src=a.ip, dst=b.ip) / segment
    assert world.passes(frame, a, b) == [bytes(frame)]
    for guest in (a, b):
        guest.send(Ether(src=guest.mac, dst=BROADCAST) / ARP(op=1, hwsrc=guest.mac, psrc=guest.ip, pdst=GATEWAY))
        guest.send(Ether(src=guest.mac, dst=GATEWAY_MAC) / IP(src=guest.ip, dst=OUTSIDE) / segment)
        (packet,) = world.packets()
        assert IP(packet).id == guest.number


@pytest.mark.parametrize(
    "frame",
    [
        Ether(src=GATEWAY_MAC, dst=BROADCAST) / IP(src=MY_IP, dst="192.168.64.9") / TCP(),
        Ether(src=ME, dst=GATEWAY_MAC) / IP(src=MY_IP, dst="127.0.0.1") / TCP(dport=80, flags="S"),
        Ether(src=ME, dst=BROADCAST) / Dot1Q(vlan=0) / IP(src=MY_IP, dst="127.9.9.9") / TCP(dport=80, flags="S"),
        Ether(src=ME, dst=BROADCAST) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / IP(src=MY_IP, dst="192.168.64.9") / TCP(),
    ],
    ids=["gateway's MAC", "loopback destination", "tagged loopback destination", "two tags"],
)
def test_a_leased_address_excuses_nothing(world, leased, frame):
    a, b = leased
    before = world.counters()["spoofed"]
    assert world.passes(frame, a, b) == []
    assert world.counters()["spoofed"] == before + 1


def test_an_address_that_is_given_back_is_nobodys(world, leased):
    a, b = leased
    frame = Ether(src=a.mac, dst=b.mac) / IP(src="192.168.64.50", dst=b.ip) / TCP(flags="S")
    tie = {("192.168.64.50", b.link)}
    world.do(world.engine.guard(tie, set()))
    assert world.passes(frame, a, b) == []
    world.do(world.engine.guard(set(), tie))
    assert world.passes(frame, a, b) == [bytes(frame)]


def test_a_storm_of_tcp_from_a_leased_address_is_one(world, leased):
    a, _ = leased
    before = world.counters()["storm"]
    frame = bytes(Ether(src=a.mac, dst=BROADCAST) / IP(src=a.ip, dst="192.168.64.255") / TCP())
    for _ in range(4 * BROADCASTS):
        a.send(frame)
    assert world.counters()["storm"] > before
