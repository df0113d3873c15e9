"""What is killed, and what goes on: VM, network process, agent. What is wrong, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest

from lab.guest import qemu, virtio
from lab.world import SERVER
from tests.qemu.test_shared import boot, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.world import World

pytestmark = pytest.mark.qemu
NAME = ("--name", "faults", "--linger", "0.3")


def record(world: World) -> dict[str, Any]:
    return json.loads((world.runtime / "openvmnet" / "faults" / "network.json").read_bytes())


def within(seconds: float, condition: Any) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def pair(world: World) -> Iterator[tuple[Guest, Guest, str]]:
    with (
        boot(world, *virtio("vmnet-shared"), name="left", run=NAME) as left,
        boot(world, *virtio("vmnet-shared"), name="right", run=NAME) as right,
    ):
        left.dhcp(hostname="left")
        yield left, right, right.dhcp(hostname="right").address
    assert world.wait_gone(10), world.leftovers()


def test_killed_vm_is_gone_within_a_second(world: World, pair: tuple[Guest, Guest, str]) -> None:
    left, right, _ = pair
    right.run(f"nc {SERVER} 9 </dev/zero >/dev/null 2>&1 & sleep 0.5; ping -c 1 {SERVER}", check=True)
    assert within(3, lambda: show(world, "faults")["flows"]["tcp"] == 1)
    right.kill()

    def gone() -> bool:
        view = show(world, "faults")
        return [port["vm"] for port in view["ports"]] == ["left"] and not any(view["flows"].values())

    assert within(1, gone), show(world, "faults")
    assert left.run("nslookup right.vmnet.internal").status != 0
    assert left.run("nslookup left.vmnet.internal", check=True)


def test_killed_network_process_is_taken_over(world: World, pair: tuple[Guest, Guest, str]) -> None:
    left, right, address = pair
    before = record(world)
    leases = [port["address"] for port in show(world, "faults")["ports"]]
    os.kill(before["pid"], signal.SIGKILL)
    assert "1 packets received" in left.run(f"ping -c 1 -W 2 {address}", check=True).out
    view = show(world, "faults")
    assert view["pid"] != before["pid"]
    assert any("had died" in note and "2 of its 2 ports" in note for note in view["notes"])
    assert [port["address"] for port in view["ports"]] == leases
    for guest in (left, right):
        assert guest.run("wget -q -O /dev/null http://www.example.test/", check=True).status == 0
        assert "1 packets received" in guest.run(f"ping -c 1 -W 2 {SERVER}", check=True).out
    with boot(world, *virtio("vmnet-shared"), name="third", run=NAME) as third:
        third.dhcp()
        assert "1 packets received" in third.run("ping -c 1 -W 2 left.vmnet.internal", check=True).out


def test_killed_agent_ends_the_network_with_a_sentence(world: World, pair: tuple[Guest, Guest, str]) -> None:
    left, _, address = pair
    before = record(world)
    os.kill(before["agent"], signal.SIGKILL)
    assert within(2, lambda: all(one.pid != before["pid"] for one in world.leftovers()))
    log = (world.home / ".local/state/openvmnet/faults/log").read_text()
    assert "the agent of network 'faults'" in log
    assert log.count("Traceback") == 0
    assert "1 packets received" in left.run(f"ping -c 1 -W 2 {address}", check=True).out
    with boot(world, *virtio("vmnet-shared"), name="later", run=NAME) as later:
        later.dhcp()  # the same name, a new network, while the old guests still have each other
        assert later.run("wget -q -O /dev/null http://www.example.test/", check=True).status == 0


def test_network_and_agent_killed_at_once(world: World, pair: tuple[Guest, Guest, str]) -> None:
    before = record(world)
    os.kill(before["pid"], signal.SIGKILL)
    os.kill(before["agent"], signal.SIGKILL)
    done = world.product_run(["vmnet", "show", "faults"], check=False)
    assert done.returncode == 4
    assert "ended without cleaning up" in done.stderr
    assert not (world.runtime / "openvmnet" / "faults").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("start-address=192.168.70.1", "'start-address', 'end-address', 'subnet-mask' should be provided together"),
        ("start-address=8.8.8.1,end-address=8.8.8.9,subnet-mask=255.255.255.0", "not '8.8.8.1'"),
        ("start-address=192.168.70.9,end-address=192.168.70.2,subnet-mask=255.255.255.0", "'192.168.70.2'"),
        ("start-address=10.0.0.1,end-address=10.0.0.9,subnet-mask=255.0.255.0", "'255.0.255.0'"),
        ("nat66-prefix=fd00:1::1", "fd00:1::1"),
        ("hostfwd=tcp::0-:22", "Invalid host forwarding rule 'tcp::0-:22'"),
        ("guestfwd=tcp:10.0.2.100:22-cmd:x", "guestfwd"),
    ],
)
def test_failed_create_leaves_nothing(world: World, options: str, sentence: str) -> None:
    _fails(world, options, 2, sentence)


@pytest.mark.parametrize(
    ("options", "status", "sentence"),
    [
        ("hostfwd=tcp::22-:22", 69, "Could not set up host forwarding rule 'tcp::22-:22'"),
        ("address=10.0.0.5", 3, "address=10.0.0.5 is not in the DHCP pool"),
    ],
)
def test_a_network_whose_only_vm_is_refused_goes_at_once(
    world: World, options: str, status: int, sentence: str
) -> None:
    """The VM's port is refused by a network that was started for it, and whose linger is five seconds."""
    _fails(world, options, status, sentence)


def _fails(world: World, options: str, status: int, sentence: str) -> None:
    before = (world.files(), world.network_namespaces())
    argv = ["vmnet", "run", "--name", "wrong", "--", *qemu("-netdev", f"vmnet-shared,id=n0,{options}")]
    done = world.product_run(argv, check=False)
    assert done.returncode == status
    assert sentence in done.stderr
    assert done.stderr.count("\n") <= 3
    assert world.wait_gone(2), world.leftovers()
    assert (world.files(), world.network_namespaces()) == before


def test_overlap_with_a_route_of_the_host(world: World) -> None:
    world.host.batch("route add 192.168.90.0/24 via 192.0.2.1")
    addresses = "start-address=192.168.90.1,end-address=192.168.90.99,subnet-mask=255.255.255.0"
    argv = ["--", "true", "-netdev", f"vmnet-shared,id=n0,{addresses}"]
    try:
        done = world.product_run(["vmnet", "run", "--linger", "0", *argv], check=False)
        assert done.returncode == 3
        assert "192.168.90.0/24" in done.stderr
        assert "--force" in done.stderr
        assert world.wait_gone(2), world.leftovers()
        assert world.product_run(["vmnet", "run", "--linger", "0", "--force", *argv]).returncode == 0
    finally:
        world.host.batch("route del 192.168.90.0/24 via 192.0.2.1")
    assert world.wait_gone(5)


def test_overlap_with_a_running_network_may_be_forced(world: World) -> None:
    addresses = "start-address=192.168.91.1,end-address=192.168.91.99,subnet-mask=255.255.255.0"
    hold = ["sh", "-c", "echo up; exec sleep 100", "sh", "-netdev", f"vmnet-shared,id=n0,{addresses}"]
    first = world.product(["vmnet", "run", "--name", "one", "--linger", "0", "--", *hold], stdout=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == b"up\n"
    second = ["vmnet", "run", "--name", "other", "--linger", "0"]
    argv = ["--", "true", "-netdev", f"vmnet-shared,id=n0,{addresses}"]
    refused = world.product_run([*second, *argv], check=False)
    assert refused.returncode == 3
    assert "running network 'one'" in refused.stderr
    assert world.product_run([*second, "--force", *argv]).returncode == 0
    joined = world.product_run(["vmnet", "run", *argv])  # the same addresses and no name: the network that has them
    assert joined.returncode == 0
    views = json.loads(world.product_run(["vmnet", "ls", "--json"]).stdout)
    assert [view["name"] for view in views if view["gateway"] == "192.168.91.1" and view["ports"]] == ["one"]
    first.kill()
    first.wait()
    first.stdout.close()
    assert world.wait_gone(5), world.leftovers()


def test_root_takes_the_same_path(world: World) -> None:
    home, runtime = world.directory / "root", world.directory / "root-runtime"
    home.mkdir(mode=0o700)
    runtime.mkdir(mode=0o700)
    own = {"HOME": str(home), "XDG_STATE_HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}
    argv = ["vmnet", "run", "--name", "roots", "--linger", "0", "--"]
    argv += ["sh", "-c", "vmnet show roots --json", "sh", "-netdev", "vmnet-shared,id=n0"]
    done = world.as_root(argv, env=world.environment() | own)
    assert [port["port"] for port in json.loads(done.stdout)["ports"]] == ["vm1"]
    assert within(5, lambda: not (runtime / "openvmnet" / "roots").exists())
    assert world.wait_gone(5), world.leftovers()
