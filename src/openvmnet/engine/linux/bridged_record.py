"""Which VMs are bridged: a record for each port, that is valid for as long as its VM lives.

A bridged VM has no process of ours that could be asked. So `vmnet run` writes a file for each port and locks it
(flock); the VM inherits the descriptor, and the lock with it. A record that nobody has locked is one of a VM that has
gone, however it went, and whoever looks removes it. Nothing depends on the records: the ports end without them.

    RUNTIME/.bridged/PID-INDEX.json
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet import state

if TYPE_CHECKING:
    from pathlib import Path


class BridgedPort(msgspec.Struct, frozen=True):
    """One port: `link` is its TAP in the bridge `ifname`, None where it is a macvtap on the NIC `ifname`."""

    vm: str
    netdev: str
    ifname: str
    how: Literal["bridge", "macvtap"]
    link: str | None
    mac: str
    isolated: bool
    pid: int


def write(port: BridgedPort, index: int) -> int:
    """Record a port; gives the descriptor that keeps the record valid."""
    path = _directory() / f"{port.pid}-{index}.json"
    # Locked before it has its name: nobody sees one that is not yet locked.
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.write(fd, state.encode(port))
        temporary.replace(path)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    return fd


def ports() -> list[BridgedPort]:
    """The ports of VMs that live; the records of others are removed."""
    found = []
    for path in sorted(_directory().glob("*.json")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            port = _look(path)
            if port is not None:
                found.append(port)
    return found


def _look(path: Path) -> BridgedPort | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return state.decode(os.read(fd, 1 << 16), BridgedPort)
    else:
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(fd)


def _directory() -> Path:
    path = state.runtime_root() / ".bridged"
    path.mkdir(mode=0o700, exist_ok=True)
    return path
