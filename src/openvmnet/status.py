"""vmnet's result codes, `vmnet_return_t`, and what QEMU says of each."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """How a call on an interface ended: vmnet.framework's numbers and names (macOS SDK 26.1), without the VMNET_."""

    SUCCESS = 1000
    FAILURE = 1001
    MEM_FAILURE = 1002
    INVALID_ARGUMENT = 1003
    SETUP_INCOMPLETE = 1004
    INVALID_ACCESS = 1005
    PACKET_TOO_BIG = 1006
    BUFFER_EXHAUSTED = 1007
    TOO_MANY_PACKETS = 1008
    SHARING_SERVICE_BUSY = 1009
    NOT_AUTHORIZED = 1010

    @property
    def text(self) -> str:
        """QEMU's words for it (net/vmnet-common.m, 7.1 on); for 1010, which QEMU does not know, our own."""
        return _TEXTS[self]

    @classmethod
    def of(cls, code: int) -> Status:
        """The status numbered `code`; a number that no vmnet has had so far is a FAILURE."""
        try:
            return cls(code)
        except ValueError:
            return cls.FAILURE


_TEXTS = {
    Status.SUCCESS: "success",
    Status.FAILURE: "general failure (possibly not enough privileges)",
    Status.MEM_FAILURE: "memory allocation failure",
    Status.INVALID_ARGUMENT: "invalid argument specified",
    Status.SETUP_INCOMPLETE: "interface setup is not complete",
    Status.INVALID_ACCESS: "invalid access, permission denied",
    Status.PACKET_TOO_BIG: "packet size is larger than MTU",
    Status.BUFFER_EXHAUSTED: "buffers exhausted in kernel",
    Status.TOO_MANY_PACKETS: "packet count exceeds limit",
    Status.SHARING_SERVICE_BUSY: "conflict, sharing service is in use",
    Status.NOT_AUTHORIZED: "not authorized to use this network",
}
