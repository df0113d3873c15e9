"""The UDP uplink on loopback: the outside is 127.0.0.2, whose address the flow's inner socket takes as well."""

from __future__ import annotations

import os
import select
import socket
import time
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.errors import HostError
from openvmnet.kernel.loop import Lane
from openvmnet.uplink import udp
from openvmnet.uplink.udp import UdpUplink
from openvmnet.wire import ip
from tests.uplink.benching import closed, turn

if TYPE_CHECKING:
    from collections.abc import Callable

GUEST, OTHER, OUTSIDE = (socket.inet_aton(one) for one in ("127.0.0.1", "127.0.0.3", "127.0.0.2"))


class Bench:
    def __init__(self, *, limit: int = 100) -> None:
        self.lane = Lane()
        self.written: list[bytes] = []
        self.fail: Exception | None = None
        self.uplink = UdpUplink(self.lane, self._transparent, self.written.append, 1500, limit)
        self.server = self._socket("127.0.0.2")
        self.port = self.server.getsockname()[1]
        self.guest = self._socket("127.0.0.1")

    def _socket(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, 0))
        sock.settimeout(1)
        return sock

    def _transparent(self) -> int:
        if self.fail is not None:
            raise self.fail
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock.detach()

    def open(self, payload: bytes = b"x", *, src: bytes = GUEST, sport: int = 0, dport: int = 0) -> None:
        packet = ip.build_udp(src, OUTSIDE, sport or self.guest.getsockname()[1], dport or self.port, payload)
        packet = packet[:4] + src[2:] + packet[6:]  # the port, as the firewall writes it: one for each address here
        self.uplink.open(packet, ip.parse(packet))

    def step(self, seconds: float = 0.02) -> None:
        turn(self.lane, seconds)

    def close(self) -> None:
        self.uplink.close()
        assert len(self.uplink) == 0
        assert self.uplink._owners == {}
        self.server.close()
        self.guest.close()
        self.lane.close()


def benched(**options):
    return closed(lambda: Bench(**options))


def test_first_answers_and_the_rest():
    with benched() as bench:
        bench.open(b"first")
        data, caller = bench.server.recvfrom(100)
        assert data == b"first"
        for payload in (b"answer", b"", bytes(60000)):
            bench.server.sendto(payload, caller)
            bench.step()
            assert bench.guest.recvfrom(65536) == (payload, ("127.0.0.2", bench.port))
        bench.guest.sendto(b"second", ("127.0.0.2", bench.port))  # finds the flow's socket, not the slow path
        bench.step()
        assert bench.server.recvfrom(100) == (b"second", caller)
        assert bench.uplink.counters["udp_opened"] == 1


def test_a_datagram_that_comes_by_the_slow_path_again_is_of_the_same_flow():
    with benched() as bench:
        bench.open(b"1")
        bench.open(b"2")
        (one, caller), (other, again) = bench.server.recvfrom(10), bench.server.recvfrom(10)
        assert (one, other, caller) == (b"1", b"2", again)
        assert len(bench.uplink) == 1


@pytest.mark.parametrize("answered", [False, True])
def test_a_flow_that_idles_ends(monkeypatch, answered):
    with benched() as bench:
        bench.open()
        _, caller = bench.server.recvfrom(10)
        if answered:
            bench.server.sendto(b"y", caller)
            bench.step()
        limit = udp.IDLE_ANSWERED if answered else udp.IDLE_NEW
        begin = time.monotonic()
        for age, left in ((limit - 2, 1), (limit + 2, 0)):
            monkeypatch.setattr(time, "monotonic", lambda age=age: begin + age)
            bench.uplink.sweep()
            monkeypatch.undo()
            assert len(bench.uplink) == left


def test_the_idlest_flow_of_who_has_most_gives_way():
    with benched(limit=10) as bench:
        bench.open(src=OTHER, sport=5000)
        bench.open(src=OTHER, sport=5001)
        for sport in range(6000, 6050):
            bench.open(sport=sport)
        kept = sorted(int.from_bytes(key[8:10], "big") for key in bench.uplink._flows)
        assert kept == [5000, 5001, *range(6042, 6050)]
        assert bench.uplink.counters["udp_evicted"] == 42


def test_a_ports_flows_rest_together_while_others_want_the_thread():
    with benched() as bench:
        later: list[Callable[[], None]] = []
        bench.uplink.later = lambda _, work: later.append(work)
        callers = []
        for sport in (6000, 6001):
            bench.open(sport=sport)
            callers.append(bench.server.recvfrom(10)[1])
        bench.open(src=OTHER, sport=5000)
        another = bench.server.recvfrom(10)[1]
        delivered = mock.Mock(return_value=1)
        bench.uplink._deliver = lambda flow, _: delivered(flow.owner)
        ours, theirs = int.from_bytes(GUEST[2:], "big"), int.from_bytes(OTHER[2:], "big")
        bench.uplink.allows = lambda owner: owner != ours
        for caller in (*callers, another):
            bench.server.sendto(b"y", caller)
        bench.step()
        assert delivered.mock_calls == [mock.call(theirs)]
        assert len(later) == 1  # one rest for all of them, and nothing spins
        bench.uplink.allows = lambda _: True
        later[0]()
        bench.step()
        assert delivered.mock_calls == [mock.call(theirs), mock.call(ours), mock.call(ours)]


def test_a_port_beyond_its_budget_has_the_thread_while_nobodys_tcp_wants_it(monkeypatch):
    with benched() as bench:
        bench.open()
        (number,) = bench.uplink._owners
        moved = [0]
        bench.uplink.turns = lambda but: moved[0] if but == number else -1
        bench.uplink.budget = mock.Mock(crowded=True, allows=lambda _: False)
        begin = time.monotonic()
        allowed = []
        for second, turns in enumerate((0, 5, 100, 100)):
            moved[0] = turns
            monkeypatch.setattr(time, "monotonic", lambda second=second: begin + second)
            allowed.append(bench.uplink.allows(number))
        assert allowed == [True, True, False, True]
        assert bench.uplink.allows(number + 1)  # whose first flow it would be
        monkeypatch.setattr(time, "monotonic", lambda: begin + 5)
        moved[0] = 200
        bench.open(sport=6000)
        assert (len(bench.uplink), bench.uplink.counters["udp_dropped"]) == (1, 1)


@pytest.mark.parametrize("failing", [0, 1, 2])  # the nest itself, the guest's socket, the host's
def test_a_flow_that_cannot_be_watched_has_not_begun(monkeypatch, failing):
    real, epolls = select.epoll, []

    class Epoll:
        def __init__(self) -> None:
            if failing == 0:
                raise OSError(24, "Too many open files")
            self._epoll, self._watched = real(), 0
            epolls.append(self)

        def register(self, fd: int, events: int) -> None:
            self._watched += 1
            if self._watched == failing:
                raise OSError(28, "No space left on device")
            self._epoll.register(fd, events)

        def __getattr__(self, name: str) -> object:
            return getattr(self._epoll, name)

    with benched() as bench:
        monkeypatch.setattr("openvmnet.kernel.watches.select.epoll", Epoll)
        bench.open()
        monkeypatch.undo()
        assert (len(bench.uplink), bench.uplink._owners) == (0, {})
        assert bench.uplink.counters["udp_dropped"] == 1
        assert all(one.closed for one in epolls)


def test_a_flow_in_use_is_not_the_idlest(monkeypatch):
    with benched(limit=3) as bench:
        for sport in (6000, 6001, 6002):
            bench.open(sport=sport)
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        bench.open(sport=6000)
        bench.open(sport=6003)
        monkeypatch.undo()
        assert sorted(int.from_bytes(key[8:10], "big") for key in bench.uplink._flows) == [6000, 6002, 6003]


def test_a_closed_port_is_told_for_each_datagram():
    with benched() as bench:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.2", 0))
            closed = free.getsockname()[1]
        for number in range(1, 4):
            # Not by the flow's inner socket, which on loopback would hear what is meant for the outside.
            bench.open(dport=closed, src=OTHER, sport=5000)
            bench.step()
            assert len(bench.written) == number
        error = bench.written[0]
        assert (ip.parse(error).src, ip.parse(error).dst, error[20:22]) == (OUTSIDE, OTHER, bytes((3, 3)))
        quoted = ip.build_udp(OTHER, OUTSIDE, 5000, closed, b"x")
        assert (error[28:32], error[34:]) == (quoted[:4], quoted[6:])  # the port stands between them


@pytest.mark.parametrize("error", [HostError("the agent is gone"), OSError(24, "Too many open files")])
def test_without_a_socket_of_the_namespace_the_datagram_is_dropped(error):
    with benched() as bench:
        bench.fail = error
        before = set(os.listdir("/proc/self/fd"))
        bench.open()
        assert set(os.listdir("/proc/self/fd")) == before
        assert len(bench.uplink) == 0
        assert bench.uplink.counters["udp_dropped"] == 1


def test_a_guest_that_is_gone_takes_its_flows_with_it():
    with benched() as bench:
        for sport in (6000, 6001):
            bench.open(sport=sport)
            bench.open(src=OTHER, sport=sport)
        bench.uplink.forget_guest(GUEST)
        assert {key[:4] for key in bench.uplink._flows} == {OTHER}


def test_settling_ends_and_passes_on_no_strangers_datagrams(monkeypatch):
    """What comes between bind(2) and connect(2) may be anybody's; and a guest that sends faster than its datagrams are
    passed on must not hold the thread."""
    with benched() as bench, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        bind = udp.sockets.bind

        def bind_and_hear(fd: int, peer: bytes) -> None:
            bind(fd, peer)
            for number in range(20):
                bench.guest.sendto(b"%d" % number, ("127.0.0.2", bench.port))
                stranger.sendto(b"not for you", ("127.0.0.2", bench.port))

        monkeypatch.setattr(udp.sockets, "bind", bind_and_hear)
        bench.server.close()  # else it hears them too
        bench.open(b"first")
        assert bench.uplink.counters["udp_dropped"] == 20
        assert len(bench.uplink) == 1
    monkeypatch.undo()
    assert udp._SETTLE * 768 >= 2 * udp._BUFFER  # all that the buffer holds


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_any_datagram_is_survived(payload):
    with benched(limit=2) as bench:
        packet = ip.build(GUEST, OUTSIDE, ip.UDP, payload)
        bench.uplink.open(packet, ip.parse(packet))
        assert len(bench.uplink) <= 2
        length = int.from_bytes(payload[4:6], "big")
        if len(payload) < 8 or not 8 <= length <= len(payload):
            assert len(bench.uplink) == 0
