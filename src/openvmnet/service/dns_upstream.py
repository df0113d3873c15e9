"""The host's own resolvers: which they are, and which of them answer.

resolv.conf(5) is looked at with one stat(2), at most once a second and only when a guest asks; it is read again when it
is another file or has changed. A file that was written within the last two seconds is read once more even so: its time
stamp is no finer than a tick of the kernel's clock, and a program that truncates and writes could be met in between.
systemd-resolved's 127.0.0.53 is a resolver like any other, because the queries leave from the host's network namespace.

A server that let a query time out, and has answered nothing else since it was asked, is *quiet*: for QUIET seconds it
is asked last. Then the next query goes to it and to the first healthy one at once, so that finding out whether it has
come back delays nobody. A server that refuses (ICMP port unreachable, no route) is known at once and needs no memory.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

log = logging.getLogger(__name__)

QUIET = 10.0  # s
_MAX_SERVERS = 8
_MAX_FILE = 65536  # octets
_UNSETTLED = 2.0  # s
_EVERY = 1.0  # s


class Server:
    """One resolver; `sockaddr` is for connect(). Times are the event loop's clock, in seconds."""

    __slots__ = ("answered", "family", "probing", "quiet_until", "sockaddr", "text")

    def __init__(self, text: str, port: int) -> None:
        self.text = text
        address = ip_address(text)
        if isinstance(address, IPv6Address):
            self.family = socket.AF_INET6
            scope = _scope(address.scope_id) if address.scope_id else 0
            self.sockaddr: tuple[str, int] | tuple[str, int, int, int] = (text.partition("%")[0], port, 0, scope)
        else:
            self.family = socket.AF_INET
            self.sockaddr = (text, port)
        self.answered = 0.0
        self.quiet_until = 0.0
        self.probing = False

    def heard(self, now: float) -> None:
        """It has answered."""
        self.answered = now
        self.probing = False
        if self.quiet_until:
            self.quiet_until = 0.0
            log.info("name server %s answers again", self.text)

    def silent(self, asked: float, now: float) -> None:
        """A query sent at `asked` has timed out."""
        if self.answered >= asked:
            return
        if not self.quiet_until:
            log.warning("name server %s does not answer", self.text)
        self.quiet_until = now + QUIET
        self.probing = False


class Resolvers:
    """The servers of the resolv.conf at `path`, in its order; `generation` changes when they do."""

    def __init__(self, path: Path, port: int = 53) -> None:
        self.servers: list[Server] = []
        self.generation = 0
        self._path = path
        self._port = port
        self._seen: tuple[int, ...] | None = ()
        self._settled = False
        self._next_look = 0.0

    def check(self, now: float) -> bool:
        """Look whether the file has changed (at most once a second); whether the servers did."""
        if now < self._next_look:
            return False
        self._next_look = now + _EVERY
        try:
            stat = os.stat(self._path)
            seen: tuple[int, ...] | None = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError:
            stat, seen = None, None
        if seen == self._seen and self._settled:
            return False
        self._seen = seen
        self._settled = stat is None or not -_UNSETTLED < time.time() - stat.st_mtime < _UNSETTLED
        addresses = parse_resolv_conf(self._read()) if stat is not None else []
        if addresses == [server.text for server in self.servers] and self.generation:
            return False
        known = {server.text: server for server in self.servers}
        self.servers = [known.get(text) or Server(text, self._port) for text in addresses]
        self.generation += 1
        log.info("the host's name servers: %s", ", ".join(addresses) or f"none in {self._path}")
        return True

    def ranked(self) -> list[Server]:
        """The servers, best first."""
        return sorted(self.servers, key=lambda server: server.quiet_until > 0)

    def order(self, now: float) -> tuple[list[Server], bool]:
        """The servers to ask, best first, and whether to ask the first two at once, since the first one is on trial."""
        well: list[Server] = []
        quiet: list[Server] = []
        probe: Server | None = None
        for server in self.servers:
            if not server.quiet_until:
                well.append(server)
            elif server.quiet_until <= now and not server.probing and probe is None:
                probe = server
            else:
                quiet.append(server)
        if probe is None:
            return well + quiet, False
        probe.probing = True
        return [probe, *well, *quiet], True

    def _read(self) -> str:
        try:
            with self._path.open("rb") as file:
                return file.read(_MAX_FILE).decode("utf-8", "replace")
        except OSError as error:
            log.warning("%s cannot be read: %s", self._path, error.strerror)
            return ""


def parse_resolv_conf(text: str) -> list[str]:
    """The addresses of its `nameserver` lines, each once, the first eight; what is no address is skipped.

    Unlike a C library, no `nameserver` line does not mean 127.0.0.1 (resolv.conf(5)): on a host without resolvers a
    guest is told at once that there are none.
    """
    return _addresses(line.split() for line in text.splitlines())


def _addresses(lines: Iterable[list[str]]) -> list[str]:
    out: list[str] = []
    for words in lines:
        if len(words) < 2 or words[0] != "nameserver":
            continue
        try:
            ip_address(words[1])
        except ValueError:
            continue
        if words[1] not in out and len(out) < _MAX_SERVERS:
            out.append(words[1])
    return out


def _scope(name: str) -> int:
    try:
        return int(name) if name.isdigit() else socket.if_nametoindex(name)
    except OSError:
        return 0  # the interface is gone: connect(2) will say so
