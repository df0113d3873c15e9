"""A guest without a VM: a network namespace that is plugged into a network of the product's.

A real guest under TCG is bound by its own CPU. To measure the network itself, a namespace takes the guest's place: a
veth pair leads from it to the network's bridge. The lab's root may do that, since it owns the user namespace in which
the product's user made the network's own. A port that is held by `sleep` keeps the network up meanwhile.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from openvmnet.engine.linux import firewall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lab.netns import Namespace
    from lab.world import World


class PluggedNetwork:
    """The product's network `name` in `world`, kept up by a held port; namespaces can be plugged into it."""

    def __init__(
        self,
        world: World,
        name: str = "bench",
        *,
        ports: int = 1,
        mode: str = "shared",
        options: str = "",
        arguments: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._world = world
        # A shell that ignores its arguments holds the port; nothing else is needed of a VM here.
        program = ["sh", "-c", "exec sleep 100000", "sh"]
        command = ["vmnet", "run", "--name", name, *arguments, "--", *program]
        for number in range(ports):
            command += ["-netdev", f"vmnet-{mode},id=n{number}{options}"]
        self._holder = world.product(command, stdin=subprocess.DEVNULL)
        self.record = self._await_record(ports)
        self.inside = self._attach()
        self._guests: list[Namespace] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The network process."""
        return int(self.record["pid"])

    @property
    def agent(self) -> int:
        """The agent's process."""
        return int(self.record["agent"])

    @property
    def gateway(self) -> str:
        """The gateway's address."""
        return str(self._config["subnet"]["gateway"])

    @property
    def prefix(self) -> ipaddress.IPv6Network | None:
        """The network's IPv6 prefix; None where it has no IPv6."""
        prefix = self._config.get("prefix")
        return None if prefix is None else ipaddress.IPv6Network(prefix)

    @property
    def gateway6(self) -> str:
        """The gateway's IPv6 address."""
        if self.prefix is None:
            raise RuntimeError(f"network '{self.name}' has no IPv6")
        return str(self.prefix[1])

    @property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.record["config"]
        return config

    def plug(self) -> Namespace:
        """A guest in the network: its namespace, with interface eth0, addresses, and the default routes."""
        number = len(self._guests)
        guest = self._world.namespace(f"g{number}-{self.name}")
        self._guests.append(guest)
        port = f"vm{900 + number}"
        mtu = self._config.get("mtu", 1500)
        guest.batch(f"link add eth0 mtu {mtu} type veth peer name {port} mtu {mtu} netns {self._tag}")
        if self.prefix is not None:  # before the link is up: on a busy machine an advertisement is quicker than we
            guest.sysctl("net.ipv6.conf.eth0.accept_ra", 0)
        self.inside_batch(f"link set {port} master vmnet0 txqueuelen 20000 up")
        self.nft(firewall.add_port(port, isolated=False, ip6=self.prefix is not None))
        if self._config["subnet"] is None:  # the guests' own business
            guest.batch("link set eth0 up")
            return guest
        prefix, _, last = self.gateway.rpartition(".")
        address = f"{prefix}.{int(last) + 200 + number}"
        guest.batch(f"addr add {address}/24 dev eth0", "link set eth0 up")
        guest.batch(f"route add default via {self.gateway}")
        self.nft(firewall.guard([(address, port)], []))  # as for an address by DHCP: it is this port's alone
        if self.prefix is not None:
            guest.batch(f"addr add {self.prefix[0x200 + number]}/64 dev eth0 nodad")
            guest.batch(f"route add default via {self.gateway6}")
        return guest

    def inside_batch(self, *lines: str) -> None:
        """ip(8) commands in the network's namespace."""
        subprocess.run(
            ["ip", "-n", self._tag, "-batch", "-"], input="\n".join(lines) + "\n", text=True, check=True, timeout=30
        )

    def nft(self, text: str) -> str:
        """An nft(8) text in the network's namespace."""
        done = subprocess.run(
            [*self.inside, "nft", "-f", "-"], input=text, text=True, check=True, capture_output=True, timeout=30
        )
        return done.stdout

    def sysctl(self, name: str, value: object) -> None:
        """A sysctl of the network's namespace."""
        subprocess.run([*self.inside, "sysctl", "-qw", f"{name}={value}"], check=True, timeout=30)

    def close(self) -> None:
        """Let the port go, and take the namespace's name back."""
        self._holder.kill()
        self._holder.wait()
        subprocess.run(["ip", "netns", "del", self._tag], check=True, timeout=30)

    def _await_record(self, ports: int) -> dict[str, Any]:
        path = Path(self._world.runtime) / "openvmnet" / self.name / "network.json"
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if path.exists():
                record: dict[str, Any] = json.loads(path.read_bytes())
                if len(record["ports"]) == ports:
                    return record
            if self._holder.poll() is not None:
                raise RuntimeError(f"vmnet run ended with {self._holder.returncode}")
            time.sleep(0.01)
        raise RuntimeError(f"network '{self.name}' did not come up within 10 s")

    def _attach(self) -> list[str]:
        self._tag = f"{self._world.tag}-{self.name}"
        subprocess.run(["ip", "netns", "attach", self._tag, str(self.agent)], check=True, timeout=30)
        return ["ip", "netns", "exec", self._tag]
