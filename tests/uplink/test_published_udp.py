"""A published UDP port on loopback: the guest is a socket of the test's, asked by an ordinary socket."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from unittest import mock

import pytest

from openvmnet.errors import HostError
from openvmnet.kernel.loop import Lane
from openvmnet.uplink import published_udp
from openvmnet.uplink.published_udp import PublishedUdp
from openvmnet.uplink.target import Target
from openvmnet.uplink.udp import UdpUplink
from tests.uplink.benching import closed, turn

LOOPBACK = socket.inet_aton("127.0.0.1")
OWNER = 7


def udp(address: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    sock.settimeout(1)
    return sock


class Bench:
    def __init__(self, *, limit: int = 100) -> None:
        self.lane = Lane()
        self.written: list[bytes] = []
        self.uplink = UdpUplink(self.lane, lambda: -1, self.written.append, 1500, limit)
        self.guest, host = udp(), udp("0.0.0.0")
        host.setsockopt(socket.SOL_IP, 8, 1)  # IP_PKTINFO
        host.setblocking(False)
        self.number = host.getsockname()[1]
        self.address: bytes | None = LOOPBACK
        self.fail: Exception | None = None
        self.counters = {"published_opened": 0, "published_refused": 0, "published_dropped": 0}
        guest_port = self.guest.getsockname()[1].to_bytes(2, "big")
        target = Target(OWNER, guest_port, lambda: self.address, self._connector, self.counters)
        self.port = PublishedUdp(self.lane, self.uplink, host, target)
        self.port.start()

    def _connector(self, size: int) -> int:
        assert size == 4
        if self.fail is not None:
            raise self.fail
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock.detach()

    def step(self, seconds: float = 0.02) -> None:
        turn(self.lane, seconds)

    def close(self) -> None:
        self.port.close()
        self.uplink.forget_port(OWNER)
        assert len(self.uplink) == 0
        self.guest.close()
        self.lane.close()


def benched(**options):
    return closed(lambda: Bench(**options))


def test_each_client_is_a_flow_and_is_answered_from_where_it_asked():
    with benched() as bench, udp() as one, udp() as other:
        peers = {}
        for client, where in ((one, "127.0.0.1"), (other, "127.0.0.5")):
            for number in range(3):
                client.sendto(b"%d" % number, (where, bench.number))
                bench.step()
                data, peers[client] = bench.guest.recvfrom(100)
                assert data == b"%d" % number
        assert peers[one] != peers[other]
        for client, where in ((one, "127.0.0.1"), (other, "127.0.0.5")):
            bench.guest.sendto(b"answer", peers[client])
            bench.step()
            assert client.recvfrom(100) == (b"answer", (where, bench.number))
        assert (len(bench.uplink), bench.counters["published_opened"]) == (2, 2)


def test_the_port_is_nobody_elses_all_the_time():
    with benched() as bench, udp() as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
                thief.bind(("127.0.0.1", bench.number))
            client.sendto(b"x", ("127.0.0.1", bench.number))
            bench.step()


def test_what_came_before_the_flow_was_connected_reaches_the_guest_and_each_its_own_flow():
    with benched() as bench, udp() as one, udp() as other:
        drain = published_udp._drain

        def meanwhile(sock: socket.socket):
            if sock.family == socket.AF_INET and sock.getsockname()[1] == bench.number:
                strays = [(b"late", one.getsockname()), (b"stray", other.getsockname())]
                return drain(sock) + ([] if len(bench.uplink) else strays)
            return drain(sock)

        with mock.patch.object(published_udp, "_drain", meanwhile):
            one.sendto(b"first", ("127.0.0.1", bench.number))
            bench.step()
        came = [bench.guest.recvfrom(100) for _ in range(3)]
        assert [data for data, _ in came] == [b"first", b"late", b"stray"]
        assert came[0][1] == came[1][1] != came[2][1]
        bench.guest.sendto(b"answer", came[2][1])
        bench.step()
        assert other.recv(100) == b"answer"


def test_a_flood_of_clients_pushes_out_the_idlest_of_its_own():
    with benched(limit=4) as bench, contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(udp()).sendto(b"x", ("127.0.0.1", bench.number))
        bench.step(0.05)
        assert len(bench.uplink) == 4
        assert bench.uplink.counters["udp_evicted"] == 6


def test_without_a_guest_or_a_socket_it_is_counted_and_nothing_is_left():
    with benched() as bench, udp() as client:
        for fail, address in ((HostError("no agent"), LOOPBACK), (OSError(24, "too many"), LOOPBACK), (None, None)):
            bench.fail, bench.address = fail, address
            client.sendto(b"x", ("127.0.0.1", bench.number))
            bench.step()
        assert bench.counters == {"published_opened": 0, "published_refused": 1, "published_dropped": 2}
        assert len(bench.uplink) == 0


def test_a_client_that_is_gone_is_an_icmp_error_for_the_guest():
    with benched() as bench:
        with udp() as client:
            client.sendto(b"x", ("127.0.0.1", bench.number))
            bench.step()
            _, peer = bench.guest.recvfrom(10)
        bench.guest.sendto(b"answer", peer)
        bench.step()
        (message,) = bench.written
        assert message[20:22] == b"\x03\x03"  # port unreachable, about the guest's own datagram
        quoted = message[28:]
        assert quoted[12:16] == LOOPBACK
        assert quoted[20:24] == bench.guest.getsockname()[1].to_bytes(2, "big") + peer[1].to_bytes(2, "big")


def test_while_others_share_the_thread_it_rests_beyond_its_share():
    with benched() as bench, udp() as client:
        later = []
        bench.uplink.later = lambda _, work: later.append(work)
        with mock.patch.object(bench.uplink, "budget") as budget:
            budget.allows.return_value = False
            client.sendto(b"x", ("127.0.0.1", bench.number))
            bench.step()
        assert (len(later), len(bench.uplink)) == (1, 0)
        later[0]()
        bench.step()
        assert bench.guest.recv(10) == b"x"
