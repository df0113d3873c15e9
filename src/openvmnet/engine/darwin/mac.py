"""What this Mac says of itself: files, commands, ids. Everything else asks here, so that tests can ask another Mac."""

from __future__ import annotations

import ctypes
import functools
import os
import plistlib
import re
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import msgspec

from openvmnet.engine.darwin.library import system_version, version_of

_SYSTEM = "/usr/lib/libSystem.B.dylib"
_LONGEST_PATH = 4096  # PROC_PIDPATHINFO_MAXSIZE
_TIMEOUT = 5.0  # s; each of these commands takes milliseconds
_BEFORE_11, _BEFORE_26, _AFTER = (10, 16), (16,), (26,)  # no macOS has a version between the last two
_HEADER = re.compile(r"^(\S+?): flags=", re.MULTILINE)
_INET = re.compile(r"^\s+inet (\S+) (?:--> \S+ )?netmask 0x([0-9a-f]{8})", re.MULTILINE)
_MEMBER = re.compile(r"^\s+member: (\S+)", re.MULTILINE)


class Link(msgspec.Struct, frozen=True):
    """A network interface of the host: its IPv4 addresses, and a bridge's members."""

    name: str
    networks: tuple[tuple[IPv4Address, IPv4Network], ...] = ()
    members: tuple[str, ...] = ()

    @property
    def bridge(self) -> bool:
        """Whether it is one of vmnet's (or Internet Sharing's) bridges: bridge100 and up."""
        return self.name.startswith("bridge1") and len(self.name) > len("bridge1")

    @property
    def tunnel(self) -> bool:
        """Whether it is a VPN's."""
        return self.name.startswith(("utun", "ipsec", "ppp", "tun"))


class Mac:
    """This Mac. `run` and `read` are the only doors to it."""

    def run(self, *argv: str) -> str:
        """A command's output, both streams; '' where it is not there or fails."""
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT, check=False, errors="replace")
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout + done.stderr

    def read(self, path: str) -> bytes | None:
        """A file's content; None where it is not there, or not to be read."""
        try:
            return Path(path).read_bytes()
        except OSError:
            return None

    @functools.cached_property
    def version(self) -> tuple[int, ...]:
        """The macOS version, (15, 6, 1). Only for choosing a remedy, never for what exists.

        A Python that was built with an older SDK is told 16 on macOS 26, and 10.16 from 11 on; sw_vers(1) is not.
        """
        told = system_version()
        if told[:2] != _BEFORE_11 and not _BEFORE_26 <= told < _AFTER:
            return told
        said = self.run("/usr/bin/env", "SYSTEM_VERSION_COMPAT=0", "/usr/bin/sw_vers", "-productVersion")
        return version_of(said) or told

    @property
    def root(self) -> bool:
        """Whether this process is root's."""
        return os.geteuid() == 0

    @property
    def program(self) -> str:
        """The file that this process runs, as the kernel has it: of a launcher, what it launched."""
        try:
            name = ctypes.CDLL(_SYSTEM).proc_pidpath
        except (OSError, AttributeError):
            return sys.executable
        room = ctypes.create_string_buffer(_LONGEST_PATH)
        length = name(os.getpid(), room, len(room))
        return os.fsdecode(room.value) if length > 0 else sys.executable

    def plist(self, path: str) -> dict[str, Any]:
        """A property list; {} where there is none."""
        content = self.read(path)
        if content is None:
            return {}
        try:
            value = plistlib.loads(content)
        except Exception:  # noqa: BLE001 - plistlib raises whatever its parsers do
            return {}
        return value if isinstance(value, dict) else {}

    def links(self) -> list[Link]:
        """The host's network interfaces, as ifconfig(8) prints them."""
        text = self.run("/sbin/ifconfig", "-a")
        starts = list(_HEADER.finditer(text))
        found = []
        for at, match in enumerate(starts):
            end = starts[at + 1].start() if at + 1 < len(starts) else len(text)
            part = text[match.end() : end]
            networks = []
            for address, mask in _INET.findall(part):
                length = int(mask, 16).bit_count()
                try:
                    networks.append((IPv4Address(address), IPv4Network(f"{address}/{length}", strict=False)))
                except ValueError:
                    continue
            found.append(Link(match[1], tuple(networks), tuple(_MEMBER.findall(part))))
        return found
