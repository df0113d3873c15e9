"""UDP over IPv6 of a guest, through a whole network, to an internet of the lab's: as over IPv4."""

from __future__ import annotations

import errno
import os
import select
import socket
import time

import pytest

from lab.world import BLACKHOLE6, PROHIBITED6, ROUTER6, SERVER6, UNREACHABLE6, WEB6
from tests.netns import eventually, flows, real_root

pytestmark = pytest.mark.kernel
IPV6_RECVERR, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO, IPV6_PMTUDISC_PROBE, IPV6_MTU = 25, 23, 2, 3, 24


@pytest.fixture
def ask(guest):
    """A UDP socket of the guest's, connected: `ask(SERVER6, 7)`."""
    made = []

    def make(address: str, port: int) -> socket.socket:
        sock = guest.socket(socket.AF_INET6, socket.SOCK_DGRAM)
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


@pytest.mark.parametrize("size", [1, 1452, 1453, 8000, 65527])
def test_a_first_datagram_of_any_size_is_answered(ask, size):
    payload = os.urandom(size)
    assert echo(ask(SERVER6, 7), payload) == payload


def test_later_datagrams_of_any_size_are_answered(ask):
    sock = ask(SERVER6, 7)
    for size in (5, 65527, 1453, 1452, 40000, 1):
        payload = os.urandom(size)
        assert echo(sock, payload) == payload


def test_empty_datagrams_arrive_both_ways(guest, world):
    with (
        world.internet.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server,
        guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
    ):
        server.bind((SERVER6, 9104))
        sock.connect((SERVER6, 9104))
        for one in (server, sock):
            one.settimeout(2)
        for _ in range(3):  # the first opens the flow
            sock.send(b"")
            data, caller = server.recvfrom(10)
            assert data == b""
            server.sendto(b"", caller)
            assert sock.recv(10) == b""


def test_flows_are_told_apart(ask):
    socks = [ask(SERVER6, 7), ask(SERVER6, 7), ask(WEB6, 7)]
    for number, sock in enumerate(socks):
        sock.send(b"%d" % number)
    assert [sock.recv(10) for sock in socks] == [b"0", b"1", b"2"]


def test_only_who_was_asked_may_answer(guest, world):
    with (
        world.internet.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server,
        world.internet.socket(socket.AF_INET6, socket.SOCK_DGRAM) as stranger,
        guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
    ):
        server.bind((SERVER6, 9100))
        stranger.bind((SERVER6, 9101))
        for one in (server, sock):
            one.settimeout(2)
        sock.sendto(b"x", (SERVER6, 9100))
        _, caller = server.recvfrom(10)
        assert caller[0] == "2001:db8:1::2"
        stranger.sendto(b"unasked", caller)
        server.sendto(b"asked", caller)
        data, sender = sock.recvfrom(10)
        assert (data, sender[:2]) == (b"asked", (SERVER6, 9100))
        assert not select.select([sock], [], [], 0.1)[0]


@pytest.mark.parametrize(
    ("address", "port", "expected"),
    [
        (SERVER6, 99, errno.ECONNREFUSED),
        (UNREACHABLE6, 7, errno.ENETUNREACH),
        (PROHIBITED6, 7, errno.EACCES),
        ("fec0::1", 53, errno.ENETUNREACH),
    ],
    ids=["port", "route", "prohibited", "site-local"],
)
def test_errors_come_back(ask, address, port, expected):
    sock = ask(address, port)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    for _ in range(3 if address == SERVER6 else 1):
        sock.send(b"x")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
            sock.recv(10)
        assert caught.value.errno == expected


def test_a_host_without_ipv6_says_so_at_once(ask, world):
    world.ipv6(on=False)
    try:
        sock = ask(SERVER6, 7)
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        begin = time.monotonic()
        sock.send(b"x")
        with pytest.raises(OSError, match=os.strerror(errno.ENETUNREACH)):
            sock.recv(10)
        assert time.monotonic() - begin < 0.1
    finally:
        world.ipv6(on=True)


def test_the_error_names_the_router_that_sent_it(ask):
    sock = ask(UNREACHABLE6, 7)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    sock.send(b"what it is about")
    assert eventually(lambda: _failed(sock))
    _, ancillary, _, where = sock.recvmsg(100, 512, socket.MSG_ERRQUEUE)
    assert where[:2] == (UNREACHABLE6, 7)
    ((_, _, extended),) = ancillary
    assert extended[4:7] == bytes((3, 1, 0))  # from ICMPv6: destination unreachable, no route
    assert socket.inet_ntop(socket.AF_INET6, extended[24:40]) == ROUTER6


def _failed(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def test_what_does_not_answer_is_silent(ask):
    sock = ask(BLACKHOLE6, 7)
    sock.settimeout(0.3)
    sock.send(b"x")
    with pytest.raises(TimeoutError):
        sock.recv(10)


@real_root("a receive buffer beyond net.core.rmem_max")
def test_a_burst_arrives_whole(guest, world):
    """In segmented messages, both ways."""
    with (
        world.internet.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server,
        guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
    ):
        server.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
        sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)
        server.bind((SERVER6, 9102))
        server.settimeout(1)
        sock.settimeout(1)
        sock.connect((SERVER6, 9102))
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
    world.narrow(1300)
    yield 1300
    world.narrow(1500)
    for namespace in (world.host, world.internet):
        namespace.run(["ip", "-6", "route", "flush", "cache"])


def test_a_narrow_path_is_told_with_its_mtu(ask, guest, narrow):
    sock = ask(SERVER6, 7)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO)
    assert echo(sock, b"small") == b"small"

    def too_big() -> bool:
        try:
            sock.send(bytes(1400))
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        time.sleep(0.05)
        return False

    assert eventually(too_big)
    assert sock.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU) == narrow
    time.sleep(0.05)
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # of those that were under way
    assert echo(sock, bytes(narrow - 48)) == bytes(narrow - 48)
    guest.run(["ip", "-6", "route", "flush", "cache"])


def test_a_narrow_path_is_passed_in_fragments_by_who_does_not_mind(ask, guest, narrow):
    """Linux's default: its own kernel learns of the path and fragments."""
    sock = ask(SERVER6, 7)
    sock.settimeout(0.5)
    for size in (1400, 5000):
        assert eventually(lambda size=size: _try(sock, os.urandom(size)))
    guest.run(["ip", "-6", "route", "flush", "cache"])


def _try(sock: socket.socket, payload: bytes) -> bool:
    try:
        return echo(sock, payload) == payload
    except OSError:
        return False


def test_a_hop_limit_is_counted_outside(ask, world, guest):
    """As traceroute does it, which sees the gateway, then the router."""
    out = guest.run(["traceroute", "-6", "-n", "-w", "1", "-q", "1", "-m", "5", "-U", "-p", "33434", SERVER6]).stdout
    hops = [line.split()[1] for line in out.splitlines()[1:]]
    assert hops[1:] == [ROUTER6, SERVER6]


def test_a_socket_closed_by_the_guest_is_no_trouble(guest, network, world):
    with world.internet.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind((SERVER6, 9103))
        server.settimeout(2)
        with guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(("::", 43000))
            sock.sendto(b"x", (SERVER6, 9103))
            _, caller = server.recvfrom(10)
        for _ in range(20):
            server.sendto(b"late", caller)
            time.sleep(0.002)
        with guest.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.settimeout(2)
            sock.bind(("::", 43000))
            sock.sendto(b"again", (SERVER6, 9103))
            assert server.recvfrom(10) == (b"again", caller)
            server.sendto(b"heard", caller)
            assert sock.recv(10) == b"heard"
    assert flows(network, world)["udp"] >= 1
