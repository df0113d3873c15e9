"""One interface of vmnet.framework: started, armed, read, written and stopped, by the framework's rules.

How it works. `vmnet_start_interface` has four ends: it returns NULL and calls no handler; it returns an interface and
calls the handler with success or with an error; it returns one and calls nobody; or it never returns. `_Start` waits
for whichever comes first, and for no longer than it was told. A success that comes too late is stopped at once by
whoever brings it, so that nothing runs that nobody knows of.

The event is level-triggered: its callback comes again, on a thread of vmnet's, for as long as packets wait and it is
set. `arm` and `disarm` set and clear it; a callback that was on its way may still come after `disarm`. The blocks
stay until the stop has been answered; where no answer comes, for ever, since the system may still call them.

A call on an interface that has been stopped would crash, and a stop may come at any time: from another thread, from a
signal handler or the garbage collector on a thread that is inside such a call. So every call is counted while it
lasts, a stop waits for no lock that a call holds, and the last call that leaves after a stop was asked for carries it
out. Who asked waits for the end, unless it is the very thread that has to leave first, or the one of the event's
callback, for which vmnet itself waits.

XPC and vmnet do not survive fork(2), so that in a child every interface is dead, and says so.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import threading
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import patience, xpc
from openvmnet.engine.darwin.blocks import Block, Kind
from openvmnet.engine.darwin.framework import DOCUMENTED_OCTETS, DOCUMENTED_PACKETS, PACKETS_AVAILABLE
from openvmnet.errors import HostError, Stopped, VmnetError
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.xpc import Scalar, Value

_LOG = logging.getLogger(__name__)

VIRTIO_HEADER = 12  # octets before each frame when the interface has vmnet_enable_virtio_header
_LAST = 2.0  # s that an interface's stop has at the process's end
_FEW = 16  # frames of 64 KB a call: what vmnet-helper found enough, and more than the documented octets allow

_forever: list[object] = []
"""What the system may call at any time, since it never said that it will not."""


class StartFailed(HostError):
    """vmnet refused: `status` is its code. What it means is for `diagnosis` to find out."""


class _Start:
    """One start: the call, its handler, and the time that they have."""

    def __init__(self, framework: Framework, network: int | None) -> None:
        self._framework = framework
        self._network = network
        self._news = threading.Condition()
        self._returned = self._abandoned = False
        self._ref: int | None = None
        self._raised: BaseException | None = None
        self._status: int | None = None
        self._parameters: dict[str, Value] = {}
        self._block = Block.take(framework, Kind.NEWS, self._answer)

    def run(self, desc: Mapping[str, Scalar], queue: int, seconds: float) -> tuple[int, dict[str, Value]]:
        """The interface and its parameters. Raises StartFailed, Late, MissingFeature for a key."""
        self._queue = queue
        threading.Thread(target=self._call, args=(desc, queue), name="vmnet_start_interface", daemon=True).start()
        with self._news:
            over = self._news.wait_for(self._settled, seconds)
            if not over:
                self._abandoned = True
                _forever.append(self)
                raise patience.Late("vmnet_start_interface", seconds)
        self._block.give_back()
        if self._raised is not None:
            raise self._raised
        if not self._ref:
            raise StartFailed("unable to create interface with requested params", status=Status.FAILURE)
        status = Status.of(self._status or 0)
        if status is not Status.SUCCESS:
            detail = status.text if self._status == status else f"unknown vmnet error {self._status}"
            raise StartFailed(f"cannot create vmnet interface: {detail}", status=status)
        return self._ref, self._parameters

    def _settled(self) -> bool:
        if not self._returned:
            return False
        return self._raised is not None or not self._ref or self._status is not None

    def _call(self, desc: Mapping[str, Scalar], queue: int) -> None:
        ref = None
        raised: BaseException | None = None
        try:
            with xpc.dictionary(self._framework, desc) as wanted:
                if self._network is None:
                    ref = self._framework.call("vmnet_start_interface", wanted, queue, self._block.pointer)
                else:
                    ref = self._framework.call(
                        "vmnet_interface_start_with_network", self._network, wanted, queue, self._block.pointer
                    )
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            raised = error
        with self._news:
            self._ref, self._raised, self._returned = ref, raised, True
            self._news.notify_all()
            late = self._abandoned and self._settled()
        if late:
            self._stop_late()

    def _answer(self, status: int, parameters: int | None) -> None:
        values = xpc.read_dictionary(self._framework, parameters) if status == Status.SUCCESS else {}
        with self._news:
            self._status, self._parameters = status, values
            self._news.notify_all()
            late = self._abandoned and self._settled()
        if late:
            threading.Thread(target=self._stop_late, daemon=True).start()

    def _stop_late(self) -> None:
        if not self._ref or self._status != Status.SUCCESS:
            return
        _LOG.warning("vmnet started an interface that nobody waits for any more: it is stopped")
        done = Block.take(self._framework, Kind.COMPLETION, lambda _status: None)
        _forever.append(done)
        self._framework.call("vmnet_stop_interface", self._ref, self._queue, done.pointer)


class Handle:
    """A started interface. `parameters` are what vmnet answered, by the names of `symbols.KEYS`.

    `largest` is the most octets of one packet, virtio header included; `most_read` and `most_written` the most packets
    of one call; a call's packets together have at most `octets`.
    """

    def __init__(
        self,
        framework: Framework,
        desc: Mapping[str, Scalar],
        *,
        network: int | None = None,
        timeout: float = patience.START,
    ) -> None:
        self._framework = framework
        self._queue = int(framework.system_call("dispatch_queue_create", b"openvmnet", None))
        try:
            self._ref, self.parameters = _Start(framework, network).run(desc, self._queue, timeout)
        except BaseException as error:
            if not isinstance(error, patience.Late):  # then it may still be used
                framework.system_call("dispatch_release", self._queue)
            raise
        self._read = framework.vmnet.function("vmnet_read")
        self._write = framework.vmnet.function("vmnet_write")
        self._read_count, self._write_count = ctypes.c_int(), ctypes.c_int()
        self._read_at, self._write_at = ctypes.addressof(self._read_count), ctypes.addressof(self._write_count)
        # Re-entrant: a signal handler or the garbage collector may come on a thread that is in here.
        self._lock, self._event = threading.RLock(), threading.RLock()
        self._inside: list[int] = []  # the threads that are in a call, once for each
        self._finishing = False
        self._ended = threading.Event()
        self._failure: VmnetError | None = None
        self._caller: int | None = None  # vmnet's thread, while it is in the event's callback
        self._wake: Callable[[], object] = _nothing
        self._block = Block.take(framework, Kind.NEWS, self._available)
        self.armed = False
        self._gone: str | None = None  # why there is no interface any more
        header = VIRTIO_HEADER if desc.get("vmnet_enable_virtio_header") else 0
        self.mtu = self.number("vmnet_mtu", 1500)
        self.largest = self.number("vmnet_max_packet_size", self.mtu + 14) + header
        self.most_read = self.number("vmnet_read_max_packets", DOCUMENTED_PACKETS)
        self.most_written = self.number("vmnet_write_max_packets", DOCUMENTED_PACKETS)
        # A macOS that says how many packets it takes has been seen to take more octets than are documented.
        newer = "vmnet_read_max_packets" in self.parameters
        self.octets = max(DOCUMENTED_OCTETS, self.largest * _FEW) if newer else DOCUMENTED_OCTETS
        _live.add(self)

    def number(self, key: str, otherwise: int) -> int:
        """A parameter that is a number."""
        value = self.parameters.get(key)
        return value if isinstance(value, int) and value > 0 else otherwise

    def text(self, key: str) -> str | None:
        """A parameter that is text."""
        value = self.parameters.get(key)
        return value if isinstance(value, str) else None

    @property
    def stopped(self) -> bool:
        """Whether there is no interface any more."""
        return self._gone is not None

    @property
    def ref(self) -> int:
        """interface_ref, for calls between `enter` and `leave`."""
        return self._ref

    def enter(self) -> None:
        """A call on the interface begins. Raises Stopped; else `leave` follows."""
        with self._lock:
            # First in, then the look: a stop in between sees that somebody is in here.
            self._inside.append(threading.get_ident())
            if self._gone is None:
                return
        self.leave()
        raise Stopped(self._gone)

    def leave(self) -> None:
        """It is over; where a stop was asked for meanwhile, the last one to leave carries it out."""
        with self._lock:
            self._inside.remove(threading.get_ident())
            last = self._gone is not None and not self._inside and not self._finishing
            self._finishing = self._finishing or last
        if last:
            self._finish(patience.STOP)

    # Packets. One thread at a time reads, one at a time writes.

    def read(self, packets: int, count: int) -> tuple[int, int]:
        """vmnet_read into `count` struct vmpktdesc at address `packets`: the status, and how many packets came."""
        self.enter()
        try:
            self._read_count.value = count
            status: int = self._read(self._ref, packets, self._read_at)
            return status, self._read_count.value
        finally:
            self.leave()

    def write(self, packets: int, count: int) -> tuple[int, int]:
        """vmnet_write of `count` struct vmpktdesc at address `packets`: the status, and how many packets went."""
        self.enter()
        try:
            self._write_count.value = count
            status: int = self._write(self._ref, packets, self._write_at)
            return status, self._write_count.value
        finally:
            self.leave()

    # The event.

    def on_available(self, wake: Callable[[], object] | None) -> None:
        """What is called, on a thread of vmnet's, while packets wait and the event is armed."""
        self._wake = wake or _nothing

    def arm(self) -> None:
        """Have the event from now on: at once, when packets wait."""
        self._set_event(True)

    def disarm(self) -> None:
        """No event from now on, but for one that is on its way."""
        self._set_event(False)

    def _set_event(self, armed: bool) -> None:
        self.enter()
        try:
            with self._event:
                if armed != self.armed:
                    self._call_event(armed)
                    self.armed = armed
        finally:
            self.leave()

    def _call_event(self, armed: bool) -> None:
        queue, block = (self._queue, self._block.pointer) if armed else (None, None)
        name = "vmnet_interface_set_event_callback"
        status = Status.of(self._framework.call(name, self._ref, PACKETS_AVAILABLE, queue, block))
        if status is not Status.SUCCESS:
            what = "set" if armed else "cleared"
            raise HostError(f"vmnet's event cannot be {what}: {status.text}", status=status)

    def _available(self, _mask: int, _event: int) -> None:
        self._caller = threading.get_ident()
        try:
            self._wake()
        finally:
            self._caller = None

    # The end.

    def stop(self, timeout: float = patience.STOP) -> None:
        """Event off, then stop, and wait for its answer. The second time does nothing; any thread may call it.

        Raises HostError where vmnet refuses, Late where it gives no answer in `timeout` seconds.
        """
        with self._lock:
            if self._gone is not None:
                return
            self._gone = "the interface is stopped"
            first = not self._inside
            self._finishing = self._finishing or first
        if first:
            self._finish(timeout)
        elif threading.get_ident() not in self._inside:
            self._ended.wait(timeout)
        if self._failure is not None:
            raise self._failure

    def _finish(self, timeout: float) -> None:
        """Nobody is in a call any more, nor will be."""
        self._wake = _nothing
        try:
            with contextlib.suppress(VmnetError):
                self._call_event(False)
            self._stop(timeout)
        except VmnetError as error:
            self._failure = error
        self._ended.set()

    def _stop(self, timeout: float) -> None:
        answered = threading.Event()
        outcome: list[int] = []

        def answer(status: int) -> None:
            outcome.append(status)
            answered.set()

        done = Block.take(self._framework, Kind.COMPLETION, answer)

        def call() -> None:
            status = self._framework.call("vmnet_stop_interface", self._ref, self._queue, done.pointer)
            if status == Status.SUCCESS:
                answered.wait()
                status = outcome[0]
            _forever.remove(kept)
            if Status.of(status) is not Status.SUCCESS:
                text = Status.of(status).text
                raise HostError(f"vmnet does not stop the interface: {text}", status=Status.of(status))
            done.give_back()
            self._block.give_back()
            self._framework.system_call("dispatch_release", self._queue)

        kept = (self, done)
        _forever.append(kept)
        _live.discard(self)
        if self._caller == threading.get_ident():
            threading.Thread(target=call, name="vmnet_stop_interface", daemon=True).start()
        else:
            patience.within(timeout, "vmnet_stop_interface", call)

    def forked(self) -> None:
        """In the child of a fork: the interface is the parent's."""
        self._gone = "the interface belongs to the process that started it, and this one is a fork of it"
        self._lock, self._inside, self._finishing = threading.RLock(), [], True
        self._ended = threading.Event()
        self._ended.set()


def _nothing() -> None:
    """Nobody waits for packets."""


_live: set[Handle] = set()
"""Every interface that runs: the system has pointers into these, so none may be collected."""


def _forked() -> None:
    for handle in _live:
        handle.forked()
    _forever.extend(_live)
    _live.clear()


def _stop_all() -> None:
    """What a program forgot goes with it; vmnet's callbacks must not meet an interpreter that is half gone."""
    for handle in list(_live):
        try:
            handle.stop(timeout=_LAST)
        except VmnetError as error:
            _LOG.warning("%s", error)


os.register_at_fork(after_in_child=_forked)
atexit.register(_stop_all)
