"""The slow path over a socketpair in the TUN's place, with uplinks that only write down what they are given."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.budget import WINDOW
from openvmnet.kernel.loop import Lane
from openvmnet.uplink import slowpath
from openvmnet.uplink.slowpath import SlowPath
from openvmnet.wire import ip

if TYPE_CHECKING:
    from collections.abc import Callable

GUEST, OUTSIDE = socket.inet_aton("192.168.64.2"), socket.inet_aton("203.0.113.1")


class Uplink:
    def __init__(self) -> None:
        self.opened: list[tuple[bytes, ip.Header]] = []
        self.error: Exception | None = None

    def __len__(self) -> int:
        return 0  # flows, as an uplink has none before its first packet

    def open(self, packet: bytes, header: ip.Header) -> None:
        self.opened.append((packet, header))
        if self.error is not None:
            raise self.error


class Bench:
    def __init__(self) -> None:
        self.lane = Lane()
        self.kernel, tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.kernel.setblocking(False)
        tun.setblocking(False)
        self.path = SlowPath(self.lane, tun.detach())
        self.udp, self.tcp = Uplink(), Uplink()
        self.later: list[Callable[[], None]] = []
        self.path.later = lambda _, work: self.later.append(work)
        self.path.uplinks = {ip.UDP: self.udp, ip.TCP: self.tcp}
        self.path.start()

    def feed(self, *packets: bytes) -> None:
        for packet in packets:
            self.kernel.send(packet)
            self.lane.select(0)

    def close(self) -> None:
        self.path.close()
        self.kernel.close()
        self.lane.close()


@pytest.fixture
def bench():
    made = Bench()
    yield made
    made.close()


def test_each_protocol_goes_to_its_uplink(bench):
    one = ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")
    other = ip.build(GUEST, OUTSIDE, ip.TCP, bytes(20))
    bench.feed(one, other, ip.build(GUEST, OUTSIDE, ip.ICMP, bytes(8)))
    assert bench.udp.opened == [(one, ip.parse(one))]
    assert bench.tcp.opened == [(other, ip.parse(other))]
    assert bench.path.counters["slowpath_packets"] == 3


def test_of_another_protocol_the_sender_is_told(bench):
    gateway = socket.inet_aton("192.168.64.1")
    bench.path.uplinks[slowpath.OTHERS] = slowpath.Refusal(bench.path.write, gateway, ip, ip.PROTOCOL)
    packet = ip.build(GUEST, OUTSIDE, 41, b"payload")
    bench.feed(packet, ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x"))
    assert bench.kernel.recv(2000) == ip.build_error(gateway, packet, ip.UNREACHABLE, ip.PROTOCOL)
    assert len(bench.udp.opened) == 1
    with pytest.raises(BlockingIOError):
        bench.kernel.recv(2000)


def test_fragments_are_put_together(bench):
    whole = ip.build_udp(GUEST, OUTSIDE, 1, 2, bytes(range(200)))
    for start, flags in ((0, 0x2000), (96, 0x2000 | 12), (192, 24)):
        part = whole[20 + start : 20 + start + 96]
        piece = ip.build(GUEST, OUTSIDE, ip.UDP, part, identification=5)
        bench.feed(piece[:6] + flags.to_bytes(2, "big") + piece[8:])
    ((packet, header),) = bench.udp.opened
    assert packet[20:] == whole[20:]
    assert header.total == len(whole)


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=10))
def test_any_packets_are_survived(packets):
    bench = Bench()
    bench.feed(*packets)
    assert bench.path.counters["slowpath_packets"] == len(packets)
    good = ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")
    bench.feed(good)
    assert bench.udp.opened[-1][0] == good
    bench.close()


def test_an_uplink_that_raises_closes_the_way_for_nobody(bench, caplog):
    bench.udp.error = ZeroDivisionError()
    with caplog.at_level(logging.ERROR):
        bench.feed(*[ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")] * 5)
    assert bench.path.counters["slowpath_failed"] == 5
    assert len(caplog.records) == 1
    bench.feed(ip.build(GUEST, OUTSIDE, ip.TCP, bytes(20)))
    assert len(bench.tcp.opened) == 1


def test_a_turn_is_bounded(bench):
    bench.kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sent = 0
    packet = ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")
    try:
        while sent < 2 * slowpath.PACKETS:
            bench.kernel.send(packet)
            sent += 1
    except BlockingIOError:
        pass
    bench.lane.select(0)
    assert len(bench.udp.opened) == min(sent, slowpath.PACKETS)
    bench.lane.select(0)
    assert len(bench.udp.opened) == min(sent, 2 * slowpath.PACKETS)


def of_port(number: int, packet: bytes) -> bytes:
    """`packet` as the firewall hands it over."""
    return packet[:4] + number.to_bytes(2, "big") + packet[6:]


def test_beyond_its_budget_a_guest_waits_and_its_neighbour_does_not(bench, monkeypatch):
    monkeypatch.setattr(slowpath, "WAITING", 20)
    clock, wall = [0.0], [1.0]
    budget = bench.path.budget
    budget._cpu = lambda: clock[0]
    budget._wall = lambda: wall[0]
    budget.crowded = True

    class Slow(Uplink):
        def open(self, packet, header):
            super().open(packet, header)
            clock[0] += 0.01

    slow = bench.path.uplinks[ip.UDP] = Slow()
    for number in range(30):
        bench.feed(of_port(1, ip.build_udp(GUEST, OUTSIDE, number, 2, b"x")))
    assert 3 <= len(slow.opened) <= 5  # 0.3 of 0.1 s
    assert bench.path.counters["slowpath_over_budget"] == 30 - 20 - len(slow.opened)  # what found its queue full
    before = len(slow.opened)
    bench.feed(of_port(1, ip.build_udp(socket.inet_aton("192.168.64.3"), OUTSIDE, 1, 2, b"x")))
    assert len(slow.opened) == before  # an address made up is no other guest
    bench.feed(of_port(2, ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")))
    assert len(slow.opened) == before + 1
    assert len(bench.later) == 1
    while bench.later:
        waited = len(slow.opened)
        wall[0] += 1.01 * WINDOW
        bench.later.pop()()
        assert len(slow.opened) <= waited + 5
    numbers = [int.from_bytes(packet[20:22]) for packet, _ in slow.opened if packet[4:6] == b"\0\1"]
    assert numbers == list(range(len(numbers)))  # in their order
    assert len(slow.opened) == before + 20 + 1


def test_what_is_beyond_the_budget_holds_nobody_up(bench, monkeypatch):
    """A neighbour's packet behind a queue of them is read in the same turn."""
    monkeypatch.setattr(slowpath, "SHARED", 2)
    bench.path.budget = mock.Mock(crowded=True, allows=lambda owner: owner != 1)
    for owner in (1, 1, 1, 1, 1, 2):
        bench.kernel.send(of_port(owner, ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")))
    bench.lane.select(0)
    assert len(bench.udp.opened) == 1
    assert bench.path.counters["slowpath_over_budget"] == 0
    bench.path.budget.crowded = False  # the other has left
    bench.path.budget.allows = lambda _: True
    for work in bench.later:
        work()
    bench.lane.select(0)
    bench.lane.select(0)
    assert len(bench.udp.opened) == 6


def test_ports_have_their_turns_one_after_the_other(bench, monkeypatch):
    monkeypatch.setattr(slowpath, "SHARED", 2)
    monkeypatch.setattr(slowpath, "WAITING", 3)
    bench.path.budget = mock.Mock(crowded=True, allows=lambda _: True)
    for owner, number in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 4), (3, 5)):
        bench.kernel.send(of_port(owner, ip.build_udp(GUEST, OUTSIDE, number, 2, b"x")))

    def opened() -> list[int]:
        return [int.from_bytes(packet[20:22], "big") for packet, _ in bench.udp.opened]

    bench.lane.select(0)
    assert opened() == [0, 4]
    assert bench.path.counters["slowpath_over_budget"] == 1  # number 3 found its queue full
    bench.lane.select(0)
    assert opened() == [0, 4, 5, 1]
    bench.path.budget.crowded = False  # the others have left; what waits has its turn all the same
    bench.feed(ip.build_udp(GUEST, OUTSIDE, 6, 2, b"x"))
    for _ in range(3):
        bench.lane.select(0)
    assert sorted(opened()) == [0, 1, 2, 4, 5, 6]
    assert bench.path._queues == {}


def test_what_waits_goes_with_the_path(bench, monkeypatch):
    monkeypatch.setattr(slowpath, "SHARED", 1)
    bench.path.budget = mock.Mock(crowded=True, allows=lambda _: True)
    for _ in range(3):
        bench.kernel.send(of_port(1, ip.build_udp(GUEST, OUTSIDE, 1, 2, b"x")))
    bench.lane.select(0)
    bench.path.close()
    bench.lane.select(0)
    assert len(bench.udp.opened) == 1
    bench.path.close = lambda: None


def test_what_the_kernel_does_not_take_is_lost(bench):
    bench.path.write(b"a packet")
    assert bench.kernel.recv(100) == b"a packet"
    for _ in range(10_000):
        bench.path.write(bytes(1000))
    assert os.get_blocking(bench.path._tun) is False
