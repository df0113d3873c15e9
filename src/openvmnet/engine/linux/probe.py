"""What this host has of what the Linux engine needs: each thing tried, not guessed.

How it works. Whether a host lets an ordinary user make a namespace, a TAP or a TPROXY rule follows from the kernel's
options, its modules, sysctls, security modules and, in a container, from its runtime: reading settings tells half of
it. So each probe does the thing itself. `sandbox` forks a real agent into a namespace of its own; in it a TAP is made
and put on a bridge as for a guest, one rule of each kind that the firewall uses is loaded, and the sockets are opened
as the engine opens them. The namespace ends with the probe, and nothing on the host is touched.

A probe gives a Finding: found, degraded (the network works, some of it is missing), optional (something that not every
host wants is not there), missing (no network without it) or untested (what it depends on is missing), with a remedy:
one command for Debian that mends it. Settings are read only afterwards, to choose that command. `Finding.error` is the
same as an exception, for the engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import stat
import subprocess
import tempfile
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import TYPE_CHECKING

from openvmnet.engine.finding import Finding
from openvmnet.engine.linux import agent, firewall, links, namespace, remedy
from openvmnet.errors import VmnetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openvmnet.engine.linux.namespace import Namespace

TOOL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # where the agent, and nobody's PATH, finds ip and nft
TUN = Path("/dev/net/tun")

_OLDEST_KERNEL = (5, 10)
_OLDEST_NFT = (1, 0)
_SO_RCVMARK = 75
_FEWEST_FILES = 16384  # 5,000 flows of two descriptors each, and room
_FEWEST_PAGES = 4096  # 16 MiB of pipe buffers: sixteen pipes in use at once
_GATEWAY = IPv4Address("192.168.64.1")  # inside the sandbox only
_NETWORK = IPv4Network("192.168.64.0/24")
_PREFIX = IPv6Network("fd00::/64")
_TIMEOUT = 10.0  # s


@contextlib.contextmanager
def sandbox() -> Iterator[Namespace]:
    """A namespace with its agent, for as long as the context lasts. Raises OSError as `agent.fork` does."""
    with tempfile.TemporaryDirectory(prefix="vmnet-probe-") as directory:
        path = Path(directory) / "agent.sock"
        pid = agent.fork(str(path))
        try:
            inside = namespace.Namespace(path)
            try:
                yield inside
            finally:
                inside.quit()
        finally:
            os.waitpid(pid, 0)


def kernel(release: str | None = None) -> Finding:
    """The kernel's version; `release` as uname(2) gives it."""
    release = os.uname().release if release is None else release
    purpose = "TPROXY, bridge port isolation, nftables as the firewall uses them"
    version = _version(release)
    if version < _OLDEST_KERNEL:
        wanted = ".".join(map(str, _OLDEST_KERNEL))
        return Finding("kernel", "missing", f"Linux {release}, and {wanted} is needed", purpose, remedy.kernel())
    return Finding("kernel", "found", f"Linux {release}", purpose)


def namespaces(error: OSError | None, proc: Path = Path("/proc/sys")) -> Finding:
    """User and network namespaces, from how `sandbox` went; sysctls are read below `proc` for the remedy."""
    purpose = "bridge, TAPs and firewall without root on the host"
    if error is None:
        return Finding("namespaces", "found", f"uid {os.getuid()} may make user and network namespaces", purpose)
    detail = f"uid {os.getuid()} may not make user and network namespaces: {error.strerror}"
    return Finding("namespaces", "missing", detail, purpose, remedy.namespaces(error, proc))


def tun(path: Path = TUN) -> Finding:
    """The device that TAPs are made with: there, and to be opened."""
    purpose = "a guest's network card (TAP) and the uplink (TUN)"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Finding("tun", "missing", f"{path} does not exist", purpose, "sudo modprobe tun")
    except PermissionError:
        detail = f"{path} has mode {_mode(path)}, and uid {os.getuid()} may not open it"
        return Finding("tun", "missing", detail, purpose, f"sudo chmod 0666 {path}")
    except OSError as error:
        return Finding("tun", "missing", f"{path}: {error.strerror}", purpose, "sudo modprobe tun")
    return Finding("tun", "found", f"{path} has mode {_mode(path)}", purpose)


def tool(name: str, package: str, purpose: str, oldest: tuple[int, ...] = (0,)) -> Finding:
    """A program that the agent runs: there, and new enough."""
    path = _which(name, TOOL_PATH)
    remedy = f"sudo apt install {package}"
    if path is None:
        return Finding(name, "missing", f"no program '{name}' in {TOOL_PATH}", purpose, remedy)
    said = _first_line([path, "-V"] if name == "ip" else [path, "--version"])
    if _version(said) < oldest:
        wanted = ".".join(map(str, oldest))
        return Finding(name, "missing", f"{path} is '{said}', and {wanted} is needed", purpose, remedy)
    return Finding(name, "found", f"{path}: {said}", purpose)


def ip() -> Finding:
    """iproute2."""
    return tool("ip", "iproute2", "links, addresses and routes of a network's namespace")


def nft() -> Finding:
    """nftables."""
    return tool("nft", "nftables", "the firewall, and the way of a guest's packets to the sockets", _OLDEST_NFT)


def tap(inside: Namespace) -> Finding:
    """A TAP with virtio headers, and a TUN, made in the sandbox as vm1 and up0. Closed again."""
    purpose = "a guest's network card with offloads, and the uplink"
    try:
        for op, name in (("tap", "vm1"), ("tun", firewall.UPLINK)):
            for fd in inside.request(op, name=name).fds:
                os.close(fd)
    except VmnetError as error:
        return Finding("tap", "missing", error.message, purpose, error.hint or "sudo modprobe tun")
    return Finding("tap", "found", "a TAP with virtio headers and a TUN can be made", purpose)


def bridge(inside: Namespace) -> Finding:
    """A bridge with an isolated port and the policy routes, made in the sandbox."""
    purpose = "VM to VM at the kernel's speed, and isolation of a VM"
    fds: list[int] = []
    try:
        fds += inside.request("tap", name="vm1").fds
        made = links.bridge("5a:00:00:00:00:01", 1500) + links.gateway(_GATEWAY, 24)
        made += links.port("vm1", 1500, isolated=True)
        refused = _refused(inside, ["ip", "-batch", "-"], made)
    except VmnetError as error:
        refused = error.message
    finally:
        for fd in fds:
            os.close(fd)
    if refused is not None:
        return Finding(
            "bridge", "missing", f"no bridge with an isolated port: {refused}", purpose, "sudo modprobe bridge"
        )
    return Finding("bridge", "found", "a bridge, an isolated port and policy routes can be made", purpose)


# One rule of each kind that the firewall uses, so that the finding names the kind that this kernel lacks.
_RULES: tuple[tuple[str, str, str], ...] = (
    ("bridge family", "nf_tables_bridge nft_meta_bridge", "bridge prerouting filter|meta mark set 1 accept"),
    ("tproxy", "nft_tproxy", "ip prerouting mangle|meta l4proto tcp tproxy to 127.0.0.1:1 meta mark set 1 accept"),
    ("socket", "nft_socket", "ip prerouting mangle|meta l4proto udp socket transparent 1 accept"),
    ("reject", "nft_reject_ipv4", "ip prerouting mangle|reject with icmp type prot-unreachable"),
    ("tproxy for IPv6", "nft_tproxy", "ip6 prerouting mangle|meta l4proto tcp tproxy to [::1]:1 accept"),
    ("reject for IPv6", "nft_reject_ipv6", "ip6 prerouting mangle|reject with icmpv6 type no-route"),
    ("limit", "nft_limit", "ip prerouting mangle|limit rate over 10/second burst 10 packets drop"),
)


def firewall_rules(inside: Namespace) -> list[Finding]:
    """Each kind of rule in turn, then the firewall's whole ruleset."""
    findings = []
    ipv6 = os.path.exists("/proc/sys/net/ipv6")  # a kernel without it has networks without it
    for name, modules, rule in _RULES:
        hook, _, text = rule.partition("|")
        family, chain, priority = hook.split()
        if family == "ip6" and not ipv6:
            continue
        refused = _try_rules(
            inside,
            f"table {family} probe {{ chain c {{ type filter hook {chain} priority {priority}; {text}; }}; }}\n"
            f"delete table {family} probe\n",
        )
        purpose = "the firewall's rules"
        if refused is not None:
            detail = f"no rule with {name}: {refused}"
            findings.append(Finding(f"nft {name}", "missing", detail, purpose, f"sudo modprobe -a {modules}"))
    rules = firewall.ruleset(
        _GATEWAY, _NETWORK, "5a:00:00:00:00:01", 1, prefix=_PREFIX if ipv6 else None, listener6=1, gateway_services=True
    ) + firewall.isolation(needed=True)
    refused = None if findings else _try_rules(inside, rules)
    if refused is not None:
        findings.append(Finding("nft rules", "missing", f"the ruleset: {refused}", "the firewall", remedy.kernel()))
    if not findings:
        kinds = ", ".join(name for name, _, _ in _RULES)
        findings.append(Finding("nft rules", "found", f"{kinds} and the whole ruleset", "the firewall"))
    return findings


def received_mark(inside: Namespace) -> Finding:
    """SO_RCVMARK (Linux 5.19), by which DHCP and DNS know the port that a request came from."""
    purpose = "limits of DHCP and DNS for each port, whatever MAC or address a guest claims"
    try:
        option = [(socket.SOL_SOCKET, _SO_RCVMARK, 1)]
        for sock in inside.sockets(socket.AF_INET, socket.SOCK_DGRAM, options=[*option]):
            sock.close()
    except VmnetError:
        return Finding("rcvmark", "degraded", "no SO_RCVMARK: Linux 5.19 brings it", purpose, remedy.kernel())
    return Finding("rcvmark", "found", "SO_RCVMARK works", purpose)


def ping() -> Finding:
    """A datagram socket of protocol ICMP, opened in the host's namespace."""
    purpose = "ping and traceroute from a guest to the outside"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError as error:
        groups = _read(Path("/proc/sys/net/ipv4/ping_group_range")).replace("\t", " to ")
        detail = (
            f"gid {os.getgid()} may not open ping sockets ({error.strerror}; net.ipv4.ping_group_range is {groups})"
        )
        remedy = "sudo sysctl -w net.ipv4.ping_group_range='0 2147483647'"
        return Finding("ping", "degraded", detail, purpose, remedy)
    return Finding("ping", "found", f"gid {os.getgid()} may open ping sockets", purpose)


def files(hard: int | None = None) -> Finding:
    """The hard limit of open files; the network process raises its soft one to it."""
    purpose = "two descriptors for each TCP connection of a guest"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if hard is None else hard
    if hard != resource.RLIM_INFINITY and hard < _FEWEST_FILES:
        detail = f"{hard} open files a process: about {max(0, hard - 64) // 2} connections"
        remedy = "sudo prlimit --pid $$ --nofile=1048576:1048576"
        return Finding("files", "degraded", detail, purpose, remedy)
    shown = "no limit of" if hard == resource.RLIM_INFINITY else str(hard)
    return Finding("files", "found", f"{shown} open files a process", purpose)


def pipes(pages: int | None = None) -> Finding:
    """Pipe buffers that an unprivileged user may have (fs.pipe-user-pages-soft), in pages; 0 is no limit."""
    purpose = "splice(2) of TCP between guest and outside"
    if pages is None:
        pages = int(_read(Path("/proc/sys/fs/pipe-user-pages-soft")) or 0)
    if 0 < pages < _FEWEST_PAGES:
        remedy = "sudo sysctl -w fs.pipe-user-pages-soft=16384"
        return Finding("pipes", "degraded", f"{pages} pages of pipe buffers a user", purpose, remedy)
    return Finding("pipes", "found", f"{pages or 'no limit of'} pages of pipe buffers a user", purpose)


def qemu(path: str | None = None) -> Finding:
    """QEMU's system emulators on PATH, and the version of the first."""
    purpose = "what `vmnet run` starts"
    names: dict[str, str] = {}
    for directory in os.get_exec_path() if path is None else path.split(":"):
        with contextlib.suppress(OSError):
            for entry in sorted(os.listdir(directory or ".")):
                full = os.path.join(directory, entry)
                if entry.startswith("qemu-system-") and os.access(full, os.X_OK):
                    names.setdefault(entry, full)
    if not names:
        return Finding("qemu", "missing", "no qemu-system-* on the PATH", purpose, "sudo apt install qemu-system")
    native = f"qemu-system-{os.uname().machine}"
    first = native if native in names else min(names)
    said = _first_line([names[first], "--version"])
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Finding("qemu", "found", f"{first}{more}: {said}", purpose)


def untested(name: str, purpose: str) -> Finding:
    """What cannot be tried without a namespace."""
    return Finding(name, "untested", "not tried: it needs what is missing above", purpose)


def _try_rules(inside: Namespace, text: str) -> str | None:
    return _refused(inside, ["nft", "-f", "-"], text)


def _refused(inside: Namespace, argv: list[str], text: str) -> str | None:
    """The program's first words when it fails on `text`, else None."""
    try:
        done = inside.request("run", argv=argv, input=text).values
    except VmnetError as error:
        return error.message
    if done["status"] == 0:
        return None
    return next((line for line in done["stderr"].splitlines() if line.strip()), f"exit status {done['status']}")


def _mode(path: Path) -> str:
    try:
        return f"{stat.S_IMODE(path.stat().st_mode):04o}"
    except OSError as error:
        return f"unknown ({error.strerror})"


def _which(name: str, path: str) -> str | None:
    found = (os.path.join(directory, name) for directory in path.split(":"))
    return next((full for full in found if os.path.isfile(full) and os.access(full, os.X_OK)), None)


def _first_line(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no version ({error})"
    return next(iter((done.stdout or done.stderr).splitlines()), "no version")


def _version(text: str) -> tuple[int, ...]:
    match = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in match.group().split(".")) if match else (0,)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
