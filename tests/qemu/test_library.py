"""The library among real guests: a program is a neighbour, and a VM that is paused costs nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.guest import qemu, virtio
from tests.netns import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.world import World

pytestmark = pytest.mark.qemu

PROGRAM = Path(__file__).with_name("library_program.py").read_text()


class Program:
    """A running program with the library, as the unprivileged user."""

    def __init__(self, world: World, do: str, **asked: Any) -> None:
        command = ["python", "-c", PROGRAM, json.dumps({"do": do, **asked})]
        pipe = subprocess.PIPE
        self.process = world.product(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.stderr.read())
        return json.loads(line)

    def end(self) -> dict[str, Any]:
        """Its last answer; it ends by itself."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.close()
        out = self.process.stdout.read()  # not communicate(): an earlier readline() may hold lines back
        err = self.process.stderr.read()
        assert self.process.wait(30) == 0, err
        assert err == ""
        return json.loads(out.splitlines()[-1]) if out else {}


def show(world: World, name: str = "shared") -> dict[str, Any]:
    return json.loads(world.product_run(["vmnet", "show", name, "--json"]).stdout)


@pytest.fixture(scope="module")
def neighbour(world: World) -> Iterator[Guest]:
    """A VM on the shared network, with a QMP socket."""
    qmp = ["-qmp", f"unix:{world.home}/qmp,server=on,wait=off"]
    guest = world.guest(["vmnet", "run", "--", *qemu(*virtio("vmnet-shared"), *qmp), "-name", "n"], name="n")
    with guest:
        guest.wait_boot()
        guest.lease = guest.dhcp(hostname="n")  # type: ignore[attr-defined] # the tests' own
        yield guest


def test_a_program_is_a_neighbour_of_a_vm(world: World, neighbour: Guest) -> None:
    theirs = neighbour.lease.address
    program = Program(world, "be a guest", ping=[theirs, "192.168.64.1"], stay=4)
    found = program.answer()
    assert found[theirs]
    assert found["192.168.64.1"]
    assert found["address"].startswith("192.168.64.")
    assert "3 packets received" in neighbour.run(f"ping -c 3 -W 2 {found['address']}").out
    # A VM's NIC leaves checksums to the TAP's other end; here they have to be done, and nothing be over the MTU.
    neighbour.run(f"head -c 20000 /dev/zero | nc -u -w 1 {found['address']} 9")
    (port,) = [port for port in show(world)["ports"] if port["mac"] == found["mac"]]
    assert port["address"] == found["address"]
    assert program.end() == {"broken": []}
    assert eventually(lambda: len(show(world)["ports"]) == 1)


def test_the_same_interface_id_gets_the_same_mac_and_lease(world: World, neighbour: Guest) -> None:
    start = {"interface_id": "0a3f0f36-6a54-4f0c-9c43-6f6d2b0f7f10"}
    found = []
    for each in (start, {}, start):
        program = Program(world, "be a guest", start=each)
        found.append(program.answer())
        program.end()
    one, other, again = found
    assert again == one
    assert other["mac"] != one["mac"]
    assert other["address"] != one["address"]


def test_a_program_has_its_reserved_address(world: World, neighbour: Guest) -> None:
    program = Program(world, "be a guest", options="vmnet-shared,id=n0,address=192.168.64.77", stay=1)
    found = program.answer()
    assert found["address"] == "192.168.64.77"
    (port,) = [port for port in show(world)["ports"] if port["mac"] == found["mac"]]
    assert (port["address"], port["reservation"]) == ("192.168.64.77", "192.168.64.77")
    program.end()


def test_an_interface_without_a_mac_may_use_any(world: World, neighbour: Guest) -> None:
    program = Program(world, "be a guest", start={"allocate_mac_address": False}, ping=[neighbour.lease.address])
    found = program.answer()
    assert found["mac"] == "52:54:00:de:ad:01"
    assert found[neighbour.lease.address]
    program.end()


def test_the_lease_of_an_interface_without_a_mac_is_shown(world: World, neighbour: Guest) -> None:
    program = Program(world, "be a guest", start={"allocate_mac_address": False}, stay=1)
    address = program.answer()["address"]
    assert [port["address"] for port in show(world)["ports"] if port["mac"] == ""] == [address]
    program.end()


def test_an_isolated_interface_reaches_the_gateway_and_no_neighbour(world: World, neighbour: Guest) -> None:
    theirs = neighbour.lease.address
    options = "vmnet-shared,id=n0,isolated=on"
    program = Program(world, "be a guest", options=options, ping=["192.168.64.1", theirs])
    found = program.answer()
    assert found["192.168.64.1"]
    assert not found[theirs]
    program.end()


def test_host_mode_and_a_large_mtu(world: World) -> None:
    options = "vmnet-host,id=n0,mtu=9000"
    program = Program(world, "be a guest", options=options, start={"linger": 0}, ping=["192.168.128.1"])
    found = program.answer()
    assert found["address"].startswith("192.168.128.")
    assert found["192.168.128.1"]
    assert program.end() == {"broken": []}


def test_a_program_that_is_killed_leaves_nothing(world: World, neighbour: Guest) -> None:
    before = len(show(world)["ports"])
    program = Program(world, "be a guest", stay=60)
    program.answer()
    assert len(show(world)["ports"]) == before + 1
    program.process.kill()
    program.process.communicate()
    assert eventually(lambda: len(show(world)["ports"]) == before)


def test_a_start_that_fails_on_a_real_network_leaves_no_port_and_no_network(world: World, neighbour: Guest) -> None:
    program = Program(world, "fail")
    failures = program.answer()["failures"]
    kinds = [kind for kind, _, _ in failures]
    assert kinds[:3] == ["Conflict", "Conflict", "OptionError"], failures
    assert [status for _, status, _ in failures[:3]] == [1009, 1009, 1003]
    assert failures[2][2].startswith("unsupported ifname 'none'")
    assert set(kinds[3:]) <= {"HostError", ""}, failures
    assert "HostError" in kinds[3:], failures
    names = [network["name"] for network in json.loads(world.product_run(["vmnet", "ls", "--json"]).stdout)]
    assert sorted(names) == ["shared", "taken"]
    assert eventually(lambda: len(show(world, "taken")["ports"]) == 1)
    program.end()
    assert eventually(lambda: not any("taken" in path for path in world.files()))


class Qmp:
    """QEMU's monitor."""

    def __init__(self, path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(10)
        self._sock.connect(path)
        self._file = self._sock.makefile("rw")
        self._file.readline()
        self.run("qmp_capabilities")

    def run(self, command: str) -> None:
        self._file.write(json.dumps({"execute": command}) + "\n")
        self._file.flush()
        while "return" not in (answer := json.loads(self._file.readline())):
            assert "event" in answer, answer

    def close(self) -> None:
        self._file.close()
        self._sock.close()


def cpu_seconds(pid: int) -> float:
    """What a process has used of the CPU."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_event_is_off_while_the_vm_is_paused(world: World, neighbour: Guest) -> None:
    network = show(world)["pid"]
    (vm,) = [one.pid for one in world.leftovers() if one.command.startswith("qemu-system")]
    with contextlib.closing(Qmp(f"{world.home}/qmp")) as qmp:
        qmp.run("stop")
        try:
            flood = Program(world, "flood", seconds=1.5)
            sent = flood.end()["sent"]  # far more than a TAP's queue holds is of no use to anyone who is paused
            assert sent >= 5000
            before = [cpu_seconds(pid) for pid in (vm, network)]
            time.sleep(2.0)
            used = [cpu_seconds(pid) - was for pid, was in zip((vm, network), before, strict=True)]
            assert all(share < 0.02 * 2.0 for share in used), used
        finally:
            qmp.run("cont")
    assert "3 packets received" in neighbour.run("ping -c 3 -W 2 192.168.64.1").out
