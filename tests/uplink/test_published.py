"""A published TCP port on loopback: the guest is a listener of the test's, asked by an ordinary socket."""

from __future__ import annotations

import contextlib
import errno
import socket
from unittest import mock

import msgspec
import pytest

from openvmnet.errors import HostError
from openvmnet.kernel import sockets
from openvmnet.kernel.loop import Lane
from openvmnet.uplink.published import PublishedTcp
from openvmnet.uplink.target import Target
from openvmnet.uplink.tcp import TcpUplink
from tests.uplink.benching import closed, turn
from tests.uplink.pumping import reset

pytestmark = pytest.mark.usefixtures("crowd")

LOOPBACK = socket.inet_aton("127.0.0.1")
OWNER = 7


class Bench:
    crowded = False

    def __init__(self, *, limit: int = 1000) -> None:
        self.lane = Lane()
        inner = self._listener()
        self.uplink = TcpUplink(self.lane, inner, lambda _: None, LOOPBACK, lambda work: work(), limit)
        self.uplink.crowded = self.crowded
        self.guest, published = self._listener(), self._listener()
        self.guest.settimeout(2)
        self.where = published.getsockname()
        self.address: bytes | None = LOOPBACK
        self.fail: Exception | None = None
        self.counters = {"published_opened": 0, "published_refused": 0, "published_dropped": 0}
        guest_port = self.guest.getsockname()[1].to_bytes(2, "big")
        target = Target(OWNER, guest_port, lambda: self.address, self._connector, self.counters)
        self.port = PublishedTcp(self.lane, self.uplink, published, target)
        self.port.start()

    @staticmethod
    def _listener() -> socket.socket:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        sock.setblocking(False)
        return sock

    def _connector(self, size: int) -> int:
        assert size == 4
        if self.fail is not None:
            raise self.fail
        return sockets.tcp()

    def client(self) -> socket.socket:
        return socket.create_connection(self.where, 2)

    def step(self, seconds: float = 0.02) -> None:
        turn(self.lane, seconds)

    def close(self) -> None:
        self.port.close()
        self.uplink.forget_port(OWNER)
        assert (self.uplink.pending(), len(self.uplink.flows), len(self.uplink.accounts)) == (0, 0, 0)
        self.uplink.close()
        self.guest.close()
        self.lane.close()


def benched(**options):
    return closed(lambda: Bench(**options))


def test_a_client_is_a_flow_of_its_owner_and_ends_with_the_port():
    with benched() as bench, bench.client() as client:
        client.sendall(b"early")
        bench.step()
        with bench.guest.accept()[0] as guest:
            bench.step()
            assert guest.recv(10) == b"early"
            assert [flow.owner for flow in bench.uplink.flows] == [OWNER]
            assert bench.uplink.accounts.of(OWNER).held == 1
            assert bench.counters["published_opened"] == 1
            bench.uplink.forget_port(OWNER)
            for end in (client, guest):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)


def test_a_guest_that_refuses_or_has_no_address_is_a_reset():
    with benched() as bench:
        bench.guest.close()
        for address in (LOOPBACK, None):
            bench.address = address
            with bench.client() as client:
                bench.step()
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        assert bench.counters["published_refused"] == 2


@pytest.mark.parametrize("failure", [HostError("no agent"), OSError(errno.EMFILE, "too many")])
def test_without_a_socket_for_the_guest_the_client_is_reset_and_counted(failure):
    with benched() as bench:
        bench.fail = failure
        with bench.client() as client:
            bench.step()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert bench.counters["published_dropped"] == 1


def test_one_port_has_seven_eighths():
    with benched(limit=8) as bench, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(bench.client()) for _ in range(9)]
        bench.step(0.05)
        assert len(bench.uplink.flows) == 7
        assert bench.counters["published_dropped"] == 2
        for client in clients[7:]:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        clients[0].close()
        bench.guest.accept()[0].close()
        bench.step()
        with bench.client():
            bench.step()
            assert len(bench.uplink.flows) == 7


def test_an_opening_counts_until_its_client_gives_up():
    with benched() as bench, contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())  # a queue that is full: the kernel drops further SYNs
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        stack.enter_context(socket.create_connection(full.getsockname()))
        where = full.getsockname()[1].to_bytes(2, "big")
        bench.port._target = msgspec.structs.replace(bench.port._target, port=where)
        client = bench.client()
        bench.step()
        assert (bench.uplink.pending(), bench.uplink.accounts.of(OWNER).openings) == (1, 1)
        reset(client)
        bench.step()
        assert bench.uplink.pending() == 0
        stack.enter_context(bench.client())
        bench.step()
        assert bench.uplink.pending() == 1  # the port's end takes it along


def test_without_descriptors_it_rests_until_the_next_look():
    with benched() as bench, bench.client() as client:
        with mock.patch.object(bench.port, "_accept", side_effect=OSError(errno.EMFILE, "too many")) as accept:
            bench.step(0.1)
        assert accept.call_count == 1  # the client waits, and nothing turns
        bench.step()
        assert bench.uplink.flows == set()
        bench.port.sweep()
        bench.step()
        assert len(bench.uplink.flows) == 1
        client.sendall(b"x")
