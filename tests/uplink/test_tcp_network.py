"""TCP of a guest, through a whole network, to an internet of the lab's."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import threading
import time

import pytest
from scapy.layers.inet import IP, TCP

from lab.world import BLACKHOLE, PROHIBITED, SERVER, UNREACHABLE, WEB
from tests.netns import descriptors, dial, eventually, flows, inside, listen, pair, receive, resident
from tests.uplink.pumping import reset

pytestmark = pytest.mark.kernel
DATA = os.urandom(4 << 20)
MANY = 5000
TCP_REPAIR = 19  # tcp(7): for checkpoint and restore; closing such a socket sends nothing


def test_a_closed_port_is_refused_at_once(guest):
    begin = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        dial(guest, (SERVER, 99))
    assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("where", [UNREACHABLE, PROHIBITED, "169.254.169.254", "0.1.2.3"])
def test_what_cannot_be_reached_says_so_at_once(guest, where):
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
        dial(guest, (where, 80))
    assert caught.value.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
    assert time.monotonic() - begin < 0.5


@pytest.mark.parametrize("where", [BLACKHOLE, "127.0.0.1", "255.255.255.255"])
def test_what_does_not_answer_is_silent(guest, where):
    sock = guest.socket()
    if where == "127.0.0.1":  # the guest's own kernel would not send it: what it has is a route for a neighbour
        guest.sysctl("net.ipv4.conf.all.route_localnet", 1)
        guest.batch("route replace local 127.0.0.0/8 dev lo table local", "addr del 127.0.0.1/8 dev lo")
    sock.settimeout(0.5)
    try:
        with pytest.raises((TimeoutError, OSError)):
            sock.connect((where, 80))
    finally:
        sock.close()
        if where == "127.0.0.1":
            guest.batch("addr add 127.0.0.1/8 dev lo")


def test_bytes_arrive_both_ways(guest):
    with dial(guest, (SERVER, 7)) as sock:
        writer = threading.Thread(target=sock.sendall, args=(DATA,))
        writer.start()
        assert receive(sock, len(DATA)) == DATA
        writer.join()


def test_the_guest_half_closes(guest):
    with dial(guest, (SERVER, 14)) as sock:
        sock.sendall(DATA)
        sock.shutdown(socket.SHUT_WR)
        assert receive(sock, 100) == b"%d\n" % len(DATA)


def test_the_outside_half_closes(guest, world):
    one, other = pair(guest, world.internet, (SERVER, 9001))
    with one, other:
        other.sendall(b"first and last")
        other.shutdown(socket.SHUT_WR)
        assert receive(one, 100) == b"first and last"
        one.sendall(DATA)
        one.shutdown(socket.SHUT_WR)
        assert receive(other, len(DATA) + 1) == DATA


@pytest.mark.parametrize("side", [0, 1], ids=["guest", "outside"])
def test_a_reset_is_a_reset(guest, world, side):
    ends = pair(guest, world.internet, (SERVER, 9002))
    ends[0].sendall(b"some")
    assert receive(ends[1], 4) == b"some"
    reset(ends[side])
    with pytest.raises(ConnectionResetError):
        ends[1 - side].recv(10)
    ends[1 - side].close()


def test_a_server_that_resets_what_it_accepts(guest):
    with pytest.raises(ConnectionError), dial(guest, (SERVER, 11)) as sock:
        assert sock.recv(10) != b""


def test_a_connection_is_accepted_when_the_outside_accepts(guest, world):
    """Neither the gateway nor a full queue of the server's says yes in the server's name."""
    with listen(world.internet, (SERVER, 9003), backlog=0) as listener:
        first = dial(guest, (SERVER, 9003))
        late = guest.socket()
        late.setblocking(False)
        late.connect_ex((SERVER, 9003))
        time.sleep(0.3)
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
            late.getpeername()
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
    """accept(2) tells only the guest's end of a connection, and here that is the same for all."""
    places = [(SERVER, 9004), (WEB, 9004), (SERVER, 9005), (WEB, 9005)]
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listen(world.internet, place)) for place in places]
        for port in range(41000, 41005):
            socks = [stack.enter_context(guest.socket()) for _ in places]
            for sock, place in zip(socks, places, strict=True):
                sock.setblocking(False)
                for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                    sock.setsockopt(socket.SOL_SOCKET, option, 1)
                sock.bind(("0.0.0.0", port))
                sock.connect_ex(place)
            for number, listener in enumerate(listeners):
                with listener.accept()[0] as accepted:
                    accepted.sendall(b"%d" % number)
            for number, sock in enumerate(socks):
                sock.settimeout(5)
                assert receive(sock, 10) == b"%d" % number


def test_a_port_may_be_used_again_after_a_reset(guest):
    for number in range(20):
        sock = dial(guest, (SERVER, 7), port=42000)
        sock.sendall(b"%d" % number)
        assert receive(sock, len(str(number))) == b"%d" % number
        reset(sock)


def test_a_port_may_be_used_again_when_the_outside_closed_first(guest):
    """The guest has no TIME_WAIT then; the gateway has, and it must not swallow the next SYN of the four-tuple."""
    for _ in range(20):
        with dial(guest, (SERVER, 13), port=42001, timeout=0.8) as sock:
            assert receive(sock, 100).startswith(b"192.0.2.2 ")


def test_a_port_may_be_used_again_by_a_guest_that_forgot(guest, network, world):
    """A guest that crashed and came back: its old connection still lives on the gateway when the new SYN comes."""
    before = flows(network, world)["tcp"]
    sock = dial(guest, (SERVER, 7), port=42002)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    sock.close()  # without a word on the wire
    assert flows(network, world)["tcp"] == before + 1
    with dial(guest, (SERVER, 7), port=42002) as again:
        again.sendall(b"x")
        assert receive(again, 1) == b"x"
        assert flows(network, world)["tcp"] == before + 1


def test_a_syn_that_was_long_on_its_way_is_no_second_connection(guest, world):
    """As on a congested way in: the guest has sent it again, and comes into its connection before that one is there."""
    where = SERVER, 9010
    with listen(world.internet, where) as listener, dial(guest, where) as sock, listener.accept()[0] as outside:
        address, port = sock.getsockname()
        segment = TCP(sport=port, dport=where[1], flags="S", seq=1)
        with guest.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(bytes(IP(src=address, dst=SERVER) / segment), (SERVER, 0))
        listener.settimeout(0.5)
        with pytest.raises(TimeoutError):
            listener.accept()
        sock.sendall(b"still")
        assert receive(outside, 5) == b"still"


def test_a_lost_syn_is_sent_again(guest, world):
    """The destination starts to exist while the guest is asking."""
    world.internet.batch(f"route del blackhole {BLACKHOLE}", f"route add blackhole {BLACKHOLE} metric 5")
    sock = guest.socket()
    sock.setblocking(False)
    sock.connect_ex((BLACKHOLE, 7))
    time.sleep(0.2)
    world.internet.batch(f"addr add {BLACKHOLE}/32 dev lo")
    try:
        with listen(world.internet, (BLACKHOLE, 7)):
            assert eventually(lambda: _connected(sock), 4)
    finally:
        sock.close()
        world.internet.batch(f"addr del {BLACKHOLE}/32 dev lo")


def test_a_lost_syn_ack_is_answered_again(guest, world):
    """The guest does not hear of its connection the first time."""
    rules = "table ip lossy { chain in { type filter hook input priority 0; tcp flags & syn == syn drop\n}\n}"
    guest.run(["nft", "-f", "-"], input=rules)
    sock = guest.socket()
    sock.setblocking(False)
    sock.connect_ex((SERVER, 7))
    time.sleep(0.2)
    assert not _connected(sock)
    guest.run(["nft", "delete", "table", "ip", "lossy"])
    assert eventually(lambda: _connected(sock), 4)
    sock.settimeout(2)
    sock.sendall(b"x")
    assert receive(sock, 1) == b"x"
    sock.close()


def test_a_server_that_does_not_read_stops_the_guest(guest, network):
    before = resident(network.pid)
    with dial(guest, (SERVER, 12)) as sock:
        sock.settimeout(1)
        with pytest.raises(TimeoutError):
            [sock.send(DATA[: 1 << 16]) for _ in range(1000)]
    assert resident(network.pid) - before < 16 << 20


def test_urgent_data_passes(guest, world):
    one, other = pair(guest, world.internet, (SERVER, 9006))
    with one, other:
        one.sendall(b"before")
        one.send(b"!", socket.MSG_OOB)
        one.sendall(b"after")
        assert receive(other, 12) == b"before!after"


def raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < 3 * MANY:
        pytest.skip(f"needs {3 * MANY} descriptors, RLIMIT_NOFILE allows {hard}")


def test_thousands_of_flows_cost_little_memory_and_end_without_a_trace(guest, world, network):
    raise_limit()
    others = flows(network, world)["tcp"]
    before = descriptors(network.pid), resident(network.pid)
    with listen(world.internet, (SERVER, 9007)) as listener:
        ends: list[socket.socket] = []

        def connect() -> None:
            for number in range(MANY):
                sock = socket.create_connection((SERVER, 9007), 5)
                sock.sendall(b"%05d" % number)
                ends.append(sock)

        thread = threading.Thread(target=inside, args=(guest, connect))
        thread.start()
        accepted = [listener.accept()[0] for _ in range(MANY)]
        thread.join()
    assert flows(network, world)["tcp"] == MANY + others
    per_flow = (resident(network.pid) - before[1]) / MANY
    for sock in accepted[:: MANY // 100]:  # each still carries its own
        number = receive(sock, 5)
        sock.sendall(number)
        assert receive(ends[int(number)], 5) == number
    for sock in ends + accepted:
        sock.close()
    assert eventually(lambda: flows(network, world)["tcp"] == others)
    assert eventually(lambda: descriptors(network.pid) <= before[0] + 8)
    print(f"{per_flow:.0f} octets of the process's memory per idle flow")
    assert per_flow < 3000


def test_twenty_thousand_connections_leave_nothing(guest, world, network):
    count = 20_000
    others = flows(network, world)["tcp"]
    before = descriptors(network.pid)
    memory = []

    def connect() -> None:
        for number in range(count):
            # Several ports of the server's, since each closed connection holds one of the guest's for a minute.
            with socket.create_connection((SERVER, (7, 9, 13, 14)[number % 4]), 5) as sock:
                if number % 4 == 0:
                    sock.sendall(b"x")
                    assert sock.recv(1) == b"x"
                elif number % 4 == 2:
                    assert sock.recv(100)
                if number % 8 > 3:
                    reset(sock)
            if number % 4000 == 3999:
                memory.append(resident(network.pid))

    begin = time.monotonic()
    inside(guest, connect)
    print(f"{count / (time.monotonic() - begin):.0f} connections a second, by one client that waits for each")
    assert eventually(lambda: flows(network, world)["tcp"] == others)
    assert eventually(lambda: descriptors(network.pid) <= before + 8)
    assert memory[-1] - memory[0] < 2 << 20
    with dial(guest, (SERVER, 7)) as sock:
        sock.sendall(b"still there")
        assert receive(sock, 11) == b"still there"
