"""recvmsg_x and sendmsg_x where a system does not export them: read(v) and write(v) of one datagram at a time.

An iovec of ours is one datagram, and readv(2) and writev(2) on a connected datagram socket move one; they are called
with the iovec that a msghdr_x points at. The socket's own flag says that nobody waits, as the batch calls are always
asked to.
"""

from __future__ import annotations

import ctypes
import os

from openvmnet.engine.darwin.framework import MsghdrX

_libc = ctypes.CDLL(None, use_errno=True)
_readv, _writev = _libc.readv, _libc.writev
for _call in (_readv, _writev):
    _call.restype, _call.argtypes = ctypes.c_ssize_t, (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)


def recvmsg_x(fd: int, messages: int, _count: int, _flags: int) -> int:
    """Receive one datagram into the first of `messages`; 1, or -1 with errno set."""
    os.set_blocking(fd, False)
    header = MsghdrX.from_address(messages)
    got: int = _readv(fd, header.iov, 1)
    if got < 0:
        return -1
    header.datalen = got
    return 1


def sendmsg_x(fd: int, messages: int, count: int, _flags: int) -> int:
    """Send `messages` in order, until one does not go; how many went, or -1 with errno set."""
    os.set_blocking(fd, False)
    size = ctypes.sizeof(MsghdrX)
    for at in range(count):
        if _writev(fd, MsghdrX.from_address(messages + at * size).iov, 1) < 0:
            return at or -1
    return count
