"""The vmnet contract: what an interface promises to a program, over whatever moves its frames.

How it works. An engine gives a `Link`: a descriptor that polls readable while frames wait, a read and a write that
move one batch and never block. `Interface` makes vmnet's contract of it, the same on every host:

- `read` moves batches of at most 200 packets and 256 KB until nothing is there or the caller has enough.
- `write` sends all frames or raises. What is wrong with a frame is found before the first one is sent; when the
  machine fails in the middle, the error says how many had gone.
- `on_packets_available` is level-triggered, and armed only while the consumer is ready: see `dispatch`.
- Every mistake of the caller's is an error with a sentence and a `Status`.

`stop` may come from any thread, from a callback, from a signal handler or from the garbage collector, while others
read and write. It takes no lock that a reader holds. The link sees to it that a call under way ends well; whoever
waits in `wait` or in `async for` is woken. An interface that is forgotten is stopped when it is collected, or when the
program ends. One with a callback is kept by that callback.

After a fork the interface stays the parent's alone. The child gives up what it inherited, so that the port lives
exactly as long as the parent holds it, and every use in the child is an error.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref
from typing import TYPE_CHECKING, Protocol, Self
from uuid import UUID

import msgspec

from openvmnet.contract.dispatch import dispatcher
from openvmnet.contract.ending import Ending
from openvmnet.errors import CallerError, LinkError, PacketTooBig, Stopped
from openvmnet.netdev import Bridged, Host, Shared
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from openvmnet.contract.aio import Frames
    from openvmnet.contract.dispatch import Source

MAX_PACKETS = 200  # of one call on a link; vmnet.framework's documented floor
MAX_OCTETS = 256 * 1024  # of one call on a link, vmnet.framework's too
HEADER = 14  # octets of an Ethernet header; max_packet_size is the MTU and these

Frame = bytes | bytearray | memoryview
_PLAIN = {bytes, bytearray}


class Parameters(msgspec.Struct, frozen=True):
    """An interface as it came up; sizes in octets, addresses as text.

    `mac_address` is the one to use, None where none was asked for: then any will do. The four addresses are None where
    the mode has none; `start_address` is the gateway. `network` is the name that `vmnet show` knows, if there is one.
    """

    mtu: int
    max_packet_size: int
    interface_id: UUID
    mac_address: str | None = None
    start_address: str | None = None
    end_address: str | None = None
    subnet_mask: str | None = None
    nat66_prefix: str | None = None
    read_max_packets: int = MAX_PACKETS
    write_max_packets: int = MAX_PACKETS
    network: str | None = None


class LinkRequest(msgspec.Struct, frozen=True):
    """What an engine's `open_link(request) -> Link` is asked for; `options` are validated.

    `interface_id` decides the MAC: the same again gets the same one. `name` and `linger` (seconds) are the network's,
    for engines that have named networks; `force` takes addresses that another network overlaps.
    """

    options: Shared | Host | Bridged
    interface_id: UUID
    allocate_mac_address: bool = True
    name: str | None = None
    linger: float = 5.0
    force: bool = False


class Link(Protocol):
    """What an engine gives: frames in, frames out, nothing blocks. Any thread may call anything at any time."""

    @property
    def parameters(self) -> Parameters:
        """As the interface came up; they do not change."""
        ...

    @property
    def tap(self) -> int | None:
        """The TAP's descriptor, where the engine has one."""
        ...

    def fileno(self) -> int:
        """A descriptor that polls readable while `read` would give frames, or would raise; the same for life.

        Level-triggered: whoever starts to poll while frames wait learns of them. The number stays taken, by this link
        or by nothing that is readable for ever, until the link is collected.
        """
        ...

    def read(self, limit: int) -> list[bytes]:
        """At most `limit` frames, in order; fewer than `limit` means that nothing more was there, [] nothing at all.

        The caller sees to it that `limit` is within `read_max_packets`, and within 256 KB of `max_packet_size` each.
        Raises Stopped after `close`, LinkError where the machine failed.
        """
        ...

    def write(self, frames: Sequence[Frame]) -> None:
        """Send one batch: within `write_max_packets` and 256 KB, each frame of 14 to `max_packet_size` octets.

        Raises Stopped after `close`, LinkError with the number of frames that had gone where the machine failed.
        """
        ...

    def close(self) -> None:
        """Give the port back; the second time does nothing. A call under way on another thread ends by itself."""
        ...

    def forked(self) -> None:
        """In the child of a fork: give up what was inherited, and do nothing that the parent would notice.

        Afterwards `read` and `write` raise Stopped, and `close` does nothing.
        """
        ...


class _Core:
    """What outlives the Interface object until the port is given back."""

    __slots__ = ("__weakref__", "ending", "link", "pid", "source")

    def __init__(self, link: Link) -> None:
        self.link = link
        self.source: Source | None = None
        self.ending = Ending()
        self.pid = os.getpid()

    def shut(self) -> None:
        """Give it all back. The link is last: who polls its descriptor has to let go of it first."""
        self.ending.end()
        self.forget()
        self.link.close()

    def forget(self) -> None:
        """Tell nobody of packets any more."""
        source, self.source = self.source, None
        if source is not None:
            dispatcher.forget(source)

    def forked(self) -> None:
        """In the child of a fork: a thread that is not here may have held the lock of what it waited for."""
        self.ending = Ending()
        self.ending.end()
        self.source = None
        self.link.forked()


class Interface:
    """A running interface: a port on a network, for this program. `start` makes it; a context manager."""

    def __init__(self, link: Link) -> None:
        parameters = link.parameters
        self._parameters = parameters
        fit = max(1, MAX_OCTETS // parameters.max_packet_size)
        self._read_batch = min(parameters.read_max_packets, fit)
        self._write_batch = min(parameters.write_max_packets, fit)
        self._link_read = link.read
        self._link_write = link.write
        self._most = parameters.max_packet_size
        self._core = _Core(link)
        self._watching = threading.RLock()
        self._finalizer = weakref.finalize(self, self._core.shut)
        _alive.add(self._core)

    @property
    def parameters(self) -> Parameters:
        """As it came up."""
        return self._parameters

    @property
    def fd(self) -> int | None:
        """The TAP's descriptor, None where the engine has none (macOS); it is the interface's to close."""
        self._check()
        return self._core.link.tap

    @property
    def running(self) -> bool:
        """Whether it has not been stopped."""
        return not self._core.ending.ended

    def fileno(self) -> int:
        """A descriptor to poll for reading, for `select` and event loops; `stop` does not wake who polls it."""
        self._check()
        return self._core.link.fileno()

    def read(self, limit: int | None = None) -> list[bytes]:
        """Up to `limit` frames that have come (None: `read_max_packets`), without waiting; [] when nothing is there.

        Each is a whole Ethernet frame without its check sequence. Having read makes the consumer ready again.
        Raises Stopped after `stop`, LinkError where the machine failed, CallerError for a limit that is none.
        """
        if limit is None:
            limit = self._parameters.read_max_packets
        elif type(limit) is not int or limit < 1:
            raise CallerError(f"read() takes a number of frames from 1 on, not {limit!r}")
        batch = self._read_batch
        ask = min(limit, batch)
        try:
            frames = self._link_read(ask)
            if len(frames) == ask and limit > ask:
                while len(frames) < limit:
                    ask = min(limit - len(frames), batch)
                    more = self._link_read(ask)
                    frames += more
                    if len(more) < ask:
                        break
        except Stopped:
            self._check()
            raise
        source = self._core.source
        if source is not None:
            source.was_read()
        return frames

    def write(self, frames: Iterable[Frame]) -> None:
        """Send whole Ethernet frames, all or an error.

        Raises PacketTooBig for a frame over `max_packet_size` and CallerError for what is no frame: nothing was sent
        then. Raises LinkError where the machine failed, with the number of frames that had gone; Stopped after `stop`.
        """
        checked = _frames(frames, self._most)
        batch = self._write_batch
        try:
            if len(checked) <= batch:
                self._link_write(checked)
                return
            for at in range(0, len(checked), batch):
                try:
                    self._link_write(checked[at : at + batch])
                except LinkError as error:
                    error.sent += at
                    raise
        except Stopped:
            self._check()
            raise

    def on_packets_available(self, callback: Callable[[], object] | None) -> None:
        """Have `callback()` called, on a thread of openvmnet's, while frames wait; None ends that.

        It is called again and again while frames remain, never twice at a time, and only while the consumer is ready:
        after a callback that returned False, or that did not read, the next call comes after the next `read` or `arm`.
        A callback should be short, since all interfaces of a process share the thread; it may call anything here.
        Once this has returned, no call of an earlier callback begins; one that runs is not waited for.
        """
        if callback is not None and not callable(callback):
            raise CallerError(f"on_packets_available() takes a function without arguments, or None, not {callback!r}")
        self._check()
        core = self._core
        with self._watching:
            core.forget()
            if callback is not None:
                try:
                    core.source = dispatcher.watch(core.link.fileno(), callback)
                except OSError:  # stopped in between, the descriptor is none any more
                    self._check()
                    raise
        if core.ending.ended:  # stop came in between, and may not have seen the source
            core.forget()
            self._check()

    def arm(self) -> None:
        """The consumer is ready again: the callback is called if frames wait. Harmless at any time."""
        self._check()
        source = self._core.source
        if source is not None:
            source.arm()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a frame may be read; False when `timeout` seconds were over first. Raises Stopped on `stop`."""
        if timeout is not None and (not isinstance(timeout, int | float) or not 0 <= timeout < 1e6):
            raise CallerError(f"wait() takes a number of seconds from 0 to 1,000,000, or None, not {timeout!r}")
        self._check()
        poll = select.poll()
        poll.register(self._core.link.fileno(), select.POLLIN)
        read, write = os.pipe()
        try:
            poll.register(read, select.POLLIN)
            with self._core.ending.waking(lambda: _ring(write)):
                events = poll.poll(None if timeout is None else timeout * 1000)
        finally:
            os.close(read)
            os.close(write)
        self._check()
        return bool(events)

    def stop(self) -> None:
        """Give the port back, from any thread; a second time does nothing. Who waits here is woken."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __aiter__(self) -> Frames:
        """`async for frames in interface`: lists of frames as they come, until the interface is stopped."""
        from openvmnet.contract.aio import Frames

        self._check()
        return Frames(self.read, self._core.link.fileno(), self._core.ending)

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<{type(self).__name__} {self._parameters.interface_id} {state}>"

    def _check(self) -> None:
        """Raise Stopped, in words that say why, if it is not running."""
        if not self._core.ending.ended:
            return
        if self._core.pid != os.getpid():
            raise Stopped(
                f"this interface belongs to process {self._core.pid}, from which this one was forked: "
                "start one in the process that uses it",
                status=Status.INVALID_ACCESS,
            )
        raise Stopped("this interface was stopped: start another")


_alive: weakref.WeakSet[_Core] = weakref.WeakSet()


def _forked() -> None:
    for core in list(_alive):
        core.forked()


os.register_at_fork(after_in_child=_forked)


def _ring(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, b"\0")


def _frames(frames: Iterable[Frame], most: int) -> Sequence[Frame]:
    """The frames as a sequence, each found to be one of 14 to `most` octets."""
    if type(frames) is not list and type(frames) is not tuple:
        if isinstance(frames, bytes | bytearray | memoryview | str):
            raise CallerError("write() takes a list of frames; a single one is written as write([frame])")
        try:
            frames = list(frames)
        except TypeError as error:
            raise CallerError(f"write() takes a list of frames, not {frames!r}") from error
    if not set(map(type, frames)) <= _PLAIN:
        frames = [_octets(frame) for frame in frames]
    sizes = list(map(len, frames))
    if sizes and max(sizes) > most:
        size = next(size for size in sizes if size > most)
        raise PacketTooBig(
            f"packet is too big, {size} > {most}: an interface takes frames up to its max_packet_size",
            size=size,
            limit=most,
        )
    if sizes and min(sizes) < HEADER:
        raise CallerError(f"a frame of {min(sizes)} octets is none: Ethernet's header alone has {HEADER}")
    return frames


def _octets(frame: object) -> Frame:
    if isinstance(frame, bytes | bytearray):
        return frame
    try:
        return bytes(memoryview(frame))  # type: ignore[arg-type] # what is no buffer is a TypeError, told below
    except (TypeError, ValueError, BufferError, NotImplementedError) as error:
        raise CallerError(f"a frame is bytes, not {type(frame).__name__}") from error
