"""The gateway's address is the host, for guests that are namespaces, in all the modes."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from lab.netguest import PluggedNetwork
from lab.world import HOST, HOST6, SERVER, SERVER6
from tests.netns import dial, eventually, family, listen, receive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.kernel
IPV6_RECVERR = 25  # linux/in6.h
EVERYWHERE, EVERYWHERE6 = "0.0.0.0", "::"
LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"


@pytest.fixture(scope="module", params=["shared", "host"])
def network(world: World, request: pytest.FixtureRequest) -> Iterator[PluggedNetwork]:
    with PluggedNetwork(world, f"gateway-{request.param}", mode=request.param) as made:
        yield made


@pytest.fixture(scope="module")
def guest(network: PluggedNetwork) -> Namespace:
    return network.plug()


@pytest.fixture(scope="module")
def open_network(world: World) -> Iterator[PluggedNetwork]:
    with PluggedNetwork(world, "opened", mode="host", arguments=["--host-loopback"]) as made:
        yield made


@pytest.fixture(scope="module")
def opened(open_network: PluggedNetwork) -> Namespace:
    return open_network.plug()


def gateways(network: PluggedNetwork) -> tuple[str, str]:
    return network.gateway, network.gateway6


@contextlib.contextmanager
def udp_socket(namespace: Namespace, address: str, port: int) -> Iterator[socket.socket]:
    """A UDP socket in `namespace`."""
    with namespace.socket(family(address), socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.bind((address, port))
        yield sock


@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("where", ["everywhere", "own"])
def test_a_port_of_the_hosts_is_reached_at_the_gateway(world, network, guest, where, six):
    address = {"everywhere": (EVERYWHERE, EVERYWHERE6), "own": (HOST, HOST6)}[where][six]
    with listen(world.host, (address, 8001)) as listener, dial(guest, (gateways(network)[six], 8001)) as near:
        far, peer = listener.accept()
        with far:
            far.settimeout(3)
            # The host's own address, not the guest's, which the host has no route to; and not loopback's.
            assert peer[0] == (HOST, HOST6)[six]
            near.sendall(b"question")
            assert receive(far, 8) == b"question"
            far.sendall(b"answer")
            assert receive(near, 6) == b"answer"
            assert near.getpeername()[:2] == (gateways(network)[six], 8001)


@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
def test_udp_reaches_the_host_at_the_gateway(world, network, guest, six):
    gateway = gateways(network)[six]
    with (
        udp_socket(world.host, (EVERYWHERE, EVERYWHERE6)[six], 8002) as far,
        udp_socket(guest, (EVERYWHERE, EVERYWHERE6)[six], 0) as near,
    ):
        near.connect((gateway, 8002))
        for number in range(20):
            near.send(b"%d" % number)
            data, peer = far.recvfrom(100)
            assert data == b"%d" % number
            far.sendto(data + b"!", peer)
            assert near.recv(100) == data + b"!"


@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
def test_what_listens_on_loopback_alone_stays_hidden(world, network, guest, six):
    with listen(world.host, ((LOOPBACK, LOOPBACK6)[six], 8003)), pytest.raises(ConnectionRefusedError):
        dial(guest, (gateways(network)[six], 8003))
    with (
        udp_socket(world.host, (LOOPBACK, LOOPBACK6)[six], 8003) as far,
        udp_socket(guest, (EVERYWHERE, EVERYWHERE6)[six], 0) as near,
    ):
        near.connect((gateways(network)[six], 8003))
        near.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            near.recv(10)
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(10)


@pytest.mark.parametrize("six", [False, True], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("where", ["loopback", "everywhere", "own"])
def test_the_hosts_loopback_where_it_is_wanted(world, open_network, opened, where, six):
    addresses = {"loopback": (LOOPBACK, LOOPBACK6), "everywhere": (EVERYWHERE, EVERYWHERE6), "own": (HOST, HOST6)}
    with (
        listen(world.host, (addresses[where][six], 8004)) as listener,
        dial(opened, (gateways(open_network)[six], 8004)) as near,
    ):
        far, _ = listener.accept()
        with far:
            far.sendall(b"hello")
            assert receive(near, 5) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        dial(opened, (gateways(open_network)[six], 8004))


@pytest.mark.parametrize("where", [SERVER, SERVER6, HOST, HOST6])
def test_a_host_network_leads_nowhere(world, open_network, opened, where):
    """A guest that makes itself a route is told at once that there is nothing behind the gateway."""
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is looked at
        dial(opened, (where, 80))
    assert caught.value.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES)
    with opened.socket(family(where), socket.SOCK_DGRAM) as sock:
        if sock.family == socket.AF_INET6:  # "no route" is no hard error of UDP's there
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        sock.connect((where, 53))
        sock.send(b"x")
        assert eventually(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    # In this one kernel the ICMPv6 error to a SYN arrives while connect(2) still holds the socket, and is a soft
    # error (tcp_v6_err): the second SYN, a second later, meets the hard one. A guest of its own kernel does not wait.
    assert time.monotonic() - begin < (1.9 if ":" in where else 0.9)
    assert "100% packet loss" in opened.run(["ping", "-c1", "-W1", where], check=False).stdout


def test_guests_of_a_private_network_meet_and_meet_nobody_else(world):
    uuid = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
    with PluggedNetwork(world, "private", mode="host", options=f",net-uuid={uuid}", ports=2) as network:
        one, two = network.plug(), network.plug()
        one.batch("addr add 10.99.0.1/24 dev eth0", "route add default via 10.99.0.254")
        two.batch("addr add 10.99.0.2/24 dev eth0")
        assert "1 received" in one.run(["ping", "-c1", "-W2", "10.99.0.2"]).stdout
        with pytest.raises(OSError, match=r"unreachable|No route"):
            dial(one, (SERVER, 80))
        view = json.loads(world.product_run(["vmnet", "show", network.name, "--json"]).stdout)
        assert (view["mode"], view["net_uuid"], view["subnet"], view["prefix6"]) == ("host", uuid, None, None)
        assert uuid in world.product_run(["vmnet", "show", network.name]).stdout
        shown = subprocess.run(
            [*network.inside, "ip", "-o", "addr", "show", "dev", "vmnet0"], check=True, capture_output=True, text=True
        )
        assert not shown.stdout
        # Nobody answers: neither DHCP nor a gateway is there.
        two.batch("addr add 10.99.1.9/16 dev eth0")
        assert "0 received" in two.run(["ping", "-c1", "-W1", "10.99.0.254"], check=False).stdout
