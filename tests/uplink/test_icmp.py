"""The echo uplink with ping sockets on loopback, in the lab's own namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.kernel.loop import Lane
from openvmnet.uplink import icmp
from openvmnet.uplink.icmp import IcmpUplink
from openvmnet.wire import ip
from tests.netns import ping_sockets, real_root
from tests.uplink.benching import turn

pytestmark = pytest.mark.kernel
GUEST, OTHER, OUTSIDE = (socket.inet_aton(one) for one in ("192.168.64.2", "192.168.64.3", "127.0.0.1"))


@pytest.fixture(scope="module", autouse=True)
def allowed(lab):
    with ping_sockets():
        yield


def request(
    identifier: int, sequence: int, data: bytes = b"data", *, src: bytes = GUEST, dst: bytes = OUTSIDE
) -> bytes:
    return ip.build_echo_request(src, dst, identifier, sequence, data)


class Bench:
    def __init__(self) -> None:
        self.lane = Lane()
        self.written: list[bytes] = []
        self.uplink = IcmpUplink(self.lane, self.written.append)

    def open(self, packet: bytes) -> None:
        self.uplink.open(packet, ip.parse(packet))

    def step(self, seconds: float = 0.01) -> None:
        turn(self.lane, seconds)


@contextlib.contextmanager
def benched():
    before = set(os.listdir("/proc/self/fd"))
    made = Bench()
    yield made
    made.uplink.close()
    made.lane.close()
    assert len(made.uplink) == 0
    assert set(os.listdir("/proc/self/fd")) == before


def echoes(packets: list[bytes]) -> list[tuple[int, int, int, bytes]]:
    """Type, identifier, sequence and data of each."""
    return [(packet[20], *struct.unpack_from("!HH", packet, 24), packet[28:]) for packet in packets]


def test_it_knows_what_the_host_allows():
    assert icmp.allowed()


def test_replies_bear_the_guests_identifier_sequence_and_data():
    with benched() as bench:
        for sequence in (1, 2, 700):
            bench.open(request(0xBEEF, sequence, b"the data %d" % sequence))
        bench.step()
        assert echoes(bench.written) == [(0, 0xBEEF, n, b"the data %d" % n) for n in (1, 2, 700)]
        assert all((ip.parse(one).src, ip.parse(one).dst) == (OUTSIDE, GUEST) for one in bench.written)
        assert len(bench.uplink) == 1


def test_identifiers_and_guests_are_told_apart():
    with benched() as bench:
        for identifier, src in ((1, GUEST), (2, GUEST), (1, OTHER)):
            bench.open(request(identifier, 1, src=src))
        bench.step()
        answered = {(ip.parse(one).dst, struct.unpack_from("!H", one, 24)[0]) for one in bench.written}
        assert answered == {(GUEST, 1), (GUEST, 2), (OTHER, 1)}
        bench.uplink.forget_guest(GUEST)
        assert len(bench.uplink) == 1


def test_the_largest_echo():
    with benched() as bench:
        bench.open(request(1, 1, bytes(65507)))
        bench.step()
        assert [len(one) for one in bench.written] == [65535]


def test_an_unreachable_destination_is_told_at_once():
    with benched() as bench:
        packet = request(1, 1, dst=socket.inet_aton("198.51.100.9"))  # no route in here
        bench.open(packet)
        (error,) = bench.written
        assert (ip.parse(error).dst, error[20]) == (GUEST, ip.UNREACHABLE)
        assert len(bench.uplink) == 0


def test_the_table_is_bounded(monkeypatch):
    monkeypatch.setattr(icmp, "LIMIT", 8)
    with benched() as bench:
        for identifier in range(50):
            bench.open(request(identifier, 1))
        assert len(bench.uplink) == 8
        bench.step()
        assert {echo[1] for echo in echoes(bench.written)} >= set(range(42, 50))


def test_an_identifier_that_idles_ends(monkeypatch):
    with benched() as bench:
        bench.open(request(1, 1))
        begin = time.monotonic()
        for age, left in ((icmp.IDLE - 1, 1), (icmp.IDLE + 1, 0)):
            monkeypatch.setattr(time, "monotonic", lambda age=age: begin + age)
            bench.uplink.sweep()
            monkeypatch.undo()
            assert len(bench.uplink) == left


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40))
def test_any_message_is_survived(message):
    with benched() as bench:
        packet = ip.build(GUEST, OUTSIDE, ip.ICMP, message)
        bench.uplink.open(packet, ip.parse(packet))
        bench.step(0.001)
        assert len(bench.uplink) == (len(message) >= 8 and message[0] == ip.ECHO_REQUEST)


@real_root("a range of no group")
def test_without_permission_requests_are_counted():
    setting = Path("/proc/sys/net/ipv4/ping_group_range")
    before = setting.read_text()
    setting.write_text("1 0")
    try:
        with benched() as bench:
            bench.open(request(1, 1))
            assert bench.written == []
            assert bench.uplink.counters["icmp_forbidden"] == 1
            assert not icmp.allowed()
    finally:
        setting.write_text(before)
