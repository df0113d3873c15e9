"""The archive as cpio(1) reads it."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest

from lab.initramfs import Initramfs


@pytest.fixture
def archive() -> Initramfs:
    made = Initramfs()
    made.file("usr/bin/tool", b"odd", 0o755)
    made.file("usr/bin/tool", b"second of the name")
    made.symlink("bin/sh", "busybox")
    made.character("dev/console", 5, 1)
    made.file("empty", b"", 0o644)
    return made


@pytest.mark.skipif(shutil.which("busybox") is None, reason="needs busybox (package busybox-static)")
def test_cpio_reads_it(archive, tmp_path):
    listed = subprocess.run(["busybox", "cpio", "-tv"], input=archive.archive(), capture_output=True, check=True).stdout
    rows = [line.split() for line in listed.decode().splitlines()]
    names = [row[-1] for row in rows]
    assert names == ["usr", "usr/bin", "usr/bin/tool", "bin", "busybox", "dev", "dev/console", "empty"]
    assert [row[0] for row in rows if row[-1] == "dev/console"] == ["crw-------"]


@pytest.mark.skipif(shutil.which("busybox") is None, reason="needs busybox (package busybox-static)")
def test_cpio_unpacks_it(archive, tmp_path):
    archive.character("dev/null", 1, 3)
    command = ["busybox", "cpio", "-i", "usr", "usr/bin", "usr/bin/tool", "bin", "bin/sh", "empty"]
    subprocess.run(command, input=archive.archive(), cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "usr/bin/tool").read_bytes() == b"odd"
    assert stat.S_IMODE((tmp_path / "usr/bin/tool").stat().st_mode) == 0o755
    assert (tmp_path / "bin/sh").readlink().name == "busybox"
    assert (tmp_path / "empty").read_bytes() == b""
    assert not (tmp_path / "dev").exists()
