"""What a Mac has to show, and what it shows here is shown over the stand-in too.

    python -m tests.engine.darwin.real [--standin LIBRARY] [--guest DIRECTORY] [--outside URL] CHECK...

    packets   shared and host mode by the library: parameters, DHCP, ARP, ping of the gateway, the same MAC again
    ipxe      a QEMU guest's own firmware gets an address: no disk, no download
    guest     a Linux guest: its address, the gateway, a page of the outside (URL, http), iperf3 both ways; needs iperf3
              here, and in DIRECTORY a `kernel` and an `initrd` as `python -m lab.image` makes them on Linux

Each check prints what it found. Over the stand-in the bridge, the DHCP server and the outside are Linux's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import openvmnet
from lab.guest import Guest, qemu, virtio
from lab.image import Image
from openvmnet import engine
from openvmnet.engine.darwin import framework, launch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.contract.interface import Interface

ID = UUID("a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d")
PATIENCE = 120.0  # s
EVERYONE = "ff:ff:ff:ff:ff:ff"
_COMMAND = ["openvmnet"]  # the module that is `vmnet`, and its first words


def exchange(interface: Interface, request: bytes, fits: Callable[[bytes], object], seconds: float = 30.0) -> object:
    """Send `request`, again each second, until a frame comes for which `fits` gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        interface.write([request])
        again = time.monotonic() + 1.0
        while (left := again - time.monotonic()) > 0:
            if not interface.wait(left):
                break
            for frame in interface.read():
                if (found := fits(frame)) is not None:
                    return found
    raise AssertionError(f"no answer in {seconds:g} s")


def dhcp(interface: Interface, mac: str) -> tuple[str, str]:
    """The address that the DHCP server gives, and the router that it names; itself where that leads nowhere."""
    from scapy.layers.dhcp import BOOTP, DHCP
    from scapy.layers.inet import IP, UDP
    from scapy.layers.l2 import Ether
    from scapy.utils import mac2str

    def message(*options: object) -> bytes:
        head = Ether(src=mac, dst=EVERYONE) / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
        return bytes(head / BOOTP(chaddr=mac2str(mac), xid=7, flags=0x8000) / DHCP(options=[*options, "end"]))

    def answer(kind: int, frame: bytes) -> tuple[str, dict] | None:
        packet = Ether(frame)
        if DHCP not in packet or packet[BOOTP].xid != 7:
            return None
        options = {option[0]: option[1] for option in packet[DHCP].options if isinstance(option, tuple)}
        return (packet[BOOTP].yiaddr, options) if options.get("message-type") == kind else None

    ask = ("param_req_list", [1, 3, 6])
    offered, options = exchange(interface, message(("message-type", 1), ask), functools.partial(answer, 2))
    wanted = (("message-type", 3), ("requested_addr", offered), ("server_id", options["server_id"]), ask)
    address, options = exchange(interface, message(*wanted), functools.partial(answer, 5))
    return address, options.get("router", options["server_id"])


def arp(interface: Interface, mac: str, own: str, gateway: str) -> str:
    """The gateway's MAC."""
    from scapy.layers.l2 import ARP, Ether

    request = bytes(Ether(src=mac, dst=EVERYONE) / ARP(hwsrc=mac, psrc=own, pdst=gateway))

    def answer(frame: bytes) -> str | None:
        packet = Ether(frame)
        return packet[ARP].hwsrc if ARP in packet and packet[ARP].op == 2 and packet[ARP].psrc == gateway else None

    return exchange(interface, request, answer)


def ping(interface: Interface, mac: str, own: str, gateway: str, through: str) -> None:
    """An echo of the gateway's."""
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.l2 import Ether

    request = bytes(Ether(src=mac, dst=through) / IP(src=own, dst=gateway) / ICMP(id=9, seq=1) / b"echo")

    def answer(frame: bytes) -> bool | None:
        packet = Ether(frame)
        return True if ICMP in packet and packet[ICMP].type == 0 and packet[IP].src == gateway else None

    exchange(interface, request, answer)


def packets() -> None:
    for options in (openvmnet.Shared(), openvmnet.Host()):
        macs = []
        for _ in range(2):
            with openvmnet.start(options, interface_id=ID) as interface:
                parameters = interface.parameters
                assert parameters.max_packet_size >= 1514
                assert parameters.mac_address is not None
                macs.append(parameters.mac_address)
                address, router = dhcp(interface, parameters.mac_address)
                gateway = parameters.start_address or router
                through = arp(interface, parameters.mac_address, address, gateway)
                ping(interface, parameters.mac_address, address, gateway, through)
        assert macs[0] == macs[1], macs
        print(f"{options.type}: {address} from {gateway} at {through}, MAC {macs[0]} both times", flush=True)


def vmnet(*words: str) -> list[str]:
    """The command line of `vmnet`, over the stand-in where this is."""
    return [sys.executable, "-m", *_COMMAND, *words]


def ipxe() -> None:
    argv = vmnet("run", "--", "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-nodefaults", "-nographic")
    argv += ["-serial", "stdio", "-boot", "n", "-netdev", "vmnet-shared,id=net0"]
    argv += ["-device", "virtio-net-pci,netdev=net0"]
    found = read_until(argv, re.compile(r"net0: (192\.168\.\d+\.\d+)/[\d.]+ gw ([\d.]+)"))
    print(f"iPXE: {found[1]}, gateway {found[2]}", flush=True)


@contextlib.contextmanager
def limit(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    """Kill what says nothing for so long that a read of its words would not end."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_until(argv: list[str], pattern: re.Pattern[str]) -> re.Match[str]:
    """What a guest's console says, until it says this; then the guest is ended."""
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        said = ""
        try:
            with limit(process, PATIENCE):
                while octet := process.stdout.read(1):
                    said += octet
                    if octet in "\n " and (found := pattern.search(said)):
                        return found
        finally:
            process.kill()
    raise AssertionError(f"not on the console: {pattern.pattern}\n{said[-3000:]}")


def guest(directory: Path, outside: str) -> None:
    iperf3 = shutil.which("iperf3")
    assert iperf3 is not None, "needs iperf3"
    boot = Image(directory / "kernel", directory / "initrd")
    server = None
    with Guest(vmnet("run", "--", *qemu(*virtio("vmnet-shared"), boot=boot)), name="guest") as one:
        one.wait_boot(PATIENCE)
        try:
            lease = one.dhcp()
            one.run(f"ping -c 3 -W 2 {lease.gateway}", check=True)
            if outside:
                one.run(f"wget -q -T 20 -O /tmp/page {outside} && test -s /tmp/page", 60, check=True)
            server = subprocess.Popen([iperf3, "-s", "-B", lease.gateway], stdout=subprocess.DEVNULL)
            time.sleep(1)
            for direction in ("up", "-R"):
                said = one.run(f"iperf3 -c {lease.gateway} -t 5 -f m {direction.strip('up')}", 60, check=True).out
                rate = re.findall(r"([\d.]+) Mbits/sec.*receiver", said)
                print(f"guest {lease.address}, iperf3 {direction}: {' '.join(rate)} Mbit/s", flush=True)
        finally:
            if server is not None:
                server.kill()
                server.wait()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--standin", default="")
    parser.add_argument("--guest", type=Path)
    parser.add_argument("--outside", default="")
    parser.add_argument("checks", nargs="+", choices=["packets", "ipxe", "guest"])
    options = parser.parse_args(argv)
    library = options.standin
    if library:
        _COMMAND[:] = ["tests.engine.darwin.on_standin", library]
        engine.DARWIN = True
        framework.load = functools.cache(lambda: framework.Framework(library))
        launch._MODULE = ("-m", "tests.engine.darwin.on_standin", library, "relay")
    for check in options.checks:
        if check == "guest":
            guest(options.guest, options.outside)
        else:
            {"packets": packets, "ipxe": ipxe}[check]()


if __name__ == "__main__":
    main(sys.argv[1:])
