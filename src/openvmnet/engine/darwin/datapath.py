"""The way of the packets between a vmnet interface and a VM's datagram socket: two threads, batch by batch.

How it works. QEMU's `-netdev dgram` takes and gives one frame a datagram, with nothing around it; its other end is
ours. `Relay` runs two loops, each with a batch of its own:

    down   vmnet_read, sendmsg_x      until vmnet is empty, then sleeps until its event
    up     recvmsg_x, vmnet_write     until the socket is empty, then sleeps in poll

No packet is looked at in Python unless something is wrong with it.

The event. Its callback, on a thread of vmnet's, only wakes the loop. As long as packets wait it comes again, and would
take the interpreter from the loop that reads them; so it stays armed only for what one read empties. When a second
read finds packets too, the loop disarms it, goes on by itself until vmnet is empty, arms it again, and reads once more:
what came in between is found by that read, what comes after it by the event.

The VM may be slower than vmnet, paused, or not yet booted: its socket is full. Linux says EAGAIN, and poll(2) knows
when there is room; macOS says ENOBUFS, and nothing tells of room. The loop tries again after 50 us, ten times at most:
that is how long a running VM takes. After that the VM is *full*: the event is disarmed, whatever it was, and the loop
sleeps, up to 20 ms at a time, until the batch is taken. Nothing turns, nothing is lost or reordered here; what comes
meanwhile waits in vmnet's own buffer, which drops when it is full, as a wire does.

All packets of a write go, or none. When vmnet refuses a batch each packet of it is tried alone, and the bad ones are
dropped and counted; when its buffers are exhausted the batch is tried again ten times, then dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING

import msgspec

from openvmnet.engine.darwin.batch import Batch
from openvmnet.errors import Stopped, VmnetError
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.handle import Handle

_LOG = logging.getLogger(__name__)

_DONTWAIT = socket.MSG_DONTWAIT
_TRIES, _PAUSE = 10, 50e-6  # s; vmnet-helper: fewer lose throughput, more make everything wait
_LONGEST = 0.02  # s between looks at a full VM
_MARGIN = 64  # octets more than the largest packet, so that one too long is seen to be
_LINE = 64  # octets that slots are a multiple of
_BUFFER = 4 << 20  # octets of a socket's receive buffer: about 2 ms at 16 Gbit/s
_LARGEST_DATAGRAM = 69632  # what QEMU takes
_GONE = (
    errno.EBADF,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EDESTADDRREQ,
    errno.ENOTCONN,
    errno.EPIPE,
)
_VAIN = 100  # times in a row that the VM's socket polls readable and gives nothing: its other end is shut


class Counters(msgspec.Struct):
    """What went each way, down being to the VM (octets: dropped ones too); `full`: how often the VM was, in batches."""

    down_packets: int = 0
    down_octets: int = 0
    down_batches: int = 0
    down_dropped: int = 0
    up_packets: int = 0
    up_octets: int = 0
    up_batches: int = 0
    up_dropped: int = 0
    full: int = 0


def socketpair() -> tuple[socket.socket, socket.socket]:
    """The relay's end and the VM's, with buffers that hold a burst."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for one in (ours, theirs):
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            _enlarge(one, option)
    return ours, theirs


def _enlarge(sock: socket.socket, option: int) -> None:
    size = _BUFFER
    while size > _LARGEST_DATAGRAM:  # macOS refuses what is beyond kern.ipc.maxsockbuf
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, size)
            return
        size //= 2


class Relay:
    """Moves packets between `handle` and `sock` from `start()` to `stop()`; `gone` is called once when the VM is."""

    def __init__(
        self,
        framework: Framework,
        handle: Handle,
        sock: socket.socket,
        *,
        gone: Callable[[], object] | None = None,
        pad: bool = True,
    ) -> None:
        self._handle, self._sock, self._pad = handle, sock, pad
        self._gone = gone
        self._recv, self._send = calls(framework)
        slot = -(-(handle.largest + _MARGIN) // _LINE) * _LINE
        self._down = Batch(max(1, min(handle.most_read, handle.octets // handle.largest)), slot)
        self._up = Batch(max(1, min(handle.most_written, handle.octets // handle.largest)), slot)
        self._over = False
        self._awake = threading.Event()
        self._waker, self._wakee = os.pipe()
        self._threads: list[threading.Thread] = []
        self._told: set[str] = set()
        self.counters = Counters()

    @property
    def geometry(self) -> tuple[int, int]:
        """Most packets of a batch to the VM, and the octets that each has room for."""
        return self._down.count, self._down.size

    def start(self) -> None:
        """Begin, both ways."""
        self._handle.on_available(self._awake.set)
        for loop, name in ((self._run_down, "vmnet to VM"), (self._run_up, "VM to vmnet")):
            thread = threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End both loops, and wait for them. The handle and the socket stay the caller's."""
        self._over = True
        self._awake.set()
        with contextlib.suppress(OSError):
            os.write(self._wakee, b"\0")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._threads.clear()
        for fd in (self._waker, self._wakee):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._waker = self._wakee = -1

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except Stopped:
            pass
        except VmnetError as error:
            _LOG.error("%s", error)
        if not self._over and self._gone is not None:
            gone, self._gone = self._gone, None
            gone()

    # From vmnet to the VM.

    def _run_down(self) -> None:
        handle, batch, awake = self._handle, self._down, self._awake
        read, packets, count, counters = handle.read, batch.packets, batch.count, self.counters
        handle.arm()
        streak = 0  # reads in a row that found packets
        while not self._over:
            status, got = read(packets, count)
            if status != Status.SUCCESS:
                self._say("read", "vmnet: read failed: %s", Status.of(status).text)
                handle.disarm()
                time.sleep(_LONGEST)
                continue
            if not got:
                if not handle.armed:
                    handle.arm()
                    streak = 0
                    continue
                streak = 0
                awake.wait()
                awake.clear()
                continue
            streak += 1
            if streak == 2 and handle.armed:
                handle.disarm()
            batch.read(got)
            if self._pad:
                batch.pad(got)
            sent = self._deliver(batch, got)
            counters.down_octets += batch.octets(got)
            batch.renew(got)
            counters.down_packets += sent
            counters.down_batches += 1
            counters.down_dropped += got - sent

    def _deliver(self, batch: Batch, count: int) -> int:
        """Send `count` packets to the VM; the number that it took. Raises Stopped when it is gone."""
        fd, send = self._sock.fileno(), self._send
        sent = dropped = 0
        while sent < count and not self._over:
            more = send(fd, batch.message(sent), count - sent, _DONTWAIT)
            if more > 0:
                sent += more
                continue
            code = ctypes.get_errno()
            if code == errno.EMSGSIZE:
                self._say("size", "a packet of %d octets is more than the VM's socket takes", batch.iov_len[sent])
                sent += 1
                dropped += 1
            elif code in (errno.EAGAIN, errno.ENOBUFS):
                if not self._await_room(code, batch, sent):
                    break
                sent += 1
            elif code in _GONE:
                raise Stopped("the VM has closed its socket")
            elif code != errno.EINTR:
                self._say("send", "the VM's socket fails: %s", os.strerror(code))
                dropped += count - sent
                sent = count
        return sent - dropped

    def _await_room(self, code: int, batch: Batch, at: int) -> bool:
        """Sleep until the VM takes packet `at`, which is sent here; False when the relay ends first."""
        fd, send = self._sock.fileno(), self._send
        room = select.poll()
        room.register(fd, select.POLLOUT)
        tries, pause = 0, _PAUSE
        while not self._over:
            if code == errno.EAGAIN:
                room.poll(1 if tries < _TRIES else _LONGEST * 1000)
            else:
                time.sleep(pause)
            tries += 1
            if tries == _TRIES:
                self.counters.full += 1
                if self._handle.armed:
                    self._handle.disarm()
            if tries >= _TRIES:
                pause = min(2 * pause, _LONGEST)
            if send(fd, batch.message(at), 1, _DONTWAIT) == 1:
                return True
            code = ctypes.get_errno()
            if code in _GONE:
                raise Stopped("the VM has closed its socket")
        return False

    # From the VM to vmnet.

    def _run_up(self) -> None:
        batch, recv, fd, counters = self._up, self._recv, self._sock.fileno(), self.counters
        messages, count = batch.messages, batch.count
        waiting = select.poll()
        waiting.register(fd, select.POLLIN)
        waiting.register(self._waker, select.POLLIN)
        vain = 0
        while not self._over:
            got = recv(fd, messages, count, _DONTWAIT)
            if got <= 0 or not batch.msg_datalen[0]:
                vain += 1
                if vain == _VAIN or (got < 0 and ctypes.get_errno() in _GONE):
                    raise Stopped("the VM has closed its socket")
                waiting.poll()
            else:
                vain = 0
            if got <= 0:
                continue
            batch.received(got)
            written = self._transmit(batch, got)
            counters.up_octets += batch.octets(got)
            batch.renew(got)
            counters.up_packets += written
            counters.up_batches += 1
            counters.up_dropped += got - written

    def _transmit(self, batch: Batch, count: int) -> int:
        """Write `count` packets to vmnet; the number that it took."""
        done = tries = 0
        while done < count:
            status, went = self._handle.write(batch.packet(done), count - done)
            if status == Status.SUCCESS and went > 0:
                done += went
            elif status == Status.BUFFER_EXHAUSTED or status == Status.SUCCESS:
                tries += 1
                if tries > _TRIES or self._over:
                    self._say("exhausted", "vmnet: write error: %s", Status.BUFFER_EXHAUSTED.text)
                    break
                time.sleep(_PAUSE)
            elif count - done > 1:
                return done + self._transmit_each(batch, done, count)
            else:
                self._refused(batch, done, status)
                break
        return done

    def _transmit_each(self, batch: Batch, first: int, count: int) -> int:
        done = 0
        for at in range(first, count):
            status, _ = self._handle.write(batch.packet(at), 1)
            if status == Status.SUCCESS:
                done += 1
            else:
                self._refused(batch, at, status)
        return done

    def _refused(self, batch: Batch, at: int, status: int) -> None:
        length = batch.iov_len[at]
        if length > self._handle.largest:
            self._say("big", "vmnet: packet is too big, %d > %d", length, self._handle.largest)
        else:
            self._say(f"write {status}", "vmnet: write error: %s (%d octets)", Status.of(status).text, length)

    def _say(self, what: str, message: str, *values: object) -> None:
        """Log the first of each kind; the rest is counted."""
        if what not in self._told:
            self._told.add(what)
            _LOG.warning(message, *values)


def calls(framework: Framework) -> tuple[Callable[..., int], Callable[..., int]]:
    """recvmsg_x and sendmsg_x, or what stands in for them where the system has none: one datagram a call."""
    return framework.batch_calls() or _single_calls()


def _single_calls() -> tuple[Callable[..., int], Callable[..., int]]:
    """recvmsg(2) and sendmsg(2) as batches of one, through the same arrays."""
    from openvmnet.engine.darwin.single import recvmsg_x, sendmsg_x

    return recvmsg_x, sendmsg_x
