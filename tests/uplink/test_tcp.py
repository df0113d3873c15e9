"""The TCP uplink on loopback: the test is the guest's kernel, and connects to the listener when its SYN comes back."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet.kernel import sockets
from openvmnet.kernel.loop import Lane
from openvmnet.uplink import account, tcp
from openvmnet.uplink.tcp import TcpUplink
from openvmnet.wire import ip
from tests.uplink.benching import turn
from tests.uplink.pumping import reset

pytestmark = pytest.mark.usefixtures("crowd")

GATEWAY = socket.inet_aton("192.168.64.1")
LOOPBACK = socket.inet_aton("127.0.0.1")


def syn(sport: int, dport: int, *, sequence: int = 1, flags: int = ip.SYN, src: bytes = LOOPBACK) -> bytes:
    segment = struct.pack("!HHIIBBHHH", sport, dport, sequence, 0, 0x50, flags, 64240, 0, 0)
    packet = ip.build(src, LOOPBACK, ip.TCP, segment)
    return packet[:4] + src[2:] + packet[6:]  # the port, as the firewall writes it: one for each address here


class Bench:
    crowded = False

    def __init__(self, *, limit: int = 1000) -> None:
        self.lane = Lane()
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(64)
        self.listener.setblocking(False)
        self.written: list[bytes] = []
        self.uplink = TcpUplink(
            self.lane, self.listener, self.written.append, GATEWAY, lambda work: work(), limit
        )  # fmt: skip
        self.uplink.crowded = self.crowded
        self.server = socket.socket()
        self.server.bind(("127.0.0.1", 0))
        self.server.listen(64)
        self.server.settimeout(2)
        self.port = self.server.getsockname()[1]
        # A listener whose queue is full: the kernel drops further SYNs, and their senders wait.
        self.stuck = socket.socket()
        self.stuck.bind(("127.0.0.1", 0))
        self.stuck.listen(0)
        self.fill = socket.create_connection(self.stuck.getsockname())
        self.waiting = self.stuck.getsockname()[1]

    def open(self, packet: bytes) -> None:
        self.uplink.open(packet, ip.parse(packet))

    def ask(self) -> tuple[int, bytes]:
        """A guest's SYN to the server, which accepts it: the guest's port, and the packet."""
        port = free_port()
        packet = syn(port, self.port)
        self.open(packet)
        self.step()
        return port, packet

    def step(self, seconds: float = 0.02) -> None:
        turn(self.lane, seconds)

    def guest(self, port: int, address: str = "127.0.0.1") -> socket.socket:
        """Complete the guest's handshake."""
        sock = socket.socket()
        sock.bind((address, port))
        sock.settimeout(2)
        sock.connect(self.listener.getsockname())
        return sock

    def close(self) -> None:
        self.uplink.close()
        assert (self.uplink.pending(), len(self.uplink.flows)) == (0, 0)
        accounts = self.uplink.accounts
        assert (len(accounts), accounts.openings, accounts.held) == (0, 0, 0)
        for sock in (self.server, self.stuck, self.fill):
            sock.close()
        self.lane.close()


@contextlib.contextmanager
def benched(**options):
    before = set(os.listdir("/proc/self/fd"))
    made = Bench(**options)
    # The listener is not transparent here, so the test says where the guest wanted to go.
    with mock.patch.object(sockets, "local", return_value=made.port.to_bytes(2, "big") + LOOPBACK):
        try:
            yield made
        finally:
            made.close()
    assert set(os.listdir("/proc/self/fd")) == before


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_a_syn_comes_back_when_the_outside_has_accepted_and_becomes_a_flow():
    with benched() as bench:
        port, packet = bench.ask()
        assert bench.written == [packet]
        assert bench.uplink.pending() == 1
        with bench.guest(port) as guest:
            outside, _ = bench.server.accept()
            with outside:
                outside.settimeout(2)
                bench.step()
                assert (bench.uplink.pending(), len(bench.uplink.flows)) == (0, 1)
                guest.sendall(b"there")
                outside.sendall(b"and back")
                bench.step()
                assert (outside.recv(10), guest.recv(10)) == (b"there", b"and back")
        bench.step()
        assert len(bench.uplink.flows) == 0


def test_a_refusal_is_a_reset():
    with benched() as bench:
        packet = syn(4000, free_port(), sequence=77)
        bench.open(packet)
        bench.step()
        assert bench.written == [ip.build_reset(packet, ip.parse(packet))]
        assert bench.uplink.counters["tcp_refused"] == 1
        assert bench.uplink.pending() == 0


def test_an_unreachable_destination_is_an_icmp_error():
    with benched() as bench:
        packet = bytearray(syn(4000, 80))
        packet[16:20] = socket.inet_aton("255.255.255.255")  # connect(2): no route, or not allowed
        bench.open(bytes(packet))
        bench.step()
        (error,) = bench.written
        assert ip.parse(error).src == GATEWAY
        assert error[20] == ip.UNREACHABLE
        assert error[28:] == bytes(packet)


def test_a_repeated_syn_opens_nothing_new_and_the_newest_counts():
    """Its sender may have begun anew: the sequence number that comes back has to be its own."""
    with benched() as bench:
        for sequence in (1, 1, 2):
            bench.open(syn(4000, bench.waiting, sequence=sequence))
        assert bench.uplink.pending() == 1
        port = free_port()
        bench.open(syn(port, bench.port, sequence=1))
        bench.step()
        for sequence in (1, 9):
            bench.open(syn(port, bench.port, sequence=sequence))
        assert bench.written == [syn(port, bench.port, sequence=one) for one in (1, 1, 9)]
        assert bench.uplink.pending() == 2


def test_a_syn_that_is_late_opens_nothing():
    """It was sent again while the first one waited here, and comes when the guest has its connection already."""
    with benched() as bench:
        port, packet = bench.ask()
        with bench.guest(port), bench.server.accept()[0]:
            bench.step()
            bench.open(packet)
            bench.step()
            assert bench.written == [packet, packet]  # the kernel knows what to answer
            assert (bench.uplink.pending(), len(bench.uplink.flows)) == (0, 1)
            bench.server.settimeout(0.1)
            with pytest.raises(TimeoutError):
                bench.server.accept()
        bench.step()
        assert bench.uplink.live == {}


def test_a_guest_that_has_reset_its_connection_may_begin_anew_at_once():
    """Its SYN is read before the reset is."""
    with benched() as bench:
        port, _ = bench.ask()
        guest = bench.guest(port)
        first, _ = bench.server.accept()
        bench.step()
        reset(guest)
        with first:
            bench.open(syn(port, bench.port, sequence=9))
            assert (bench.uplink.pending(), len(bench.uplink.flows)) == (1, 1)
            bench.step()
            assert (bench.uplink.pending(), len(bench.uplink.flows)) == (1, 0)
            with bench.guest(port), bench.server.accept()[0]:
                bench.step()
                assert [flow.key for flow in bench.uplink.flows] == list(bench.uplink.live)


@pytest.mark.parametrize("flags", [ip.ACK, ip.SYN | ip.ACK, ip.FIN | ip.ACK, ip.SYN | ip.FIN, 0])
def test_what_is_no_syn_goes_back_and_opens_nothing(flags):
    with benched() as bench:
        packet = syn(4000, bench.port, flags=flags)
        bench.open(packet)
        assert bench.written == [packet]
        assert bench.uplink.pending() == 0


@given(st.binary(max_size=40))
def test_any_segment_is_survived(segment):
    with benched() as bench:
        # To a port that waits, whatever the bytes say, and from nobody's address.
        packet = ip.build(LOOPBACK, LOOPBACK, ip.TCP, segment[:2] + bench.waiting.to_bytes(2, "big") + segment[4:])
        bench.uplink.open(packet, ip.parse(packet))


def test_one_guest_has_so_many_openings(monkeypatch):
    monkeypatch.setattr(account, "OPENINGS_PER_OWNER", 8)
    with benched() as bench:
        for port in range(4000, 4020):
            bench.open(syn(port, bench.waiting))
        assert bench.uplink.pending() == 8
        assert bench.uplink.counters["tcp_dropped"] == 12
        bench.open(syn(4000, bench.waiting, src=socket.inet_aton("127.0.0.9")))
        assert bench.uplink.pending() == 9


def test_all_have_so_many_and_one_never_all():
    with benched(limit=16) as bench:
        for port in range(4000, 4030):
            bench.open(syn(port, bench.waiting))
        assert bench.uplink.pending() == 14
        for port in range(4000, 4030):
            bench.open(syn(port, bench.waiting, src=socket.inet_aton("127.0.0.9")))
        assert bench.uplink.pending() == 16


def test_a_guest_that_does_not_come_is_not_waited_for(monkeypatch):
    with benched() as bench:
        bench.open(syn(free_port(), bench.port))
        bench.step()
        outside, _ = bench.server.accept()
        with outside:
            bench.uplink.sweep()
            assert bench.uplink.pending() == 1
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now + tcp.ACCEPT_TIMEOUT + 1)
            bench.uplink.sweep()
            monkeypatch.undo()
            assert bench.uplink.pending() == 0
            outside.settimeout(2)
            with pytest.raises(ConnectionResetError):
                outside.recv(1)


def test_a_connection_that_nobody_opened_is_reset():
    with benched() as bench:
        with bench.guest(0) as stranger:
            bench.step()
            with pytest.raises(ConnectionResetError):
                stranger.recv(1)
        assert bench.uplink.counters["tcp_stray"] == 1


def test_a_guest_that_is_gone_takes_all_with_it():
    with benched() as bench:
        port = free_port()
        bench.open(syn(port, bench.port))
        bench.open(syn(4001, bench.waiting))
        bench.open(syn(4002, bench.waiting, src=socket.inet_aton("127.0.0.9")))
        bench.step()
        with bench.guest(port) as guest:
            bench.step()
            assert (bench.uplink.pending(), len(bench.uplink.flows)) == (2, 1)
            bench.uplink.forget_guest(LOOPBACK)
            assert (bench.uplink.pending(), len(bench.uplink.flows)) == (1, 0)
            with pytest.raises(ConnectionResetError):
                guest.recv(1)


def test_a_port_that_is_gone_takes_along_what_it_opened():
    with benched() as bench:
        ours, another = socket.inet_aton("127.0.0.9"), socket.inet_aton("127.0.0.8")
        for source in (ours, another):
            bench.open(syn(4001, bench.waiting, src=source))  # nobody answers
            bench.open(syn(4002, bench.port, src=source))
        bench.step()
        assert (bench.uplink.pending(), len(bench.written)) == (4, 2)
        bench.uplink.forget_port(9)
        assert bench.uplink.pending() == 2
        assert (bench.uplink.accounts.of(9).held, bench.uplink.accounts.of(8).held) == (0, 2)


def test_whose_tcp_moves_is_known_by_port():
    with benched() as bench:
        port = free_port()
        bench.open(syn(port, bench.port))  # of 127.0.0.1, whose port is number 1 here
        bench.step()
        with bench.guest(port) as guest:
            bench.step()
            before = bench.uplink.turns(2)
            for _ in range(3):
                guest.sendall(b"x")
                bench.step()
            assert bench.uplink.turns(2) == before + 3
            assert bench.uplink.turns(1) == 0
        bench.step()
        bench.uplink.forget_port(1)
        assert bench.uplink.turns(2) == 0


def test_a_ports_connection_waits_for_a_few_of_anothers_at_a_time():
    """The flow that becomes ready last, of another port than the many before it, is among the first to be served."""
    with benched() as bench, contextlib.ExitStack() as keep:
        bench.uplink.crowded = True
        many = [keep.enter_context(bench.guest(bench.ask()[0])) for _ in range(30)]
        port = free_port()
        bench.open(syn(port, bench.port, src=socket.inet_aton("127.0.0.9")))
        bench.step()
        ours = keep.enter_context(bench.guest(port, "127.0.0.9"))
        bench.step()
        for guest in [*many, ours]:
            guest.sendall(b"x")
        moved = bench.uplink.pool.turns
        before = moved[1], moved[9]
        bench.lane.select(0)
        assert (moved[1] - before[0], moved[9] - before[1]) == (tcp.SLICE, 1)
        bench.step()
        assert moved[1] - before[0] == len(many)


def test_what_was_opened_before_there_were_several_stays_where_it_is():
    with benched() as bench:
        bench.uplink.crowded = False
        port, _ = bench.ask()
        bench.uplink.crowded = True
        with bench.guest(port) as guest:
            bench.step()
            with bench.server.accept()[0] as outside:
                guest.sendall(b"there")
                bench.step()
                assert outside.recv(10) == b"there"


def test_a_port_without_a_descriptor_for_its_nest_shares_the_lane(monkeypatch):
    with benched() as bench:
        bench.uplink.crowded = True
        with monkeypatch.context() as patch:
            patch.setattr("openvmnet.kernel.watches.select.epoll", mock.Mock(side_effect=OSError(24, "Too many")))
            assert bench.uplink.home(5) is bench.lane
        assert bench.uplink.home(5) is bench.uplink.home(5) is not bench.lane


def test_a_flow_that_lives_gets_keep_alive():
    with benched() as bench:
        port = free_port()
        bench.open(syn(port, bench.port))
        bench.step()
        with bench.guest(port):
            bench.step()
            (flow,) = bench.uplink.flows
            bench.uplink.sweep()
            for fd in (flow.guest, flow.host):
                with socket.socket(fileno=os.dup(fd)) as view:
                    assert view.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                    assert view.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == tcp.KEEPALIVE_IDLE


def test_a_reset_flow_whose_peer_takes_nothing_is_given_up(monkeypatch):
    with benched() as bench:
        port = free_port()
        bench.open(syn(port, bench.port))
        bench.step()
        with bench.guest(port):
            bench.step()
            (flow,) = bench.uplink.flows
            flow.lost = time.monotonic()
            bench.uplink.sweep()
            assert len(bench.uplink.flows) == 1
            now = time.monotonic()
            monkeypatch.setattr(time, "monotonic", lambda: now + tcp.LOST_TIMEOUT + 1)
            bench.uplink.sweep()
            monkeypatch.undo()
            assert len(bench.uplink.flows) == 0


def test_without_descriptors_a_syn_is_dropped(monkeypatch):
    with benched() as bench:

        def refuse() -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("openvmnet.kernel.sockets.tcp", refuse)
        bench.open(syn(4000, bench.port))
        assert (bench.written, bench.uplink.pending()) == ([], 0)
        assert bench.uplink.counters["tcp_dropped"] == 1
