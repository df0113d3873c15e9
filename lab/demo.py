"""The demo: a real guest on vmnet-shared, told as a story. Runs in the lab; `scripts/demo` takes care of that.

Two guests on a `vmnet` network and one on QEMU's own `-netdev user` boot at once. Every line of the story is measured
or read from the running guests; a step that fails ends the demo with exit status 1 and what the guest said last.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

from lab.guest import Guest, GuestError, qemu, virtio
from lab.world import IPERF_PORTS, PAGE, SERVER, WEB, WEB6, World

_ROUNDS, _SECONDS = 3, 2  # throughput: rounds of both networks in turn, seconds each way


class Failure(Exception):
    """A step did not come out as it has to; the message says how."""


def main() -> int:
    """Run the demo; its exit status."""
    begun = time.monotonic()
    try:
        with World() as world:
            _who(world)
            _story(world)
    except (Failure, GuestError, RuntimeError) as error:
        print(f"\n  FAILED  {error}", flush=True)
        return 1
    print(f"\nAll of it took {time.monotonic() - begun:.0f} s.")
    return 0


def _story(world: World) -> None:
    shared = qemu(*virtio("vmnet-shared"))
    command = ["vmnet", "run", "--linger", "1", "--"]
    _heading("Boot: an unmodified Linux kernel under QEMU, started by one command")
    print(f"  $ {_short(command + shared)}", flush=True)
    with world.guest([*command, *shared, "-name", "red"], name="red") as red:
        _step("exec", f"the command became QEMU after {_until_qemu(red):.2f} s, the network's start included")
        with (
            world.guest([*command, *shared, "-name", "blue"], name="blue") as blue,
            world.guest(qemu(*virtio("user")), name="user") as user,
        ):
            _step("exec", f"a second one joined the network after {_until_qemu(blue):.2f} s")
            _progress("two guests boot, and a third on QEMU's -netdev user to compare with; about 5 s")
            _step("boot", f"{red.wait_boot():.1f} s on an emulated CPU")
            _rights(world, red)
            for other in (blue, user):
                other.wait_boot()
            _services(red, blue)
            _outside(red)
            user.dhcp()
            _throughput(red, user)
            _views(world)
    _heading("Afterwards")
    _nothing_left(world)


def _who(world: World) -> None:
    _heading("Who runs this, and where")
    root = os.environ.get("OPENVMNET_LAB_UID") == "0"
    said = world.product_run(["sh", "-c", "id -u; grep CapEff /proc/self/status"]).stdout.split()
    if said[0] == "0" or int(said[2], 16) != 0:
        raise Failure(f"the product would run as uid {said[0]} with capabilities {said[2]}")
    start = "root started this; " if root else ""
    _step("user", f"{start}vmnet and QEMU run as uid {said[0]} with no capability at all")
    _step("world", "network namespaces of the demo's own: a host, a router, an internet with web, DNS and iperf3")


def _rights(world: World, guest: Guest) -> None:
    uids = {}
    for process in world.leftovers():
        fields = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"^Uid:\t(\d+)", fields, re.MULTILINE)
        uids[process.pid] = found[1] if found else "?"
    if "0" in uids.values() and os.environ.get("OPENVMNET_LAB_UID") == "0":
        raise Failure(f"a process of the product's runs as root: {uids}")
    if guest.process.pid not in uids:
        raise Failure(f"QEMU is not process {guest.process.pid}")
    _step("rights", f"{len(uids)} processes (network, agent, 3 QEMU), none of them root's")


def _services(red: Guest, blue: Guest) -> None:
    _heading("The network's services")
    lease = red.dhcp(hostname="red")
    blue.dhcp(hostname="blue")
    _step("address", f"{lease.address}/{lease.prefix} from {lease.server} by DHCP in {lease.seconds:.2f} s")
    answer = red.run("nslookup -type=a www.example.test", check=True).out
    if WEB not in answer:
        raise Failure(f"www.example.test is not {WEB}: {answer}")
    _step("name", f"www.example.test is {WEB}, says {lease.dns[0]}")
    out = red.run("ping -c 3 -A blue.vmnet.internal", check=True).out
    _step("neighbour", f"blue.vmnet.internal answers through the kernel's bridge in {_rtt(out)}")


def _outside(red: Guest) -> None:
    _heading("The outside")
    page = red.run("wget -qO- http://www.example.test/", check=True).out
    if page != PAGE:
        raise Failure(f"another page came: {page}")
    _step("page", f"http://www.example.test/ fetched, {len(page)} octets")
    out = red.run(f"ping -c 3 -A {SERVER}", check=True).out
    _step("ping", f"{SERVER} answers in {_rtt(out)}")
    out = red.run(f"traceroute -n -q 1 -w 2 -m 4 {SERVER}").out
    hops = re.findall(r"^ *\d+  (\S+)", out, re.MULTILINE)
    if not hops or hops[0] != "192.168.64.1":
        raise Failure(f"traceroute's first hop is not the gateway: {out}")
    _step("path", f"traceroute: {' - '.join(hops)}")
    refused = red.run(f"nc -w 3 {SERVER} 81 </dev/null; echo status $?").out
    if "status 1" not in refused:
        raise Failure(f"a closed port was not refused: {refused}")
    _step("closed port", "refused, as on the host")
    own = _own_address(red)
    page = red.run(f"wget -qO- http://[{WEB6}]/", check=True).out
    if page != PAGE:
        raise Failure(f"another page came over IPv6: {page}")
    _step("IPv6", f"http://[{WEB6}]/ fetched by {own}, the guest's own choice in our prefix")


def _own_address(guest: Guest) -> str:
    """The IPv6 address that the guest's kernel has made of the router advertisement, once it may be used (RFC 4862)."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        told = guest.run("ip -6 addr show dev eth0 scope global").out
        found = re.search(r"inet6 (fd[0-9a-f:]+)/", told)
        if found and "tentative" not in told:
            return found[1]
        time.sleep(0.2)
    raise Failure(f"the guest has no IPv6 address: {told}")


def _throughput(ours: Guest, user: Guest) -> None:
    _heading("Throughput of one TCP stream, beside QEMU's -netdev user in the same run")
    _progress(f"{_ROUNDS} rounds, both networks in turn; about {_ROUNDS * 4 * _SECONDS + 4} s")
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for direction in ("", "-R"):
            for guest, port in ((ours, IPERF_PORTS[0]), (user, IPERF_PORTS[1])):
                rates.setdefault((guest.name, direction), []).append(_iperf(guest, port, direction))
    print(f"  {'':12}{'vmnet-shared':>16}{'-netdev user':>16}{'ratio':>8}")
    for label, direction in (("upload", ""), ("download", "-R")):
        mine = statistics.median(rates[ours.name, direction])
        theirs = statistics.median(rates[user.name, direction])
        print(f"  {label:12}{mine:>9.2f} Gbit/s{theirs:>9.2f} Gbit/s{mine / theirs:>7.1f}x", flush=True)


def _iperf(guest: Guest, port: int, direction: str) -> float:
    command = f"iperf3 -c {SERVER} -p {port} -t {_SECONDS} -i 0 --json {direction}"
    result = guest.run(command, timeout=60)
    try:
        return float(json.loads(result.out)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError) as error:
        raise Failure(f"{guest.name}: {command} gave no figure: {result.out[-500:]}") from error


def _views(world: World) -> None:
    _heading("What vmnet knows")
    for command in (["vmnet", "ls"], ["vmnet", "show", "shared"]):
        print(f"  $ {' '.join(command)}")
        for line in world.product_run(command, env={"COLUMNS": "116"}).stdout.splitlines():
            print(f"  {line}".rstrip(), flush=True)


def _nothing_left(world: World) -> None:
    _progress("the guests are killed; the network ends a second after its last guest (--linger 1)")
    begun = time.monotonic()
    if not world.wait_gone(20):
        raise Failure(f"still there: {world.leftovers()}")
    seconds = time.monotonic() - begun
    files = [name for name in world.files() if not name.endswith(".lock")]
    if files:
        raise Failure(f"files left in the runtime directory: {files}")
    _step(
        "left behind", f"after {seconds:.1f} s: 0 processes, {world.network_namespaces()} network namespaces, 0 sockets"
    )


def _until_qemu(guest: Guest) -> float:
    """Seconds from the command's start until its process is QEMU."""
    program = Path(f"/proc/{guest.process.pid}/exe")
    while not _is_qemu(program):
        if guest.process.poll() is not None or time.monotonic() - guest.begun > 20:
            raise Failure(f"{guest.name} never became QEMU: {guest.stderr()}")
        time.sleep(0.001)
    return time.monotonic() - guest.begun


def _is_qemu(program: Path) -> bool:
    try:
        return "qemu-system" in os.readlink(program)
    except FileNotFoundError:  # it has ended
        return False


def _rtt(out: str) -> str:
    found = re.search(r"= ([\d.]+)/([\d.]+)/([\d.]+) ms", out)
    if found is None:
        raise Failure(f"no answer: {out}")
    return f"{found[2]} ms ({found[1]} at best)"


def _short(command: list[str]) -> str:
    """The command line as a person would type it: long paths by their last part."""
    words = [word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in command]
    return "\n      ".join(_wrapped([shlex.quote(word) for word in words]))


def _wrapped(words: list[str]) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 108:
            lines[-1] += " \\"
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".lstrip()
    return lines


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _step(what: str, text: str) -> None:
    print(f"  ok  {what:12} {text}", flush=True)


def _progress(text: str) -> None:
    print(f"  ..  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
