"""QEMU's own setuid helper, which puts a TAP into a bridge for a user whom an administrator has allowed that.

The helper is started with one end of a unix socket; it makes the TAP, puts it into the bridge, and sends the descriptor
through the socket. Whom it serves is its own affair: it reads an access list, lines of `allow BRIDGE`, `deny BRIDGE`
(`all` is every bridge) and `include FILE`; a bridge is allowed when some line allows it and none denies it. With any
other line in it, it serves nobody.
Distributions ship it without the setuid bit (Debian) or with it (Fedora), and often without an access list.

Source: QEMU's documentation (man qemu-system, -netdev bridge), and what the helper of 7.2 does when it is run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
from typing import Literal, NamedTuple

from openvmnet.errors import HostError, MissingFeature

PATHS = (
    "/usr/lib/qemu/qemu-bridge-helper",
    "/usr/libexec/qemu-bridge-helper",
    "/run/wrappers/bin/qemu-bridge-helper",
    "/usr/local/libexec/qemu-bridge-helper",
    "/usr/lib/qemu-bridge-helper",
)
ACLS = ("/etc/qemu/bridge.conf", "/etc/qemu-kvm/bridge.conf", "/usr/local/etc/qemu/bridge.conf")

_TIMEOUT = 10.0  # s; the helper takes milliseconds
_INCLUDES = 8  # files that an access list may include, one in the other
_ACL_OCTETS = 1 << 16

Verdict = Literal["broken", "deny", "allow", "silent"]


class Obstacle(NamedTuple):
    """What keeps the helper from serving: the end of a sentence, and the command that mends it."""

    sentence: str
    remedy: str


def path() -> str | None:
    """Where the helper is, or None."""
    return next((each for each in PATHS if os.path.isfile(each)), None)


def acl() -> str:
    """The access list that is there, or where the first one would be."""
    return next((each for each in ACLS if os.path.exists(each)), ACLS[0])


def rights() -> Obstacle | None:
    """What keeps the helper from having root's rights, or None: it has them, for all that can be seen."""
    helper = path()
    if helper is None:
        return Obstacle("QEMU's qemu-bridge-helper is not installed", "sudo apt install qemu-system-common")
    if not os.access(helper, os.X_OK):
        group = os.stat(helper).st_gid
        return Obstacle(f"{helper} is for members of its group alone", f"sudo usermod -aG '#{group}' $USER")
    status = os.stat(helper)
    if not (status.st_mode & stat.S_ISUID and status.st_uid == 0) and not _file_capabilities(helper):
        return Obstacle(f"{helper} is not setuid root", f"sudo chmod u+s {helper}")
    if os.statvfs(helper).f_flag & os.ST_NOSUID:
        return Obstacle(f"{helper} lies on a file system mounted nosuid", "mount it with suid")
    if _no_new_privileges():
        return Obstacle(
            f"{helper} gains no rights in a process that gave up new ones (no_new_privs)",
            "start it outside of that sandbox",
        )
    return None


def allows(bridge: str, file: str | None = None) -> bool | None:
    """Whether the access list allows `bridge`; None where it cannot be read, which may be meant so."""
    verdict = _verdict(bridge, file or acl())
    return None if verdict is None else verdict == "allow"


def obstacle(bridge: str) -> Obstacle | None:
    """What keeps the caller from getting a TAP in `bridge` through the helper, or None: nothing that can be seen."""
    found = rights()
    if found is not None:
        allow = "" if allows(bridge) in (True, None) else f" && {allow_command(bridge)}"
        return found._replace(remedy=found.remedy + allow)
    if allows(bridge) is False:
        return _denied(bridge)
    return None


def lacks(bridge: str) -> str | None:
    """`obstacle` as one command, None where there is none."""
    found = obstacle(bridge)
    return None if found is None else found.remedy


def open_tap(bridge: str, *, offloads: bool = True) -> int:
    """A TAP in `bridge`, with virtio headers for `offloads`: its descriptor.

    Raises MissingFeature where the helper is missing, has no rights or denies it; its message says which, its hint
    the three ways to mend that. HostError where the helper fails otherwise.
    """
    helper = path()
    if helper is None:
        raise refusal(bridge, obstacle(bridge))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        argv = [helper, *(["--use-vnet"] if offloads else []), f"--fd={theirs.fileno()}", f"--br={bridge}"]
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                pass_fds=(theirs.fileno(),),
                timeout=_TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            raise HostError(f"{helper} did not answer within {_TIMEOUT:.0f} s") from error
        except OSError as error:
            raise refusal(bridge, obstacle(bridge) or Obstacle(f"{helper}: {error.strerror}", "")) from error
        theirs.close()
        ours.settimeout(_TIMEOUT)
        fds: list[int] = []
        if done.returncode == 0:
            with contextlib.suppress(OSError):
                _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if len(fds) == 1:
        os.set_inheritable(fds[0], False)
        return fds[0]
    said = " ".join(done.stderr.split()) or f"it ended with {done.returncode} and gave no descriptor"
    raise refusal(bridge, _failure(helper, bridge, said))


def refusal(bridge: str, found: Obstacle | None) -> MissingFeature:
    """The error for a caller who may not put a TAP into `bridge`, with the three ways out."""
    why = found.sentence if found else "the helper serves nobody here"
    allow = (found.remedy if found else "") or allow_command(bridge)
    return MissingFeature(
        f"uid {os.getuid()} may not put a TAP into bridge '{bridge}': that takes CAP_NET_ADMIN, or QEMU's bridge "
        f"helper, and {why}",
        hint=f"let the helper do it: {allow}; or have the capability: {with_capability()}; "
        "or do without the bridge: -netdev vmnet-shared,id=net0",
    )


def with_capability() -> str:
    """How an ordinary user starts a VM with CAP_NET_ADMIN, which `vmnet run` does not hand on to QEMU."""
    return (
        "sudo setpriv --reuid=$(id -u) --regid=$(id -g) --init-groups --inh-caps=+net_admin --ambient-caps=+net_admin "
        "vmnet run ..."
    )


def _failure(helper: str, bridge: str, said: str) -> Obstacle:
    found = obstacle(bridge)
    if found is None and "acl" in said:  # of a list that the caller cannot read, only the helper knows what it says
        found = _denied(bridge)
    if found is None:
        return Obstacle(f"{helper} says: {said}", f"see what {helper} says")
    return found


def _denied(bridge: str) -> Obstacle:
    file = acl()
    if not os.path.exists(file):
        return Obstacle(f"its access list {file} is not there", allow_command(bridge))
    verdict = _verdict(bridge, file)
    if verdict == "broken":
        return Obstacle(f"its access list {file} has a line that is none of allow, deny, include", f"correct {file}")
    if verdict == "deny":
        return Obstacle(f"its access list {file} denies '{bridge}'", f"take the deny out of {file} and let it allow it")
    return Obstacle(f"its access list {file} does not allow '{bridge}'", allow_command(bridge))


def allow_command(bridge: str) -> str:
    """The command by which an administrator allows `bridge` to everybody."""
    file = acl()
    return f"sudo mkdir -p {os.path.dirname(file)} && echo 'allow {bridge}' | sudo tee -a {file}"


def _verdict(bridge: str, file: str) -> Verdict | None:
    """What a list and those that it includes say in sum; a deny anywhere outweighs every allow. None: unreadable."""
    said = _said(bridge, file, _INCLUDES)
    order: tuple[Verdict, ...] = ("broken", "deny", "allow")
    return None if said is None else next((each for each in order if each in said), "silent")


def _said(bridge: str, file: str, depth: int) -> set[str] | None:
    """What the lines of a list say of `bridge`, up to the first that is none.

    As the helper reads them: a line's command ends at the first space or, where the line has none, at the first tab;
    an included file that is missing or broken takes nothing away.
    """
    said: set[str] = set()
    try:
        with open(file, errors="replace") as opened:
            lines = opened.read(_ACL_OCTETS).splitlines()
    except FileNotFoundError:
        return said
    except OSError:
        return None
    for line in map(str.lstrip, lines):
        if not line or line.startswith("#"):
            continue
        command, _, argument = line.partition(" " if " " in line else "\t")
        argument = argument.strip()
        if command not in ("allow", "deny", "include") or not argument:
            return said | {"broken"}
        if command == "include":
            inner = _said(bridge, argument, depth - 1) if depth else set()
            if inner is None:
                return None
            said |= inner - {"broken"}
        elif argument in ("all", bridge):
            said.add(command)
    return said


def _file_capabilities(helper: str) -> bool:
    try:
        return bool(os.getxattr(helper, "security.capability"))
    except OSError:
        return False


def _no_new_privileges() -> bool:
    with open("/proc/self/status") as file:
        return any(line.split() == ["NoNewPrivs:", "1"] for line in file)
