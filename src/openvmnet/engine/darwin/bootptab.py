"""DHCP reservations of a Mac: lines of /etc/bootptab, which bootpd(8) reads.

    %%
    # name                 hwtype  hwaddr             ipaddr         bootfile
    openvmnet-525400123456 1       52:54:00:12:34:56  192.168.64.50

How it works. Everything up to the line `%%` is the head. Whoever else keeps lines there keeps them: ours are known by
their names. Only root writes the file, and a relay gives root's rights up as soon as its interface is up, so most of
our lines outlive their VM. Whether one is still somebody's is told by a lock: who has a line holds an flock(2) on a
file of the MAC's, taken as root, kept without, and over with the process, however that ends. Whoever writes next
leaves out our lines that nobody holds. A line that is left over meanwhile does no harm but that its address waits for
its MAC.

Writers take turns by a lock on bootptab itself, and replace it in one step. From macOS 26 on there are reservations of
a network object too (`network26`), which is one process's, so that VMs with a relay each cannot share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from openvmnet.engine.darwin.network26 import Reservation
from openvmnet.errors import Conflict, HostError, MissingFeature, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

PATH = Path("/etc/bootptab")
HOLDERS = Path("/var/run/openvmnet-reservations")
_MARK = "%%"
_PREFIX = "openvmnet-"
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_FIELDS = 4


def parse(text: str) -> list[Reservation]:
    """The reservations of the file, whoever's they are; lines that are none are left out."""
    _, mark, body = text.partition(f"{_MARK}\n")
    found = (_reservation(line) for line in (body if mark else "").splitlines())
    return [each for each in found if each is not None]


def merge(text: str, reservations: Iterable[Reservation], held: Callable[[str], bool]) -> str:
    """The file's text with lines for `reservations`; ours stay whose MAC is `held`, everybody else's in any case.

    Raises OptionError for a MAC that is none, Conflict for an address or a MAC that a line that stays has.
    """
    head, mark, body = text.partition(f"{_MARK}\n")
    wanted = [Reservation(_checked(each.mac), each.address) for each in reservations]
    own = {each.mac for each in wanted}
    kept = [line for line in body.splitlines() if _stays(line, own, held)] if mark else []
    others = parse(f"{_MARK}\n" + "\n".join(kept))
    lines = []
    for each in wanted:
        if each in others:  # somebody else's line says the same
            continue
        for other in others:
            if each.address == other.address or each.mac == other.mac:
                raise Conflict(
                    f"address={each.address} for {each.mac}: {PATH} keeps {other.address} for {other.mac} already",
                    hint=f"give another address, or take that line out of {PATH}",
                )
        others.append(each)
        lines.append(f"{_PREFIX}{each.mac.replace(':', '')} 1 {each.mac} {each.address}")
    return "\n".join([*([head.rstrip("\n")] if head.strip() and mark else []), _MARK, *kept, *lines, ""])


class Hold:
    """A line of ours, made at once; ours until `release`, or until the process ends. Only root can make one.

    Raises OptionError and Conflict as `merge`, Conflict for a MAC that somebody holds, MissingFeature without root's
    rights, HostError where the file cannot be written.
    """

    def __init__(self, reservation: Reservation, path: Path | None = None, holders: Path | None = None) -> None:
        self.path, self.holders = path or PATH, holders or HOLDERS
        self._fd: int | None = None
        mac = _checked(reservation.mac)
        try:
            with _alone_with(self.path):
                self.holders.mkdir(mode=0o755, parents=True, exist_ok=True)
                self._fd = _take(self.holders / mac.replace(":", ""))
                if self._fd is None:
                    raise Conflict(f"a VM with {mac} runs already, and has an address kept for it")
                self._write([reservation])
        except PermissionError as error:
            self._let_go()
            raise MissingFeature(
                f"{self.path} is root's to write: an address is kept for a VM by a line in it"
            ) from error
        except OSError as error:
            self._let_go()
            raise HostError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self._let_go()
            raise

    def release(self) -> None:
        """It is nobody's any more; the line goes, where this process may still write, else with the next writer."""
        if self._fd is None:
            return
        self._let_go()
        with contextlib.suppress(OSError), _alone_with(self.path):
            self._write([])

    def forked(self) -> None:
        """In the child of a fork: it is the parent's."""
        self._let_go()

    def _let_go(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _write(self, reservations: list[Reservation]) -> None:
        """Alone with the file: have these lines in it, and none of ours that nobody holds."""
        text = self.path.read_text("utf-8", "surrogateescape")  # others' lines stay, whatever is in them
        merged = merge(text, reservations, lambda mac: _is_held(self.holders / mac.replace(":", "")))
        for file_ in self.holders.iterdir():
            if not _is_held(file_):
                file_.unlink()
        # Last: who opens the new file is alone with that one, and may have made, not yet locked, what holds its MAC.
        if merged != text:
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".bootptab-")
            with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(merged)
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Hold the lock on the file that is at `path`, made if missing: who replaces a file leaves its lock behind."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _is_at(path, fd):
                yield
                return
        finally:
            os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _take(path: Path) -> int | None:
    """The descriptor that holds `path`; None where another does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    fd = _take(path)
    if fd is not None:
        os.close(fd)
    return fd is None


def _reservation(line: str) -> Reservation | None:
    fields = line.split()
    if len(fields) < _FIELDS or fields[0].startswith("#"):
        return None
    try:
        return Reservation(fields[2].lower(), IPv4Address(fields[3]))
    except AddressValueError:
        return None


def _stays(line: str, own: set[str], held: Callable[[str], bool]) -> bool:
    if not line.startswith(_PREFIX):
        return True
    reservation = _reservation(line)
    known = reservation is not None and _MAC.fullmatch(reservation.mac) is not None
    return reservation is not None and known and reservation.mac not in own and held(reservation.mac)


def _checked(mac: str) -> str:
    mac = mac.lower()
    if not _MAC.fullmatch(mac):
        raise OptionError(f"a MAC is six bytes such as 52:54:00:12:34:56, not '{mac}'", option="mac", value=mac)
    return mac
