"""A network namespace of the lab: commands and sockets in it, links between two of them."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

_CLONE_NEWNET = 0x40000000


class Namespace:
    """A named network namespace with its loopback up. Offloads are the kernel's defaults."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path("/run/netns") / name
        _ip("netns", "add", name)
        self.batch("link set lo up")
        # Absent in a kernel without br_netfilter; where it is loaded, bridged packets would meet iptables (bridge-nf).
        for table in ("iptables", "ip6tables", "arptables"):
            self.sysctl(f"net.bridge.bridge-nf-call-{table}", 0, missing_ok=True)

    @classmethod
    def adopt(cls, name: str, pid: int) -> Self:
        """The network namespace that process `pid` lives in, under a name; nothing in it is changed."""
        _ip("netns", "attach", name, str(pid))
        adopted = cls.__new__(cls)
        adopted.name, adopted.path = name, Path("/run/netns") / name
        return adopted

    def argv(self, command: list[str]) -> list[str]:
        """The command line that runs `command` in here; it becomes the command, by exec, without a fork between."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def popen(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - Popen's own
        """Start `command` in here."""
        return subprocess.Popen(self.argv(command), **options)

    def run(
        self,
        command: list[str],
        *,
        check: bool = True,
        **options: Any,  # noqa: ANN401 - passed on to subprocess.run
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in here, output captured as text; an error's message holds what it said."""
        options = {"timeout": 60, "text": True, "stdin": subprocess.DEVNULL} | options
        if "input" in options:
            del options["stdin"]
        done = subprocess.run(self.argv(command), capture_output=True, check=False, **options)
        if check and done.returncode != 0:
            raise RuntimeError(f"in {self.name}, {command} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done

    def batch(self, *lines: str) -> None:
        """Run ip(8) commands in here: `batch("addr add 192.0.2.1/24 dev eth0", "link set eth0 up")`."""
        _ip("-n", self.name, "-batch", "-", given="\n".join(lines) + "\n")

    def sysctl(self, name: str, value: object, *, missing_ok: bool = False) -> None:
        """Set net.* sysctl `name` in here, in a thread that joins the namespace and ends."""
        path = Path("/proc/sys") / name.replace(".", "/")

        def write() -> None:
            try:
                path.write_text(str(value))
            except FileNotFoundError:
                if not missing_ok:
                    raise

        self._inside(write)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        """A socket that lives in here: a socket keeps the namespace it was made in."""
        made: list[socket.socket] = []
        self._inside(lambda: made.append(socket.socket(family, kind, protocol)))
        return made[0]

    def remove(self) -> None:
        """Delete the name; the namespace goes with its last process, socket and link."""
        _ip("netns", "del", self.name)

    def _inside(self, action: Callable[[], object]) -> None:
        failure: list[BaseException] = []

        def enter() -> None:
            try:
                libc = ctypes.CDLL(None, use_errno=True)  # os.setns() is new in Python 3.12
                with self.path.open() as file:
                    if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
                        raise OSError(ctypes.get_errno(), f"setns: {self.path}")
                action()
            except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
                failure.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]


def link(one: Namespace, one_name: str, other: Namespace, other_name: str, *, mtu: int = 1500) -> None:
    """A veth pair between two namespaces, both ends up."""
    _ip("-n", one.name, "link", "add", one_name, "mtu", str(mtu), "type", "veth", "peer", "name", other_name, "mtu",
        str(mtu), "netns", other.name)  # fmt: skip
    one.batch(f"link set {one_name} up")
    other.batch(f"link set {other_name} up")


def _ip(*words: str, given: str | None = None) -> None:
    done = subprocess.run(["ip", *words], input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()} {given or ''}")


def mounted() -> list[str]:
    """Names under which network namespaces are kept alive by a mount."""
    return sorted(os.listdir("/run/netns")) if Path("/run/netns").is_dir() else []
