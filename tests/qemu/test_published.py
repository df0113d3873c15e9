"""Published ports of real guests: found by their leases, used by real clients, gone with their VMs."""

from __future__ import annotations

import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from lab.guest import qemu, virtio
from lab.world import HOST
from tests.netns import eventually
from tests.qemu.test_library import Program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.qemu

WEB = "mkdir -p /www && echo {} >/www/index.html && httpd -p 80 -h /www"


def boot(world: World, *network: str, name: str) -> Guest:
    guest = world.guest(["vmnet", "run", "--", *qemu(*network), "-name", name], name=name)
    guest.wait_boot()
    return guest


def ports(world: World, name: str = "shared") -> dict[str, Any]:
    view = json.loads(world.product_run(["vmnet", "show", name, "--json"]).stdout)
    return {port["vm"]: port for port in view["ports"]}


def curl(client: Namespace, where: str) -> tuple[int, str]:
    done = client.run(["curl", "-sS", "--max-time", "5", f"http://{where}/"], check=False)
    return done.returncode, done.stdout.strip()


@pytest.fixture(scope="module")
def fresh(world: World) -> Iterator[Guest]:
    """An isolated VM with published ports, before it has asked for an address."""
    rules = ("tcp::8080-:80", "tcp::5301-:5201", "udp::5301-:5201", "tcp:127.0.0.1:8088-:80")
    options = "vmnet-shared,isolated=on" + "".join(f",hostfwd={rule}" for rule in rules)
    with boot(world, *virtio(options), name="server") as guest:
        yield guest


@pytest.fixture(scope="module")
def server(fresh: Guest) -> Guest:
    """The same with an address, and a page on its port 80."""
    fresh.lease = fresh.dhcp(hostname="server")  # type: ignore[attr-defined] # the tests' own
    fresh.run(WEB.format("served"), check=True)
    return fresh


def test_before_the_lease_a_client_is_reset(world: World, fresh: Guest) -> None:
    # CURLE_COULDNT_CONNECT or CURLE_RECV_ERROR: the reset is there before curl has looked, or not.
    assert curl(world.internet, f"{HOST}:8080")[0] in (7, 56)
    assert ports(world)["server"]["published"][0]["guest_address"] is None


def test_real_clients_are_served(world: World, server: Guest) -> None:
    address = server.lease.address
    for client, where in (
        (world.internet, f"{HOST}:8080"),
        (world.host, f"{HOST}:8080"),
        (world.host, "localhost:8080"),
        (world.host, "127.0.0.1:8088"),
    ):
        assert curl(client, where) == (0, "served")
    assert curl(world.internet, f"{HOST}:8088")[0] == 7  # CURLE_COULDNT_CONNECT: the host's loopback only
    assert {one["guest_address"] for one in ports(world)["server"]["published"]} == {address}
    shown = world.product_run(["vmnet", "show", "shared"]).stdout
    assert f"publishes tcp 0.0.0.0:8080 to {address}:80" in shown


def test_iperf3_measures_through_it_both_ways_by_tcp_and_udp(world: World, server: Guest) -> None:
    server.run("iperf3 -s -D; until grep -q :1451 /proc/net/tcp /proc/net/tcp6; do usleep 20000; done", check=True)
    for options in ([], ["-R"], ["-u", "-b", "5M"], ["-u", "-b", "5M", "-R"]):
        received = iperf3(world, *options)
        assert received["bytes"] > 300_000, received
        assert received.get("lost_percent", 0) < 20, received


def iperf3(world: World, *options: str) -> dict[str, Any]:
    """What arrived in a second."""
    command = ["iperf3", "-c", HOST, "-p", "5301", "-t", "1", "--json", *options]
    for _ in range(20):
        found = json.loads(world.internet.run(command, check=False).stdout)
        # The server has not done with the client before, or does not listen again yet: a refusal is a reset here.
        if not any(word in found.get("error", "") for word in ("busy", "reset by peer")):
            break
        time.sleep(0.1)
    assert "error" not in found, found["error"]
    return found["end"]["sum" if "-u" in options else "sum_received"]


def test_two_vms_have_their_own_ports_and_the_json_form(world: World, server: Guest) -> None:
    network = ["-netdev", '{"type":"vmnet-shared","id":"two","hostfwd":[{"str":"tcp::8081-:80"}]}']
    network += ["-device", "virtio-net-pci,netdev=two"]
    with boot(world, *network, name="second") as guest:
        guest.dhcp(hostname="second")
        guest.run(WEB.format("second"), check=True)
        assert curl(world.internet, f"{HOST}:8081") == (0, "second")
        assert curl(world.internet, f"{HOST}:8080") == (0, "served")
        # The host's port is a service of the host's: a guest meets it at the gateway.
        asked = guest.run("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | nc -w 5 192.168.64.1 8080").out
        assert asked.strip().endswith("served")
    assert eventually(lambda: curl(world.internet, f"{HOST}:8081")[0] == 7)


def test_a_port_that_is_taken_ends_the_command_before_the_vm(world: World, server: Guest) -> None:
    command = ["vmnet", "run", "--", *qemu(*virtio("vmnet-shared,hostfwd=tcp::8080-:80")), "-name", "third"]
    begun = time.monotonic()
    done = world.product_run(command, check=False)
    assert done.returncode == 3
    assert "Could not set up host forwarding rule 'tcp::8080-:80': tcp port 8080 of this host is in use" in done.stderr
    assert time.monotonic() - begun < 3
    assert "third" not in ports(world)


def test_vmnet_host_publishes_too(world: World) -> None:
    with boot(world, *virtio("vmnet-host,hostfwd=tcp::8090-:80"), name="inner") as guest:
        guest.dhcp()
        guest.run(WEB.format("inner"), check=True)
        assert curl(world.internet, f"{HOST}:8090") == (0, "inner")
    assert eventually(lambda: curl(world.host, f"{HOST}:8090")[0] == 7)


def test_a_program_publishes_by_the_library(world: World) -> None:
    options = "vmnet-shared,id=n0,hostfwd=udp::5390-:53"
    program = Program(world, "serve", options=options, start={"linger": 0}, seconds=10)
    program.answer()
    with world.internet.socket(kind=socket.SOCK_DGRAM) as client:
        client.connect((HOST, 5390))
        client.settimeout(5)
        client.send(b"question")
        assert client.recv(100) == b"QUESTION"
        assert program.end() == {"from": "192.168.64.1"}


def test_a_program_learns_that_a_port_is_taken(world: World) -> None:
    with world.host.socket() as other:
        other.bind(("", 5391))
        other.listen(1)
        program = ["python", "-c", "import openvmnet; openvmnet.start(openvmnet.Shared(hostfwd=('tcp::5391-:22',)))"]
        done = world.product_run(program, check=False)
    assert "openvmnet.errors.Conflict: Could not set up host forwarding rule 'tcp::5391-:22'" in done.stderr
