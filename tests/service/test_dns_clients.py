"""The name server between other people's clients and other people's servers, in the lab's world.

A guest's namespace asks; our server answers on the host, where its upstream queries leave from as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from lab.netns import Namespace, link
from lab.paths import CHECKOUT
from lab.world import BLACKHOLE, NAMESERVER, NAMESERVER2, NAMESERVER6, PROHIBITED, UNREACHABLE, WEB, WEB6, World

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kernel

GATEWAY = "192.168.64.1"


class Setting:
    """A guest, and the server that it asks."""

    def __init__(self, world: World, guest: Namespace, server: subprocess.Popen[str], directory: Path) -> None:
        self.world = world
        self.guest = guest
        self._server = server
        self._resolv_conf = directory / "resolv.conf"
        self._resolv_conf.write_text(f"nameserver {GATEWAY}\nsearch vmnet.internal\noptions timeout:3 attempts:1\n")

    def dig(self, *words: str) -> str:
        """What dig prints; it tries once, for five seconds."""
        need("dig")
        return self.guest.run(["dig", "+time=5", "+tries=1", f"@{GATEWAY}", *words], check=False).stdout

    def short(self, *words: str) -> list[str]:
        return sorted(self.dig("+short", *words).split("\n")[:-1])

    def status(self, *words: str) -> str:
        found = re.search(r"status: (\w+)", self.dig(*words))
        return found[1] if found else "no answer"

    def libc(self, *command: str) -> str:
        """A command whose C library asks our server: a resolv.conf of its own is mounted over the lab's."""
        script = f'mount --bind {self._resolv_conf} "$(realpath /etc/resolv.conf)" && exec "$@"'
        return self.guest.run(["unshare", "--mount", "sh", "-c", script, "sh", *command], check=False).stdout

    def rename(self, name: str, address: str) -> None:
        """Give a guest's name another address."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{name} {address}\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline() == "ok\n"

    def settle(self) -> None:
        """Let the server's look at resolv.conf be due: it looks once a second."""
        time.sleep(1.1)


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"needs {program}")


@pytest.fixture(scope="module")
def setting(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    guest = world.namespace("dns-guest")
    link(guest, "eth0", world.host, "vmnet0")
    guest.batch("addr add 192.168.64.2/24 dev eth0", f"route add default via {GATEWAY}")
    world.host.batch(f"addr add {GATEWAY}/24 dev vmnet0")
    command = [sys.executable, "-m", "lab.name_server", GATEWAY, "/run/lab/resolv.conf"]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    with world.host.popen(command, **options) as server:
        assert server.stdout.readline() == "ready\n"
        yield Setting(world, guest, server, tmp_path_factory.mktemp("dns"))
        server.stdin.close()


@pytest.fixture(autouse=True)
def usual(world: World, setting: Setting) -> Iterator[None]:
    """After a test that changed the resolvers, the usual one is back and has been noticed."""
    yield
    world.resolver(NAMESERVER)
    for address in (NAMESERVER, NAMESERVER2):
        with contextlib.suppress(KeyError):
            world.stop_nameserver(address)
        world.start_nameserver(address)


class TestDig:
    def test_forwarded(self, setting):
        assert setting.short("www.example.test") == [WEB]
        assert setting.short("www.example.test", "AAAA") == [WEB6]
        assert setting.short("+tcp", "www.example.test") == [WEB]
        assert setting.short("+noedns", "www.example.test") == [WEB]
        assert setting.short("+nocookie", "+dnssec", "www.example.test") == [WEB]
        assert setting.short("alias.example.test") == [WEB, "www.example.test."]
        assert setting.short("example.test", "MX") == ["10 mail.example.test."]
        assert setting.status("none.example.test") == "NXDOMAIN"

    def test_too_long_for_udp(self, setting):
        assert "flags: qr aa tc rd" in setting.dig("+ignore", "big.example.test", "TXT")
        assert len(setting.short("big.example.test", "TXT")) == 24  # dig repeats it by TCP
        said = setting.dig("big.example.test", "TXT")
        assert ";; Truncated, retrying in TCP mode." in said

    def test_local(self, setting):
        assert setting.short("vm7.vmnet.internal") == ["192.168.64.7"]
        assert setting.short("-x", "192.168.64.7") == ["vm7.vmnet.internal."]
        assert setting.short("gateway.vmnet.internal") == [GATEWAY]
        assert setting.short("+tcp", "gateway.vmnet.internal") == [GATEWAY]
        assert setting.status("vm999.vmnet.internal") == "NXDOMAIN"
        assert setting.status("vm7.vmnet.internal", "AAAA") == "NOERROR"
        for _ in range(2):
            setting.rename("vm8", "192.168.64.88")
            assert setting.short("vm8.vmnet.internal") == ["192.168.64.88"]
            setting.rename("vm8", "192.168.64.8")
            assert setting.short("vm8.vmnet.internal") == ["192.168.64.8"]

    def test_edns(self, setting):
        assert "; EDNS: version: 0, flags:; udp: 1232" in setting.dig("vm7.vmnet.internal")
        assert setting.status("+edns=1", "+noednsnegotiation", "vm7.vmnet.internal") == "BADVERS"
        assert setting.short("+edns=1", "vm7.vmnet.internal") == ["192.168.64.7"]  # dig steps back to version 0
        assert setting.short("+ednsopt=65001:abcd", "+subnet=192.168.64.0/24", "www.example.test") == [WEB]

    def test_what_is_not_done(self, setting):
        assert setting.status("+opcode=UPDATE", "www.example.test") == "NOTIMP"
        assert setting.status("CH", "TXT", "version.bind") == "REFUSED"
        assert setting.status("+header-only") == "FORMERR"
        assert "Transfer failed" in setting.dig("AXFR", "vmnet.internal")

    def test_ttls_go_down(self, setting):
        def ttl() -> int:
            return int(setting.dig("+noall", "+answer", "server.example.test").split()[1])

        first = ttl()
        time.sleep(2.1)
        assert first - 4 <= ttl() <= first - 2
        setting.short("short.example.test")
        before = len(setting.world.queries())
        time.sleep(1.1)
        setting.short("short.example.test")  # it held for a second
        assert len(setting.world.queries()) == before + 1


class TestLibraries:
    def test_busybox(self, setting):
        need("busybox")
        said = setting.guest.run(["busybox", "nslookup", "www.example.test", GATEWAY]).stdout
        assert WEB in said
        assert WEB6 in said
        assert "192.168.64.7" in setting.guest.run(["busybox", "nslookup", "vm7.vmnet.internal", GATEWAY]).stdout
        assert "vm7.vmnet.internal" in setting.guest.run(["busybox", "nslookup", "192.168.64.7", GATEWAY]).stdout

    def test_glibc(self, setting):
        assert setting.libc("getent", "ahostsv4", "www.example.test").split()[0] == WEB
        assert setting.libc("getent", "hosts", "vm7").split() == ["192.168.64.7", "vm7.vmnet.internal"]  # search list
        assert setting.libc("getent", "hosts", "192.168.64.7").split() == ["192.168.64.7", "vm7.vmnet.internal"]
        assert setting.libc("getent", "ahosts", "none.example.test") == ""

    def test_host_and_nslookup(self, setting):
        need("nslookup")
        assert WEB in setting.libc("nslookup", "www.example.test")
        assert WEB in setting.libc("host", "-T", "www.example.test")


def test_no_private_name_leaks(setting, world):
    before = len(world.queries())
    names = [
        "printer.local",
        "x.onion",
        "a.invalid",
        "none.vmnet.internal",
        "localhost",
        "b.localhost",
        "_dns.resolver.arpa",
    ]
    for name in names:
        setting.dig(name)
    addresses = [
        "10.1.2.3",
        "172.20.0.1",
        "192.168.1.1",
        "192.168.64.99",
        "169.254.1.1",
        "127.1.1.1",
        "100.64.9.9",
        "fd00::1",
        "fe80::1",
        "::1",
    ]
    for address in addresses:
        for transport in ("+notcp", "+tcp"):
            assert setting.status(transport, "-x", address) in {"NXDOMAIN", "NOERROR"}
    setting.dig("any", "vmnet.internal")
    assert world.queries()[before:] == []
    setting.dig("-x", "203.0.113.80")
    setting.dig("-x", "8.8.8.8")
    assert "PTR 8.8.8.8.in-addr.arpa" in world.queries()[before:]


class TestFaults:
    def test_one_down_and_all_down(self, setting, world):
        world.resolver(NAMESERVER, NAMESERVER2)
        setting.settle()
        world.stop_nameserver(NAMESERVER)
        started = time.monotonic()
        assert setting.short("www.example.test") == [WEB]
        assert setting.short("+tcp", "server.example.test") != []
        assert time.monotonic() - started < 0.5
        assert world.queries(NAMESERVER2)[-1] == "A server.example.test"
        world.stop_nameserver(NAMESERVER2)
        started = time.monotonic()
        assert setting.status("text.example.test", "TXT") == "SERVFAIL"
        assert setting.status("+tcp", "text.example.test", "TXT") == "SERVFAIL"
        assert time.monotonic() - started < 0.5
        world.start_nameserver(NAMESERVER2)
        assert setting.short("text.example.test", "TXT") == ['"the text"']

    @pytest.mark.parametrize("nowhere", [UNREACHABLE, PROHIBITED, "192.0.2.99", "240.0.0.1"])
    def test_a_server_that_cannot_be_reached(self, setting, world, nowhere):
        """The error comes as ICMP, from a router or (192.0.2.99: no such neighbour) from the host's own ARP."""
        world.resolver(nowhere, NAMESERVER2)
        setting.settle()
        started = time.monotonic()
        assert setting.short("www.example.test") == [WEB]
        assert time.monotonic() - started < (3.5 if nowhere == "192.0.2.99" else 0.5)

    def test_silence(self, setting, world):
        world.resolver(BLACKHOLE, NAMESERVER2)
        setting.settle()
        started = time.monotonic()
        assert setting.short("www.example.test") == [WEB]
        assert 0.9 < time.monotonic() - started < 1.5
        started = time.monotonic()
        assert setting.short("example.test", "MX") == ["10 mail.example.test."]
        assert time.monotonic() - started < 0.5

    def test_another_resolv_conf(self, setting, world):
        setting.short("www.example.test")
        world.resolver(NAMESERVER2)
        setting.settle()
        before = len(world.queries(NAMESERVER2))
        assert setting.short("www.example.test") == [WEB]  # not from the cache: it may be another world now
        assert world.queries(NAMESERVER2)[before:] == ["A www.example.test"]
        world.resolver()
        setting.settle()
        started = time.monotonic()
        assert setting.status("www.example.test") == "SERVFAIL"
        assert time.monotonic() - started < 0.5
        assert setting.short("vm7.vmnet.internal") == ["192.168.64.7"]

    def test_a_resolver_on_the_hosts_loopback(self, setting, world):
        """As systemd-resolved has it: 127.0.0.53 is the host's, since the question leaves from there."""
        world.resolver("127.0.0.53")
        setting.settle()
        with dnsmasq(world.host, "127.0.0.53", f"--server={NAMESERVER2}"):
            assert setting.short("www.example.test") == [WEB]
            assert len(setting.short("big.example.test", "TXT")) == 24

    def test_a_resolver_with_an_ipv6_address(self, setting, world):
        world.resolver(NAMESERVER6)
        setting.settle()
        with dnsmasq(world.internet, NAMESERVER6, f"--host-record=six.example.test,{WEB}"):
            assert setting.short("six.example.test") == [WEB]
            assert setting.short("+tcp", "six.example.test", "AAAA") == []
        started = time.monotonic()
        assert setting.status("other.example.test") == "SERVFAIL"  # refused by ICMPv6
        assert time.monotonic() - started < 0.5


@contextlib.contextmanager
def dnsmasq(namespace: Namespace, address: str, *options: str) -> Iterator[None]:
    command = ["dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file="]
    command += ["--bind-interfaces", f"--listen-address={address}", *options]
    with namespace.popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                if namespace.run(["dig", "+tries=1", "+time=1", f"@{address}", "x"], check=False).returncode == 0:
                    break
            yield
        finally:
            process.kill()


def test_a_neighbour_that_floods(setting, tmp_path):
    """One guest asks for ten thousand names that have to be forwarded; another's answers all come, and soon."""
    need("dnsperf")
    flood = tmp_path / "flood"
    flood.write_text("".join(f"r{number}.nowhere.test A\n" for number in range(10_000)))
    queries = tmp_path / "queries"
    queries.write_text("vm7.vmnet.internal A\nwww.example.test A\n")
    setting.settle()
    setting.short("www.example.test")
    setting.guest.batch("addr add 192.168.64.66/24 dev eth0")
    command = ["dnsperf", "-s", GATEWAY, "-a", "192.168.64.66", "-d", str(flood), "-l", "3", "-q", "1000", "-t", "1"]
    with setting.guest.popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as flooder:
        time.sleep(0.5)
        command = ["dnsperf", "-s", GATEWAY, "-a", "192.168.64.2", "-d", str(queries), "-l", "1.5", "-Q", "500"]
        said = setting.guest.run(command).stdout
        flooder.kill()
    assert re.search(r"Queries lost: +0 ", said), said
    assert re.search(r"NOERROR \d+ \(100.00%\)", said), said
    latency = re.search(r"Average Latency \(s\): +([\d.]+)", said)
    assert latency is not None
    assert float(latency[1]) < 0.2
