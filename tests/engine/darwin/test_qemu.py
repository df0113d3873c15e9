"""Real guests whose network is the macOS engine, over the stand-in, whose packets end in a Linux bridge."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from lab import standin
from lab.guest import Guest, qemu, virtio
from lab.image import image
from lab.paths import CHECKOUT
from lab.world import UID

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.qemu
GATEWAY = "192.168.64.1"


class Mac:
    """A namespace that plays the Mac: what vmnet's kernel side and bootpd do there, a bridge and dnsmasq do here."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.namespace: Namespace = world.namespace("mac")
        self.namespace.batch(
            "link add bridge100 type bridge",
            f"addr add {GATEWAY}/24 dev bridge100",
            "addr add 192.168.128.1/24 dev bridge100",  # the gateway of host mode, on the same wire
            "link set bridge100 up",
        )
        command = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--no-ping"]
        command += ["--interface=bridge100", "--bind-interfaces", "--port=0", "--dhcp-authoritative", "--pid-file="]
        command += ["--dhcp-range=192.168.64.2,192.168.64.254,1h", f"--dhcp-leasefile={world.directory}/dhcpd_leases"]
        self.dhcp = self.namespace.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.guests: list[Guest] = []
        library = standin.library()
        self.command = [sys.executable, "-m", "tests.engine.darwin.on_standin", str(library)]
        self.environment = world.environment() | {
            "PYTHONPATH": str(CHECKOUT),
            "STANDIN_TAP": "vmenet%d",
            "STANDIN_BRIDGE": "bridge100",
            "SUDO_UID": str(UID),
            "SUDO_GID": str(UID),
        }

    def vmnet(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.namespace.run([*self.command, *words], check=False, env=self.environment, cwd=CHECKOUT)

    def boot(self, *network: str, name: str) -> Guest:
        def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
            return self.namespace.popen(command, env=self.environment, cwd=CHECKOUT, **options)

        guest = Guest([*self.command, "run", "--", *qemu(*network), "-name", name], name=name, popen=popen)
        self.world.guests.append(guest)
        self.guests.append(guest)
        guest.wait_boot()
        return guest

    def close(self) -> None:
        for guest in self.guests:
            guest.kill()
        self.dhcp.kill()
        self.dhcp.wait()


@pytest.fixture(scope="module")
def mac(world: World) -> Iterator[Mac]:
    if os.environ.get("OPENVMNET_LAB_UID") != "0":
        pytest.skip("needs root's lab: a relay drops root's rights to another user's")
    made = Mac(world)
    yield made
    made.close()


def relays(world: World) -> list[str]:
    return [process.command for process in world.leftovers() if " relay " in process.command]


def gone(world: World, count: int) -> bool:
    deadline = time.monotonic() + 10
    while len(relays(world)) > count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def guest(mac: Mac) -> Guest:
    booted = mac.boot(*virtio("vmnet-shared"), name="one")
    booted.lease = booted.dhcp(hostname="one")  # type: ignore[attr-defined] # for the tests below
    return booted


def test_guest_gets_its_address_and_reaches_the_gateway(guest: Guest) -> None:
    lease = guest.lease  # type: ignore[attr-defined] # see the fixture
    assert lease.address.startswith("192.168.64.")
    assert (lease.prefix, lease.gateway) == (24, GATEWAY)
    assert "0% packet loss" in guest.run(f"ping -c 20 -i 0.05 -W 2 {GATEWAY}", check=True).out


def test_vm_and_relay_are_the_users_and_not_roots(guest: Guest, world: World) -> None:
    for pid in (guest.process.pid, *(each.pid for each in world.leftovers() if " relay " in each.command)):
        with open(f"/proc/{pid}/status") as file:
            status = file.read()
        (uids,) = [line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")]
        assert uids == [str(UID)] * 4
        (groups,) = [line.split()[1:] for line in status.splitlines() if line.startswith("Groups:")]
        assert groups in ([], [str(UID)])


def test_tcp_both_ways(guest: Guest, mac: Mac) -> None:
    server = mac.namespace.popen(["iperf3", "-s", "-B", GATEWAY, "-p", "5299"], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        for direction in ("", "-R"):
            done = guest.run(f"iperf3 -c {GATEWAY} -p 5299 -t 2 {direction} --json", timeout=30, check=True)
            assert '"bits_per_second"' in done.out
    finally:
        server.kill()
        server.wait()


def test_sibling_and_the_end_of_a_relay_with_its_vm(guest: Guest, mac: Mac, world: World) -> None:
    count = len(relays(world))
    sibling = mac.boot(*virtio("vmnet-shared"), name="two")
    lease = sibling.dhcp(hostname="two")
    own = guest.lease.address  # type: ignore[attr-defined] # see the fixture
    assert "0% packet loss" in sibling.run(f"ping -c 5 -i 0.05 -W 2 {own}", check=True).out
    assert "0% packet loss" in guest.run(f"ping -c 5 -i 0.05 -W 2 {lease.address}", check=True).out
    sibling.kill()
    assert gone(world, count), "the relay ends with its VM"


@pytest.mark.parametrize("network", ["-nic vmnet-shared,model=virtio", "-net vmnet-shared -net nic,model=virtio"])
def test_nic_and_net_forms(mac: Mac, network: str) -> None:
    booted = mac.boot(*network.split(), name="form")
    assert booted.dhcp().address.startswith("192.168.64.")
    booted.kill()


def qmp(path: str, command: str) -> None:
    """One command to QEMU's monitor."""
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.connect(path)
        lines = monitor.makefile("rw")
        lines.readline()
        for each in ("qmp_capabilities", command):
            lines.write(json.dumps({"execute": each}) + "\n")
            lines.flush()
            while "return" not in json.loads(lines.readline()):
                pass


def ticks(pid: int) -> int:
    """Clock ticks that a process has had of a CPU, 100 to the second."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_paused_vm_costs_nothing_and_has_its_network_when_it_goes_on(mac: Mac, world: World) -> None:
    before = {process.pid for process in world.leftovers()}
    path = f"{world.runtime}/qmp"
    booted = mac.boot(*virtio("vmnet-shared"), "-qmp", f"unix:{path},server=on,wait=off", name="paused")
    (relay,) = [each.pid for each in world.leftovers() if each.pid not in before and " relay " in each.command]
    lease = booted.dhcp()
    booted.run(f"ping -c 1 -W 2 {GATEWAY}", check=True)
    qmp(path, "stop")
    hardware = mac.namespace.run(["ip", "neigh", "show", lease.address]).stdout.split("lladdr ")[1].split()[0]
    mac.namespace.batch(f"neigh replace {lease.address} lladdr {hardware} dev bridge100 nud permanent")
    flood = mac.namespace.socket(kind=socket.SOCK_DGRAM)
    for _ in range(3000):
        flood.sendto(bytes(1400), (lease.address, 9))
    flood.close()
    time.sleep(0.5)
    spent = ticks(relay)
    time.sleep(2)
    assert ticks(relay) - spent <= 4  # of 200: less than 2 %
    qmp(path, "cont")
    assert "0% packet loss" in booted.run(f"ping -c 5 -i 0.1 -W 2 {GATEWAY}", check=True).out
    booted.kill()


def test_what_a_mac_has_to_show_is_shown_over_the_stand_in(mac: Mac, tmp_path: Path) -> None:
    built = image()
    (tmp_path / "kernel").symlink_to(built.kernel)
    (tmp_path / "initrd").symlink_to(built.initrd)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)  # QEMU is the user's
    words = [sys.executable, "-m", "tests.engine.darwin.real", "--standin", mac.command[-1]]
    words += ["--guest", str(tmp_path), "packets", "ipxe", "guest"]
    done = mac.namespace.run(words, check=False, env=mac.environment, cwd=CHECKOUT)
    assert done.returncode == 0, done.stderr + done.stdout
    said = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in said[:3]] == ["vmnet-shared", "vmnet-host", "iPXE"]
    assert "gateway 192.168.64.1" in said[2]
    for line, direction in zip(said[3:], ("up", "-R"), strict=True):
        assert re.fullmatch(rf"guest 192\.168\.64\.\d+, iperf3 {direction}: [\d.]+ Mbit/s", line)


def test_mistakes_are_sentences_and_leave_nothing(mac: Mac, world: World) -> None:
    before = len(relays(world))
    for option, status, words in (
        ("vmnet-bridged,id=n,ifname=wlan9", 1003, "unsupported ifname 'wlan9'"),
        ("vmnet-shared,id=n,start-address=8.8.8.1,end-address=8.8.8.9,subnet-mask=255.255.255.0", None, "RFC 1918"),
    ):
        done = mac.vmnet("run", "--", "qemu-system-x86_64", "-netdev", option)
        assert done.returncode not in (0, 1), done
        assert words in done.stderr, (status, done.stderr)
        assert "Traceback" not in done.stderr
    assert len(relays(world)) == before
