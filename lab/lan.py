"""A LAN beside the world: a switch with a DHCP server on it, to which the host is connected by a bridge and by a NIC.

    host                                       lan
    br0 198.18.0.2/24 ── trunk0 ── veth ── p1 ┐
    nic0 198.18.0.3/32 ─────────── veth ── p2 ┴ sw0 198.18.0.1/24, fd12::1/64, dnsmasq: DHCP from .100 to .199

`root()` starts a process on the host with root's rights and places of its own, as `world.product()` does for the
ordinary user. `links()` is what is left when all VMs are gone.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

from lab.guest import Guest
from lab.netns import link

if TYPE_CHECKING:
    from lab.world import World

GATEWAY, GATEWAY6 = "198.18.0.1", "fd12::1"
BRIDGE_ADDRESS, NIC_ADDRESS = "198.18.0.2", "198.18.0.3"


class Lan:
    """The LAN; it goes with its world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lan = world.namespace("lan")
        self.home = world.directory / "root"
        self.home.mkdir(mode=0o700)
        link(world.host, "trunk0", self.lan, "p1")
        link(world.host, "nic0", self.lan, "p2")
        self.lan.batch(
            "link add name sw0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "link set p1 master sw0",
            "link set p2 master sw0",
            "link set sw0 up",
            f"addr add {GATEWAY}/24 dev sw0",
            f"addr add {GATEWAY6}/64 dev sw0 nodad",
        )
        world.host.batch(
            "link add name br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0",
            "link set trunk0 master br0",
            "link set br0 up",
            f"addr add {BRIDGE_ADDRESS}/24 dev br0",
            f"addr add {NIC_ADDRESS}/32 dev nic0",
        )
        # Else br0 answers for nic0's address, and the host is reached by its other cable.
        world.host.sysctl("net.ipv4.conf.all.arp_ignore", 1)
        self.leases = self.home / "leases"
        command = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--port=0", "--no-ping", "--interface=sw0"]
        command += ["--bind-interfaces", "--pid-file=", f"--dhcp-leasefile={self.leases}", "--dhcp-authoritative"]
        command += ["--dhcp-range=198.18.0.100,198.18.0.199,255.255.255.0,1h", f"--dhcp-option=3,{GATEWAY}"]
        with (self.home / "dnsmasq.log").open("ab") as log:
            self._server = self.lan.popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def close(self) -> None:
        """End the DHCP server; the rest is the world's."""
        self._server.kill()
        self._server.wait()

    def environment(self) -> dict[str, str]:
        """Root's environment, with directories of its own."""
        own = {"HOME": str(self.home), "XDG_STATE_HOME": str(self.home / "state"), "XDG_RUNTIME_DIR": str(self.home)}
        return self.world.environment() | own

    def root(self, argv: list[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - Popen's own
        """Start `argv` on the host as root."""
        return self.world.host.popen(argv, env=self.environment(), **options)

    def root_run(self, argv: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `argv` on the host as root."""
        return self.world.as_root(argv, check=check, env=self.environment())

    def root_guest(self, argv: list[str], *, name: str) -> Guest:
        """Start a guest on the host as root."""
        guest = Guest(argv, name=name, popen=self.root)
        self.world.guests.append(guest)
        return guest

    def links(self) -> list[str]:
        """Every link of the host; a NIC under a macvtap, in whatever namespace that is, hears what is not its own."""
        shown = json.loads(self.world.host.run(["ip", "-json", "-details", "link"]).stdout)
        names = [one["ifname"] for one in shown]
        return sorted(names + [f"{one['ifname']}: promiscuous" for one in shown if one.get("promiscuity")])

    def macs(self) -> dict[str, str]:
        """Address by MAC, as the DHCP server has leased them."""
        lines = self.leases.read_text().splitlines() if self.leases.exists() else []
        return {words[1]: words[2] for words in map(str.split, lines)}
