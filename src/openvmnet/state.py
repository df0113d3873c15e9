"""Where things lie: one runtime directory and one state directory per network, each of the user alone.

    RUNTIME/NAME/control.sock   the network process listens here
    RUNTIME/NAME/agent.sock     the agent listens here, for a network process that takes over from a dead one
    RUNTIME/.lock               held (flock) while a network is started, joined or ended
    RUNTIME/NAME/network.json   what the running network is: enough to take it over
    STATE/NAME/network.json     the addresses chosen for the name, remembered
    STATE/NAME/leases.json      DHCP's memory
    STATE/NAME/log              the network process's own words

RUNTIME is $XDG_RUNTIME_DIR/openvmnet; where there is none, or another user's as after su(1), /run/openvmnet for root
(macOS: /var/run/openvmnet) and /tmp/openvmnet-UID for others.
STATE is $XDG_STATE_HOME/openvmnet, else /var/lib/openvmnet for root and ~/.local/state/openvmnet for others.
A directory that belongs to somebody else, or that others may write to, is refused: /tmp is everybody's.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

from openvmnet.errors import HostError, OptionError

_T = TypeVar("_T")
_SUN_PATH = 107  # octets, unix(7), without the zero at the end
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")


def check_name(name: str) -> str:
    """A network's name: 1 to 32 letters, digits, `.`, `_`, `-`; it becomes a directory and a label in messages."""
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"'{name}' is not a network name: 1 to 32 letters, digits, '.', '_', '-', a letter or digit first",
            option="name",
            value=name,
        )
    return name


def runtime_root() -> Path:
    """The directory of all running networks, made 0700 if missing."""
    base, uid = os.environ.get("XDG_RUNTIME_DIR"), os.getuid()
    if base and os.access(base, os.W_OK) and os.stat(base).st_uid == uid:
        return _private(Path(base) / "openvmnet")
    if uid == 0:  # a Mac has no /run, and its root directory is read-only
        return _private(Path("/var/run/openvmnet" if sys.platform == "darwin" else "/run/openvmnet"))
    return _private(Path(f"/tmp/openvmnet-{uid}"))  # noqa: S108 - _private() refuses another owner's


def sudoer_root() -> Path | None:
    """The directory of the running networks of the user behind sudo(8); None for who is not root by it, or has none."""
    uid = os.environ.get("SUDO_UID", "")
    path = Path(f"/tmp/openvmnet-{uid}")  # noqa: S108 - looked at, not made
    return path if os.getuid() == 0 and uid.isdigit() and path.is_dir() else None


def state_root() -> Path:
    """The directory of what is remembered of networks, made 0700 if missing."""
    base = os.environ.get("XDG_STATE_HOME")
    if base:
        return _private(Path(base) / "openvmnet")
    if os.getuid() == 0:
        return _private(Path("/var/lib/openvmnet"))
    try:
        home = Path.home()
    except RuntimeError as error:
        raise HostError(
            f"uid {os.getuid()} has no home directory, where the addresses of networks would be kept",
            hint="set XDG_STATE_HOME to a directory of yours",
        ) from error
    return _private(home / ".local/state/openvmnet")


def runtime(name: str) -> Path:
    """The runtime directory of network `name`, made if missing."""
    return _private(runtime_root() / check_name(name))


def control_socket(name: str) -> Path:
    """Where network `name` listens, the longest path of its sockets. HostError where it is longer than one may be."""
    path = runtime_root() / name / "control.sock"
    if len(os.fsencode(path)) > _SUN_PATH:
        raise HostError(
            f"{path} is longer than the {_SUN_PATH} octets of a unix socket's path",
            hint="set XDG_RUNTIME_DIR to a shorter directory of yours, or give a shorter --name",
        )
    return path


def remembered(name: str) -> Path:
    """The state directory of network `name`, made if missing."""
    return _private(state_root() / check_name(name))


def names() -> list[str]:
    """Every network that has a runtime directory, whether or not its process lives."""
    return sorted(entry.name for entry in runtime_root().iterdir() if entry.is_dir() and _NAME.fullmatch(entry.name))


def try_lock(*, wait: bool = False) -> int | None:
    """Take the lock under which networks start, are joined and end; its descriptor, which releases it when closed.

    None where somebody else has it, unless `wait`.
    """
    fd = os.open(runtime_root() / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def encode(value: object) -> bytes:
    """`value` as JSON; addresses as text."""
    return msgspec.json.encode(value, enc_hook=str)


def decode(data: bytes, kind: type[_T]) -> _T:
    """JSON as `kind`; msgspec.DecodeError where it does not fit."""
    return msgspec.json.decode(data, type=kind, dec_hook=_from_text)


def write(path: Path, value: object, *, durable: bool) -> None:
    """Put `value` as JSON where a reader sees either the old file or the new one, never a part.

    `durable` waits for the disk, for what has to outlive a power cut; a runtime file need not. Raises HostError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(encode(value))
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise HostError(f"{path} cannot be written: {error.strerror}") from error
        raise


def _from_text(kind: type, value: object) -> object:
    return kind(value)


def _private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"{path} cannot be made: {error.strerror}",
            hint="set XDG_RUNTIME_DIR and XDG_STATE_HOME to directories of yours",
        ) from error
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise HostError(
            f"{path} has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):04o}; "
            "it has to be a directory of yours, writable by nobody else",
            hint=f"chmod 0700 {path}, or set XDG_RUNTIME_DIR and XDG_STATE_HOME to directories of yours",
        )
    return path
