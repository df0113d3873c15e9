"""The one command that mends what a host forbids or lacks: the same for `vmnet doctor` and for an error on the way."""

from __future__ import annotations

import errno
from pathlib import Path

PROC = Path("/proc/sys")


def namespaces(error: OSError, proc: Path = PROC) -> str:
    """For a refused user or network namespace; sysctls are read below `proc`."""
    limits = ("user/max_user_namespaces", "user/max_net_namespaces")
    for limit in limits:
        if error.errno == errno.ENOSPC or _read(proc / limit) == "0":
            name = next((each for each in limits if _read(proc / each) == "0"), limit).replace("/", ".")
            return f"sudo sysctl -w {name}=15000"
    if _read(proc / "kernel/unprivileged_userns_clone") == "0":
        return "sudo sysctl -w kernel.unprivileged_userns_clone=1"
    if _read(proc / "kernel/apparmor_restrict_unprivileged_userns") == "1":
        return "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    if error.errno in (errno.EINVAL, errno.ENOSYS):
        return kernel()
    # Nothing of the kernel's own forbids it: a seccomp filter does, as container runtimes install one.
    return "start the container with --security-opt seccomp=unconfined --device /dev/net/tun"


def kernel() -> str:
    """For a kernel that was built without what is needed."""
    return "sudo apt install linux-image-$(dpkg --print-architecture)"


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
