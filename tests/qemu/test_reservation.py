"""An address kept for a VM: a real guest is given it, nobody else is, and it outlives the network's process."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from lab.guest import qemu, virtio
from tests.qemu.test_shared import boot, show

if TYPE_CHECKING:
    from lab.world import World

pytestmark = pytest.mark.qemu
NAME = ("--name", "kept", "--linger", "0.3")
KEPT, OTHER = "192.168.64.50", "192.168.64.51"
RESERVED = f"vmnet-shared,address={KEPT}"


def end(world: World) -> None:
    """The network lingers for the sake of one test: end it."""
    record = json.loads((world.runtime / "openvmnet" / "kept" / "network.json").read_bytes())
    os.kill(record["pid"], signal.SIGTERM)
    assert world.wait_gone(10), world.leftovers()


def refused(world: World, *options: str) -> str:
    """What `vmnet run` says to options that do not go with network `kept`; exit code 3."""
    argv = ["vmnet", "run", *NAME, "--", *qemu(*virtio(",".join(("vmnet-shared", *options)))), "-name", "refused"]
    done = world.product_run(argv, check=False)
    assert done.returncode == 3, done.stderr
    return done.stderr


def test_a_guest_has_its_reserved_address_and_no_other_guest_has(world: World) -> None:
    with (
        boot(world, *virtio(RESERVED), name="owner", run=NAME) as owner,
        boot(world, *virtio("vmnet-shared"), name="other", run=NAME) as other,
    ):
        # The neighbour asks first, and for this very address.
        assert other.dhcp(options=f"-r {KEPT}").address != KEPT
        assert owner.dhcp(options=f"-r {OTHER}").address == KEPT
        ports = {port["vm"]: port for port in show(world, "kept")["ports"]}
        assert (ports["owner"]["address"], ports["owner"]["reservation"]) == (KEPT, KEPT)
        assert ports["other"]["reservation"] is None
        text = world.product_run(["vmnet", "show", "kept"]).stdout
        assert f"{ports['owner']['port']} has {KEPT} reserved" in text
        assert "1 packets received" in other.run(f"ping -c 1 -W 2 {KEPT}", check=True).out
        # Who is in the way, by name: the reservation, a lease, the gateway, the pool's ends.
        assert f"address={KEPT} is kept for VM 'owner'" in refused(world, f"address={KEPT}")
        leased = ports["other"]["address"]
        assert f"address={leased} is leased to VM 'other'" in refused(world, f"address={leased}")
        assert "is the gateway's" in refused(world, "address=192.168.64.1")
        assert "192.168.64.2 to 192.168.64.254" in refused(world, "address=10.0.0.5")
    assert world.wait_gone(10), world.leftovers()


def test_a_reserved_address_is_guarded_before_it_is_leased(world: World) -> None:
    with (
        boot(world, *virtio(RESERVED), name="owner", run=NAME),
        boot(world, *virtio("vmnet-shared"), name="thief", run=NAME) as thief,
    ):
        time.sleep(0.5)  # the firewall learns of it within a fifth of a second
        thief.run(f"ip link set eth0 up; ip addr add {KEPT}/24 dev eth0", check=True)
        assert thief.run("ping -c 2 -W 1 192.168.64.1").status != 0
        assert show(world, "kept")["counters"]["firewall_spoofed"] > 0
    assert world.wait_gone(10), world.leftovers()


def test_it_outlives_the_networks_process_and_ends_with_the_vm(world: World) -> None:
    with boot(world, *virtio("vmnet-shared"), name="other", run=NAME) as other:
        with boot(world, *virtio(RESERVED), name="owner", run=NAME) as owner:
            record = json.loads((world.runtime / "openvmnet" / "kept" / "network.json").read_bytes())
            os.kill(record["pid"], signal.SIGKILL)  # before its guest has asked for anything
            view = show(world, "kept")
            assert view["pid"] != record["pid"]
            assert [port["reservation"] for port in view["ports"]] == [None, KEPT]
            assert other.dhcp(options=f"-r {KEPT}").address != KEPT
            assert f"address={KEPT} is kept for VM 'owner'" in refused(world, f"address={KEPT}")
            assert owner.dhcp().address == KEPT
            record = json.loads((world.runtime / "openvmnet" / "kept" / "network.json").read_bytes())
            os.kill(record["pid"], signal.SIGKILL)  # and when it has its lease
            (port,) = (port for port in show(world, "kept")["ports"] if port["vm"] == "owner")
            assert (port["address"], port["reservation"]) == (KEPT, KEPT)
            assert owner.dhcp().address == KEPT
        with boot(world, *virtio(RESERVED), name="next", run=NAME) as heir:
            assert heir.dhcp().address == KEPT
    assert world.wait_gone(10), world.leftovers()


def test_a_vm_that_had_another_address_is_moved(world: World) -> None:
    with boot(world, *virtio("vmnet-shared"), name="mover", run=("--name", "kept", "--linger", "20")) as guest:
        before = guest.dhcp().address
    with boot(world, *virtio(RESERVED), name="mover", run=NAME) as guest:
        # It asks for its old address, which the network remembers, and is given the reserved one.
        assert guest.dhcp(options=f"-r {before}").address == KEPT != before
        (port,) = show(world, "kept")["ports"]
        assert port["address"] == KEPT
    end(world)


def test_an_address_that_a_new_network_does_not_have_ends_it_soon(world: World) -> None:
    argv = [
        "vmnet",
        "run",
        "--name",
        "vain",
        "--linger",
        "0",
        "--",
        "true",
        "-netdev",
        "vmnet-shared,id=n,address=10.0.0.5",
    ]
    done = world.product_run(argv, check=False)
    assert done.returncode == 3
    assert "address=10.0.0.5 is not in the DHCP pool on network 'vain'" in done.stderr
    deadline = time.monotonic() + 3
    while (world.runtime / "openvmnet" / "vain").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
