"""A relay for a VM's netdev, started and heard: the side of whoever becomes the VM.

The relay is a process of its own, since `vmnet run` becomes the VM by exec(2), and since on macOS 26 it is the signed
copy of the interpreter that may use vmnet, not this one. The VM inherits its end of the socket, and the writing end of
the life pipe, which nobody else has: when the VM is gone, however that came, the relay sees the pipe's end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from openvmnet import errors
from openvmnet.engine.darwin import entitlement, patience
from openvmnet.engine.darwin.datapath import socketpair
from openvmnet.engine.darwin.mac import Mac
from openvmnet.engine.darwin.relay import Fault, Report, Spec
from openvmnet.errors import HostError, VmnetError
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

# -P: the relay may be root's, and nothing is to be imported from the directory that it happens to start in.
_MODULE = ("-P", "-m", "openvmnet.engine.darwin.relay")
_GRACE = 5.0  # s more than the relay's own time-outs
_LONGEST = 1 << 20  # octets of a report


@dataclass(frozen=True)
class Port:
    """A started relay: the descriptors that the VM inherits, the relay's process, and what vmnet answered."""

    vm_fd: int
    life_fd: int
    process: subprocess.Popen[bytes]
    parameters: dict[str, str | int]

    @property
    def pid(self) -> int:
        """The relay's."""
        return self.process.pid

    def close(self) -> None:
        """Give it back without a VM: the relay ends, and is waited for."""
        for fd in (self.vm_fd, self.life_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        try:
            self.process.wait(patience.STOP + _GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(
    options: str,
    *,
    vm: str,
    netdev: str,
    interface_id: UUID,
    mac: str | None = None,
    mac_os: Mac | None = None,
    command: Sequence[str] | None = None,
) -> Port:
    """A relay for one netdev. Raises what the relay says, MissingFeature where this process may not use vmnet.

    `command` starts the relay instead of the interpreter that may use vmnet.
    """
    if command is None:
        program, environment = entitlement.interpreter(mac_os or Mac())
        command = (program, *_MODULE)
    else:
        environment = dict(os.environ)
    ours, theirs = socketpair()
    life_read, life_write = os.pipe()
    report_read, report_write = os.pipe()
    spec = Spec(
        options=options,
        vm=vm,
        netdev=netdev,
        vm_pid=os.getpid(),
        vm_fd=ours.fileno(),
        life_fd=life_read,
        report_fd=report_write,
        interface_id=interface_id,
        mac=mac,
        user=entitlement.sudo_user() if os.geteuid() == 0 else None,
    )
    process: subprocess.Popen[bytes] | None = None
    try:
        with ours:
            process = _spawn([*command, msgspec.json.encode(spec).decode()], environment, spec)
        os.close(life_read)
        os.close(report_write)
        life_read = report_write = -1
        parameters = _hear(report_read, process)
    except BaseException:
        theirs.close()
        for fd in (life_read, life_write, report_write):
            if fd >= 0:
                os.close(fd)
        if process is not None:
            process.wait()
        raise
    finally:
        os.close(report_read)
    return Port(theirs.detach(), life_write, process, parameters)


def _spawn(argv: list[str], environment: dict[str, str], spec: Spec) -> subprocess.Popen[bytes]:
    inherited = (spec.vm_fd, spec.life_fd, spec.report_fd)
    try:
        return subprocess.Popen(
            argv, env=environment, pass_fds=inherited, stdin=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        raise HostError(f"the relay '{argv[0]}' cannot be started: {error.strerror}") from error


def _hear(fd: int, process: subprocess.Popen[bytes]) -> dict[str, str | int]:
    """The parameters that the relay reports. Raises the error that it reports, or that it says nothing."""
    deadline = time.monotonic() + patience.START + _GRACE
    said = bytearray()
    waiting = select.poll()
    waiting.register(fd, select.POLLIN)
    while len(said) < _LONGEST:
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.poll(left * 1000):
            process.send_signal(signal.SIGKILL)
            process.wait()
            raise patience.Late("the relay", patience.START + _GRACE)
        part = os.read(fd, 65536)
        if not part:
            break
        said += part
    try:
        report = msgspec.json.decode(bytes(said), type=Report)
    except msgspec.DecodeError:
        code = process.wait()
        what = f"signal {-code}" if code < 0 else f"code {code}"
        killed = "; macOS kills programs whose entitlements it does not accept" if code == -signal.SIGKILL else ""
        raise HostError(f"the relay ended with {what}, and said nothing{killed}", hint="vmnet doctor") from None
    if report.fault is not None:
        process.wait()
        raise raised(report.fault)
    return report.parameters


def raised(fault: Fault) -> VmnetError:
    """The relay's error as one of this process."""
    kind = getattr(errors, fault.kind, HostError)
    if kind is errors.OptionError:
        error: VmnetError = errors.OptionError(fault.message, option="netdev", value="", hint=fault.hint)
    elif isinstance(kind, type) and issubclass(kind, VmnetError):
        error = kind(fault.message, hint=fault.hint)
    else:
        error = HostError(fault.message, hint=fault.hint)
    error.exit_code = fault.exit_code
    error.status = Status.of(fault.status)
    return error
