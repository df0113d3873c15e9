"""A real guest: a QEMU process, and a way to run commands in it.

QEMU is started with its serial console on its standard input and output, so that whatever starts it (`vmnet run`, a
change of user, a namespace) needs to pass nothing along. The guest's init (guest_init.sh) answers each line on
that console with the output and the exit status of the script in it, between marker lines. A thread reads the console
all the time, into a log that tells afterwards what the guest said.
"""

from __future__ import annotations

import base64
import contextlib
import re
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from lab.image import Image, image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BOOT_TIMEOUT = 60.0  # s; an emulated boot takes 2 to 3 s on an idle machine


class GuestError(AssertionError):
    """The guest did not do what the test needs; the console's last lines are in the message."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest printed (both streams), and its exit status."""

    out: str
    status: int


@dataclass(frozen=True)
class Lease:
    """What the guest's DHCP client was given; `seconds` from its start to its end, by the guest's own clock."""

    address: str
    prefix: int
    gateway: str
    dns: list[str]
    domain: str
    mtu: int | None
    lease_time: int
    server: str
    seconds: float
    options: dict[str, str] = field(repr=False)


def qemu(
    *network: str, memory: int = 192, cpu: str | None = None, append: str = "", boot: Image | None = None
) -> list[str]:
    """QEMU's command line for the guest image; `network` are the -netdev and -device arguments.

    TCG always: the figures of a run stay comparable, and nested or partial KVM does not boot every kernel.
    """
    built = boot or image()
    argv = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", str(memory)]
    argv += ["-cpu", cpu] if cpu else []
    argv += ["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]
    argv += ["-kernel", str(built.kernel), "-initrd", str(built.initrd)]
    argv += ["-append", f"console=ttyS0 quiet panic=-1 {append}".strip()]
    return [*argv, *network]


def virtio(netdev: str, device: str = "virtio-net-pci", **options: object) -> list[str]:
    """A netdev `net0` of the given type and options (`vmnet-shared,isolated=on`), and the NIC for it."""
    kind, _, rest = netdev.partition(",")
    middle = f",{rest}" if rest else ""
    extra = "".join(f",{name}={value}" for name, value in options.items())
    return ["-netdev", f"{kind},id=net0{middle}", "-device", f"{device},netdev=net0{extra}"]


class Guest:
    """One running guest; a context manager that kills it at the end."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        name: str = "guest",
        popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        self.name = name
        self.begun = time.monotonic()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the guest
        self.process = popen(
            list(argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
        )
        self._console = bytearray()
        self._news = threading.Condition()
        self._ended = False
        self._count = 0
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"console of {name}")
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_boot(self, timeout: float = BOOT_TIMEOUT) -> float:
        """Wait until the guest takes commands; the seconds since its start."""
        self._await(re.compile(rb"\x01ready\n"), timeout, "it did not boot")
        return time.monotonic() - self.begun

    def run(self, command: str, timeout: float = 30.0, *, check: bool = False) -> Result:
        """Run a shell script in the guest; `check` makes a status other than 0 a GuestError."""
        self._count += 1
        ident = b"%d" % self._count
        self._send(ident + b" " + base64.b64encode(command.encode()) + b"\n")
        frame = re.compile(rb"\x01begin %b\n(.*?)\n\x01end %b (\d+)\n" % (ident, ident), re.DOTALL)
        found = self._await(frame, timeout, f"no answer to: {command}")
        result = Result(found[1].decode(errors="replace"), int(found[2]))
        if check and result.status != 0:
            raise GuestError(f"{self.name}: {command!r} ended with {result.status}: {result.out}")
        return result

    def dhcp(self, interface: str = "eth0", *, hostname: str = "", options: str = "", timeout: float = 30.0) -> Lease:
        """Bring `interface` up by udhcpc; GuestError when no lease was got in 5 tries of a second each."""
        name = f"-x hostname:{hostname}" if hostname else ""
        script = f"""
            ip link set {interface} up
            for i in 1 2 3 4 5 6 7 8 9 10; do grep -q 1 /sys/class/net/{interface}/carrier && break; usleep 20000; done
            read begun rest </proc/uptime
            udhcpc -i {interface} -f -n -q -t 5 -T 1 -O 26 -O 119 -O 121 {name} {options} || exit
            read ended rest </proc/uptime
            cat /run/dhcp.{interface}; echo begun=$begun; echo ended=$ended"""
        found = self.run(script, timeout)
        values = dict(line.split("=", 1) for line in found.out.splitlines() if "=" in line)
        if found.status != 0 or "ip" not in values:
            raise GuestError(f"{self.name}: no DHCP lease on {interface}: {found.out}")
        return Lease(
            address=values["ip"],
            prefix=int(values["mask"]),
            gateway=values.get("router", "").split(" ")[0],
            dns=values.get("dns", "").split(),
            domain=values.get("domain", ""),
            mtu=int(values["mtu"]) if "mtu" in values else None,
            lease_time=int(values["lease"]),
            server=values["serverid"],
            seconds=round(float(values["ended"]) - float(values["begun"]), 2),
            options=values,
        )

    def kill(self) -> None:
        """End the QEMU process at once (SIGKILL), and wait for its end."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        if not self._errors.closed:
            self._last_errors = self._stderr()
            self._errors.close()

    def log(self) -> str:
        """All that QEMU and the guest's console said so far."""
        with self._news:
            said = self._console.decode(errors="replace")
        return f"{self._last_errors if self._errors.closed else self._stderr()}{said}"

    def stderr(self) -> str:
        """What QEMU, or what started it, wrote to its standard error."""
        return self._last_errors if self._errors.closed else self._stderr()

    def _stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError as error:
            raise GuestError(f"{self.name}: QEMU is gone ({error}): {self.log()[-2000:]}") from error

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := self.process.stdout.read1(65536):  # type: ignore[attr-defined]  # a pipe's BufferedReader
            with self._news:
                self._console += data
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _await(self, pattern: re.Pattern[bytes], timeout: float, otherwise: str) -> re.Match[bytes]:
        deadline = time.monotonic() + timeout
        with self._news:
            while (found := pattern.search(self._console)) is None:
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "QEMU ended" if self._ended else f"{timeout:.0f} s passed"
                    break
                self._news.wait(left)
            else:
                return found
        raise GuestError(f"{self.name}: {otherwise} ({why}); it said last: {self.log()[-2000:]}")
