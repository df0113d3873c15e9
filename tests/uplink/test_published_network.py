"""Published ports, through a whole network: clients on the host and beyond it, a guest that serves."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lab.netguest import PluggedNetwork
from lab.world import HOST, HOST6
from tests.netns import descriptors, dial, eventually, flows, listen, readable, receive, view
from tests.uplink.pumping import reset

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.kernel
DATA = os.urandom(4 << 20)
GUEST, GUEST6 = "10.9.9.201", "fd99:9:9:9::200"
ADDRESSES = "start-address=10.9.9.1,end-address=10.9.9.99,subnet-mask=255.255.255.0,nat66-prefix=fd99:9:9:9::"
RULES = (
    f"tcp::2201-{GUEST}:22",
    f":127.0.0.1:2202-{GUEST}:22",
    f"tcp:[{HOST6}]:2203-{GUEST}:22",
    f"tcp::2204-[{GUEST6}]:22",
    "tcp::2205-10.9.9.77:22",  # nobody is there
    "tcp::2206-:22",  # no lease
    f"udp::2201-{GUEST}:53",
    f"udp:[::]:2202-{GUEST}:53",
    f"udp::2203-[{GUEST6}]:53",
    "udp::2204-:53",
)
OPTIONS = f",{ADDRESSES}" + "".join(f",hostfwd={rule}" for rule in RULES)


@pytest.fixture(scope="module")
def network(world: World) -> Iterator[PluggedNetwork]:
    with PluggedNetwork(world, "published", options=OPTIONS) as made:
        yield made


@pytest.fixture(scope="module")
def guest(network: PluggedNetwork) -> Namespace:
    return network.plug()


@contextlib.contextmanager
def connected(client: Namespace, guest: Namespace, where: tuple[str, int], at: str = GUEST):
    """One connection: (the client's end, the guest's end, the client's address as the guest sees it)."""
    with listen(guest, (at, 22)) as server, dial(client, where) as one:
        other, peer = server.accept()
        other.settimeout(5)
        with other:
            yield one, other, peer


def test_a_client_beyond_the_host_reaches_the_guest(world, guest, network):
    before = flows(network, world)["tcp"]
    with connected(world.internet, guest, (HOST, 2201)) as (one, other, peer):
        assert peer[0] == network.gateway
        for source, sink in ((one, other), (other, one)):
            writer = threading.Thread(target=source.sendall, args=(DATA,))
            writer.start()
            assert receive(sink, len(DATA)) == DATA
            writer.join()
        assert flows(network, world)["tcp"] == before + 1
    assert eventually(lambda: flows(network, world)["tcp"] == before)


@pytest.mark.parametrize(
    ("where", "at"),
    [
        (("127.0.0.1", 2201), GUEST),
        (("127.0.0.1", 2202), GUEST),
        ((HOST6, 2203), GUEST),
        ((HOST, 2204), GUEST6),
    ],
)
def test_each_rule_leads_to_its_guest(world, guest, where, at):
    with connected(world.host, guest, where, at) as (one, other, _):
        one.sendall(b"question")
        assert receive(other, 8) == b"question"
        other.sendall(b"answer")
        assert receive(one, 6) == b"answer"


def test_the_guest_speaks_first(world, guest):
    with connected(world.internet, guest, (HOST, 2201)) as (one, other, _):
        other.sendall(b"SSH-2.0")
        assert receive(one, 7) == b"SSH-2.0"


@pytest.mark.parametrize("side", [0, 1], ids=["client", "guest"])
def test_half_of_it_closes(world, guest, side):
    with connected(world.internet, guest, (HOST, 2201)) as ends:
        first, second = ends[side], ends[1 - side]
        first.sendall(b"first and last")
        first.shutdown(socket.SHUT_WR)
        assert receive(second, 100) == b"first and last"
        second.sendall(DATA)
        second.shutdown(socket.SHUT_WR)
        assert receive(first, len(DATA) + 1) == DATA


@pytest.mark.parametrize("side", [0, 1], ids=["client", "guest"])
def test_a_reset_is_a_reset(world, guest, side):
    with connected(world.internet, guest, (HOST, 2201)) as ends:
        ends[0].sendall(b"some")
        assert receive(ends[1], 4) == b"some"
        reset(ends[side])
        with pytest.raises(ConnectionResetError):
            ends[1 - side].recv(10)


def test_what_the_client_said_and_left_before_the_guest_accepted_arrives(world, guest):
    with listen(guest, (GUEST, 22)) as server:
        with dial(world.host, (HOST, 2201)) as one:
            one.sendall(b"in one breath")
        with server.accept()[0] as other:
            other.settimeout(5)
            assert receive(other, 100) == b"in one breath"


@pytest.mark.parametrize("port", [2201, 2206], ids=["closed port", "no lease"])
def test_a_guest_that_does_not_serve_is_a_reset(world, guest, network, port):
    before = view(network, world)["counters"]["published_refused"]
    begin = time.monotonic()
    with pytest.raises(ConnectionResetError), dial(world.internet, (HOST, port)) as sock:
        assert sock.recv(10) != b""
    assert time.monotonic() - begin < 1
    assert view(network, world)["counters"]["published_refused"] == before + 1


def test_a_guest_that_is_not_there_is_a_reset_after_a_while(world, guest, network):
    with dial(world.internet, (HOST, 2205)) as sock:
        assert flows(network, world)["tcp_opening"] == 1
        with pytest.raises(OSError, match=os.strerror(104)):
            sock.recv(10)
    assert flows(network, world)["tcp_opening"] == 0


def test_a_client_that_gives_up_first_takes_its_opening_with_it(world, guest, network):
    sock = dial(world.internet, (HOST, 2205))
    assert flows(network, world)["tcp_opening"] == 1
    reset(sock)
    assert eventually(lambda: flows(network, world)["tcp_opening"] == 0, 1)


def test_openings_have_a_bound(world, guest, network):
    """A guest that is not there keeps each client waiting; the 513th is not among them."""
    before = view(network, world)["counters"]["published_dropped"]
    clients = [world.internet.socket() for _ in range(530)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex((HOST, 2205))
    assert eventually(lambda: view(network, world)["counters"]["published_dropped"] >= before + 18, 2)
    assert flows(network, world)["tcp_opening"] <= 512
    for client in clients:
        reset(client)
    assert eventually(lambda: flows(network, world)["tcp_opening"] == 0)


def test_many_connections_leave_nothing(world, guest, network):
    before = descriptors(network.pid)
    count = 2000
    with listen(guest, (GUEST, 22)) as server:

        def serve() -> None:
            for _ in range(count):
                with server.accept()[0] as sock:
                    sock.sendall(sock.recv(10))

        thread = threading.Thread(target=serve)
        thread.start()
        for number in range(count):
            with dial(world.host, (HOST, 2201)) as sock:
                sock.sendall(b"%d" % number)
                assert sock.recv(10) == b"%d" % number
        thread.join()
    assert eventually(lambda: descriptors(network.pid) <= before + 40)  # sockets of the namespace are kept in stock


def test_ports_of_ended_connections_are_soon_used_again(world, guest, network):
    """The gateway's end of a connection that the client has closed waits for a minute: TIME_WAIT."""
    network.sysctl("net.ipv4.ip_local_port_range", "48000 51999")
    with listen(guest, (GUEST, 22)) as server:
        for _ in range(6000):
            with dial(world.host, (HOST, 2201)) as one:
                one.sendall(b"x")
                one.shutdown(socket.SHUT_WR)
                with server.accept()[0] as other:
                    assert other.recv(10) == b"x"
                    assert other.recv(10) == b""


# UDP.


def bound(guest: Namespace, at: str) -> socket.socket:
    sock = guest.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.bind((at, 53))
    return sock


@pytest.mark.parametrize(
    ("where", "at"),
    [((HOST, 2201), GUEST), (("127.0.0.1", 2201), GUEST), ((HOST6, 2202), GUEST), ((HOST, 2203), GUEST6)],
)
def test_datagrams_go_both_ways_and_come_from_where_they_were_sent_to(world, guest, network, where, at):
    family = socket.AF_INET6 if ":" in where[0] else socket.AF_INET
    with bound(guest, at) as server, world.host.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        for number in range(5):
            client.sendto(b"question %d" % number, where)
            data, peer = server.recvfrom(100)
            assert (data, peer[0]) == (b"question %d" % number, network.gateway6 if ":" in at else network.gateway)
            server.sendto(b"answer %d" % number, peer)
            data, peer = client.recvfrom(100)
            assert (data, peer[:2]) == (b"answer %d" % number, where)
        assert flows(network, world)["udp"] >= 1


def test_each_client_has_a_flow_of_its_own(world, guest, network):
    with bound(guest, GUEST) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(world.internet.socket(kind=socket.SOCK_DGRAM)) for _ in range(200)]
        for number, client in enumerate(clients):
            client.connect((HOST, 2201))
            client.send(b"%d" % number)
        seen = set()
        for _ in clients:
            data, peer = server.recvfrom(100)
            seen.add(peer)
            server.sendto(b"for " + data, peer)
        assert len(seen) == len(clients)
        for number, client in enumerate(clients):
            client.settimeout(5)
            assert client.recv(100) == b"for %d" % number


def test_large_and_many_datagrams_pass(world, guest):
    with bound(guest, GUEST) as server, world.host.socket(kind=socket.SOCK_DGRAM) as client:
        client.connect((HOST, 2201))
        client.settimeout(5)
        for size in (0, 1, 1472, 1473, 9000, 60000):
            client.send(DATA[:size])
            data, peer = server.recvfrom(65536)
            assert data == DATA[:size]
            server.sendto(data, peer)
            assert client.recv(65536) == DATA[:size]


def test_a_guest_without_a_lease_gets_nothing_and_it_is_counted(world, guest, network):
    before = view(network, world)["counters"]["published_refused"]
    with world.host.socket(kind=socket.SOCK_DGRAM) as client:
        client.sendto(b"x", (HOST, 2204))
        assert eventually(lambda: view(network, world)["counters"]["published_refused"] == before + 1)


def test_only_the_guest_that_was_asked_answers(world, network, guest):
    """A neighbour cannot answer a client in the guest's place."""
    neighbour = network.plug()
    with bound(guest, GUEST) as server, world.host.socket(kind=socket.SOCK_DGRAM) as client:
        client.connect((HOST, 2201))
        client.send(b"question")
        _, peer = server.recvfrom(100)
        with neighbour.socket(kind=socket.SOCK_DGRAM) as liar:
            liar.bind(("", 53))
            liar.sendto(b"lie", peer)
            assert not readable(client, 0.3)
        server.sendto(b"truth", peer)
        client.settimeout(5)
        assert client.recv(100) == b"truth"


# The commands.


def run(world: World, rule: str, *, name: str = "other", options: str = "") -> subprocess.CompletedProcess[str]:
    command = ["vmnet", "run", "--name", name, "--linger", "0.2", "--", "sh", "-c", "exit 0", "sh"]
    return world.product_run([*command, "-netdev", f"vmnet-shared,id=n0,hostfwd={rule}{options}"], check=False)


def test_show_lists_them(world, network):
    (port,) = [port for port in view(network, world)["ports"] if port["published"]]
    assert len(port["published"]) == len(RULES)
    assert port["published"][0] == {
        "protocol": "tcp",
        "host_address": "0.0.0.0",
        "host_port": 2201,
        "guest_address": GUEST,
        "guest_port": 22,
    }
    assert port["published"][5]["guest_address"] is None
    shown = world.product_run(["vmnet", "show", network.name]).stdout
    assert f"{port['port']} publishes tcp 0.0.0.0:2201 to {GUEST}:22" in shown
    assert f"{port['port']} publishes tcp [{HOST6}]:2203 to {GUEST}:22" in shown
    assert f"{port['port']} publishes udp 0.0.0.0:2204 to (no address yet):53" in shown


@pytest.mark.parametrize(
    ("rule", "code", "words"),
    [
        ("tcp::2201-:22", 3, "tcp port 2201 of this host is in use"),
        ("udp::2201-:22", 3, "udp port 2201 of this host is in use"),
        (f"tcp:{HOST}:2201-:22", 3, f"tcp port 2201 of {HOST} is in use"),
        ("tcp::23-:22", 69, "ports below 1024 are for root on this host, and 23 is one; 1024 to 65535 would be right"),
        ("tcp:192.0.2.99:2222-:22", 2, "192.0.2.99 is no address of this host"),
        ("tcp::2222-10.0.2.15:22", 2, "10.0.2.15 is no guest's address on network 'other'"),
        ("tcp::0-:22", 2, "Invalid host forwarding rule 'tcp::0-:22' (Bad host port)"),
    ],
)
def test_what_the_host_refuses_is_a_sentence_before_the_vm_starts(world, network, rule, code, words):
    done = run(world, rule)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    if "Invalid" not in words:
        assert f"Could not set up host forwarding rule '{rule}'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_plug_keeps_no_port_of_the_hosts(world, network):
    assert run(world, "tcp::2299-:22,hostfwd=tcp::2201-:22").returncode == 3
    with world.host.socket() as sock:
        sock.bind(("", 2299))
    assert run(world, "tcp::2299-:22").returncode == 0


def test_the_host_is_not_on_a_private_network(world):
    uuid = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
    command = ["vmnet", "run", "--", "true", "-netdev", f"vmnet-host,id=n0,net-uuid={uuid},hostfwd=tcp::2222-:22"]
    done = world.product_run(command, check=False)
    assert done.returncode == 2
    assert "the host is not on a private network" in done.stderr


def test_when_the_vm_is_gone_its_port_is_free_and_its_connections_have_ended(world):
    options = ",start-address=10.7.7.1,end-address=10.7.7.99,subnet-mask=255.255.255.0"
    with PluggedNetwork(world, "leaving", options=f"{options},hostfwd=tcp::2300-10.7.7.201:22") as leaving:
        server = leaving.plug()
        with connected(world.host, server, (HOST, 2300), "10.7.7.201") as (one, _, _):
            leaving._holder.kill()
            leaving._holder.wait()
            one.settimeout(3)
            with pytest.raises(ConnectionResetError):
                one.recv(10)
        with pytest.raises(ConnectionRefusedError):
            dial(world.host, (HOST, 2300))


def test_the_next_process_of_the_network_takes_the_ports_again(world):
    options = ",start-address=10.8.8.1,end-address=10.8.8.99,subnet-mask=255.255.255.0"
    with PluggedNetwork(world, "survivor", options=f"{options},hostfwd=tcp::2400-10.8.8.201:22") as survivor:
        server = survivor.plug()
        os.kill(survivor.pid, signal.SIGKILL)
        assert eventually(lambda: not os.path.exists(f"/proc/{survivor.pid}/exe"))
        shown = view(survivor, world)
        assert shown["ports"][0]["published"][0]["host_port"] == 2400
        with connected(world.host, server, (HOST, 2400), "10.8.8.201") as (one, other, _):
            one.sendall(b"again")
            assert receive(other, 5) == b"again"
