"""Batches of datagrams, on loopback sockets."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openvmnet.kernel.mmsg import SOCKADDR, Batch


@pytest.fixture
def pair():
    """Two connected UDP sockets on loopback."""
    one, other = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    with one, other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        one.connect(other.getsockname())
        other.connect(one.getsockname())
        for end in (one, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            end.settimeout(2)
        yield one, other


@pytest.fixture
def pairs():
    """Socket pairs that keep datagrams apart, for tests that need no addresses."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, b, c, d:
        d.settimeout(2)
        yield a, b, c, d


def test_receives_in_order_with_lengths(pair):
    one, other = pair
    batch = Batch(8, 2048, names=False)
    sent = [bytes([i]) * (i * 100) for i in range(5)]  # the first is an empty datagram
    for payload in sent:
        one.send(payload)
    assert batch.recv(other.fileno()) == 5
    assert [bytes(batch.payload(i)) for i in range(5)] == sent
    assert batch.recv(other.fileno()) == 0


def test_at_most_count_and_the_rest_the_next_time(pair):
    one, other = pair
    batch = Batch(4, 64, names=False)
    for i in range(6):
        one.send(bytes([i]))
    assert batch.recv(other.fileno()) == 4
    assert batch.recv(other.fileno()) == 2
    assert [bytes(batch.payload(i)) for i in range(2)] == [b"\4", b"\5"]


def test_slots_are_whole_again_after_short_datagrams(pair):
    """iov_len holds what was received until the next receive, which must find the full size."""
    one, other = pair
    batch = Batch(3, 4096, names=True)
    for size in (1, 4096, 0, 7, 4096, 4096):
        one.send(b"x" * size)
    assert batch.recv(other.fileno()) == 3
    assert batch.received[:3].tolist() == [1, 4096, 0]
    assert batch.recv(other.fileno()) == 3
    assert batch.received[:3].tolist() == [7, 4096, 4096]
    assert not any(batch.truncated(i) for i in range(3))


def test_relay_touches_nothing(pairs):
    a, b, c, d = pairs
    batch = Batch(64, 65536, names=False)
    payloads = [os.urandom(size) for size in (0, 1, 1400, 9000, 65507, 65535)]
    for payload in payloads:
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        c.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        a.send(payload)
    count = batch.recv(b.fileno())
    assert batch.send(c.fileno(), count) == count == len(payloads)
    assert [d.recv(65536) for _ in payloads] == payloads


def test_the_largest_datagram_over_udp(pair):
    one, other = pair
    batch = Batch(64, 65536, names=False)
    payload = os.urandom(65507)
    one.send(payload)
    assert batch.recv(other.fileno()) == 1
    assert batch.send(other.fileno(), 1) == 1
    assert one.recv(65536) == payload


def test_a_send_is_taken_up_where_it_stopped(pairs):
    a, b, c, d = pairs
    batch = Batch(16, 64, names=False)
    for i in range(8):
        a.send(bytes([i]) * (i + 1))
    assert batch.recv(b.fileno()) == 8
    assert batch.send(c.fileno(), 3) == 3
    assert batch.send(c.fileno(), 5, 3) == 5
    assert [d.recv(64) for _ in range(8)] == [bytes([i]) * (i + 1) for i in range(8)]


def test_a_full_queue_is_zero_and_no_error(pairs):
    a, b, c, _ = pairs
    batch = Batch(64, 64, names=False)
    taken = []
    for _ in range(300):  # net.unix.max_dgram_qlen is far below 300 * 64
        a.send(b"x")
        assert batch.recv(b.fileno()) == 1
        taken.append(batch.send(c.fileno(), 1))
    assert taken[0] == 1
    assert taken[-1] == 0


def test_answers_go_back_to_their_senders():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
        try:
            for i, client in enumerate(clients):
                client.settimeout(2)
                client.sendto(b"question %d" % i, server.getsockname())
            batch = Batch(8, 512, names=True)
            assert batch.recv(server.fileno()) == 5
            for i, client in enumerate(clients):
                name = batch.name(i)
                assert len(name) == 16
                assert struct.unpack_from("!H", name, 2)[0] == client.getsockname()[1]
                batch.set_payload(i, b"answer to " + bytes(batch.payload(i)))
            assert batch.send(server.fileno(), 5) == 5
            for i, client in enumerate(clients):
                assert client.recv(512) == b"answer to question %d" % i
            # A second round with other lengths and another order of senders.
            clients[3].sendto(b"again", server.getsockname())
            assert batch.recv(server.fileno()) == 1
            assert batch.send(server.fileno(), 1) == 1
            assert clients[3].recv(512) == b"again"
        finally:
            for client in clients:
                client.close()


@pytest.mark.kernel
def test_marks_are_told_and_not_passed_on(lab):
    """The firewall's mark of each datagram; here the sender's own socket sets it. Both take rights in the namespace."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("127.0.0.1", 0))
        try:
            server.setsockopt(socket.SOL_SOCKET, 75, 1)
        except OSError as error:
            pytest.skip(f"SO_RCVMARK (Linux 5.19): {error}")
        client.settimeout(2)
        batch = Batch(4, 64, names=True, marks=True)
        for marks in ((7, 0x1001, 0), (9,)):
            for mark in marks:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                client.sendto(b"question", server.getsockname())
            assert batch.recv(server.fileno()) == len(marks)
            assert [batch.mark(i) for i in range(len(marks))] == list(marks)
            assert batch.send(server.fileno(), len(marks)) == len(marks)
            assert [client.recv(64) for _ in marks] == [b"question"] * len(marks)
    assert Batch(1, 64, names=True).mark(0) == 0


def test_a_given_name_is_where_it_goes():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        two.bind(("127.0.0.1", 0))
        two.settimeout(2)
        batch = Batch(2, 64, names=True)
        port = two.getsockname()[1]
        name = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, bytes((127, 0, 0, 1)))
        batch.set_payload(1, b"hello")
        batch.set_name(1, name)
        assert batch.name(1) == name
        assert batch.send(one.fileno(), 1, 1) == 1
        assert two.recv(64) == b"hello"


def test_names_of_ipv6_senders_are_whole():
    try:
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        server.bind(("::1", 0))
    except OSError:
        pytest.skip("this kernel has no IPv6 (CONFIG_IPV6) or no ::1")
    with server, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.sendto(b"six", server.getsockname())
        batch = Batch(2, 64, names=True)
        assert batch.recv(server.fileno()) == 1
        assert len(batch.name(0)) == 28
        assert batch.send(server.fileno(), 1) == 1
        assert client.recv(64) == b"six"


def test_truncation_shows(pair):
    one, other = pair
    batch = Batch(2, 10, names=False)
    one.send(b"0123456789")
    one.send(b"0123456789ab")
    assert batch.recv(other.fileno()) == 2
    assert [batch.truncated(i) for i in range(2)] == [False, True]
    assert bytes(batch.payload(1)) == b"0123456789"


def test_an_error_of_the_peer_is_raised_and_does_not_stick():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
    ):
        gone.bind(("127.0.0.1", 0))
        one.connect(gone.getsockname())
        gone.close()
        one.send(b"to nobody")
        batch = Batch(2, 64, names=False)
        with pytest.raises(ConnectionRefusedError):
            batch.recv(one.fileno())
        assert batch.recv(one.fileno()) == 0


def test_errors_carry_the_kernels_errno():
    batch = Batch(2, 64, names=False)
    with pytest.raises(OSError, match="descriptor") as raised:
        batch.recv(-1)
    assert raised.value.errno == 9
    with pytest.raises(OSError, match="descriptor"):
        batch.send(-1, 1)


def test_bounds():
    batch = Batch(2, 8, names=False)
    with pytest.raises(IndexError):
        batch.set_payload(0, b"123456789")
    with pytest.raises(IndexError):
        batch.send(0, 2, 1)
    with pytest.raises(IndexError):
        batch.send(0, 1, -1)
    with pytest.raises(IndexError):
        batch.set_name(0, b"x")
    with pytest.raises(IndexError):
        Batch(1, 8, names=True).set_name(0, bytes(SOCKADDR + 1))
    assert batch.name(0) == b""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=9), min_size=1, max_size=8), st.integers(1, 9))
def test_any_sequence_of_lengths_is_relayed(rounds, count):
    """Whatever lengths came before, a batch relays the next datagrams as they are."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with a, b, c, d:
        d.settimeout(2)
        batch = Batch(count, 300, names=False)
        for lengths in rounds:
            payloads = [bytes([i + 1]) * length for i, length in enumerate(lengths)]
            for payload in payloads:
                a.send(payload)
            while got := batch.recv(b.fileno()):
                assert batch.send(c.fileno(), got) == got
            assert [d.recv(400) for _ in payloads] == payloads


def test_untouched_room_costs_nothing(pair):
    before = _resident()
    batch = Batch(512, 65536, names=False)
    pair[0].send(b"x")
    assert batch.recv(pair[1].fileno()) == 1
    assert _resident() - before < 2 << 20  # of 32 MiB


def test_no_object_is_made_per_datagram(pairs):
    """A relay of 10 datagrams takes as many Python calls as one of a single datagram."""
    import sys

    a, b, c, d = pairs
    batch = Batch(16, 64, names=False)

    def calls(number):
        for _ in range(number):
            a.send(b"x")
        seen = []
        sys.setprofile(lambda _frame, event, _arg: seen.append(event))
        batch.send(c.fileno(), batch.recv(b.fileno()))
        sys.setprofile(None)
        for _ in range(number):
            d.recv(10)
        return len(seen)

    calls(2)
    assert calls(2) == calls(10)


def test_faster_than_one_by_one(pair):
    """Small datagrams over loopback; the kernel's own share is in both, so the margin is modest."""
    one, other = pair
    sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink:
        sink.bind(("127.0.0.1", 0))
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        other.connect(sink.getsockname())
        one.connect(("127.0.0.1", other.getsockname()[1]))
        batch = Batch(64, 65536, names=False)
        other.setblocking(False)

        def fill():
            other.connect(one.getsockname())
            for _ in range(64):
                one.send(b"x" * 64)
            other.connect(sink.getsockname())

        best = {"batch": 1.0, "single": 1.0}
        for _ in range(30):
            fill()
            start = time.perf_counter()
            assert batch.send(other.fileno(), batch.recv(other.fileno())) == 64
            best["batch"] = min(best["batch"], time.perf_counter() - start)
            fill()
            start = time.perf_counter()
            for _ in range(64):
                other.send(other.recv(65536))
            best["single"] = min(best["single"], time.perf_counter() - start)
        assert best["batch"] < best["single"]


def _resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
