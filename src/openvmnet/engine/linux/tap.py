"""A TAP as the link of an interface: one system call a frame, nothing else.

How it works. The descriptor is non-blocking, and its frames are bare (no IFF_VNET_HDR): the kernel splits what is
longer than the MTU and fills in checksums before a frame comes here. It knows no call for several frames.

`close` may come while another thread is between "which descriptor?" and the system call on it. A closed number could
be somebody else's file by then. So the number is not closed but given another meaning, atomically (dup2): that of an
O_PATH descriptor, on which each read and write fails with EBADF. The TAP is gone with that, and the number follows when
no thread can be in a call any more: when the object is collected.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from typing import TYPE_CHECKING

from openvmnet.errors import LinkError, Stopped
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.contract.interface import Frame, Parameters

log = logging.getLogger(__name__)

_TAG = 4  # octets of an 802.1Q tag, which a bridge does not count as MTU
_STATUS = {
    errno.EINVAL: Status.INVALID_ARGUMENT,
    errno.EMSGSIZE: Status.PACKET_TOO_BIG,
    errno.EPERM: Status.INVALID_ACCESS,
    errno.EACCES: Status.INVALID_ACCESS,
    errno.ENOMEM: Status.MEM_FAILURE,
    errno.ENOBUFS: Status.BUFFER_EXHAUSTED,
    errno.EAGAIN: Status.BUFFER_EXHAUSTED,
    errno.EIO: Status.SETUP_INCOMPLETE,  # the device is down
    errno.EBADFD: Status.SETUP_INCOMPLETE,  # the device was removed under us
}


class TapLink:
    """The TAP behind descriptor `fd`, which is the link's from here on: non-blocking, frames without header."""

    header = 0  # octets before each frame on the descriptor

    def __init__(self, fd: int, parameters: Parameters) -> None:
        self._nowhere = _dead_end()
        self._fd = fd  # last of what can fail: an object that is not made must not close it
        self._parameters = parameters
        self._most = parameters.max_packet_size + self.header
        self._oversize = 0

    @property
    def parameters(self) -> Parameters:
        """As the interface came up."""
        return self._parameters

    @property
    def tap(self) -> int | None:
        """The TAP's descriptor."""
        return self._fd

    def fileno(self) -> int:
        """The same."""
        return self._fd

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` frames; fewer means that nothing more was there."""
        fd, size, read = self._fd, self._most + _TAG, os.read
        frames: list[bytes] = []
        append = frames.append
        try:
            for _ in range(limit):
                append(read(fd, size))
        except BlockingIOError:
            pass
        except OSError as error:
            if not frames:  # else it comes again with the next call
                raise _failure("read failed", error) from error
        if frames and max(map(len, frames)) > self._most:
            return self._fitting(frames) or self.read(limit)
        return frames

    def write(self, frames: Sequence[Frame]) -> None:
        """Send one batch; a TAP takes a frame whole or not at all."""
        fd, write = self._fd, os.write
        sent = 0
        try:
            for frame in frames:
                write(fd, frame)
                sent += 1
        except OSError as error:
            raise _failure("write error", error, sent) from error

    def close(self) -> None:
        """Give the port back: the device goes with its last descriptor."""
        os.dup2(self._nowhere, self._fd, inheritable=False)

    def forked(self) -> None:
        """The same: what the child had was its own copy."""
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)

    def _fitting(self, frames: list[bytes]) -> list[bytes]:
        """Without those that have a tag on top of a full frame: the contract has no room for them."""
        kept = [frame for frame in frames if len(frame) <= self._most]
        if not self._oversize:
            size, most = max(map(len, frames)) - self.header, self._most - self.header
            log.warning("packet is too big, %d > %d: dropped, as are more of them without a word", size, most)
        self._oversize += len(frames) - len(kept)
        return kept


class HeadedTapLink(TapLink):
    """A TAP whose frames bear a virtio_net_hdr (IFF_VNET_HDR) that says nothing: no offload was asked for."""

    header = 10  # octets, as a TAP has it until told otherwise

    def __init__(self, fd: int, parameters: Parameters, record: int) -> None:
        super().__init__(fd, parameters)
        self._record = record  # a descriptor that has to stay open for as long as the port is there

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` frames; fewer means that nothing more was there."""
        skip = self.header
        return [frame[skip:] for frame in super().read(limit)]

    def write(self, frames: Sequence[Frame]) -> None:
        """Send one batch; a TAP takes a frame whole or not at all."""
        fd, write, empty = self._fd, os.writev, bytes(self.header)
        sent = 0
        try:
            for frame in frames:
                write(fd, (empty, frame))
                sent += 1
        except OSError as error:
            raise _failure("write error", error, sent) from error

    def close(self) -> None:
        """Give the port back, and what was kept with it."""
        super().close()
        os.dup2(self._nowhere, self._record, inheritable=False)

    def __del__(self) -> None:
        super().__del__()
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._record)


@functools.cache
def _dead_end() -> int:
    """The O_PATH descriptor of this process, opened once."""
    return os.open("/", os.O_PATH | os.O_CLOEXEC)


def _failure(what: str, error: OSError, sent: int = 0) -> LinkError | Stopped:
    if error.errno == errno.EBADF:
        return Stopped("this interface was stopped: start another")
    status = _STATUS.get(error.errno or 0, Status.FAILURE)
    return LinkError(f"{what}: {status.text} ({error.strerror})", sent=sent, status=status)
