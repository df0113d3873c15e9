"""vmnet-host, private networks and the MTU, with real guests."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lab.guest import qemu, virtio
from lab.world import HOST, PAGE, SERVER, WEB
from tests.netns import listen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.guest import Guest
    from lab.world import World

pytestmark = pytest.mark.qemu
UUID = "a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d"
OTHER_UUID = UUID.replace("a0", "b0", 1)
ADDRESSES = "start-address=10.77.0.1,end-address=10.77.0.99,subnet-mask=255.255.255.0"


def boot(world: World, netdev: str, name: str, *run: str) -> Guest:
    guest = world.guest(["vmnet", "run", *run, "--", *qemu(*virtio(netdev)), "-name", name], name=name)
    guest.wait_boot()
    return guest


def show(world: World, name: str) -> dict:
    return json.loads(world.product_run(["vmnet", "show", name, "--json"]).stdout)


@contextlib.contextmanager
def greeter(world: World, address: str, port: int) -> Iterator[None]:
    """A service of the host's that says hello and hangs up."""
    with listen(world.host, (address, port)) as listener:
        listener.settimeout(30)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock:
                        sock.sendall(b"hello\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(2)
        thread.join(5)


def test_a_host_network_has_the_host_and_nothing_beyond(world: World) -> None:
    with (
        boot(world, "vmnet-host", "one") as one,
        boot(world, "vmnet-host", "two") as two,
        greeter(world, "0.0.0.0", 8080),
        greeter(world, "127.0.0.1", 8081),
    ):
        lease, other = one.dhcp(hostname="one"), two.dhcp(hostname="two")
        assert (lease.prefix, lease.gateway, lease.dns) == (24, "", ["192.168.128.1"])
        assert lease.address.startswith("192.168.128.")
        assert "default" not in one.run("ip route").out
        assert "hello" in one.run("nc -w 5 192.168.128.1 8080 </dev/null", check=True).out
        assert "refused" in one.run("nc -w 5 192.168.128.1 8081 </dev/null").out
        assert "1 packets received" in one.run("ping -c 1 -W 2 two.vmnet.internal", check=True).out
        assert "1 packets received" in two.run(f"ping -c 1 -W 2 {lease.address}", check=True).out
        assert "1 packets received" in two.run("ping -c 1 -W 2 192.168.128.1", check=True).out
        assert one.run("nslookup www.example.test 2>&1").status != 0
        # Who makes itself a route is told that there is none.
        one.run("ip route add default via 192.168.128.1", check=True)
        for where in (SERVER, HOST):
            begun = time.monotonic()
            assert "timed out" not in (found := one.run(f"nc -w 8 {where} 80 </dev/null")).out
            assert found.status != 0
            assert time.monotonic() - begun < 5
            assert one.run(f"ping -c 1 -W 1 {where}").status != 0
        view = show(world, "host")
        assert (view["mode"], view["subnet"]) == ("host", "192.168.128.0/24")
        assert {port["address"] for port in view["ports"]} == {lease.address, other.address}


def test_loopback_of_the_host_where_it_is_wanted(world: World) -> None:
    with (
        boot(world, "vmnet-host", "trusted", "--name", "trusted", "--host-loopback") as guest,
        greeter(world, "127.0.0.1", 8081),
    ):
        lease = guest.dhcp()
        gateway = lease.dns[0]
        assert "hello" in guest.run(f"nc -w 5 {gateway} 8081 </dev/null", check=True).out


def test_a_private_network_is_its_guests_own(world: World) -> None:
    with (
        boot(world, f"vmnet-host,net-uuid={UUID}", "left") as left,
        boot(world, f"vmnet-host,net-uuid={UUID.upper()}", "right") as right,
    ):
        view = show(world, UUID.replace("-", ""))
        assert (len(view["ports"]), view["net_uuid"], view["gateway"]) == (2, UUID, None)
        assert left.run("ip link set eth0 up; udhcpc -i eth0 -n -q -t 2 -T 1 -s /bin/true", timeout=20).status != 0
        for guest, address in ((left, "10.5.0.1"), (right, "10.5.0.2")):
            guest.run(f"ip link set eth0 up; ip addr add {address}/24 dev eth0", check=True)
        assert "1 packets received" in left.run("ping -c 1 -W 2 10.5.0.2", check=True).out


def test_a_private_network_with_addresses_has_the_host(world: World) -> None:
    with boot(world, f"vmnet-host,net-uuid={OTHER_UUID},{ADDRESSES}", "named", "--linger", "0") as guest:
        lease = guest.dhcp()
        assert (lease.address[:8], lease.dns) == ("10.77.0.", ["10.77.0.1"])
        assert "1 packets received" in guest.run("ping -c 1 -W 2 10.77.0.1", check=True).out
    assert world.wait_gone()


def test_a_subnet_belongs_to_one_mode(world: World) -> None:
    with boot(world, f"vmnet-host,{ADDRESSES}", "owner", "--linger", "0"):
        argv = ["vmnet", "run", "--", *qemu(*virtio(f"vmnet-shared,{ADDRESSES}"))]
        done = world.product_run(argv, check=False)
        assert done.returncode == 3
        assert "overlaps running network 'host-10.77.0.1' (10.77.0.0/24, vmnet-host)" in done.stderr


@pytest.mark.parametrize("mtu", [1280, 9000, 65520])
def test_the_mtu_is_everybodys(world: World, mtu: int) -> None:
    name = f"mtu{mtu}"
    with (
        boot(world, f"vmnet-shared,mtu={mtu}", "wide", "--name", name) as one,
        boot(world, f"vmnet-shared,mtu={mtu}", "broad", "--name", name) as two,
    ):
        lease = one.dhcp(hostname="wide")
        address = two.dhcp(hostname="broad").address
        assert lease.mtu == mtu
        assert f"mtu {mtu}" in one.run("ip link show eth0").out
        assert show(world, name)["mtu"] == mtu
        payload = mtu - 28
        assert "1 packets received" in one.run(f"ping -c 1 -W 2 -s {payload} {address}", check=True).out
        assert "1 packets received" in one.run(f"ping -c 1 -W 2 -s {payload} {lease.gateway}", check=True).out
        # Beyond the host the path is narrower: TCP and pings get there all the same.
        assert one.run(f"wget -q -O - http://{WEB}/", check=True).out.strip() == PAGE.strip()
        for size in (1200, 1400):
            assert "1 packets received" in one.run(f"ping -c 1 -W 2 -s {size} {SERVER}", check=True).out
