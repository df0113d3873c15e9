"""UDP of a guest, through a whole network, to an internet of the lab's."""

from __future__ import annotations

import errno
import os
import select
import socket
import time

import pytest

from lab.world import BLACKHOLE, PROHIBITED, SERVER, UNREACHABLE, WEB
from tests.netns import descriptors, eventually, flows, real_root, view

pytestmark = pytest.mark.kernel
IP_RECVERR, IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_PMTUDISC_PROBE, IP_MTU = 11, 10, 2, 3, 14


@pytest.fixture
def ask(guest):
    """A UDP socket of the guest's, connected: `ask(SERVER, 7)`."""
    made = []

    def make(address: str, port: int) -> socket.socket:
        sock = guest.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(2)
        sock.connect((address, port))
        made.append(sock)
        return sock

    yield make
    for sock in made:
        sock.close()


def echo(sock: socket.socket, payload: bytes) -> bytes:
    sock.send(payload)
    return sock.recv(70000)


@pytest.mark.parametrize("size", [1, 1472, 1473, 8000, 65507])
def test_a_first_datagram_of_any_size_is_answered(ask, size):
    payload = os.urandom(size)
    assert echo(ask(SERVER, 7), payload) == payload


def test_later_datagrams_of_any_size_are_answered(ask):
    sock = ask(SERVER, 7)
    for size in (5, 65507, 1473, 1472, 40000, 1):
        payload = os.urandom(size)
        assert echo(sock, payload) == payload


def test_empty_datagrams_arrive_both_ways(guest, world):
    with (
        world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        server.bind((SERVER, 9104))
        sock.connect((SERVER, 9104))
        for one in (server, sock):
            one.settimeout(2)
        for _ in range(3):  # the first opens the flow
            sock.send(b"")
            data, caller = server.recvfrom(10)
            assert data == b""
            server.sendto(b"", caller)
            assert sock.recv(10) == b""


def test_what_opens_a_flow_stays_the_first(guest, world):
    """It is handled apart from those behind it, of which some take the slow path and some find the flow's socket."""
    with world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((SERVER, 9105))
        server.settimeout(2)
        for port in range(44000, 44020):
            with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind(("0.0.0.0", port))
                sock.connect((SERVER, 9105))
                for number in range(8):
                    sock.send(b"%d" % number)
                got = [server.recv(10) for _ in range(8)]
                assert got[0] == b"0"
                assert sorted(got) == [b"%d" % number for number in range(8)]


def test_flows_are_told_apart(ask):
    """By both ends: one destination from two ports, two destinations from one."""
    socks = [ask(SERVER, 7), ask(SERVER, 7), ask(WEB, 7)]
    for number, sock in enumerate(socks):
        sock.send(b"%d" % number)
    assert [sock.recv(10) for sock in socks] == [b"0", b"1", b"2"]


def test_an_answer_comes_from_where_it_was_asked(guest):
    with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        for address in (SERVER, WEB):
            sock.sendto(b"x", (address, 7))
            assert sock.recvfrom(10) == (b"x", (address, 7))


def test_only_the_asked_one_may_answer(guest, world):
    """The host's socket is connected: nobody else outside reaches the guest through it."""
    with (
        world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        server.bind((SERVER, 9100))
        stranger.bind((SERVER, 9101))
        for one in (server, sock):
            one.settimeout(2)
        sock.sendto(b"x", (SERVER, 9100))
        _, caller = server.recvfrom(10)
        stranger.sendto(b"unasked", caller)
        server.sendto(b"asked", caller)
        assert sock.recvfrom(10) == (b"asked", (SERVER, 9100))
        assert not select.select([sock], [], [], 0.1)[0]


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        (SERVER, 99, errno.ECONNREFUSED),
        (UNREACHABLE, 7, errno.EHOSTUNREACH),
        (PROHIBITED, 7, errno.EHOSTUNREACH),
        ("169.254.169.254", 53, errno.ENETUNREACH),
    ],
    ids=["port", "host", "prohibited", "metadata"],
)
def test_errors_come_back(ask, address, port, expected):
    sock = ask(address, port)
    sock.setsockopt(socket.SOL_IP, IP_RECVERR, 1)  # else Linux tells an application of some errors only
    for _ in range(3 if address == SERVER else 1):  # each datagram has its own; a router tells only so many a second
        sock.send(b"x")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
            sock.recv(10)
        assert caught.value.errno == expected


def test_the_error_names_the_router_that_sent_it(ask):
    sock = ask(UNREACHABLE, 7)
    sock.setsockopt(socket.SOL_IP, IP_RECVERR, 1)
    sock.send(b"what it is about")
    assert eventually(lambda: _failed(sock))
    _, ancillary, _, where = sock.recvmsg(100, 512, socket.MSG_ERRQUEUE)
    assert where == (UNREACHABLE, 7)
    ((_, _, extended),) = ancillary
    assert extended[4:7] == bytes((2, 3, 1))  # from ICMP: destination unreachable, host
    assert socket.inet_ntoa(extended[20:24]) == "192.0.2.1"


def _failed(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def test_what_does_not_answer_is_silent(ask):
    sock = ask(BLACKHOLE, 7)
    sock.settimeout(0.3)
    sock.send(b"x")
    with pytest.raises(TimeoutError):
        sock.recv(10)


@real_root("a receive buffer beyond net.core.rmem_max")
def test_a_burst_arrives_whole(guest, world):
    """As QUIC sends: hundreds of datagrams of 1,200 octets without a pause; the first of them opens the flow."""
    with (
        world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        server.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
        sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
        server.bind((SERVER, 9102))
        server.settimeout(1)
        sock.settimeout(1)
        sock.connect((SERVER, 9102))
        for number in range(300):
            sock.send(b"%04d" % number + bytes(1196))
        got, caller = [], None
        while len(got) < 300:
            data, caller = server.recvfrom(2000)
            got.append(int(data[:4]))
        assert sorted(got) == list(range(300))
        for number in range(150):
            server.sendto(b"%04d" % number + bytes(1196), caller)
        assert [int(sock.recv(2000)[:4]) for _ in range(150)] == list(range(150))


@pytest.fixture
def narrow(world):
    world.narrow(1200)
    yield 1200
    world.narrow(1500)
    for namespace in (world.host, world.internet):
        namespace.run(["ip", "route", "flush", "cache"])


def test_a_narrow_path_is_told_with_its_mtu(ask, guest, narrow):
    guest.run(["ip", "route", "flush", "cache"])
    sock = ask(SERVER, 7)
    sock.setsockopt(socket.SOL_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
    assert echo(sock, b"small") == b"small"

    def too_big() -> bool:
        try:
            sock.send(bytes(1400))
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        time.sleep(0.05)
        return False

    assert eventually(too_big)
    assert sock.getsockopt(socket.SOL_IP, IP_MTU) == narrow
    time.sleep(0.05)
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # of those that were under way
    assert echo(sock, bytes(narrow - 28)) == bytes(narrow - 28)
    guest.run(["ip", "route", "flush", "cache"])


def test_a_narrow_path_is_passed_in_fragments_by_who_does_not_mind(ask, guest, narrow):
    guest.run(["ip", "route", "flush", "cache"])
    sock = ask(SERVER, 7)
    sock.setsockopt(socket.SOL_IP, IP_MTU_DISCOVER, 0)
    assert eventually(lambda: _try(sock, os.urandom(1400)))
    assert _try(sock, os.urandom(5000))


def _try(sock: socket.socket, payload: bytes) -> bool:
    sock.settimeout(0.5)
    try:
        return echo(sock, payload) == payload
    except TimeoutError:
        return False


def test_many_flows_are_bounded(guest, network, world):
    before = descriptors(network.pid)
    with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for port in range(10000, 16000):
            sock.sendto(b"x", (BLACKHOLE, port))
            if port % 100 == 0:
                time.sleep(0.02)
    shown = view(network, world)
    assert shown["flows"]["udp"] <= 4096
    assert shown["counters"]["udp_evicted"] > 0
    assert descriptors(network.pid) - before <= 2 * 4096 + 64


def test_a_socket_closed_by_the_guest_is_no_trouble(guest, network, world):
    """Its kernel answers late datagrams with an ICMP error, which ends at the gateway."""
    with world.internet.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((SERVER, 9103))
        server.settimeout(2)
        with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("0.0.0.0", 43000))
            sock.sendto(b"x", (SERVER, 9103))
            _, caller = server.recvfrom(10)
        for _ in range(20):
            server.sendto(b"late", caller)
            time.sleep(0.002)
        with guest.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.bind(("0.0.0.0", 43000))
            sock.sendto(b"again", (SERVER, 9103))
            assert server.recvfrom(10) == (b"again", caller)
            server.sendto(b"heard", caller)
            assert sock.recv(10) == b"heard"
    assert flows(network, world)["udp"] >= 1
