"""TCP over IPv6 of a guest, through a whole network, to an internet of the lab's: as over IPv4."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time

import pytest

from lab.world import BLACKHOLE, BLACKHOLE6, HOST6, PROHIBITED6, SERVER, SERVER6, UNREACHABLE6, WEB6
from tests.netns import descriptors, dial, eventually, flows, inside, listen, pair, receive
from tests.uplink.pumping import reset

pytestmark = pytest.mark.kernel
DATA = os.urandom(4 << 20)


def refused(guest, where: str, port: int = 80, timeout: float = 5) -> tuple[int, float]:
    """The errno with which a connection fails, 0 for none within `timeout`, and after how many seconds.

    A namespace for a guest hears an ICMP error while it is still in connect(2), where Linux only notes it; SO_ERROR
    tells of it, and a blocking connect(2) would tell after the second SYN. A VM's answers come later.
    """
    begin = time.monotonic()
    with guest.socket(socket.AF_INET6) as sock:
        sock.setblocking(False)
        number = sock.connect_ex((where, port))
        while number in (0, errno.EINPROGRESS) and time.monotonic() - begin < timeout:
            time.sleep(0.002)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return 0 if number == errno.EINPROGRESS else number, time.monotonic() - begin


def test_a_closed_port_is_refused_at_once(guest):
    number, seconds = refused(guest, SERVER6, 99)
    assert number == errno.ECONNREFUSED
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("where", "number"),
    [(UNREACHABLE6, errno.ENETUNREACH), (PROHIBITED6, errno.EACCES)],
)
def test_what_a_router_says_is_said(guest, where, number):
    """After a second here: the lab's router answers the host within connect(2), too."""
    assert refused(guest, where)[0] == number


@pytest.mark.parametrize(
    "where",
    ["fec0::1", "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "2002:7f00:1::1", "2002:a9fe:a9fe::1"],
)
def test_what_is_never_forwarded_says_so_at_once(guest, where):
    number, seconds = refused(guest, where)
    assert number in (errno.ENETUNREACH, errno.EACCES)
    assert seconds < 0.5


def test_what_does_not_answer_is_silent(guest):
    assert refused(guest, BLACKHOLE6, timeout=0.5)[0] == 0


def test_a_host_without_ipv6_says_so_at_once(guest, world):
    """Happy eyeballs goes on with IPv4 without a pause."""
    world.ipv6(on=False)
    try:
        number, seconds = refused(guest, SERVER6)
        assert number == errno.ENETUNREACH
        assert seconds < 0.1
        fetched = guest.run(["curl", "-s", "-m", "5", "-w", "%{time_total}", "--resolve",
                             f"www:80:[{SERVER6}],203.0.113.80", "http://www/whoami"]).stdout  # fmt: skip
        assert fetched.startswith("192.0.2.2\n")
        assert float(fetched.split()[-1]) < 0.15  # curl would wait 0.2 s for an answer to IPv6
    finally:
        world.ipv6(on=True)
    with dial(guest, (SERVER6, 7)):
        pass


def test_a_host_whose_ipv6_is_turned_off_says_so_at_once(guest, world):
    world.host.sysctl("net.ipv6.conf.eth0.disable_ipv6", 1)
    try:
        number, seconds = refused(guest, SERVER6)
        assert number == errno.ENETUNREACH
        assert seconds < 0.1
    finally:
        world.host.sysctl("net.ipv6.conf.eth0.disable_ipv6", 0)
        with contextlib.suppress(RuntimeError):
            world.host.batch("route del default via 2001:db8:1::1")
        world.host.batch(f"addr replace {HOST6}/64 dev eth0 nodad", "route add default via 2001:db8:1::1")


def test_bytes_arrive_both_ways(guest):
    with dial(guest, (SERVER6, 7)) as sock:
        writer = threading.Thread(target=sock.sendall, args=(DATA,))
        writer.start()
        assert receive(sock, len(DATA)) == DATA
        writer.join()


def test_the_outside_sees_the_host(guest):
    with dial(guest, (SERVER6, 13)) as sock:
        assert receive(sock, 100).startswith(f"{HOST6} ".encode())


def test_the_guest_half_closes(guest):
    with dial(guest, (SERVER6, 14)) as sock:
        sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, 100) == b"%d\n" % len(DATA)


def test_the_outside_half_closes(guest, world):
    one, other = pair(guest, world.internet, (SERVER6, 9001))
    with one, other:
        other.sendall(b"first and last")
        other.shutdown(socket.SHUT_WR)
        assert receive(one, 100) == b"first and last"
        one.sendall(DATA)
        one.shutdown(socket.SHUT_WR)
        assert receive(other, len(DATA) + 1) == DATA


@pytest.mark.parametrize("side", [0, 1], ids=["guest", "outside"])
def test_a_reset_is_a_reset(guest, world, side):
    ends = pair(guest, world.internet, (SERVER6, 9002))
    ends[0].sendall(b"some")
    assert receive(ends[1], 4) == b"some"
    reset(ends[side])
    with pytest.raises(ConnectionResetError):
        ends[1 - side].recv(10)
    ends[1 - side].close()


def test_a_connection_is_accepted_when_the_outside_accepts(guest, world):
    with listen(world.internet, (SERVER6, 9003), backlog=0) as listener:
        first = dial(guest, (SERVER6, 9003))
        late = guest.socket(socket.AF_INET6)
        late.setblocking(False)
        late.connect_ex((SERVER6, 9003))
        time.sleep(0.3)
        assert not _connected(late)
        listener.accept()[0].close()
        assert eventually(lambda: _connected(late), 4)
        late.close()
        first.close()


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def test_openings_from_one_port_go_each_to_its_own(guest, world):
    places = [(SERVER6, 9004), (WEB6, 9004), (SERVER6, 9005), (WEB6, 9005)]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listen(world.internet, place)) for place in places]
        for port in range(41000, 41005):
            socks = [stack.enter_context(guest.socket(socket.AF_INET6)) for _ in places]
            for sock, place in zip(socks, places, strict=True):
                sock.setblocking(False)
                for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                    sock.setsockopt(socket.SOL_SOCKET, option, 1)
                sock.bind(("::", port))
                sock.connect_ex(place)
            for number, listener in enumerate(listeners):
                with listener.accept()[0] as accepted:
                    accepted.sendall(b"%d" % number)
            for number, sock in enumerate(socks):
                sock.settimeout(5)
                assert receive(sock, 10) == b"%d" % number


@pytest.mark.parametrize("server", [7, 13], ids=["after a reset", "when the outside closed first"])
def test_a_port_may_be_used_again(guest, server):
    for _ in range(20):
        with dial(guest, (SERVER6, server), port=42000 + server, timeout=0.8) as sock:
            if server == 13:
                assert receive(sock, 100)
            else:
                sock.sendall(b"x")
                assert receive(sock, 1) == b"x"
                reset(sock)


def test_both_versions_at_once_are_told_apart(guest, world):
    """The same ports in both."""
    with (
        listen(world.internet, (SERVER6, 9008)) as six,
        listen(world.internet, (SERVER, 9008)) as four,
        dial(guest, (SERVER6, 9008), port=42100) as one,
        dial(guest, (SERVER, 9008), port=42100) as other,
        six.accept()[0] as first,
        four.accept()[0] as second,
    ):
        first.sendall(b"six")
        second.sendall(b"four")
        assert (receive(one, 3), receive(other, 4)) == (b"six", b"four")


def test_a_lost_syn_ack_is_answered_again(guest):
    rules = "table ip6 lossy { chain in { type filter hook input priority 0; tcp flags & syn == syn drop\n}\n}"
    guest.run(["nft", "-f", "-"], input=rules)
    sock = guest.socket(socket.AF_INET6)
    sock.setblocking(False)
    sock.connect_ex((SERVER6, 7))
    time.sleep(0.2)
    assert not _connected(sock)
    guest.run(["nft", "delete", "table", "ip6", "lossy"])
    assert eventually(lambda: _connected(sock), 4)
    sock.close()


def test_many_connections_leave_nothing(guest, world, network):
    others, before = flows(network, world)["tcp"], descriptors(network.pid)

    def connect() -> None:
        for number in range(3000):
            with socket.create_connection((SERVER6, (7, 9, 13, 14)[number % 4]), 5) as sock:
                if number % 8 > 3:
                    reset(sock)

    begin = time.monotonic()
    inside(guest, connect)
    print(f"{3000 / (time.monotonic() - begin):.0f} connections a second, by one client that waits for each")
    assert eventually(lambda: flows(network, world)["tcp"] == others)
    assert eventually(lambda: descriptors(network.pid) <= before + 8)


def test_a_guest_without_ipv4_is_not_bothered_by_a_silent_one(guest):
    """A filtered address of the one version holds up nobody in the other."""
    with guest.socket() as silent:
        silent.setblocking(False)
        silent.connect_ex((BLACKHOLE, 80))
        begin = time.monotonic()
        with dial(guest, (SERVER6, 7)):
            assert time.monotonic() - begin < 0.5
