"""Socket calls on bare descriptors for IPv6, on loopback."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket

import pytest

from openvmnet.kernel import sockets, sockets6


def peer(address: tuple) -> bytes:
    return address[1].to_bytes(2, "big") + socket.inet_pton(socket.AF_INET6, address[0])


@pytest.fixture(scope="module", autouse=True)
def ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"this host's loopback has no IPv6: {error}")


@pytest.fixture
def listener():
    with socket.socket(socket.AF_INET6) as made:
        made.bind(("::1", 0))
        made.listen(16)
        made.setblocking(False)
        yield made


def test_accept_names_the_peer_and_local_the_own_end(listener):
    fd = sockets6.tcp()
    assert sockets6.connect(fd, peer(listener.getsockname())) in (0, errno.EINPROGRESS)
    select.select([listener], [], [], 2)
    accepted, who = sockets6.accept(listener.fileno())
    assert who == sockets6.local(fd)
    assert sockets6.local(accepted) == peer(listener.getsockname())
    assert not os.get_blocking(accepted)
    assert not os.get_inheritable(accepted)
    os.write(fd, b"through")
    select.select([accepted], [], [], 2)
    assert os.read(accepted, 10) == b"through"
    os.close(fd)
    os.close(accepted)


@pytest.mark.parametrize("make", [sockets6.tcp, sockets6.udp])
def test_sockets_do_not_block_and_are_not_inherited(make):
    fd = make()
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    with socket.socket(fileno=fd) as view:
        assert view.family == socket.AF_INET6


def test_ping_sockets_are_icmpv6s_or_refused():
    with contextlib.suppress(PermissionError), socket.socket(fileno=sockets6.ping()) as view:
        assert (view.family, view.proto) == (socket.AF_INET6, socket.IPPROTO_ICMPV6)


def test_accept_without_anybody_waiting(listener):
    assert sockets6.accept(listener.fileno()) is None


def test_accept_of_something_else_is_an_error():
    fd = sockets6.udp()
    with pytest.raises(OSError, match=os.strerror(errno.EOPNOTSUPP)):
        sockets6.accept(fd)
    os.close(fd)


def test_connect_gives_the_errno_of_a_refusal():
    with socket.socket(socket.AF_INET6) as free:
        free.bind(("::1", 0))
        where = peer(free.getsockname())
    fd = sockets6.tcp()
    result = sockets6.connect(fd, where)
    if result == errno.EINPROGRESS:
        select.select([], [fd], [], 2)
        result = sockets.pending_error(fd)
    assert result == errno.ECONNREFUSED
    os.close(fd)


def test_ipv4_in_disguise_is_nowhere():
    """The listener is there, and the kernel would connect to it."""
    with socket.socket() as four:
        four.bind(("127.0.0.1", 0))
        four.listen(1)
        fd = sockets6.tcp()
        where = peer(("::ffff:127.0.0.1", four.getsockname()[1]))
        assert sockets6.connect(fd, where) == errno.ENETUNREACH
        os.close(fd)
        with socket.socket(socket.AF_INET6) as other:
            other.connect(("::ffff:127.0.0.1", four.getsockname()[1]))


def test_bind_takes_the_address_and_refuses_it_twice():
    one, other = sockets6.udp(), sockets6.udp()
    sockets6.bind(one, peer(("::1", 0)))
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        sockets6.bind(other, sockets6.local(one))
    os.close(one)
    os.close(other)


def test_running_out_of_descriptors_is_an_error():
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
    made = []
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            made.extend(sockets6.tcp() for _ in range(used + 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in made:
            os.close(fd)
