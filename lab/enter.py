"""Enter the lab: new namespaces in which nothing can reach the machine's own network, not even by mistake.

`python -m lab.enter COMMAND...` runs the command with network, mount and process namespaces of its own: as root with
real root's rights, as an ordinary user inside a user namespace. When the command ends, every process that it
left dies with the process namespace, and every mount and network namespace with them.
Where a container forbids mounting /proc anew, an ordinary user's lab has no process namespace.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

_MARK = Path("/run/lab/entered")
_SCRIPT = Path(__file__).with_name("enter_world.sh")


def inside() -> bool:
    """Is this process in the lab? By the facts, not by a variable: the mark, and no interface but the loopback."""
    return _MARK.exists() and [name for _, name in socket.if_nameindex()] == ["lo"]


def enter(command: list[str]) -> NoReturn:
    """Become the lab's first process, with `command` in it. `SystemExit` with a sentence where the host forbids it."""
    if shutil.which("unshare") is None:
        raise SystemExit("unshare is not installed (package util-linux); run scripts/setup test")
    environment = os.environ | {
        "OPENVMNET_LAB_UID": str(os.getuid()),
        "OPENVMNET_LAB_GID": str(os.getgid()),
        # pytest's directory below /tmp is named for it; a user's lab would take root's, whose name it sees.
        "LOGNAME": os.environ.get("LOGNAME") or str(os.getuid()),
        "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    for options in _variants():
        probe = subprocess.run([*options, "true"], capture_output=True, text=True, check=False)
        if probe.returncode == 0:
            sys.stdout.flush()
            os.execvpe("unshare", [*options, "sh", str(_SCRIPT), *command], environment)
    raise SystemExit(
        f"the lab needs namespaces that this host refuses: {probe.stderr.strip()}\n"
        "where AppArmor restricts them: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    )


def _variants() -> list[list[str]]:
    processes = ["--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() == 0:
        return [["unshare", "--mount", "--net", "--ipc", *processes]]
    user = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc"]
    return [[*user, *processes], user]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m lab.enter COMMAND...")
    enter(sys.argv[1:])
