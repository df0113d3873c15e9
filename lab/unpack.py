"""Packages of the distribution that are unpacked into the cache and never installed: a kernel, a boot program."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lab.paths import cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Work at `path` in the cache, which another process may want to make at the same time: one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"image: waiting for another process that makes {path.name}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unpacked(name: str, packages: Callable[[], list[str]]) -> Path:
    """The tree of `packages()`, downloaded when it is not in the cache under `name`."""
    base = cache() / "image" / name
    done = base / "done"
    if not done.exists():
        with alone(base):
            if not done.exists():  # by who was here before
                with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
                    _download(Path(scratch), packages)
                    shutil.rmtree(base, ignore_errors=True)
                    (Path(scratch) / "tree").rename(base)
                done.touch()
    return base


def _download(scratch: Path, packages: Callable[[], list[str]]) -> None:
    names = packages()
    print(f"image: downloading {', '.join(names)} (unpacked, not installed)", file=sys.stderr, flush=True)
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download"]
    done = subprocess.run([*command, *names], cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0:  # the package lists may be older than the archive
        update = ["apt-get", "update", "-qq"]
        subprocess.run(update if os.geteuid() == 0 else ["sudo", *update], check=True, stdout=sys.stderr)
        subprocess.run([*command, *packages()], cwd=scratch, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(scratch / "tree")], check=True)
    (scratch / "tree").chmod(0o755)
