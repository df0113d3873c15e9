"""The main job, with a real guest: an address, a name, a page, a ping, a sibling, and what is left afterwards."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from lab.guest import qemu, virtio
from lab.world import BLACKHOLE, PAGE, PROHIBITED, ROUTER, SERVER, UNREACHABLE, WEB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.world import World

pytestmark = pytest.mark.qemu


def boot(world: World, *network: str, name: str = "guest", run: tuple[str, ...] = ()) -> Guest:
    guest = world.guest(["vmnet", "run", *run, "--", *qemu(*network), "-name", name], name=name)
    guest.wait_boot()
    return guest


def show(world: World, name: str = "shared") -> dict:
    return json.loads(world.product_run(["vmnet", "show", name, "--json"]).stdout)


@pytest.fixture(scope="module")
def alone(world: World) -> Iterator[Guest]:
    with boot(world, *virtio("vmnet-shared"), name="alone") as guest:
        guest.dhcp(hostname="alone")
        yield guest


def test_lease_is_there_at_once_and_whole(world: World) -> None:
    with boot(world, *virtio("vmnet-shared"), name="first") as guest:
        lease = guest.dhcp(hostname="first")
        assert lease.seconds < 1.0  # the client's own process included; the exchange itself takes milliseconds
        assert lease.address.startswith("192.168.64.")
        assert (lease.prefix, lease.gateway, lease.dns) == (24, "192.168.64.1", ["192.168.64.1"])
        assert (lease.domain, lease.mtu) == ("vmnet.internal", 1500)
        view = show(world)
        (port,) = [port for port in view["ports"] if port["vm"] == "first"]
        assert (port["address"], port["hostname"]) == (lease.address, "first")
        assert port["mac"] in guest.run("ip link show eth0").out


def test_name_page_ping_and_first_hop(alone: Guest) -> None:
    assert WEB in alone.run("nslookup www.example.test", check=True).out
    assert alone.run("wget -q -O - http://www.example.test/", check=True).out.strip() == PAGE.strip()
    assert "1 packets received" in alone.run(f"ping -c 1 -W 2 {SERVER}", check=True).out
    hops = alone.run(f"traceroute -n -q 1 -w 2 -m 5 {SERVER}").out
    assert [line.split()[1] for line in hops.splitlines() if line.strip()[:1].isdigit()] == [
        "192.168.64.1",
        ROUTER,
        SERVER,
    ]


def test_errors_are_the_outsides_own(alone: Guest) -> None:
    refused = alone.run(f"time -p nc -w 5 {SERVER} 81 </dev/null")
    assert refused.status != 0
    assert "refused" in refused.out
    assert "timed out" in alone.run(f"nc -w 2 {BLACKHOLE} 80 </dev/null").out
    for address in (UNREACHABLE, PROHIBITED):
        begun = time.monotonic()
        found = alone.run(f"nc -w 10 {address} 80 </dev/null")
        assert found.status != 0
        assert time.monotonic() - begun < 5, found.out
        assert "timed out" not in found.out


def test_metadata_and_loopback_are_never_reached(alone: Guest) -> None:
    assert alone.run("nc -w 3 169.254.169.254 80 </dev/null").status != 0
    before = alone.run("nc -w 1 -z 127.0.0.1 1").status
    assert before != 0


def test_source_is_the_host(alone: Guest) -> None:
    assert "192.0.2.2" in alone.run(f"wget -q -O - http://{WEB}/whoami", check=True).out


def test_two_guests_meet_by_name_and_an_isolated_one_does_not(world: World, alone: Guest) -> None:
    with (
        boot(world, *virtio("vmnet-shared"), name="friend") as friend,
        boot(world, *virtio("vmnet-shared,isolated=on"), name="hermit") as hermit,
    ):
        friend.dhcp(hostname="friend")
        lease = hermit.dhcp(hostname="hermit")
        assert "1 packets received" in alone.run("ping -c 1 -W 2 friend.vmnet.internal", check=True).out
        assert "1 packets received" in friend.run("ping -c 1 -W 2 alone.vmnet.internal", check=True).out
        assert alone.run(f"ping -c 1 -W 1 {lease.address}").status != 0
        assert hermit.run("ping -c 1 -W 1 alone.vmnet.internal").status != 0
        # On no path: not through the gateway's MAC either.
        gateway = "ip route add 192.168.64.0/25 via 192.168.64.1 && ip route add 192.168.64.128/25 via 192.168.64.1"
        hermit.run(gateway)
        assert hermit.run("ping -c 1 -W 1 alone.vmnet.internal").status != 0
        assert "1 packets received" in hermit.run(f"ping -c 1 -W 2 {SERVER}", check=True).out
        assert hermit.run("wget -q -O /dev/null http://www.example.test/", check=True).status == 0


def test_a_guest_cannot_take_its_neighbours_address(world: World, alone: Guest) -> None:
    with boot(world, *virtio("vmnet-shared"), name="thief") as thief:
        own = thief.dhcp(hostname="thief").address
        address = next(port["address"] for port in show(world)["ports"] if port["vm"] == "alone")
        before = show(world)["counters"]["firewall_spoofed"]
        time.sleep(0.5)  # the firewall learns of a lease within a fifth of a second
        thief.run(f"ip addr flush dev eth0; ip addr add {address}/24 dev eth0; ip route add default via 192.168.64.1")
        assert thief.run("ping -c 2 -W 1 192.168.64.1").status != 0
        fetch = f"timeout 3 wget -q -O /dev/null http://{WEB}/"  # busybox's own -T ends it by a segmentation fault
        assert thief.run(fetch).status != 0
        assert show(world)["counters"]["firewall_spoofed"] > before
        assert alone.run(fetch, check=True).status == 0
        thief.run(f"ip addr flush dev eth0; ip addr add {own}/24 dev eth0; ip route add default via 192.168.64.1")
        assert thief.run(fetch, check=True).status == 0


def test_nic_without_offloads(world: World) -> None:
    with boot(world, *virtio("vmnet-shared", "vmxnet3"), name="plain") as guest:
        guest.dhcp()
        assert guest.run("wget -q -O /dev/null http://www.example.test/", check=True).status == 0


def test_nic_json_and_two_netdevs(world: World) -> None:
    network = ["-nic", "vmnet-shared,model=virtio-net-pci,id=one"]
    network += ["-netdev", '{"type":"vmnet-shared","id":"two","isolated":true}']
    network += ["-device", '{"driver":"virtio-net-pci","netdev":"two"}']
    with boot(world, *network, name="double") as guest:
        first, second = guest.dhcp("eth0"), guest.dhcp("eth1")
        assert first.address != second.address
        ports = [port for port in show(world)["ports"] if port["vm"] == "double"]
        assert sorted(port["isolated"] for port in ports) == [False, True]


def test_same_name_has_the_same_address_again(world: World) -> None:
    leases = []
    for _ in range(2):
        with boot(world, *virtio("vmnet-shared"), name="again", run=("--linger", "0.2")) as guest:
            leases.append((guest.dhcp().address, guest.run("cat /sys/class/net/eth0/address").out.strip()))
    assert leases[0] == leases[1]


def test_exit_code_and_signals_are_qemus(world: World) -> None:
    with boot(world, *virtio("vmnet-shared"), name="exits") as guest:
        argv = (world.leftovers(), guest.process.pid)
        assert any(one.pid == argv[1] and one.command.startswith("qemu-system") for one in argv[0])
        guest.process.terminate()
        assert guest.process.wait(timeout=10) == 0  # QEMU's own code for SIGTERM
    done = world.product_run(
        ["vmnet", "run", "--", "qemu-system-x86_64", "-netdev", "vmnet-shared,id=n0", "-device", "nonsense"],
        check=False,
    )
    assert done.returncode == 1
    assert "nonsense" in done.stderr
