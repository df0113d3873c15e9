"""Guests' links that are wider or narrower than the outside's, both versions of IP, through a whole network."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import threading

import pytest

from lab.netguest import PluggedNetwork
from lab.world import SERVER, SERVER6
from tests.netns import dial, eventually, family, receive

pytestmark = pytest.mark.kernel
DATA = os.urandom(8 << 20)
MTU_DISCOVER = {socket.AF_INET: (socket.SOL_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}


@pytest.fixture(scope="module", params=[1280, 9000, 65520])
def network(request, world):
    """A network whose links have that MTU; the outside's have 1500."""
    with PluggedNetwork(world, f"mtu{request.param}", options=f",mtu={request.param}") as made:
        yield made


@pytest.fixture(scope="module")
def guest(network):
    return network.plug()


def test_the_bridge_and_its_ports_have_it(network):
    mtu = network.name.removeprefix("mtu")
    shown = subprocess.run([*network.inside, "ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(vmnet0|vm1|up0)[@:].* mtu (\d+)", shown))
    assert found == {"vmnet0": mtu, "vm1": mtu, "up0": "65535"}


@pytest.mark.parametrize("server", [SERVER, SERVER6], ids=["IPv4", "IPv6"])
def test_a_stream_passes_both_ways(guest, server):
    with dial(guest, (server, 7)) as sock:
        writer = threading.Thread(target=sock.sendall, args=(DATA,))
        writer.start()
        assert receive(sock, len(DATA)) == DATA
        writer.join()


@pytest.mark.parametrize("server", [SERVER, SERVER6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("size", [1200, 1300, 1452, 1472, 5000, 60000, 65507])
def test_datagrams_of_any_size_pass_in_fragments(guest, server, size):
    """The first one of an IPv6 flow may be lost to "packet too big", which the guest's kernel heeds."""
    with guest.socket(family(server), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(*MTU_DISCOVER[sock.family], 0)
        sock.settimeout(0.3)
        sock.connect((server, 7))

        def passes() -> bool:
            payload = os.urandom(size)
            try:
                sock.send(payload)
                return sock.recv(70000) == payload
            except OSError:
                return False

        assert eventually(passes)
        assert passes()


@pytest.mark.parametrize("server", [SERVER, SERVER6], ids=["IPv4", "IPv6"])
def test_a_sender_that_does_not_fragment_is_told_of_the_outsides_mtu(guest, network, server):
    mtu = min(1500, int(network.name.removeprefix("mtu")))
    overhead = 28 if server == SERVER else 48
    with guest.socket(family(server), socket.SOCK_DGRAM) as sock:
        sock.setsockopt(*MTU_DISCOVER[sock.family], 2)
        sock.settimeout(1)
        sock.connect((server, 7))

        def too_big() -> bool:
            try:
                sock.send(bytes(1600 - overhead))
                sock.recv(70000)
            except OSError:
                return sock.getsockopt(MTU_DISCOVER[sock.family][0], 14 if server == SERVER else 24) == mtu
            return False

        assert eventually(too_big)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        sock.send(bytes(mtu - overhead))
        assert sock.recv(70000) == bytes(mtu - overhead)


@pytest.mark.parametrize("server", [SERVER, SERVER6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("size", [56, 1400, 20000, 65000])
def test_echo_of_any_size(guest, server, size):
    def passes() -> bool:
        out = guest.run(["ping", "-n", "-c", "1", "-W", "0.5", "-s", str(size), server], check=False).stdout
        return "1 received" in out

    assert eventually(passes)
