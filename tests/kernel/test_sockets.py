"""Socket calls on bare descriptors, on loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time

import pytest

from openvmnet.kernel import sockets


def peer(address: tuple[str, int]) -> bytes:
    return address[1].to_bytes(2, "big") + socket.inet_aton(address[0])


@pytest.fixture
def listener():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen(16)
        made.setblocking(False)
        yield made


@pytest.fixture
def connected(listener):
    """(the connecting descriptor, the accepted one, the connecting end's address)."""
    fd = sockets.tcp()
    assert sockets.connect(fd, peer(listener.getsockname())) in (0, errno.EINPROGRESS)
    select.select([listener], [], [], 2)
    accepted = sockets.accept(listener.fileno())
    assert accepted is not None
    yield fd, accepted[0], accepted[1]
    for one in (fd, accepted[0]):
        with contextlib.suppress(OSError):  # the test may have closed it
            os.close(one)


@pytest.mark.parametrize("make", [sockets.tcp, sockets.udp])
def test_sockets_do_not_block_and_are_not_inherited(make):
    fd = make()
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_running_out_of_descriptors_is_an_error():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    made = []
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            made.extend(sockets.tcp() for _ in range(used + 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in made:
            os.close(fd)


def test_accept_names_the_peer_and_local_the_own_end(connected, listener):
    fd, accepted, who = connected
    assert who == sockets.local(fd)
    assert sockets.local(accepted) == peer(listener.getsockname())
    assert not os.get_blocking(accepted)
    assert not os.get_inheritable(accepted)


def test_accept_without_anybody_waiting(listener):
    assert sockets.accept(listener.fileno()) is None


def test_accept_of_something_else_is_an_error():
    fd = sockets.udp()
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        sockets.accept(fd)
    os.close(fd)


def test_connect_gives_the_errno_of_a_refusal():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = peer(free.getsockname())
    fd = sockets.tcp()
    result = sockets.connect(fd, where)
    if result == errno.EINPROGRESS:
        select.select([], [fd], [], 2)
        result = sockets.pending_error(fd)
    assert result == errno.ECONNREFUSED
    assert sockets.pending_error(fd) == 0  # reading it cleared it
    os.close(fd)


def test_bind_takes_the_address_and_refuses_it_twice():
    one, other = sockets.udp(), sockets.udp()
    sockets.bind(one, peer(("127.0.0.1", 0)))
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        sockets.bind(other, sockets.local(one))
    os.close(one)
    os.close(other)


def test_shut_write_is_an_end_of_file_and_bears_a_dead_connection(connected):
    fd, accepted, _ = connected
    sockets.shut_write(fd)
    select.select([accepted], [], [], 2)
    assert os.read(accepted, 10) == b""
    os.write(accepted, b"still")
    select.select([fd], [], [], 2)
    assert os.read(fd, 10) == b"still"
    sockets.abort(accepted)
    time.sleep(0.01)
    sockets.shut_write(fd)


def test_a_reset_connection_is_closed_and_a_half_closed_one_is_not(connected):
    fd, other, _ = connected
    assert not sockets.is_closed(fd)
    sockets.shut_write(other)
    select.select([fd], [], [], 2)
    assert not sockets.is_closed(fd)
    sockets.abort(other)
    poll = select.poll()
    poll.register(fd, 0)
    assert poll.poll(2000)
    assert sockets.is_closed(fd)


def test_abort_is_a_reset(connected):
    fd, accepted, _ = connected
    os.write(fd, b"unread")
    sockets.abort(fd)
    select.select([accepted], [], [], 2)
    with pytest.raises(ConnectionResetError):
        [os.read(accepted, 3) for _ in range(3)]


@pytest.mark.parametrize("value", [0, 1, 2, 37])
def test_set_option_sets_the_value(value):
    with socket.socket() as sock:
        sockets.set_option(sock.fileno(), socket.IPPROTO_TCP, socket.TCP_KEEPCNT, value or 5)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == (value or 5)
        sockets.set_option(sock.fileno(), socket.SOL_SOCKET, socket.SO_KEEPALIVE, value)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == bool(value)


def test_set_option_bears_what_a_socket_cannot_take():
    with socket.socket(socket.AF_UNIX) as sock:
        sockets.set_option(sock.fileno(), socket.IPPROTO_TCP, socket.TCP_NODELAY)
