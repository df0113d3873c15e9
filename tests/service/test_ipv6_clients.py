"""Other people's IPv6 clients, and what they find at the gateway of a network of the product's, in the lab."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from ipaddress import IPv6Address, IPv6Network
from typing import TYPE_CHECKING, Any

import pytest

from lab.ipxe import ipxe
from lab.netguest import PluggedNetwork
from openvmnet.wire import icmp6

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lab.netns import Namespace
    from lab.world import World

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def network(world: World) -> Iterator[PluggedNetwork]:
    with PluggedNetwork(world, "six") as made:
        yield made


@pytest.fixture(scope="module")
def prefix(network: PluggedNetwork) -> IPv6Network:
    return IPv6Network(network.record["config"]["prefix"])


@pytest.fixture(scope="module")
def guest(network: PluggedNetwork) -> Namespace:
    """A guest that configures itself as Linux does."""
    made = network.plug()
    made.batch("link set eth0 down")
    made.sysctl("net.ipv6.conf.eth0.accept_ra", 1)
    made.batch("link set eth0 up")
    return made


@pytest.fixture(scope="module")
def quiet(network: PluggedNetwork) -> Namespace:
    """A guest whose kernel takes no router advertisements: its address is the client's alone."""
    made = network.plug()
    made.run(["ip", "-6", "addr", "flush", "dev", "eth0", "scope", "global"])
    eventually(lambda: "tentative" not in made.run(["ip", "-6", "addr", "show", "dev", "eth0"]).stdout)
    return made


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def addresses(guest: Namespace, prefix: IPv6Network) -> list[IPv6Address]:
    links = json.loads(guest.run(["ip", "-j", "-6", "addr", "show", "dev", "eth0"]).stdout)
    found = [
        IPv6Address(one["local"]) for link in links for one in link.get("addr_info", ()) if not one.get("tentative")
    ]
    return [one for one in found if one in prefix]


def show(network: PluggedNetwork, world: World) -> dict[str, Any]:
    return json.loads(world.product_run(["vmnet", "show", network.name, "--json"]).stdout)


def test_linux_configures_itself(guest: Namespace, prefix: IPv6Network) -> None:
    (address,) = eventually(lambda: addresses(guest, prefix))
    assert address != prefix[1]
    routes = guest.run(["ip", "-6", "route"]).stdout
    (default,) = (line for line in routes.splitlines() if line.startswith("default"))
    assert "via fe80::" in default
    assert "proto ra" in default
    assert guest.run(["ping", "-6", "-c", "1", "-W", "2", str(prefix[1])]).returncode == 0


def test_an_address_is_known_before_its_guest_speaks(
    network: PluggedNetwork, guest: Namespace, prefix: IPv6Network
) -> None:
    address = str(prefix[0x5EED])
    guest.batch(f"addr add {address}/64 dev eth0")

    def known() -> bool:
        lines = subprocess.run(
            [*network.inside, "ip", "-6", "neigh", "show", "dev", "vmnet0"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return any(line.startswith(f"{address} ") and "lladdr" in line for line in lines)

    eventually(known)
    guest.batch(f"addr del {address}/64 dev eth0")


def test_a_solicitation_is_answered_at_once_with_all_that_a_guest_needs(guest: Namespace, prefix: IPv6Network) -> None:
    ifindex = json.loads(guest.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["ifindex"]
    with guest.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sock.setsockopt(socket.IPPROTO_IPV6, 51, 1)
        sock.settimeout(2)
        for _ in range(3):
            begun = time.monotonic()
            sock.sendto(bytes([133, 0, 0, 0, 0, 0, 0, 0]), ("ff02::2", 0, 0, ifindex))
            while True:
                message, ancillary, _, sender = sock.recvmsg(1500, 100)
                if message[0] == icmp6.ROUTER_ADVERTISEMENT:
                    break
            assert time.monotonic() - begun < 0.1
            assert [struct.unpack("=i", data)[0] for _, kind, data in ancillary if kind == 52] == [255]
            assert sender[0].startswith("fe80::")
        found = icmp6.parse_advertisement(message)
    assert (found.lifetime, found.managed, found.other, found.mtu) == (1800, True, True, 1500)
    (option,) = found.prefixes
    assert (option.address, option.length) == (prefix.network_address.packed, 64)
    assert option.on_link
    assert option.autonomous
    assert found.dns == (prefix[1].packed,)
    assert found.search == ("vmnet.internal",)
    assert found.dns_lifetime == 1800


def test_who_asks_without_end_is_answered_a_little(guest: Namespace) -> None:
    ifindex = json.loads(guest.run(["ip", "-j", "link", "show", "eth0"]).stdout)[0]["ifindex"]
    answers = 0
    with guest.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        for _ in range(200):
            sock.sendto(bytes([133, 0, 0, 0, 0, 0, 0, 0]), ("ff02::2", 0, 0, ifindex))
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                answers += sock.recv(1500)[0] == icmp6.ROUTER_ADVERTISEMENT
    assert answers <= 6


def test_dig_by_ipv6(guest: Namespace, prefix: IPv6Network) -> None:
    if shutil.which("dig") is None:
        pytest.skip("needs dig")
    eventually(lambda: addresses(guest, prefix))

    def dig(*words: str) -> str:
        return guest.run(["dig", "+short", "+time=2", "+tries=1", f"@{prefix[1]}", *words], check=False).stdout.strip()

    assert dig("gateway.vmnet.internal", "AAAA") == str(prefix[1])
    assert dig("+tcp", "gateway.vmnet.internal", "AAAA") == str(prefix[1])
    assert dig("-x", str(prefix[1])) == "gateway.vmnet.internal."
    assert dig("www.example.test", "AAAA") == "2001:db8:2::80"


class Dhclient:
    """ISC dhclient -6 in a guest's namespace."""

    def __init__(self, guest: Namespace, directory: Path) -> None:
        if shutil.which("dhclient") is None:
            pytest.skip("needs dhclient")
        self.guest = guest
        self.out = directory / "environment"
        script = directory / "script"
        script.write_text(f'#!/bin/sh\necho "event=$reason\n$(env)" >> {self.out}\n')
        script.chmod(0o755)
        (directory / "conf").write_text('send fqdn.fqdn "alpha.";\n'.replace('"alpha."', '"alpha"'))
        self.files = [
            "-cf",
            f"{directory}/conf",
            "-sf",
            str(script),
            "-lf",
            f"{directory}/leases",
            "-pf",
            f"{directory}/pid",
        ]

    def run(self, *words: str) -> dict[str, str]:
        """Run until it is configured, once; what its script was given last."""
        self.out.unlink(missing_ok=True)
        self.guest.run(["dhclient", "-6", "-1", "-v", *words, *self.files, "eth0"], timeout=20)
        last = self.out.read_text().split("event=")[-1]
        return {"event": last.split("\n")[0]} | dict(line.split("=", 1) for line in last.splitlines() if "=" in line)

    def end(self, how: str = "-r") -> None:
        """Release the lease (-r), or just stop (-x)."""
        self.guest.run(["dhclient", "-6", how, *self.files, "eth0"], timeout=20)


def test_dhclient_is_given_an_address_and_the_same_again(
    world: World, network: PluggedNetwork, quiet: Namespace, prefix: IPv6Network, tmp_path: Path
) -> None:
    client = Dhclient(quiet, tmp_path)
    begun = time.monotonic()
    given = client.run()
    assert time.monotonic() - begun < 5
    assert given["event"] == "BOUND6"
    address = IPv6Address(given["new_ip6_address"])
    assert prefix[0x10000] <= address <= prefix[0x1FFFF]
    assert given["new_dhcp6_name_servers"] == str(prefix[1])
    assert given["new_dhcp6_domain_search"] == "vmnet.internal."
    counters = show(network, world)["counters"]
    assert counters["dhcp6_advertise"] >= 1
    client.end()
    assert client.run()["new_ip6_address"] == str(address)
    client.end()


def test_dhclient_stateless(quiet: Namespace, prefix: IPv6Network, tmp_path: Path) -> None:
    client = Dhclient(quiet, tmp_path)
    given = client.run("-S")
    client.end("-x")
    assert given["new_dhcp6_name_servers"] == str(prefix[1])
    assert "new_ip6_address" not in given


def test_the_router_says_farewell(world: World) -> None:
    with PluggedNetwork(world, "leaving") as network:
        guest = network.plug()
        with guest.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6) as sock:
            sock.settimeout(10)
            time.sleep(0.5)  # what came at the start is over
            network._holder.kill()
            while (message := sock.recv(1500))[0] != icmp6.ROUTER_ADVERTISEMENT or message[6:8] != b"\0\0":
                pass
        found = icmp6.parse_advertisement(message)
        assert (found.lifetime, found.dns_lifetime) == (0, 0)
        assert found.prefixes[0].valid > 0


def test_a_killed_process_is_followed_by_one_that_knows_the_lease(world: World, tmp_path: Path) -> None:
    with PluggedNetwork(world, "killed") as network:
        guest = network.plug()
        guest.run(["ip", "-6", "addr", "flush", "dev", "eth0", "scope", "global"])
        eventually(lambda: "tentative" not in guest.run(["ip", "-6", "addr", "show", "dev", "eth0"]).stdout)
        client = Dhclient(guest, tmp_path)
        address = client.run()["new_ip6_address"]
        client.end("-x")
        os.kill(network.pid, signal.SIGKILL)
        assert show(network, world)["pid"] != network.pid
        kept = world.home / ".local" / "state" / "openvmnet" / "killed" / "leases6.json"
        assert address in kept.read_text()


def test_no_way_out_of_a_host_network(world: World) -> None:
    with PluggedNetwork(world, "hostsix", mode="host") as network:
        guest = network.plug()
        guest.batch("link set eth0 down")
        guest.sysctl("net.ipv6.conf.eth0.accept_ra", 1)
        guest.batch("link set eth0 up")
        made = IPv6Network(network.record["config"]["prefix"])
        eventually(lambda: addresses(guest, made))
        assert "default" not in guest.run(["ip", "-6", "route"]).stdout


@pytest.mark.qemu
def test_ipxe_by_ipv6(world: World) -> None:
    """iPXE takes no global destination from a unique local source, so the gateway's name server is what it asks for."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64")
    script = world.runtime / "script.ipxe"
    script.write_text("#!ipxe\nifconf -c ipv6 net0 && route\nimgfetch http://www.example.test/ || echo finished\n")
    qemu = ["qemu-system-x86_64", "-M", "q35,accel=tcg,graphics=off", "-m", "128", "-nographic", "-nodefaults"]
    qemu += ["-serial", "stdio", "-kernel", str(ipxe()), "-initrd", str(script), "-netdev", "vmnet-shared,id=n0"]
    qemu += ["-device", "virtio-net-pci,netdev=n0,romfile="]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    machine = world.product(["vmnet", "run", "--name", "pxe", "--", *qemu], **options)
    try:
        assert machine.stdout is not None
        said = b""
        while b"finished" not in said:
            more = os.read(machine.stdout.fileno(), 4096)
            assert more, f"iPXE ended: {said!r}"
            said += more
        view = json.loads(world.product_run(["vmnet", "show", "pxe", "--json"]).stdout)
        (own,) = view["ports"][0]["addresses6"]
        assert f"net0: {own}/64 gw fe80::".encode() in said
        assert view["counters"]["dhcp6_reply"] == 1
        assert view["counters"]["dns_queries"] > 0
        assert view["ports"][0]["address"] is None  # nothing of it went over IPv4
    finally:
        machine.kill()
