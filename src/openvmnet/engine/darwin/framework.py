"""vmnet.framework and its company, loaded: structures, keys and values.

How it works. The framework, libSystem (libdispatch, XPC, blocks, the batch calls on datagram sockets) and
CoreFoundation are three libraries; `Framework` holds them. Since macOS 11 their files lie in the dyld shared cache
only, so nothing here looks whether a file exists: dlopen(3) knows. The structures' layouts are those of 64-bit macOS,
asserted by the tests:

    struct vmpktdesc   24 octets   vm_pkt_size 0, vm_pkt_iov 8, vm_pkt_iovcnt 16, vm_flags 20
    struct iovec       16          iov_base 0, iov_len 8
    struct msghdr_x    56          msg_name 0, msg_namelen 8, msg_iov 16, msg_iovlen 24, msg_control 32,
                                   msg_controllen 40, msg_flags 44, msg_datalen 48

Everything else of the engine takes a `Framework`, so that one made of another library with the same symbols serves as
well.
"""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from openvmnet.engine.darwin import symbols
from openvmnet.engine.darwin.library import Library

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.blocks import Block, Kind

_VMNET = "/System/Library/Frameworks/vmnet.framework/vmnet"
_SYSTEM = "/usr/lib/libSystem.B.dylib"
_FOUNDATION = "/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation"

PACKETS_AVAILABLE = 1  # interface_event_t: the only bit there is
DOCUMENTED_PACKETS = 200  # most packets of one read or write, unless vmnet itself says more
DOCUMENTED_OCTETS = 256 * 1024  # most octets of one read or write
INTERFACES = 32  # most interfaces of one host


class Mode(IntEnum):
    """operating_modes_t, since macOS 26 vmnet_mode_t."""

    HOST = 1000
    SHARED = 1001
    BRIDGED = 1002


class Iovec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Vmpktdesc(ctypes.Structure):
    """struct vmpktdesc: one packet of a read or write. One iovec, whose length is `size`; flags 0 both ways."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("iov", ctypes.c_void_p),
        ("iovcnt", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class MsghdrX(ctypes.Structure):
    """struct msghdr_x: one datagram of recvmsg_x or sendmsg_x; `flags` and `datalen` are 0 on input."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_int),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_uint32),
        ("flags", ctypes.c_int),
        ("datalen", ctypes.c_size_t),
    )


class Framework:
    """The three libraries. `path` puts one other library in the place of all of them."""

    def __init__(self, path: str | None = None) -> None:
        self.vmnet = Library(path or _VMNET, symbols.VMNET)
        self.system = Library(path or _SYSTEM, symbols.SYSTEM, errno=True)
        self.foundation = Library(path or _FOUNDATION, symbols.FOUNDATION)
        self._keys: dict[str, bytes] = {}
        self.spare_blocks: dict[Kind, list[Block]] = {}

    def call(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the function's row says
        """Call a function of vmnet.framework. Raises MissingFeature."""
        return self.vmnet.function(name)(*arguments)

    def system_call(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 - whatever the function's row says
        """Call a function of libSystem. Raises MissingFeature."""
        return self.system.function(name)(*arguments)

    def key(self, name: str) -> bytes:
        """The text of a dictionary's key, by its name in `symbols.KEYS`. Raises MissingFeature."""
        found = self._keys.get(name)
        if found is None:
            row = symbols.KEYS[name]
            found = self._keys[name] = self.vmnet.text(row.symbol, row.since)
        return found

    def has(self, symbol: str) -> bool:
        """Whether this macOS has a function, or a key, of vmnet.framework."""
        key = symbols.KEYS.get(symbol)
        return self.vmnet.has(symbol if key is None else key.symbol)

    def batch_calls(self) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
        """recvmsg_x and sendmsg_x, or None where one is missing."""
        if not (self.system.has("recvmsg_x") and self.system.has("sendmsg_x")):
            return None
        return self.system.function("recvmsg_x"), self.system.function("sendmsg_x")


@functools.cache
def load() -> Framework:
    """This Mac's own framework. Raises MissingFeature where there is none."""
    return Framework()
