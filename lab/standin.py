"""The stand-in for vmnet.framework, built from tests/engine/darwin/standin by the C compiler that is there.

One library for each macOS whose symbols it is to export, named for what it was made of, so that it is built once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from lab.paths import CHECKOUT, cache

if TYPE_CHECKING:
    from pathlib import Path

SOURCES = CHECKOUT / "tests" / "engine" / "darwin" / "standin"
MACOS = (1015, 1100, 1200, 1500, 1504, 2600)
_FLAGS = ("-std=gnu17", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread")


def compiler() -> str | None:
    """The C compiler, or None."""
    return shutil.which("gcc") or shutil.which("cc")


def library(macos: int = MACOS[-1], *, sanitizer: str = "") -> Path:
    """The library that exports what that macOS does. Raises RuntimeError with the compiler's words."""
    gcc = compiler()
    if gcc is None:
        raise RuntimeError("there is no C compiler; run scripts/setup test")
    sources = sorted(SOURCES.glob("*.c"))
    flags = [*_FLAGS, f"-DMACOS={macos}"]
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (*sources, *SOURCES.glob("*.h")):
        digest.update(path.read_bytes())
    made = cache() / f"standin-{macos}{'-' + sanitizer if sanitizer else ''}-{digest.hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        command = [gcc, *flags, "-o", str(partial), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the stand-in cannot be built: {done.stderr}")
        partial.rename(made)
    return made


class Standin:
    """The library's own controls: settings, counters, the wire of the next interface."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        long, text, integer, size, double = (
            ctypes.c_long,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_size_t,
            ctypes.c_double,
        )
        for name, result, arguments in (
            ("standin_set", None, (text, long)),
            ("standin_count", long, (text,)),
            ("standin_objects", long, (ctypes.c_int,)),
            ("standin_interfaces", long, ()),
            ("standin_wire", None, (integer,)),
            ("standin_memory", None, ()),
            ("standin_send", ctypes.c_bool, (text, size)),
            ("standin_receive", size, (ctypes.c_void_p, size)),
            (
                "standin_relay_down",
                long,
                (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_double),
            ),
            ("standin_relay_up", long, (ctypes.c_void_p, integer, integer, size, double)),
            ("standin_blast", long, (integer, size, integer, double)),
            ("standin_sink", long, (integer, size, integer, double)),
        ):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def set(self, name: str, value: int) -> None:
        """Change a setting; 0 is its rest."""
        self.library.standin_set(name.encode(), value)

    def count(self, name: str) -> int:
        """A counter."""
        return int(self.library.standin_count(name.encode()))

    def objects(self) -> list[int]:
        """How many objects live: queues, semaphores, XPC objects, configurations, networks."""
        return [int(self.library.standin_objects(kind)) for kind in range(1, 6)]

    def interfaces(self) -> int:
        """How many interfaces live."""
        return int(self.library.standin_interfaces())

    def memory(self) -> None:
        """Join the next interface to a wire in memory."""
        self.library.standin_memory()

    def send(self, frame: bytes) -> bool:
        """Put a frame on that wire, towards the interface; False where there is none any more."""
        return bool(self.library.standin_send(frame, len(frame)))

    def receive(self) -> bytes | None:
        """The next frame that came from the interface, or None."""
        room = ctypes.create_string_buffer(70000)
        size = self.library.standin_receive(ctypes.addressof(room), len(room))
        return room.raw[:size] if size else None

    def wire(self, fd: int) -> None:
        """Join the next interface to this datagram socket."""
        self.library.standin_wire(fd)
