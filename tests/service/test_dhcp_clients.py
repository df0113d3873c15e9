"""Other people's DHCP clients as real processes, on a bridge in namespaces of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from openvmnet.engine.linux import firewall_ip
from openvmnet.engine.linux.names import limit
from openvmnet.wire import dhcp4
from tests.service.dhcp_world import PORT, STATIC_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.geteuid() != 0, reason="needs root: network and mount namespaces, and clients that want uid 0"
    ),
]

NETWORKD = Path("/lib/systemd/systemd-networkd")
MAC = "52:54:00:aa:bb:01"
ROUTES = "0.0.0.0/0 192.168.64.1 10.20.0.0/16 192.168.64.1"


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class World:
    """The process of dhcp_world, and ways into its namespaces."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.directory = directory
        self.events: list[dict[str, Any]] = []
        self._process = process
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.pid = int(self.wait(lambda event: "ready" in event)["ready"])

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()

    def wait(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 15) -> dict[str, Any]:
        """The first event that is `wanted`."""
        with self._news:
            found = self._news.wait_for(lambda: [event for event in self.events if wanted(event)], seconds)
        assert found, f"no such answer among {self.events}"
        return found[0]

    def here(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *command]

    def client(self, *command: str) -> list[str]:
        return self.here("ip", "netns", "exec", "client", *command)

    def run(self, command: list[str], timeout: float = 30, **options: Any) -> str:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextmanager
    def running(self, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        """A client in the background, ended when the test is done with it."""
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()

    def hook(self, variable: str = "reason") -> tuple[Path, Path]:
        """A client's script that appends its environment to a file: script and file."""
        out, script = self.directory / "environment", self.directory / "hook"
        # One write, so that who waits for the event has the environment too.
        script.write_text(f'#!/bin/sh\necho "event=${{{variable}:-$1}}\n$(env)" >> {out}\n')
        script.chmod(0o755)
        return script, out

    def exchange(self, mac: str = MAC) -> list[dict[str, Any]]:
        """The answers to a client up to its ACK; asserts that ours was the time it took."""
        ack = self.wait(lambda event: event.get("type") == dhcp4.ACK and event["mac"] == mac)
        answers = [event for event in self.events if event.get("mac") == mac]
        answers = answers[: answers.index(ack) + 1]
        assert next(event["type"] for event in answers if event.get("answered", True)) == dhcp4.OFFER
        assert sum(event["took"] for event in answers) < 0.2
        return answers

    def lease(self, mac: str = MAC) -> dict[str, Any]:
        return next(lease for lease in self.exchange(mac)[-1]["leases"] if lease["mac"] == mac)


@contextmanager
def namespaces(directory: Path, *kept: str) -> Iterator[World]:
    command = ["unshare", "--net", "--mount", "--propagation=private", sys.executable, "-m", "tests.service.dhcp_world"]
    with subprocess.Popen(
        [*command, str(directory), *kept], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        world = World(process, directory)
        yield world
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=10) == 0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    # Clients drop their privileges, and run their scripts after that.
    for directory in [tmp_path, *tmp_path.parents][:3]:
        directory.chmod(0o755)
    with namespaces(tmp_path) as made:
        yield made


def environment(out: Path, event: str) -> dict[str, str]:
    """What the client's script was given at an event."""
    blocks = out.read_text().split("event=")[1:]
    block = next(block for block in reversed(blocks) if block.startswith(event + "\n"))
    return dict(line.split("=", 1) for line in block.splitlines() if "=" in line)


UDHCPC = ("busybox", "udhcpc", "-i", "eth0", "-O", "mtu", "-O", "search", "-O", "staticroutes")


def test_busybox_udhcpc(world):
    need("busybox")
    script, out = world.hook()
    world.run(world.client(*UDHCPC, "-f", "-q", "-n", "-s", str(script), "-x", "hostname:alpha"))
    given = environment(out, "bound")
    lease = world.lease()
    assert (given["ip"], given["subnet"]) == (lease["ip"], "255.255.255.0")
    assert given["router"] == given["dns"] == given["serverid"] == "192.168.64.1"
    assert (given["mtu"], given["domain"]) == ("1400", "vmnet.internal")
    assert (given["search"], given["staticroutes"]) == ("vmnet.internal example.org", ROUTES)
    assert lease["name"] == "alpha"


def test_the_port_of_a_client_is_known_by_the_firewalls_mark(world):
    need("busybox")
    script, _ = world.hook()
    world.run(world.client(*UDHCPC, "-f", "-q", "-n", "-s", str(script)))
    assert world.lease()["port"] == PORT


def test_udhcpc_renews_by_unicast_and_releases(world):
    need("busybox")
    script, out = world.hook()
    with world.running(world.client(*UDHCPC, "-f", "-s", str(script))) as process:
        address = world.lease()["ip"]
        eventually(lambda: out.exists() and "event=bound" in out.read_text())
        # udhcpc leaves configuring to its script; the renewal leaves from the address.
        world.run(world.client("ip", "addr", "add", f"{address}/24", "dev", "eth0"))
        process.send_signal(signal.SIGUSR1)  # renew
        renewed = world.wait(lambda event: event.get("type") == dhcp4.ACK and not event["raw"])
        assert renewed["ip"] == address
        assert renewed["took"] < 0.2
        process.send_signal(signal.SIGUSR2)  # release
        released = world.wait(lambda event: event.get("type") == dhcp4.RELEASE)
        assert released["leases"] == []


def test_isc_dhclient(world, tmp_path):
    need("dhclient")
    script, out = world.hook()
    configuration = tmp_path / "dhclient.conf"
    configuration.write_text(
        "option classless code 121 = array of unsigned integer 8;\n"
        'send host-name "alpha";\n'
        "request subnet-mask, routers, domain-name, domain-name-servers, domain-search, host-name, interface-mtu,"
        " classless;\n"
    )
    leases = tmp_path / "leases"
    files = ["-cf", str(configuration), "-sf", str(script), "-lf", str(leases), "-pf", str(tmp_path / "pid")]

    def once(event: str) -> list[int]:
        """Run until the script is told of the lease; the types of our answers."""
        before = len(world.events)
        out.unlink(missing_ok=True)
        with world.running(world.client("dhclient", "-4", "-1", "-d", *files, "eth0")):
            eventually(lambda: out.exists() and f"event={event}\n" in out.read_text())
        return [answer["type"] for answer in world.events[before:]]

    assert once("BOUND") == [dhcp4.OFFER, dhcp4.ACK]
    given = environment(out, "BOUND")
    lease = world.lease()
    assert (given["new_ip_address"], given["new_subnet_mask"]) == (lease["ip"], "255.255.255.0")
    assert given["new_routers"] == given["new_domain_name_servers"] == "192.168.64.1"
    assert (given["new_interface_mtu"], given["new_domain_name"]) == ("1400", "vmnet.internal")
    assert given["new_domain_search"] == "vmnet.internal. example.org."
    assert given["new_classless"] == "0 192 168 64 1 16 10 20 192 168 64 1"
    assert given["new_host_name"] == lease["name"] == "alpha"
    # A second start comes with the old lease: INIT-REBOOT, one message and one answer.
    assert once("REBOOT") == [dhcp4.ACK]
    assert environment(out, "REBOOT")["new_ip_address"] == lease["ip"]
    # Where the old lease is another network's, the NAK comes at once, and a new lease after it.
    leases.write_text(leases.read_text().replace(lease["ip"], "10.0.2.15"))
    assert once("BOUND") == [dhcp4.NAK, dhcp4.OFFER, dhcp4.ACK]


def test_a_client_with_another_lease_is_refused_and_given_its_reserved_address(tmp_path):
    need("dhclient")
    for directory in [tmp_path, *tmp_path.parents][:3]:
        directory.chmod(0o755)
    leases = tmp_path / "leases"
    leases.write_text(
        'lease {\n  interface "eth0";\n  fixed-address 192.168.64.77;\n  option subnet-mask 255.255.255.0;\n'
        "  option dhcp-lease-time 86400;\n  option dhcp-server-identifier 192.168.64.1;\n"
        "  renew never;\n  rebind never;\n  expire never;\n}\n"
    )
    with namespaces(tmp_path, MAC, "192.168.64.50") as world:
        script, out = world.hook()
        files = ["-sf", str(script), "-lf", str(leases), "-pf", str(tmp_path / "pid")]
        with world.running(world.client("dhclient", "-4", "-1", "-d", *files, "eth0")):
            eventually(lambda: out.exists() and "event=BOUND\n" in out.read_text())
        assert [event["type"] for event in world.events if "type" in event] == [dhcp4.NAK, dhcp4.OFFER, dhcp4.ACK]
        assert environment(out, "BOUND")["new_ip_address"] == "192.168.64.50"
        # Another client that asks for it by name is given another.
        static_guest(world, "192.168.64.250", mac="52:54:00:aa:bb:02")
        command = ("ip", "netns", "exec", "static", *UDHCPC, "-f", "-q", "-n", "-s", str(script), "-r", "192.168.64.50")
        world.run(world.here(*command))
        assert world.lease("52:54:00:aa:bb:02")["ip"] != "192.168.64.50"


def dhcpcd(world: World, *, arp: bool) -> tuple[list[str], Path]:
    script, out = world.hook()
    configuration = world.directory / "dhcpcd.conf"
    configuration.write_text(
        "hostname beta\nclientid\nnoipv6\nnoipv4ll\nrequire dhcp_server_identifier\n"
        "option domain_name_servers, domain_name, domain_search, classless_static_routes, interface_mtu\n"
        + ("" if arp else "noarp\n")
    )
    command = world.client("dhcpcd", "-4", "-1", "-B", "-f", str(configuration), "-c", str(script), "eth0")
    return command, out


def test_dhcpcd(world):
    need("dhcpcd")
    command, out = dhcpcd(world, arp=False)
    world.run(command)
    given = environment(out, "BOUND")
    lease = world.lease()
    assert (given["new_ip_address"], given["new_subnet_mask"]) == (lease["ip"], "255.255.255.0")
    assert given["new_routers"] == given["new_domain_name_servers"] == "192.168.64.1"
    assert (given["new_interface_mtu"], given["new_domain_name"]) == ("1400", "vmnet.internal")
    assert (given["new_domain_search"], given["new_classless_static_routes"]) == ("vmnet.internal example.org", ROUTES)
    assert lease["name"] == "beta"
    routes = world.run(world.client("ip", "route"))
    assert "default via 192.168.64.1" in routes
    assert "10.20.0.0/16 via 192.168.64.1" in routes


def test_dhcpcd_declines_what_a_silent_guest_uses_and_gets_another_address(world):
    need("dhcpcd")
    command, _ = dhcpcd(world, arp=True)
    guess = expected_address(world)
    static_guest(world, guess)
    with world.running(command) as process:
        assert world.exchange()[-1]["ip"] == guess
        world.wait(lambda event: event.get("type") == dhcp4.DECLINE, 30)
        second = world.wait(lambda event: event.get("type") == dhcp4.ACK and event["ip"] != guess, 30)
        assert second["took"] < 0.2
        assert process.wait(timeout=30) == 0


def test_an_address_that_arp_shows_in_use_is_not_offered(world):
    need("busybox")
    guess = expected_address(world)
    static_guest(world, guess)
    world.run(world.here("ip", "netns", "exec", "static", "busybox", "ping", "-c1", "-W2", "192.168.64.1"))
    script, _ = world.hook()
    world.run(world.client(*UDHCPC, "-f", "-q", "-n", "-s", str(script)))
    ack = world.exchange()[-1]
    assert ack["ip"] != guess
    # The packet socket tells the port too.
    assert ack["in_use"] == {guess: STATIC_PORT}


def expected_address(world: World) -> str:
    """What the client would be offered: the address it gets in a world of its own."""
    directory = world.directory / "other"
    directory.mkdir()
    with namespaces(directory) as other:
        script, _ = other.hook()
        other.run(other.client(*UDHCPC, "-f", "-q", "-n", "-s", str(script)))
        return str(other.lease()["ip"])


def static_guest(world: World, address: str, mac: str = "52:54:00:aa:bb:09") -> None:
    """A guest in the namespace `static` that has an address and says nothing."""
    ip = ("ip", "-n", "static")
    for command in (
        ("ip", "netns", "add", "static"),
        ("ip", "link", "add", "port2", "type", "veth", "peer", "name", "eth0", "netns", "static"),
        ("ip", "link", "set", "port2", "master", "vmnet0", "up"),
        (*ip, "link", "set", "eth0", "address", mac, "up"),
        (*ip, "addr", "add", f"{address}/24", "dev", "eth0"),
    ):
        world.run(world.here(*command))


def test_systemd_networkd(world, tmp_path):
    if os.environ.get("OPENVMNET_LAB_UID") != "0":
        pytest.skip("systemd-networkd becomes another user, which takes real root")
    if not NETWORKD.exists():
        pytest.skip("needs systemd-networkd")
    script = tmp_path / "networkd"
    # Without a writable /sys it waits for no udev, as in a container.
    script.write_text(f"""set -e
mount -o remount,bind,ro /sys
mkdir -p /run/systemd/network /run/systemd/netif/leases /run/systemd/netif/links /run/systemd/netif/lldp
chown -R systemd-network:systemd-network /run/systemd/netif
cat > /run/systemd/network/10.network <<END
[Match]
Name=eth0
[Network]
DHCP=ipv4
LinkLocalAddressing=no
IPv6AcceptRA=no
[DHCPv4]
UseMTU=yes
UseDomains=yes
Hostname=gamma
END
exec {NETWORKD}
""")
    with world.running(world.client("unshare", "--mount", "sh", str(script))) as process:
        lease = world.lease()
        leases = Path(f"/proc/{process.pid}/root/run/systemd/netif/leases")
        eventually(lambda: any("LIFETIME=" in stored.read_text() for stored in leases.iterdir()))
        (stored,) = (stored for stored in leases.iterdir() if not stored.name.startswith("."))
        given = dict(line.split("=", 1) for line in stored.read_text().splitlines() if "=" in line)
    assert (given["ADDRESS"], given["NETMASK"]) == (lease["ip"], "255.255.255.0")
    assert given["ROUTER"] == given["DNS"] == "192.168.64.1"
    assert (given["MTU"], given["DOMAINNAME"]) == ("1400", "vmnet.internal")
    assert given["DOMAIN_SEARCH_LIST"] == "vmnet.internal example.org"
    assert given["CLASSLESS_ROUTES"] == "0.0.0.0/0,192.168.64.1 10.20.0.0/16,192.168.64.1"
    assert (given["T1"], given["T2"], given["LIFETIME"]) == ("43200", "75600", "86400")
    assert lease["name"] == "gamma"


def test_perfdhcp_a_hundred_exchanges_a_second_without_a_drop(world):
    need("perfdhcp")
    world.run(world.client("ip", "addr", "add", "192.168.64.250/24", "dev", "eth0"))
    out = world.run(world.client("perfdhcp", "-4", "-l", "eth0", "-r", "100", "-R", "200", "-p", "3", "-W", "500000"))
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("drops:")] == ["drops: 0", "drops: 0"], out
    assert [line for line in lines if line.startswith("non unique")] == ["non unique addresses: 0"] * 2
    sent = [int(line.split()[-1]) for line in lines if line.startswith("sent packets")]
    assert min(sent) > 250


def test_a_flood_of_discovers_neither_starves_a_neighbour_nor_fills_memory(world):
    need("busybox")
    # The kernel's share of the defence, as the network's own firewall has it.
    rate = limit(firewall_ip.DHCP_RATE, burst=firewall_ip.DHCP_AT_ONCE)
    world.run(world.here("nft", f'add rule bridge marks prerouting iifname "port1" udp dport 67 {rate} drop'))
    neighbour = "52:54:00:aa:bb:02"
    static_guest(world, "192.168.64.250", mac=neighbour)
    script, _ = world.hook()
    before = resident(world.pid)
    hostile = str(Path(__file__).with_name("dhcp_flood.py"))
    with world.running(world.client(sys.executable, hostile, "eth0", "4")) as flood:
        world.wait(lambda event: event.get("mac", "").startswith("52:66:"))
        world.run(world.here("ip", "netns", "exec", "static", *UDHCPC, "-f", "-q", "-n", "-s", str(script)))
        assert flood.stdout is not None
        assert int(flood.stdout.read()) > 5000
    # Each of its messages was answered at the first time of asking: udhcpc asks again after three seconds.
    answers = [event["type"] for event in world.events if event.get("mac") == neighbour]
    assert answers == [dhcp4.OFFER, dhcp4.ACK]
    offers = sum(event.get("mac", "").startswith("52:66:") and event["type"] == dhcp4.OFFER for event in world.events)
    assert 1000 < offers < 7000
    assert resident(world.pid) - before < 8 << 20


def resident(pid: int) -> int:
    """Octets of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.qemu
def test_ipxe_in_qemu(world):
    need("qemu-system-x86_64")
    for command in (
        ("ip", "tuntap", "add", "vm0", "mode", "tap"),
        ("ip", "link", "set", "vm0", "master", "vmnet0", "up"),
    ):
        world.run(world.here(*command))
    mac = "52:54:00:12:34:56"
    command = world.here(
        *("qemu-system-x86_64", "-M", "q35,accel=tcg,graphics=off", "-m", "64", "-nographic", "-nodefaults"),
        *("-serial", "stdio", "-netdev", "tap,id=n0,ifname=vm0,script=no,downscript=no"),
        *("-device", f"virtio-net-pci,netdev=n0,mac={mac},bootindex=1"),
    )
    with world.running(command) as process:
        assert process.stdout is not None
        said = b""
        while b" gw 192.168.64.1" not in said:
            more = os.read(process.stdout.fileno(), 4096)
            assert more, f"iPXE got no lease: {said!r}"
            said += more
    lease = world.lease(mac)
    assert f"net0: {lease['ip']}/255.255.255.0 gw 192.168.64.1".encode() in said
