"""Packages of the distribution that are unpacked into the cache and never installed: a kernel, a boot program."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lab.paths import cache

if TYPE_CHECKING:
    from collections.abc import Callable


def unpacked(name: str, packages: Callable[[], list[str]]) -> Path:
    """The tree of `packages()`, downloaded when it is not in the cache under `name`."""
    base = cache() / "image" / name
    if not (base / "done").exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
            _download(Path(scratch), packages)
            shutil.rmtree(base, ignore_errors=True)
            (Path(scratch) / "tree").rename(base)
        (base / "done").touch()
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
