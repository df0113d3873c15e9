"""An initramfs: files in cpio's "newc" format (Linux Documentation/driver-api/early-userspace/buffer-format).

Written here and not by cpio(1), because an ordinary user cannot make device nodes and files of root's for it to read.
"""

from __future__ import annotations

import stat
from pathlib import Path


class Initramfs:
    """Collects entries; `archive()` gives the archive, uncompressed, which an emulated CPU unpacks fastest."""

    def __init__(self) -> None:
        self._entries: dict[str, bytes] = {}

    def directory(self, name: str) -> None:
        """Add a directory and the ones above it."""
        parts = Path(name).parts
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path not in self._entries:
                self._add(path, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o755) -> None:
        """Add a regular file; a second one of the same name is ignored."""
        if name not in self._entries:
            self.directory(str(Path(name).parent))
            self._add(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self.directory(str(Path(name).parent))
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self.directory(str(Path(name).parent))
        self._add(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def archive(self) -> bytes:
        """The archive."""
        return b"".join(self._entries.values()) + _record("TRAILER!!!", 0, 0, b"", (0, 0))

    def _add(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._entries[name] = _record(name, len(self._entries) + 1, mode, data, device)


def _record(name: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    label = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(label), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + label
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
