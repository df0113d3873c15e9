"""The library's `Link` over an interface of vmnet.framework.

How it works. The contract wants a descriptor that polls readable while frames wait; vmnet has an event instead, which
is called again and again while they do. Between the two is a pipe:

    vmnet's thread    the event's callback queues the link for the keeper, and returns
    keeper's thread   disarms the event, then writes an octet into the pipe: it polls readable from now on
    a reader          reads packets; when it finds that vmnet is empty it takes the octet out, arms the event, and
                      reads once more, so that what came in between is not waited for

An event that was on its way when the last packet was read makes the pipe readable in vain, once; the next read finds
nothing and takes the octet out. While nobody reads, the octet stays, the event is disarmed, and nothing turns. The
keeper is one thread for all links of the process: to clear the event inside its own callback is nothing that Apple says
is allowed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from openvmnet.contract.interface import Parameters
from openvmnet.engine.darwin import bridged, diagnosis, framework, publish, reservation
from openvmnet.engine.darwin.batch import Batch
from openvmnet.engine.darwin.description import Extras, describe
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.mac import Mac
from openvmnet.engine.darwin.ports import Rules
from openvmnet.errors import LinkError, VmnetError
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openvmnet.contract.interface import Frame, LinkRequest
    from openvmnet.engine.darwin.bootptab import Hold
    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.network26 import Network

_TRIES, _PAUSE = 10, 50e-6  # s


class _Keeper:
    """The thread that disarms events."""

    def __init__(self) -> None:
        self._noticed: queue.SimpleQueue[tuple[VmnetLink, int]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.put = self._noticed.put

    def begin(self) -> None:
        """Have the thread; called before any event is armed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="vmnet events", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            link, arming = self._noticed.get()
            with contextlib.suppress(VmnetError):  # stopped in between
                link.noticed(arming)
            del link  # else the last one would be kept until the next


_keeper = _Keeper()


def _forked() -> None:
    global _keeper  # noqa: PLW0603 - the thread is the parent's
    _keeper = _Keeper()


os.register_at_fork(after_in_child=_forked)


class VmnetLink:
    """A running interface as the library's `Link`."""

    def __init__(self, loaded: Framework, handle: Handle, interface_id: UUID, kept: Hold | None = None) -> None:
        self.handle = handle
        self._kept = kept  # the line that keeps its address
        self.framework = loaded
        self.parameters = _parameters(handle, interface_id)
        self.tap: int | None = None
        fit = max(1, handle.octets // handle.largest)
        self._incoming = Batch(min(handle.most_read, fit), handle.largest)
        self._outgoing = Batch(min(handle.most_written, fit), handle.largest)
        self._reading, self._writing = threading.Lock(), threading.Lock()
        # What says whether the pipe has its octet; held for moments, and never around a call that waits.
        self._state = threading.RLock()
        self._signalled = self._queued = False
        self._arming = 0  # counts the times that the event was armed, so that a late callback is known as one
        self._pipe = os.pipe()
        for fd in self._pipe:
            os.set_blocking(fd, False)
        _keeper.begin()
        handle.on_available(self._available)
        handle.arm()

    def fileno(self) -> int:
        """The pipe's reading end, until the link is collected."""
        return self._pipe[0]

    def _available(self) -> None:
        if not self._queued:
            self._queued = True
            _keeper.put((self, self._arming))

    def noticed(self, arming: int) -> None:
        """On the keeper's thread: packets wait, or did when the event was armed for the `arming`th time."""
        self._queued = False
        with self._state:
            if self.handle.armed and arming == self._arming:
                self.handle.disarm()
                self._signal()

    def _signal(self) -> None:
        if not self._signalled:
            self._signalled = True
            os.write(self._pipe[1], b"\0")

    def _calm(self) -> None:
        if self._signalled:
            self._signalled = False
            os.read(self._pipe[0], 1)

    def read(self, limit: int) -> list[bytes]:
        """At most `limit` frames; see `openvmnet.contract.interface.Link`."""
        with self._reading:
            frames = self._take(limit)
            if len(frames) < limit and self._rest():
                frames += self._take(limit - len(frames))
            return frames

    def _rest(self) -> bool:
        """vmnet is empty: wait for its event. False where it is awaited already."""
        with self._state:
            self._calm()
            if self.handle.armed:
                return False
            self._arming += 1
            self.handle.arm()
            return True

    def _take(self, limit: int) -> list[bytes]:
        batch = self._incoming
        status, count = self.handle.read(batch.packets, min(limit, batch.count))
        if status != Status.SUCCESS:
            known = Status.of(status)
            raise LinkError(f"vmnet: read failed: {known.text}", status=known)
        if not count:
            return []
        size, data = batch.size, batch.data
        frames = [bytes(data[at * size : at * size + length]) for at, length in enumerate(batch.vm_pkt_size[:count])]
        batch.renew(count)
        return frames

    def write(self, frames: Sequence[Frame]) -> None:
        """Send one batch, all or an error; see `openvmnet.contract.interface.Link`."""
        with self._writing:
            self._write(frames)

    def _write(self, frames: Sequence[Frame]) -> None:
        batch, count = self._outgoing, len(frames)
        for at, frame in enumerate(frames):
            batch.put(at, frame)
        done = tries = 0
        while done < count:
            status, went = self.handle.write(batch.packet(done), count - done)
            if status == Status.SUCCESS and went:
                done += went
                continue
            if status in (Status.SUCCESS, Status.BUFFER_EXHAUSTED) and tries < _TRIES:
                tries += 1
                time.sleep(_PAUSE)
                continue
            known = Status.BUFFER_EXHAUSTED if status == Status.SUCCESS else Status.of(status)
            raise LinkError(f"vmnet: write error: {known.text}", sent=done, status=known)

    def close(self) -> None:
        """Stop the interface; the pipe is not readable any more, so that nobody who polls it turns."""
        self.handle.stop()
        if self._kept is not None:
            self._kept.release()
        with self._state:
            self._calm()

    def forked(self) -> None:
        """In the child of a fork: nothing of it is ours, not even the pipe, whose numbers stay taken."""
        self.handle.forked()
        if self._kept is not None:
            self._kept.forked()
        for fresh, fd in zip(os.pipe(), self._pipe, strict=True):
            os.dup2(fresh, fd, inheritable=False)
            os.close(fresh)
        self._signalled = False
        self._state, self._reading, self._writing = threading.RLock(), threading.Lock(), threading.Lock()

    def __del__(self) -> None:
        for fd in self._pipe:
            with contextlib.suppress(OSError):
                os.close(fd)


def _parameters(handle: Handle, interface_id: UUID) -> Parameters:
    given = handle.parameters.get("vmnet_interface_id")
    return Parameters(
        mtu=handle.mtu,
        max_packet_size=handle.largest,
        interface_id=given if isinstance(given, UUID) else interface_id,
        mac_address=handle.text("vmnet_mac_address"),
        start_address=handle.text("vmnet_start_address"),
        end_address=handle.text("vmnet_end_address"),
        subnet_mask=handle.text("vmnet_subnet_mask"),
        nat66_prefix=handle.text("vmnet_nat66_prefix"),
        read_max_packets=handle.most_read,
        write_max_packets=handle.most_written,
    )


def open_link(request: LinkRequest, loaded: Framework | None = None) -> VmnetLink:
    """A link for what the library was asked for. Raises with the cause that `diagnosis` finds."""
    loaded = loaded or framework.load()
    forwards = publish.forwards(request.options)
    publish.refuse_leased(forwards)
    extras = Extras(interface_id=request.interface_id, allocate_mac_address=request.allocate_mac_address)
    reservation.refuse(request.options, Mac())
    desc = describe(loaded, request.options, extras)
    bridged.refuse(request.options, loaded)
    try:
        handle = Handle(loaded, desc)
    except StartFailed as error:
        raise diagnosis.explain(error, request.options) from error
    try:
        publish.Publisher(Rules(loaded, handle), forwards, None, None).begin()
        kept = reservation.hold(request.options, handle.text("vmnet_mac_address"), handle)
    except VmnetError:
        handle.stop()
        raise
    return VmnetLink(loaded, handle, request.interface_id, kept)


def open_on(network: Network, *, isolated: bool = False, extras: Extras | None = None) -> VmnetLink:
    """A link on a network object of macOS 26. Its interface id and MAC are new each time."""
    handle = network.start(extras or Extras(allocate_mac_address=True), isolated=isolated)
    return VmnetLink(network.framework, handle, uuid4())
