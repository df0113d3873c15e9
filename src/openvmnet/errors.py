"""Every error of openvmnet's own, in one tree.

    VmnetError
    ├── CallerError            what was asked for is wrong            exit 2   HTTP 400  INVALID_ARGUMENT
    │   ├── OptionError        one option's value                     exit 2   HTTP 400  INVALID_ARGUMENT
    │   ├── NotFound           no such network, port, program         exit 4   HTTP 404  INVALID_ARGUMENT
    │   ├── Conflict           it would collide with what is there    exit 3   HTTP 409  SHARING_SERVICE_BUSY
    │   ├── PacketTooBig       a frame over max_packet_size           exit 2   HTTP 400  PACKET_TOO_BIG
    │   └── Stopped            the interface is no longer there       exit 2   HTTP 400  SETUP_INCOMPLETE
    ├── PeerError              what came over a wire is wrong         exit 76  HTTP 502  FAILURE
    │   └── Malformed          bytes that are not the protocol's
    └── HostError              this machine cannot do it              exit 71  HTTP 500  FAILURE
        ├── MissingFeature     a kernel option, tool or permission    exit 69  HTTP 503  FAILURE
        ├── Exhausted          a bound was reached                    exit 75  HTTP 503  MEM_FAILURE
        └── LinkError          a frame could not be read or written   exit 71  HTTP 500  by its cause

Exit codes follow BSD sysexits(3) where it has the case, so that 0 and 1 stay with the program that `vmnet run` becomes.
The message is one sentence that names the offending value and what would be right; `hint` is the command that mends it;
`status` is the vmnet result code that a program which knows vmnet.framework would expect.
"""

from __future__ import annotations

from openvmnet.status import Status


class VmnetError(Exception):
    """Root of the tree: `exit_code` for the command, `http_status` for an API, `hint` for the person.

    `status` is the class's, or the one given: an error that came from a result code keeps that code.
    """

    exit_code = 1
    http_status = 500
    status: Status = Status.FAILURE

    def __init__(self, message: str, *, hint: str | None = None, status: Status | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if status is not None:
            self.status = status


class CallerError(VmnetError):
    """What was asked for is wrong."""

    exit_code = 2
    http_status = 400
    status = Status.INVALID_ARGUMENT


class OptionError(CallerError):
    """One option's value is wrong: `option` is its name as typed, `value` what was given."""

    def __init__(self, message: str, *, option: str, value: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.option = option
        self.value = value


class NotFound(CallerError):
    """No such network, port or program."""

    exit_code = 4
    http_status = 404


class Conflict(CallerError):
    """It would collide with something that is there."""

    exit_code = 3
    http_status = 409
    status = Status.SHARING_SERVICE_BUSY


class PacketTooBig(CallerError):
    """A frame is longer than the interface takes: it has `size` octets, `limit` is `max_packet_size`."""

    status = Status.PACKET_TOO_BIG

    def __init__(self, message: str, *, size: int = 0, limit: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.size = size
        self.limit = limit


class Stopped(CallerError):
    """The interface was stopped, or belongs to the process that this one was forked from (INVALID_ACCESS)."""

    status = Status.SETUP_INCOMPLETE


class PeerError(VmnetError):
    """What came over a wire is wrong."""

    exit_code = 76
    http_status = 502


class Malformed(PeerError):
    """Bytes that are not what the protocol says."""


class HostError(VmnetError):
    """This machine cannot do what was asked."""

    exit_code = 71


class MissingFeature(HostError):
    """A kernel option, a tool or a permission is missing."""

    exit_code = 69
    http_status = 503


class Exhausted(HostError):
    """A bound was reached."""

    exit_code = 75
    http_status = 503
    status = Status.MEM_FAILURE


class LinkError(HostError):
    """The machine failed to move a frame; of the frames of a write, the first `sent` went out."""

    def __init__(
        self, message: str, *, sent: int = 0, hint: str | None = None, status: Status = Status.FAILURE
    ) -> None:
        super().__init__(message, hint=hint, status=status)
        self.sent = sent
