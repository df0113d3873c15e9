"""The guest's image: an unmodified distribution kernel, and an initramfs with busybox, drivers and network tools.

The kernel package is downloaded and unpacked into the cache, never installed; `python -m lab.image` builds what is
missing and prints where it lies. The image is found again by what went into it: the kernel's version, the tools'
contents, and the scripts of this directory. Programs of the host come along with the shared libraries that ldd(1)
names.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lab.initramfs import Initramfs
from lab.paths import cache
from lab.unpack import alone, unpacked

_KERNELS = ("linux-image-cloud-amd64", "linux-image-virtual")  # Debian's, Ubuntu's
_DRIVERS = ("virtio_pci", "virtio_net", "vmxnet3", "af_packet")
_TOOLS = ("iperf3", "socat", "ethtool", "tracepath")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Image:
    """What `-kernel` and `-initrd` are given."""

    kernel: Path
    initrd: Path


def image() -> Image:
    """The image, built when it is not in the cache. `SystemExit` with a sentence where something for it is missing."""
    kernel, modules = _kernel()
    inputs = [_tool("busybox"), *(_tool(name) for name in _TOOLS), _HERE / "guest_init.sh", _HERE / "guest_udhcpc.sh"]
    digest = hashlib.sha256(kernel.name.encode())
    for path in [*inputs, Path(__file__), _HERE / "initramfs.py"]:
        digest.update(path.read_bytes())
    initrd = cache() / "image" / f"initrd-{digest.hexdigest()[:16]}"
    if not initrd.exists():
        with alone(initrd.with_name("initrd")):
            if not initrd.exists():  # by who was here before
                _say("building the guest's initramfs")
                for old in initrd.parent.glob("initrd-*"):
                    old.unlink()
                _write(initrd, _initramfs(modules))
    return Image(kernel, initrd)


def _initramfs(modules: Path) -> bytes:
    archive = Initramfs()
    for name in ("dev", "proc", "sys", "etc"):
        archive.directory(name)
    archive.character("dev/console", 5, 1)
    archive.file("init", (_HERE / "guest_init.sh").read_bytes())
    archive.file("etc/udhcpc/default.script", (_HERE / "guest_udhcpc.sh").read_bytes())
    archive.file("bin/busybox", _tool("busybox").read_bytes())
    archive.symlink("bin/sh", "busybox")
    archive.file("etc/services", b"", 0o644)
    for name in _TOOLS:
        path = _tool(name)
        archive.file(f"usr/bin/{name}", path.read_bytes())
        for library in _libraries(path):
            archive.file(library.lstrip("/"), Path(library).read_bytes())
    order = _modules(modules)
    for module in order:
        archive.file(f"lib/modules/{_plain(module)}", _decompressed(module), 0o644)
    archive.file("lib/modules/order", "".join(f"{_plain(module)}\n" for module in order).encode(), 0o644)
    return archive.archive()


def _libraries(path: Path) -> list[str]:
    listed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listed, re.MULTILINE)


def _tool(name: str) -> Path:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise SystemExit(f"{name} is not installed; run scripts/setup demo")
    return Path(found).resolve()


def _kernel() -> tuple[Path, Path]:
    """Paths of the kernel and of its modules' directory, downloaded and unpacked when not in the cache."""
    if os.uname().machine != "x86_64":
        raise SystemExit(f"the guest image is built from an x86-64 distribution's kernel; this is {os.uname().machine}")
    base = unpacked("kernel", _kernel_packages)
    for kernel in (base / "boot").glob("vmlinuz-*"):
        if kernel.stat().st_mode & 0o777 != 0o644:  # Ubuntu's is root's alone
            kernel.chmod(0o644)
    modules = next(path for path in (base / "lib" / "modules", base / "usr" / "lib" / "modules") if path.is_dir())
    return next((base / "boot").glob("vmlinuz-*")), next(modules.iterdir())


def _kernel_packages() -> list[str]:
    """The package that holds the kernel, and the one with its modules where they come apart (Ubuntu)."""
    for meta in _KERNELS:
        images = _depends(meta, "linux-image-")
        if images:
            return [images[0], *_depends(images[0], "linux-modules-")[:1]]
    raise SystemExit(f"the package lists know none of {', '.join(_KERNELS)}; run apt-get update as root")


def _depends(package: str, prefix: str) -> list[str]:
    listed = subprocess.run(
        ["apt-cache", "depends", "--important", package], capture_output=True, text=True, check=False
    )
    names = re.findall(r"Depends: (\S+)", listed.stdout)
    return [name for name in names if name.startswith(prefix)]


def _modules(directory: Path) -> list[Path]:
    """The drivers and what they depend on, each after its dependencies; built-in ones have no file."""
    lines = _dependencies(directory)
    files = {re.sub(r"\.ko(\.\w+)?$", "", Path(name).name).replace("-", "_"): name for name in lines}
    order: list[str] = []

    def visit(name: str) -> None:
        for dependency in lines[name]:
            visit(dependency)
        if name not in order:
            order.append(name)

    for driver in _DRIVERS:
        if driver in files:
            visit(files[driver])
    return [directory / name for name in order]


def _dependencies(directory: Path) -> dict[str, list[str]]:
    """What modules.dep says; the package leaves it to the installation to make it, so depmod(8) does it here."""
    if not (directory / "modules.dep").exists():
        root = directory.parent.parent.parent
        subprocess.run(["depmod", "-b", str(root), directory.name], check=True, env={"PATH": "/usr/sbin:/sbin:/bin"})
    table = {}
    for line in (directory / "modules.dep").read_text().splitlines():
        name, _, needs = line.partition(":")
        table[name] = needs.split()
    return table


def _plain(module: Path) -> str:
    return re.sub(r"\.ko\.\w+$", ".ko", module.name)


def _decompressed(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", str(module)], capture_output=True, check=True).stdout
    return module.read_bytes()


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and readable for every user."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(data)
    partial.chmod(0o644)
    partial.rename(path)


def _say(what: str) -> None:
    print(f"image: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    built = image()
    print(built.kernel, built.initrd)
