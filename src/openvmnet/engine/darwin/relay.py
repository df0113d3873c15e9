"""The process between a VM and vmnet: `python -m openvmnet.engine.darwin.relay SPEC`, started by `launch`.

How it works. It starts the interface that SPEC describes, gives up root's rights where it has them, says on the report
descriptor how that went, and moves packets until the VM is gone. That it learns from the life descriptor, the reading
end of a pipe whose writing end only the VM has: a datagram socket tells nobody that its peer is gone. Then, or at
SIGTERM, the relay ends, the interface is stopped, and the stop is waited for.

It is in a session of its own: an interrupt typed at the VM's terminal is the VM's, and the VM needs its network until
its end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from uuid import UUID

import msgspec

from openvmnet import netdev
from openvmnet.engine.darwin import bridged, diagnosis, entitlement, framework, publish, records, reservation
from openvmnet.engine.darwin.datapath import Relay
from openvmnet.engine.darwin.description import Extras, describe
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.ports import Rules
from openvmnet.engine.darwin.publish import Publisher
from openvmnet.errors import VmnetError

if TYPE_CHECKING:
    from openvmnet.engine.darwin.bootptab import Hold
    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.xpc import Scalar
    from openvmnet.netdev import Bridged, Host, Shared

_LOG = logging.getLogger(__name__)
_REFRESH = 2.0  # s between two looks at whether the counters have changed


class Spec(msgspec.Struct, frozen=True):
    """What a relay is started for. `options` is the netdev in QEMU's text; descriptors are inherited.

    `user` is uid and gid to become once the interface is up; `vm_pid` the process that is or becomes the VM.
    """

    options: str
    vm: str
    netdev: str
    vm_pid: int
    vm_fd: int
    life_fd: int
    report_fd: int
    interface_id: UUID | None = None
    mac: str | None = None
    user: tuple[int, int] | None = None


class Fault(msgspec.Struct, frozen=True):
    """An error as it goes over the report descriptor."""

    kind: str
    message: str
    hint: str | None
    exit_code: int
    status: int


class Report(msgspec.Struct, frozen=True):
    """How the start went: vmnet's parameters by their keys' names, or why there is no interface."""

    parameters: dict[str, str | int] = {}
    fault: Fault | None = None


@dataclass(frozen=True)
class _Attached:
    """What the relay has of vmnet: the interface, who publishes its ports, what keeps its address, what is known."""

    handle: Handle
    publisher: Publisher
    hold: Hold | None
    known: dict[str, str | int]

    def end(self) -> None:
        """Stop the interface, and let the address go."""
        try:
            self.handle.stop()
        except VmnetError as error:
            _LOG.warning("%s", error)
        if self.hold is not None:
            self.hold.release()


def plain(parameters: dict[str, Scalar]) -> dict[str, str | int]:
    """Parameters as JSON has them."""
    return {key: value if isinstance(value, int) else str(value) for key, value in parameters.items()}


def main(argv: list[str], loaded: Framework | None = None) -> int:
    """The process; its exit code is the error's, 0 after a VM's whole life."""
    logging.basicConfig(format="vmnet: %(message)s", level=logging.WARNING)
    spec = msgspec.json.decode(argv[0], type=Spec)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    wakee, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        loaded = loaded or framework.load()
        options = netdev.parse(spec.options)
        attached = _start(loaded, options, spec)
    except VmnetError as error:
        fault = Fault(type(error).__name__, error.message, error.hint, error.exit_code, int(error.status))
        _report(spec.report_fd, Report(fault=fault))
        return error.exit_code
    _report(spec.report_fd, Report(parameters=attached.known))
    with socket.socket(fileno=spec.vm_fd) as sock:
        relay = Relay(loaded, attached.handle, sock, gone=lambda: os.write(waker, b"\0"))
        relay.start()
        try:
            _live(spec, options, attached, relay, wakee)
        finally:
            relay.stop()
            with contextlib.suppress(OSError, VmnetError):
                records.remove(os.getpid())
            attached.end()
    return 0


def _start(loaded: Framework, options: Shared | Host | Bridged, spec: Spec) -> _Attached:
    """The interface with its ports published, and rights given up."""
    forwards = publish.forwards(options)
    desc = describe(loaded, options, Extras(interface_id=spec.interface_id))
    bridged.refuse(options, loaded)
    try:
        handle = Handle(loaded, desc)
    except StartFailed as error:
        raise diagnosis.explain(error, options) from error
    hold: Hold | None = None
    try:
        rules = Rules(loaded, handle)
        network = publish.network_of(handle.text("vmnet_start_address"), handle.text("vmnet_subnet_mask"))
        publisher = Publisher(rules, forwards, spec.mac, network)
        publisher.begin()
        hold = reservation.hold(options, spec.mac, handle)
        if spec.user is not None:
            entitlement.drop(*spec.user)
    except VmnetError:
        if hold is not None:
            hold.release()
        handle.stop()
        raise
    _warn(options, handle)
    answered = {key: value for key, value in handle.parameters.items() if isinstance(value, int | str | UUID)}
    asked = {key: desc[key] for key in ("vmnet_network_identifier", "vmnet_shared_interface_name") if key in desc}
    return _Attached(handle, publisher, hold, plain(answered | asked))


def _mode(options: Shared | Host | Bridged) -> Literal["shared", "host", "bridged"]:
    if isinstance(options, netdev.Bridged):
        return "bridged"
    return "host" if isinstance(options, netdev.Host) else "shared"


def _warn(options: Shared | Host | Bridged, handle: Handle) -> None:
    """Say when the subnet that vmnet chose by itself is one that the host is on."""
    start, mask = handle.text("vmnet_start_address"), handle.text("vmnet_subnet_mask")
    if isinstance(options, netdev.Bridged) or options.start_address is not None or start is None or mask is None:
        return
    clash = diagnosis.clash_of(start, mask)
    if clash is not None:
        _LOG.warning("%s; %s", clash.sentence, clash.cure)


def _report(fd: int, report: Report) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        os.write(fd, msgspec.json.encode(report))
    os.close(fd)


def _live(
    spec: Spec,
    options: Shared | Host | Bridged,
    attached: _Attached,
    relay: Relay,
    wakee: int,
) -> None:
    """Until the VM is gone, the relay's loops have ended, or SIGTERM came."""
    waiting = select.poll()
    waiting.register(spec.life_fd, select.POLLIN)
    waiting.register(wakee, select.POLLIN)
    written: bytes | None = None
    started = time.time()
    while True:
        attached.publisher.refresh()
        counted = msgspec.json.encode(relay.counters)
        if counted != written:
            written = counted
            record = records.Record(
                pid=os.getpid(),
                vm_pid=spec.vm_pid,
                vm=spec.vm,
                netdev=spec.netdev,
                mode=_mode(options),
                mac=spec.mac,
                isolated=options.isolated,
                started=started,
                parameters=attached.known,
                counters=relay.counters,
                hostfwd=options.hostfwd,
                reservation=options.address,
            )
            try:
                records.write(record)
            except (OSError, VmnetError) as error:
                _LOG.warning("vmnet ls and vmnet show will not know this VM: %s", error)
                waiting.poll()
                return
        if waiting.poll(_REFRESH * 1000):
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
