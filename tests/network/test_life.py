"""A network's life: what keeps it, what ends it, and that two NICs do not get one MAC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lab.world import World

pytestmark = pytest.mark.kernel

_HOLD = ("sh", "-c", "exec sleep 100000", "sh")  # takes a VM's place: it holds its ports and looks at no argument


def networks(world: World) -> dict[str, dict[str, Any]]:
    """The running networks, by name."""
    done = world.product_run(["vmnet", "ls", "--json"])
    return {view["name"]: view for view in json.loads(done.stdout)}


@pytest.fixture
def hold(world: World) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """`vmnet run` of something that stays; what is left of them is ended with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *netdev: str, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        argv = ["vmnet", "run", "--name", name, *options, "--", *_HOLD, *netdev]
        before = len(networks(world).get(name, {"ports": ()})["ports"])
        process: subprocess.Popen[bytes] = world.product(argv, stdin=subprocess.DEVNULL)
        started.append(process)
        assert eventually(lambda: len(networks(world).get(name, {"ports": ()})["ports"]) > before, 15), "no port came"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    assert eventually(lambda: not networks(world), 15), "a network is left"


def _nic(mac: str) -> tuple[str, ...]:
    return ("-netdev", "vmnet-shared,id=n0", "-device", f"virtio-net-pci,netdev=n0,mac={mac}")


def test_a_mac_in_use_is_refused_before_the_vm_starts(world: World, hold: Callable[..., Any]) -> None:
    hold("twins", *_nic("52:54:00:00:00:01"), options=["--linger", "0"])
    argv = ["vmnet", "run", "--name", "twins", "--", "sh", "-c", "echo started", "sh", *_nic("52:54:00:00:00:01")]
    done = world.product_run(argv, check=False)
    assert done.returncode == 3
    assert "mac=52:54:00:00:00:01 is in use on network 'twins'" in done.stderr
    assert "started" not in done.stdout
    assert [port["mac"] for port in networks(world)["twins"]["ports"]] == ["52:54:00:00:00:01"]


def test_nics_without_a_mac_get_one_each(world: World, hold: Callable[..., Any]) -> None:
    hold("two", "-netdev", "vmnet-shared,id=a", "-netdev", "vmnet-shared,id=b", options=["--linger", "0"])
    assert eventually(lambda: len(networks(world)["two"]["ports"]) == 2, 15), "the second port did not come"
    first, second = (port["mac"] for port in networks(world)["two"]["ports"])
    assert first != second


def test_the_network_stays_for_its_linger_and_is_joined(world: World, hold: Callable[..., Any]) -> None:
    process = hold("lingering", "-netdev", "vmnet-shared,id=n0", options=["--linger", "300"])
    pid = networks(world)["lingering"]["pid"]
    process.kill()
    process.wait()
    assert eventually(lambda: not networks(world)["lingering"]["ports"], 15), "the port stays"
    assert networks(world)["lingering"]["pid"] == pid
    process = hold("lingering", "-netdev", "vmnet-shared,id=n0", options=["--linger", "0"])
    process.kill()
    process.wait()
    assert eventually(lambda: not networks(world)["lingering"]["ports"], 15), "the port stays"
    # Who started it has said how long; nobody waits for that here.
    assert networks(world)["lingering"]["pid"] == pid
    os.kill(pid, signal.SIGTERM)
    assert eventually(lambda: "lingering" not in networks(world), 15), "the network stays"


def test_a_neighbour_keeps_the_network(world: World, hold: Callable[..., Any]) -> None:
    leaving = hold("kept", "-netdev", "vmnet-shared,id=n0", options=["--linger", "0"])
    hold("kept", "-netdev", "vmnet-shared,id=n0", options=["--linger", "0"])
    leaving.kill()
    leaving.wait()
    assert eventually(lambda: len(networks(world)["kept"]["ports"]) == 1, 15), "the port stays"
    assert "kept" in networks(world)
