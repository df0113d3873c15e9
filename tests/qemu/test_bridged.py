"""vmnet-bridged with real guests: an address from the LAN's own DHCP server, over a bridge and over a NIC."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lab.guest import Guest, qemu, virtio
from lab.lan import BRIDGE_ADDRESS, GATEWAY, NIC_ADDRESS, Lan
from openvmnet.kernel.linkinfo import links
from tests.netns import eventually, inside

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from lab.world import World

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.environ.get("OPENVMNET_LAB_UID") != "0", reason="bridging to a host's links takes real root"),
]

HELPER = Path("/usr/lib/qemu/qemu-bridge-helper")


@pytest.fixture(scope="module")
def lan(world: World) -> Iterator[Lan]:
    made = Lan(world)
    yield made
    made.close()


def macvtap_or_skip(lan: Lan) -> None:
    made = lan.world.host.run(["ip", "link", "add", "link", "nic0", "name", "try0", "type", "macvtap"], check=False)
    if made.returncode != 0:
        pytest.skip(f"this kernel has no macvtap (CONFIG_MACVTAP): {made.stderr}")
    lan.world.host.batch("link delete try0")


def boot(lan: Lan, netdev: str, name: str, *network: str, wait: bool = True) -> Guest:
    guest = lan.root_guest(["vmnet", "run", "--", *qemu(*virtio(netdev), *network), "-name", name], name=name)
    if wait:
        guest.wait_boot()
    return guest


def pings(guest: Guest, address: str) -> bool:
    return guest.run(f"ping -c 2 -W 1 {address}").status == 0


def reaches(lan: Lan, address: str) -> bool:
    return lan.lan.run(["ping", "-c", "1", "-W", "1", address], check=False).returncode == 0


@pytest.mark.parametrize(("ifname", "own_host"), [("br0", BRIDGE_ADDRESS), ("nic0", NIC_ADDRESS)])
def test_a_guest_is_on_the_lan_and_leaves_nothing(lan: Lan, ifname: str, own_host: str) -> None:
    if ifname == "nic0":
        macvtap_or_skip(lan)
    before = lan.links()
    with boot(lan, f"vmnet-bridged,ifname={ifname}", f"on-{ifname}") as guest:
        lease = guest.dhcp()
        mac = guest.run("cat /sys/class/net/eth0/address").out.strip()
        assert lan.macs()[mac] == lease.address
        assert (lease.server, lease.gateway) == (GATEWAY, GATEWAY)
        assert pings(guest, GATEWAY)
        assert reaches(lan, lease.address)
        # Neighbour discovery needs multicast to come in: the LAN seeks the guest, not the guest the LAN.
        address6 = "fd12::b" if ifname == "br0" else "fd12::c"
        guest.run(f"ip -6 addr add {address6}/64 dev eth0", check=True)
        assert eventually(lambda: reaches(lan, address6), 10)
        assert pings(guest, own_host) == (ifname == "br0")  # a macvtap's limit
        assert lan.links() != before
        guest.process.kill()
        assert eventually(lambda: lan.links() == before)


def test_traffic_is_whole_with_offloads(lan: Lan) -> None:
    """Segments over the MTU pass between guest and LAN as QEMU negotiates them."""
    macvtap_or_skip(lan)
    data = os.urandom(1 << 20)
    served = lan.home / "served"
    served.write_bytes(data)
    server = lan.lan.popen(["socat", "-U", f"TCP-LISTEN:8000,bind={GATEWAY},reuseaddr,fork", f"OPEN:{served},rdonly"])
    try:
        for ifname in ("br0", "nic0"):
            with boot(lan, f"vmnet-bridged,ifname={ifname}", f"bulk-{ifname}") as guest:
                guest.dhcp()
                got = guest.run(f"nc {GATEWAY} 8000 </dev/null | sha256sum", check=True).out.split()[0]
                assert got == lan.lan.run(["sha256sum", str(served)]).stdout.split()[0]
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("ifname", ["br0", "nic0"])
def test_isolated_guests_do_not_meet_and_others_do(lan: Lan, ifname: str) -> None:
    if ifname == "nic0":
        macvtap_or_skip(lan)
    flags = {"plain1": "", "plain2": "", "hermit1": ",isolated=on", "hermit2": ",isolated=on"}
    with contextlib.ExitStack() as stack:
        guests = [
            stack.enter_context(boot(lan, f"vmnet-bridged,ifname={ifname}{flag}", name, wait=False))
            for name, flag in flags.items()
        ]
        for guest in guests:
            guest.wait_boot()
        one, other, hermit, recluse = guests
        addresses = {guest.name: guest.dhcp().address for guest in (one, other, hermit, recluse)}
        assert len(set(addresses.values())) == 4
        assert pings(one, addresses["plain2"])
        assert not pings(hermit, addresses["hermit2"])
        # A bridge keeps isolated ports from each other only, a macvtap in private mode keeps to itself.
        assert pings(hermit, addresses["plain1"]) == (ifname == "br0")
        assert pings(hermit, GATEWAY)
        assert pings(recluse, GATEWAY)
        shown = json.loads(lan.root_run(["vmnet", "interfaces", "--json"]).stdout)
        assert {port["vm"]: port["isolated"] for port in shown["ports"] if port["ifname"] == ifname} == {
            "plain1": False, "plain2": False, "hermit1": True, "hermit2": True,
        }  # fmt: skip
        listed = lan.root_run(["vmnet", "ls"]).stdout
        assert all(name in listed for name in addresses)
        # A VM's end, however it comes, is the end of its record.
        one.process.kill()
        one.process.wait()
        assert "plain1" not in lan.root_run(["vmnet", "ls"]).stdout


def test_the_same_vm_has_the_same_address_at_once(lan: Lan) -> None:
    """Its MAC may still be in the kernel's tables when it comes again."""
    macvtap_or_skip(lan)
    leases = []
    for _ in range(2):
        with boot(lan, "vmnet-bridged,ifname=nic0", "again") as guest:
            leases.append(guest.dhcp().address)
    assert leases[0] == leases[1]


def test_two_vms_with_one_mac_on_a_nic_are_a_conflict(lan: Lan) -> None:
    macvtap_or_skip(lan)
    before = lan.links()
    netdev = "vmnet-bridged,ifname=nic0"
    argv = ["vmnet", "run", "--", *qemu(*virtio(netdev, mac="52:54:00:aa:bb:cc"))]
    with lan.root_guest(argv, name="first") as guest:
        guest.wait_boot()
        with_one = lan.links()
        done = lan.root_run(argv, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith("vmnet: another macvtap on nic0 has the MAC already")
        assert lan.links() == with_one
    assert eventually(lambda: lan.links() == before)


def test_both_kinds_of_netdev_in_one_vm(lan: Lan) -> None:
    before = lan.links()
    network = ["-netdev", "vmnet-shared,id=n1", "-device", "virtio-net-pci,netdev=n1"]
    with boot(lan, "vmnet-bridged,ifname=br0", "both", *network) as guest:
        assert guest.dhcp("eth0").server == GATEWAY
        assert guest.dhcp("eth1").server == "192.168.64.1"
    assert eventually(lambda: lan.links() == before)  # the network's process, still there, has none of it
    lan.world.wait_gone()


class TestHelper:
    """As an ordinary user, through QEMU's own setuid helper, put where the distributions put it."""

    @pytest.fixture(autouse=True)
    def setuid(self, world: World, lan: Lan) -> Iterator[None]:
        """The lab's mounts are its own: a setuid copy over the helper, and an empty directory for its access list."""
        if not HELPER.exists():
            pytest.skip(f"{HELPER} is not there (package qemu-system-common)")
        etc = Path("/etc/qemu")
        made = not etc.exists()
        etc.mkdir(exist_ok=True)
        world.host.run(["mount", "-t", "tmpfs", "tmpfs", "/etc/qemu"])
        copy = world.directory / "qemu-bridge-helper"
        shutil.copy(HELPER, copy)
        copy.chmod(0o4755)
        world.host.run(["mount", "--bind", str(copy), str(HELPER)])
        yield
        world.host.run(["umount", str(HELPER)])
        world.host.run(["umount", "/etc/qemu"])
        copy.unlink()
        if made:
            etc.rmdir()

    def test_an_allowed_bridge(self, world: World, lan: Lan) -> None:
        Path("/etc/qemu/bridge.conf").write_text("allow br0\n")
        before = lan.links()
        shown = json.loads(world.product_run(["vmnet", "interfaces", "--json"]).stdout)["interfaces"]
        assert next(each["needs"] for each in shown if each["name"] == "br0") is None
        argv = ["vmnet", "run", "--", *qemu(*virtio("vmnet-bridged,ifname=br0")), "-name", "helped"]
        with world.guest(argv, name="helped") as guest:
            guest.wait_boot()
            lease = guest.dhcp()
            assert lease.server == GATEWAY
            assert lan.macs()[guest.run("cat /sys/class/net/eth0/address").out.strip()] == lease.address
            assert "helped" in world.product_run(["vmnet", "ls"]).stdout
            assert "TUNSETOFFLOAD" not in guest.stderr()
            guest.process.kill()
        assert eventually(lambda: lan.links() == before)

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("allow br1\n", "its access list /etc/qemu/bridge.conf does not allow 'br0'"),
            ("allow all\ndeny br0\n", "its access list /etc/qemu/bridge.conf denies 'br0'"),
            (None, "its access list /etc/qemu/bridge.conf is not there"),
        ],
    )
    def test_a_bridge_that_is_not_allowed(self, world: World, lan: Lan, text: str | None, sentence: str) -> None:
        if text is not None:
            Path("/etc/qemu/bridge.conf").write_text(text)
        before = lan.links()
        done = refused(world, "vmnet-bridged,ifname=br0")
        assert sentence in done
        if text is None:
            assert "sudo mkdir -p /etc/qemu && echo 'allow br0' | sudo tee -a /etc/qemu/bridge.conf" in done
        assert lan.links() == before

    def test_without_the_setuid_bit(self, world: World, lan: Lan) -> None:
        HELPER.chmod(0o755)
        said = refused(world, "vmnet-bridged,ifname=br0")
        assert f"sudo chmod u+s {HELPER} && sudo mkdir -p /etc/qemu && echo 'allow br0' | sudo tee -a" in said
        Path("/etc/qemu/bridge.conf").write_text("allow br0\n")
        said = refused(world, "vmnet-bridged,ifname=br0")
        assert f"{HELPER} is not setuid root" in said
        assert f"let the helper do it: sudo chmod u+s {HELPER};" in said
        assert "sudo setpriv " in said
        assert "-netdev vmnet-shared,id=net0" in said

    def test_isolation_is_not_to_be_had(self, world: World, lan: Lan) -> None:
        Path("/etc/qemu/bridge.conf").write_text("allow br0\n")
        before = lan.links()
        assert "isolated=on on bridge 'br0' takes CAP_NET_ADMIN" in refused(
            world, "vmnet-bridged,ifname=br0,isolated=on"
        )
        assert lan.links() == before

    @pytest.mark.parametrize(
        "text",
        [
            "", "# allow br0\n", "allow br0", "  allow br0  \n", "allow\tbr0\n", "  allow\tbr0  \n", "allow   br0\n",
            "allow all\n", "deny all\nallow br0\n", "allow br0 br1\n", "allow br0\ndeny br0\n", "allow br0\ndeny br1\n",
            "include /etc/qemu/more.conf\n", "allow br0\ninclude /etc/qemu/deny.conf\n", "allow br00\n", "Allow br0\n",
            "include /etc/qemu/none.conf\nallow br0\n", "include /etc/qemu/odd.conf\nallow br0\n", "allow br0\nodd\n",
            "allow br0\nodd br1\n", "allow br0\nallow\n", "allow br0 # ours\n", "\n\nallow br0\n",
        ],
    )  # fmt: skip
    def test_what_we_read_in_the_list_is_what_the_helper_reads(self, world: World, lan: Lan, text: str) -> None:
        Path("/etc/qemu/bridge.conf").write_text(text)
        Path("/etc/qemu/more.conf").write_text("allow br0\n")
        Path("/etc/qemu/deny.conf").write_text("deny all\n")
        Path("/etc/qemu/odd.conf").write_text("odd\n")
        shown = json.loads(world.product_run(["vmnet", "interfaces", "--json"]).stdout)["interfaces"]
        ours = next(each["needs"] for each in shown if each["name"] == "br0") is None
        script = (
            "import socket, subprocess, sys; a, b = socket.socketpair();"
            "fd = b.fileno();"
            f"sys.exit(subprocess.run(['{HELPER}', '--br=br0', f'--fd={{fd}}'], pass_fds=[fd]).returncode)"
        )
        theirs = world.product_run(["python", "-c", script], check=False).returncode == 0
        assert ours == theirs


def refused(world: World, netdev: str) -> str:
    done = world.product_run(["vmnet", "run", "--", *qemu(*virtio(netdev))], check=False)
    assert done.returncode == 69
    return done.stderr


def test_an_ordinary_user_and_a_nic(world: World, lan: Lan) -> None:
    said = refused(world, "vmnet-bridged,ifname=nic0")
    assert said.startswith("vmnet: uid 60001 may not bridge a VM to nic0: a macvtap on a NIC takes root\nhint: ")
    assert "-runas $USER" in said


def test_an_ordinary_user_with_the_capability(world: World, lan: Lan) -> None:
    """As the hint says it; QEMU itself has no capability then."""
    keep = ["--inh-caps=+net_admin", "--ambient-caps=+net_admin"]
    user = ["setpriv", "--reuid=60001", "--regid=60001", "--clear-groups", *keep]
    argv = [*user, "vmnet", "run", "--", *qemu(*virtio("vmnet-bridged,ifname=br0,isolated=on")), "-name", "able"]
    before = lan.links()

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return world.host.popen(command, env=world.environment(), **options)

    with Guest(argv, name="able", popen=start) as guest:
        guest.wait_boot()
        assert guest.dhcp().server == GATEWAY
        assert "isolated on" in world.host.run(["bridge", "-d", "link", "show", "dev", "vmtap0"]).stdout
        status = Path(f"/proc/{guest.process.pid}/status").read_text()
        assert [line.split()[1] for line in status.splitlines() if line.startswith(("CapEff", "CapAmb"))] == [
            "0" * 16
        ] * 2
    assert eventually(lambda: lan.links() == before)


def test_root_hands_its_rights_off_and_needs_no_place_for_the_record(world: World, lan: Lan) -> None:
    """The directory of the records, in a runtime directory of root's own, is another user's."""
    macvtap_or_skip(lan)
    before = lan.links()
    runtime = world.directory / "roots-own"
    (runtime / "openvmnet").mkdir(mode=0o700, parents=True)
    os.chown(runtime / "openvmnet", 60001, 60001)
    argv = ["env", f"XDG_RUNTIME_DIR={runtime}", "vmnet", "run", "--"]
    argv += [*qemu(*virtio("vmnet-bridged,ifname=nic0")), "-name", "sudo", "-runas", "60001:60001"]
    with lan.root_guest(argv, name="sudo") as guest:
        guest.wait_boot()
        assert guest.dhcp().server == GATEWAY
        assert "vmnet: vmnet ls does not list net0: " in guest.stderr()
        status = Path(f"/proc/{guest.process.pid}/status").read_text()
        assert "\nUid:\t60001\t60001\t60001\t60001\n" in status
        guest.process.kill()
        assert eventually(lambda: lan.links() == before)


def test_a_vm_that_goes_to_the_background_keeps_its_port(world: World, lan: Lan) -> None:
    """QEMU's -daemonize: the process that was started ends, another has the descriptors."""
    macvtap_or_skip(lan)
    before = lan.links()
    pidfile = lan.home / "pid"
    qemu_argv = ["qemu-system-x86_64", "-M", "none", "-display", "none", "-daemonize", "-pidfile", str(pidfile)]
    netdev = ["-netdev", "vmnet-bridged,id=n0,ifname=nic0", "-name", "daemon"]
    done = lan.root_run(["vmnet", "run", "--", *qemu_argv, *netdev])
    assert re.fullmatch(
        r"vmnet: a NIC that is plugged into n0 later needs mac=52:54:00:\S{8} over macvtap", done.stderr.splitlines()[0]
    )
    try:
        assert lan.links() != before
        assert "daemon" in lan.root_run(["vmnet", "ls"]).stdout
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGKILL)
    assert eventually(lambda: lan.links() == before)
    assert "daemon" not in lan.root_run(["vmnet", "ls"]).stdout


def test_names_that_are_refused(world: World, lan: Lan) -> None:
    done = lan.root_run(["vmnet", "run", "--", *qemu(*virtio("vmnet-bridged,ifname=none0"))], check=False)
    assert done.returncode == 2
    usable = [each.name for each in reversed(inside(world.host, links)) if each.name not in ("lo", "trunk0")]
    assert done.stderr.startswith(
        f"vmnet: unsupported ifname 'none0', expected one of [ {' '.join(usable)} ]: no link has that name\n"
    )
    done = lan.root_run(["vmnet", "run", "--", *qemu(*virtio("vmnet-bridged,ifname=trunk0"))], check=False)
    assert done.stderr.splitlines()[0].endswith(": trunk0 is a port of bridge br0: name br0 instead")


def test_a_start_that_is_killed_leaves_nothing(world: World, lan: Lan) -> None:
    """`vmnet run` itself, killed at fifteen moments of its half second."""
    macvtap_or_skip(lan)
    before = lan.links()
    for ifname in ("br0", "nic0"):
        argv = ["vmnet", "run", "--", "sleep", "0.05", "-netdev", f"vmnet-bridged,id=a,ifname={ifname}"]
        for step in range(15):
            process = lan.root(argv, stdin=-3, stdout=-3, stderr=-3)
            time.sleep(0.1 + step * 0.03)
            process.kill()
            process.wait()
        assert eventually(lambda: lan.links() == before)
