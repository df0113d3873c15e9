"""Every error of openvmnet's own, in one tree.

    VmnetError
    ├── CallerError            what was asked for is wrong            exit 2   HTTP 400
    │   ├── OptionError        one option's value                     exit 2   HTTP 400
    │   ├── NotFound           no such network, port, program         exit 4   HTTP 404
    │   └── Conflict           it would collide with what is there    exit 3   HTTP 409
    ├── PeerError              what came over a wire is wrong         exit 76  HTTP 502
    │   └── Malformed          bytes that are not the protocol's
    └── HostError              this machine cannot do it              exit 71  HTTP 500
        ├── MissingFeature     a kernel option, tool or permission    exit 69  HTTP 503
        └── Exhausted          a bound was reached                    exit 75  HTTP 503

Exit codes follow BSD sysexits(3) where it has the case, so that 0 and 1 stay with the program that `vmnet run` becomes.
The message is one sentence that names the offending value and what would be right; `hint` is the command that mends it.
"""

from __future__ import annotations


class VmnetError(Exception):
    """Root of the tree: `exit_code` for the command, `http_status` for an API, `hint` for the person."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CallerError(VmnetError):
    """What was asked for is wrong."""

    exit_code = 2
    http_status = 400


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
