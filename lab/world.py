"""The lab's world: a host on which the product runs, a router, and an "internet" with services, all in namespaces.

    host                          router                         internet
    192.0.2.2/24  ── veth ──  192.0.2.1   198.51.100.1  ── veth ──  198.51.100.2   203.0.113.{1,53,54,80} on lo
    2001:db8:1::2/64          2001:db8:1::1  2001:db8:3::1          2001:db8:3::2  2001:db8:2::{1,53,80} on lo

- `HOST` is the namespace that the product starts in; its resolver is `NAMESERVER`, and everyone may use ping
  sockets there.
- `SERVER` and `WEB` answer on the ports that lab/internet.py lists; iperf3 listens on `SERVER` ports 5201 to 5204, and
  on the same of `SERVER6`.
- `NAMESERVER` and `NAMESERVER2` (dnsmasq) know example.test; everything else does not exist for them.
- Nothing listens on other ports (refused); `BLACKHOLE` swallows everything; for `UNREACHABLE` the router answers with
  ICMP host unreachable, for `PROHIBITED` with ICMP administratively prohibited. Each has its like in IPv6.

The product runs as an unprivileged user: `product()` changes to uid 60001 where the lab is root's, and to the caller's
own uid, without rights, where it is a user's. Its home and its runtime directory are made for it and go with the world.
Every process started through `product()` bears the variable OPENVMNET_WORLD, by which `leftovers()` finds
what it, or what it started, left behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lab import enter, internet
from lab.guest import Guest
from lab.netns import Namespace, link
from lab.paths import CHECKOUT, programs

HOST, HOST6 = "192.0.2.2", "2001:db8:1::2"
ROUTER, ROUTER6 = "192.0.2.1", "2001:db8:1::1"
SERVER, SERVER6 = "203.0.113.1", "2001:db8:2::1"
WEB, WEB6 = "203.0.113.80", "2001:db8:2::80"
NAMESERVER, NAMESERVER6, NAMESERVER2 = "203.0.113.53", "2001:db8:2::53", "203.0.113.54"
BLACKHOLE, UNREACHABLE, PROHIBITED = "203.0.113.66", "203.0.113.67", "203.0.113.68"
BLACKHOLE6, UNREACHABLE6, PROHIBITED6 = "2001:db8:2::66", "2001:db8:2::67", "2001:db8:2::68"
IPERF_PORTS = (5201, 5202, 5203, 5204)
PAGE = internet.PAGE.decode()
UID = 60001  # an id that no distribution gives to anyone

_ZONE = [
    f"--host-record=www.example.test,{WEB},{WEB6}",
    f"--host-record=server.example.test,{SERVER},{SERVER6}",
    "--host-record=short.example.test,203.0.113.9,1",  # a TTL of one second
    "--cname=alias.example.test,www.example.test",
    "--mx-host=example.test,mail.example.test,10",
    "--srv-host=_http._tcp.example.test,www.example.test,80",
    "--txt-record=text.example.test,the text",
    *(f"--txt-record=big.example.test,{index:02d}{'x' * 200}" for index in range(24)),  # 5 kB: needs TCP
]


@dataclass(frozen=True)
class Process:
    """A process that is there: its pid and command line."""

    pid: int
    command: str


class World:
    """The world as a context manager. Only one at a time: it owns the resolver's configuration of the lab.

    `hops` is the number of routers between host and internet, 0 or 1;
    `congestion` is TCP's congestion control in all namespaces.
    """

    _serial = 0

    def __init__(self, *, hops: int = 1, congestion: str = "reno") -> None:
        if not enter.inside():
            raise RuntimeError("the world is only built in the lab: python -m lab.enter COMMAND")
        World._serial += 1
        self.tag = f"w{os.getpid()}-{World._serial}"
        self.directory = Path("/run/lab") / self.tag
        self.congestion = congestion
        self.namespaces: list[Namespace] = []
        self.guests: list[Guest] = []
        self._services: list[subprocess.Popen[Any]] = []
        self._products: list[subprocess.Popen[Any]] = []
        try:
            self._make_user()
            self.host = self.namespace("host")
            self.internet = self.namespace("internet")
            self.router = self.namespace("router") if hops else self.internet
            self._connect()
            self._start_services()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Running things.

    def product(
        self,
        command: list[str],
        *,
        env: dict[str, str] | None = None,
        **options: Any,  # noqa: ANN401 - Popen's own
    ) -> subprocess.Popen[Any]:
        """Start `command` on the host as the unprivileged user, with `vmnet` on its PATH."""
        environment = self.environment() | (env or {})
        options = {"cwd": self.home, "start_new_session": True} | options
        process = self.host.popen([*self._as_user(), *command], env=environment, **options)
        self._products.append(process)
        return process

    def product_run(
        self, command: list[str], *, check: bool = True, timeout: float = 60, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` likewise, its output captured as text; an error's message holds what it said."""
        process = self.product(
            command, env=env, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        if check and process.returncode != 0:
            raise RuntimeError(f"{command} ended with {process.returncode}: {err}{out}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def as_root(
        self,
        command: list[str],
        *,
        check: bool = True,
        **options: Any,  # noqa: ANN401 - passed on to subprocess.run
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` on the host with the lab's root rights."""
        return self.host.run(command, check=check, **options)

    def guest(self, argv: list[str], *, name: str = "guest", env: dict[str, str] | None = None) -> Guest:
        """Start a guest on the host as the unprivileged user: `vmnet run -- qemu-system-x86_64 ...` or plain QEMU."""

        def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401 - Popen's own
            return self.product(command, env=env, **options)

        guest = Guest(argv, name=name, popen=start)
        self.guests.append(guest)
        return guest

    def environment(self) -> dict[str, str]:
        """The unprivileged user's environment."""
        return {
            "PATH": f"{programs()}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_STATE_HOME": str(self.home / ".local" / "state"),
            "LANG": "C.UTF-8",
            "OPENVMNET_WORLD": self.tag,
        }

    def namespace(self, name: str) -> Namespace:
        """One more namespace, with the world's congestion control; it goes with the world."""
        made = Namespace(f"{self.tag}-{name}")
        self.namespaces.append(made)
        made.sysctl("net.ipv4.tcp_congestion_control", self.congestion)
        return made

    # Changing the world.

    def resolver(self, *servers: str, text: str = "") -> None:
        """Write the host's resolv.conf, in place, as a VPN client does."""
        lines = "".join(f"nameserver {server}\n" for server in servers)
        Path("/run/lab/resolv.conf").write_text(lines + text)

    def narrow(self, mtu: int) -> None:
        """Set the MTU of the link beyond the router: packets that the host sends whole no longer fit there."""
        self.router.batch(f"link set outer mtu {mtu}")
        self.internet.batch(f"link set uplink mtu {mtu}")

    def ipv6(self, *, on: bool) -> None:
        """Take IPv6's address and route away from the host, or give them back: most hosts have no IPv6."""
        address, route = f"{HOST6}/64 dev eth0", f"default via {ROUTER6}"
        if on:
            self.host.batch(f"addr add {address} nodad", f"route add {route}")
        else:
            self.host.batch(f"route del {route}", f"addr del {address}")

    def stop_nameserver(self, address: str = NAMESERVER) -> None:
        """End one name server: what asks it gets ICMP port unreachable."""
        self._end(self._nameservers.pop(address))

    def start_nameserver(self, address: str = NAMESERVER, *more: str) -> None:
        """Start one name server; `more` are further dnsmasq options."""
        # --no-daemon: it neither forks nor drops rights, for which a user's lab has no second uid.
        command = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"]
        command += [f"--listen-address={address}", "--address=/#/", "--local-ttl=300", "--cache-size=0", "--pid-file="]
        with (self.directory / f"dns-{address}.log").open("ab") as log:
            self._nameservers[address] = self._service(
                [*command, "--log-queries", *more, *_ZONE], stdout=log, stderr=log
            )
        self._await_port(address, 53)

    def queries(self, address: str = NAMESERVER) -> list[str]:
        """What one name server was asked: "A www.example.test", in order."""
        lines = (self.directory / f"dns-{address}.log").read_text().splitlines()
        asked = [line.partition(": query[")[2] for line in lines if ": query[" in line]
        return [line.partition(" from ")[0].replace("] ", " ") for line in asked]

    # What is there.

    def leftovers(self) -> list[Process]:
        """Processes that came from `product()` and are still there."""
        mark = f"OPENVMNET_WORLD={self.tag}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    found.append(Process(int(entry.name), command))
        return sorted(found, key=lambda process: process.pid)

    def network_namespaces(self) -> int:
        """How many network namespaces the processes of `product()` live in, the host's own not counted."""
        own = self.host.path.stat().st_ino
        inodes = set()
        for process in self.leftovers():
            with contextlib.suppress(OSError):
                inodes.add(Path(f"/proc/{process.pid}/ns/net").stat().st_ino)
        return len(inodes - {own})

    def files(self) -> list[str]:
        """Every file and socket in the product's runtime directory, by relative path."""
        return sorted(str(path.relative_to(self.runtime)) for path in self.runtime.rglob("*") if not path.is_dir())

    def wait_gone(self, timeout: float = 15.0) -> bool:
        """Wait until no process of the product's is left; False when one still is at the end."""
        deadline = time.monotonic() + timeout
        while self.leftovers():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """End every process of the world, delete its namespaces and files."""
        for process in self.leftovers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for guest in self.guests:
            guest.kill()
        for service in [*self._products, *self._services]:
            self._end(service)
        self.wait_gone()
        for namespace in self.namespaces:
            namespace.remove()
        shutil.rmtree(self.directory, ignore_errors=True)
        Path("/run/lab/resolv.conf").write_text("")

    # Building.

    def _make_user(self) -> None:
        self.directory.mkdir(mode=0o755)
        self.home, self.runtime = self.directory / "home", self.directory / "runtime"
        for path in (self.home, self.runtime):
            path.mkdir(mode=0o700)
            if self._real_root():
                os.chown(path, UID, UID)
        for path in (CHECKOUT, programs()):
            if path == programs() and not os.access(path / "python", os.X_OK):
                raise RuntimeError(f"{path} has no python; run scripts/setup")

    def _real_root(self) -> bool:
        return os.environ.get("OPENVMNET_LAB_UID") == "0"

    def _as_user(self) -> list[str]:
        if self._real_root():
            return ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", "--"]
        uid, gid = os.environ["OPENVMNET_LAB_UID"], os.environ["OPENVMNET_LAB_GID"]
        return ["unshare", "--user", f"--map-user={uid}", f"--map-group={gid}", "--"]

    def _connect(self) -> None:
        inner, outer = ("inner", "outer") if self.router is not self.internet else ("inner", "inner")
        for namespace in {self.host, self.router, self.internet}:
            for which in ("all", "default"):  # else no neighbour is asked for during the first second
                namespace.sysctl(f"net.ipv6.conf.{which}.accept_dad", 0)
        link(self.host, "eth0", self.router, inner)
        # A user's lab has one group only, and its ping sockets are for that one.
        self.host.sysctl("net.ipv4.ping_group_range", "0 2147483647" if self._real_root() else "0 0")
        self.host.batch(f"addr add {HOST}/24 dev eth0", f"route add default via {ROUTER}")
        self.host.batch(f"addr add {HOST6}/64 dev eth0 nodad", f"route add default via {ROUTER6}")
        self.router.batch(f"addr add {ROUTER}/24 dev {inner}", f"addr add {ROUTER6}/64 dev {inner} nodad")
        if self.router is not self.internet:
            link(self.router, outer, self.internet, "uplink")
            self.router.batch(
                f"addr add 198.51.100.1/24 dev {outer}",
                f"addr add 2001:db8:3::1/64 dev {outer} nodad",
                "route add 203.0.113.0/24 via 198.51.100.2",
                "route add 2001:db8:2::/64 via 2001:db8:3::2",
            )
            self.internet.batch(
                "addr add 198.51.100.2/24 dev uplink",
                "addr add 2001:db8:3::2/64 dev uplink nodad",
                "route add default via 198.51.100.1",
                "route add default via 2001:db8:3::1",
            )
        for namespace in {self.router, self.internet}:
            namespace.sysctl("net.ipv4.ip_forward", 1)  # without it, no ICMP error for a route that says "unreachable"
            namespace.sysctl("net.ipv4.icmp_ratelimit", 0)
            namespace.sysctl("net.ipv6.conf.all.forwarding", 1)
            namespace.sysctl("net.ipv6.icmp.ratelimit", 0)
        addresses = [f"{a}/32" for a in (SERVER, WEB, NAMESERVER, NAMESERVER2)]
        addresses += [f"{a}/128" for a in (SERVER6, WEB6, NAMESERVER6)]
        self.internet.batch(*(f"addr add {a} dev lo{' nodad' if ':' in a else ''}" for a in addresses))
        self.internet.batch(f"route add blackhole {BLACKHOLE}")
        self.router.batch(f"route add unreachable {UNREACHABLE}", f"route add prohibit {PROHIBITED}")
        if self.router is not self.internet:  # there is nobody else to send them on to
            self.internet.batch(f"route add blackhole {BLACKHOLE6}")
            self.router.batch(f"route add unreachable {UNREACHABLE6}", f"route add prohibit {PROHIBITED6}")

    def _start_services(self) -> None:
        self._nameservers: dict[str, subprocess.Popen[Any]] = {}
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
        services = self._service(
            [sys.executable, "-m", "lab.internet", SERVER, WEB, SERVER6, WEB6], env=environment, stdout=subprocess.PIPE
        )
        for address in (SERVER, SERVER6):
            for port in IPERF_PORTS:
                self._service(["iperf3", "--server", "--bind", address, "--port", str(port)])
        for address in (NAMESERVER, NAMESERVER2):
            self.start_nameserver(address)
        for address in (SERVER, SERVER6):
            for port in IPERF_PORTS:
                self._await_port(address, port)
        if services.stdout is None or services.stdout.readline() != b"ready\n":
            said = (self.directory / "services.log").read_text()
            raise RuntimeError(f"the lab's services did not start: {said}")
        self.resolver(NAMESERVER)

    def _service(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - Popen's own
        with (self.directory / "services.log").open("ab") as log:
            options = {"stdout": log, "stderr": log} | options
            process = self.internet.popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self._services.append(process)
        return process

    def _await_port(self, address: str, port: int) -> None:
        deadline = time.monotonic() + 10
        while True:
            with self.internet.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
                if sock.connect_ex((address, port)) == 0:
                    return
            if time.monotonic() > deadline:
                said = "".join(path.read_text(errors="replace")[-500:] for path in self.directory.glob("*.log"))
                raise RuntimeError(f"nothing came to listen on {address} port {port}: {said}")
            time.sleep(0.01)

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError, ValueError):
                    stream.close()
