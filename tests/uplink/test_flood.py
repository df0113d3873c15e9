"""A hostile guest floods: the neighbour is still served, and no table grows beyond its bound."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from lab.bench_small import PORTS, exchange, exchange_server
from lab.netguest import PluggedNetwork
from lab.paths import CHECKOUT
from lab.world import SERVER, SERVER6, WEB
from openvmnet.service.dns_tcp import MAX_PER_CLIENT
from tests.netns import resident

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.kernel
KINDS = ["syn", "spoof", "udp", "stream", "dhcp", "arp", "dns", "asker", "broken"]
KINDS6 = ["syn6", "spoof6", "udp6", "ndp6", "echo6", "broken6"]
SECONDS = 1.5
GROWTH = 48  # MiB, over all kinds: the receive batches and the cache fill once


@pytest.fixture(scope="module")
def network(world: World) -> Iterator[PluggedNetwork]:
    with PluggedNetwork(world, "flooded", ports=2) as plugged:
        yield plugged


@pytest.fixture(scope="module")
def guests(network: PluggedNetwork) -> tuple[Namespace, Namespace]:
    return network.plug(), network.plug()


@pytest.fixture(scope="module")
def before(network: PluggedNetwork, guests: tuple[Namespace, Namespace]) -> int:
    return resident(network.pid)


@pytest.mark.parametrize("kind", ["syn", "udp", "dns", "asker", "udp6"])
def test_a_neighbours_syn_waits_for_no_queue(
    network: PluggedNetwork, guests: tuple[Namespace, Namespace], kind: str
) -> None:
    """Its own kernel is the clock: it sends a SYN again that has no answer after a second."""
    good, bad = guests
    command = [sys.executable, "-m", "lab.flood", kind, "eth0", network.gateway, "4"]
    flood = bad.popen(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(1)
        before = sent_again(good)
        count = connections(good, 2)
        again = sent_again(good) - before
    finally:
        flood.communicate(timeout=30)
    assert count > 10
    assert again <= count // 10  # a busy machine may hold one up


def sent_again(guest: Namespace) -> int:
    """TCP segments that the guest has sent more than once: RFC 4022, tcpRetransSegs."""
    names, values = (line.split() for line in guest.run(["grep", "^Tcp:", "/proc/net/snmp"]).stdout.splitlines())
    return int(values[names.index("RetransSegs")])


@pytest.mark.parametrize("kind", KINDS + KINDS6)
def test_the_neighbour_is_served_and_nothing_grows(
    world: World, network: PluggedNetwork, guests: tuple[Namespace, Namespace], before: int, kind: str
) -> None:
    good, bad = guests
    command = [sys.executable, "-m", "lab.flood", kind, "eth0", network.gateway, str(SECONDS)]
    flood = bad.popen(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.3)
        for _ in range(3):
            with good.socket() as sock:
                sock.settimeout(4)
                sock.connect((SERVER, 7))
                sock.sendall(b"still served")
                assert sock.recv(100) == b"still served"
            with good.socket(socket.AF_INET6) as sock:
                sock.settimeout(4)
                sock.connect((SERVER6, 7))
                sock.sendall(b"still served")
                assert sock.recv(100) == b"still served"
            assert (
                WEB
                in good.run(["dig", f"@{network.gateway}", "+short", "+tries=4", "+time=1", "www.example.test"]).stdout
            )
            with good.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.settimeout(1)
                answers = 0
                for _ in range(5):
                    sock.sendto(b"x", (SERVER, 7))
                    try:
                        answers += sock.recv(10) == b"x"
                    except TimeoutError:
                        continue
                    break
                assert answers
        view = json.loads(world.product_run(["vmnet", "show", network.name, "--json"]).stdout)
    finally:
        sent, _ = flood.communicate(timeout=30)
    assert int(sent) > 1000
    assert view["flows"]["udp"] <= 4096
    assert view["flows"]["tcp_opening"] <= 1024
    assert view["flows"]["icmp"] <= 512
    assert resident(network.pid) - before < GROWTH << 20
    log = (world.home / ".local/state/openvmnet" / network.name / "log").read_text()
    assert "Traceback" not in log
    assert log.count("\n") < 100  # what can be provoked is said once in a while


@pytest.mark.parametrize("kind", ["dns", "asker", "by TCP"])
def test_a_neighbours_connections_go_on(
    world: World, network: PluggedNetwork, guests: tuple[Namespace, Namespace], kind: str
) -> None:
    """Beside their number while nobody floods: a tenth and less where nothing holds the other back."""
    good, bad = guests
    command = [sys.executable, "-m", "lab.flood", kind, "eth0", network.gateway, "4"]
    if kind == "by TCP":
        command = [sys.executable, "-c", _ASKING, network.gateway, "4"]
    with exchange_server(world.internet):
        alone = exchange(good, "connect", PORTS, 1.5, 1)
        flood = bad.popen(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stdout=subprocess.PIPE, text=True)
        try:
            time.sleep(1)
            beside = exchange(good, "connect", PORTS, 1.5, 1)
        finally:
            asked, _ = flood.communicate(timeout=30)
    assert int(asked) > 500
    assert beside > alone / 6


def connections(guest: Namespace, seconds: float) -> int:
    """How many connections with an exchange each the guest makes, one after the other."""
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        with guest.socket() as sock:
            sock.settimeout(8)
            sock.connect((SERVER, 7))
            sock.sendall(b"x")
            assert sock.recv(10) == b"x"
        count += 1
    return count


def test_a_guest_with_many_addresses_is_one_asker(
    world: World, network: PluggedNetwork, guests: tuple[Namespace, Namespace]
) -> None:
    bad = guests[1]
    last = network.gateway.rpartition(".")[0]
    before = _counter(world, network, "dns_tcp_turned_away")
    addresses = [f"{last}.{number}" for number in (240, 241)]
    bad.batch(*(f"addr add {address}/24 dev eth0" for address in addresses))
    socks = [bad.socket() for _ in range(2 * MAX_PER_CLIENT)]
    try:
        for number, sock in enumerate(socks):
            sock.bind((addresses[number % 2], 0))
            sock.settimeout(4)
            sock.connect((network.gateway, 53))
        deadline = time.monotonic() + 5
        turned_away = 0
        while turned_away < MAX_PER_CLIENT and time.monotonic() < deadline:
            time.sleep(0.1)
            turned_away = _counter(world, network, "dns_tcp_turned_away") - before
        assert turned_away == MAX_PER_CLIENT
    finally:
        for sock in socks:
            sock.close()
        bad.batch(*(f"addr del {address}/24 dev eth0" for address in addresses))


def test_made_up_addresses_are_one_asker_too(
    world: World, network: PluggedNetwork, guests: tuple[Namespace, Namespace]
) -> None:
    before = _counter(world, network, "dns_forwarded")
    command = [sys.executable, "-m", "lab.flood", "asker", "eth0", network.gateway, "3"]
    guests[1].run(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, timeout=30)
    assert 0 < _counter(world, network, "dns_forwarded") - before < 5000  # three times as many, were they several


def _counter(world: World, network: PluggedNetwork, name: str) -> int:
    view = json.loads(world.product_run(["vmnet", "show", network.name, "--json"]).stdout)
    return int(view["counters"][name])


_ASKING = """
import select, socket, sys, time
gateway, seconds = sys.argv[1], float(sys.argv[2])
query = b"\\0\\1\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7gateway\\5vmnet\\10internal\\0\\0\\1\\0\\1"
ask = (len(query).to_bytes(2, "big") + query) * 400
socks = [socket.create_connection((gateway, 53)) for _ in range(16)]
end, octets = time.monotonic() + seconds, 0
for sock in socks:
    sock.setblocking(False)
while time.monotonic() < end:
    readable, writable, _ = select.select(socks, socks, [], 0.1)
    for sock in readable:
        octets += len(sock.recv(65536))
    for sock in writable:
        try:
            sock.send(ask)
        except BlockingIOError:
            pass
print(octets // 60)
"""
