"""Datagrams in batches: recvmmsg(2) and sendmmsg(2), by ctypes.

A `Batch` is one array of struct mmsghdr, laid out once: message *i* has one iovec, which points at slot *i* of one
anonymous mapping, and, where the sender matters, a struct sockaddr_storage of its own, where its mark matters, room for
one control message. After that no message costs an object. The lengths are the only thing that changes between a
receive and a send, and they lie at a constant distance from each other, so they are copied for a whole batch at once,
as a strided memoryview slice:

    recv()  iov_len of every slot used before := the slot's size        (so that it is ready to take a datagram)
            recvmmsg
            iov_len of every message received := its msg_len            (so that it is ready to be sent on)
    send()  sendmmsg

A relay is therefore `recv(one)` and `send(other)`, whatever the number of datagrams, and a send that stops half-way can
be taken up again at any message. With `names`, the sender's address stays where the kernel wrote it, and an answer put
into the slot goes back to it with nobody having looked at it.

iov_len is a size_t; a datagram's length fits in its low 32 bits, whose place depends on the byte order of the machine.
Pages of the mapping that no datagram has reached cost nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)

SOCKADDR = 128  # sizeof(struct sockaddr_storage)
_DONTWAIT = socket.MSG_DONTWAIT
_TRUNC = socket.MSG_TRUNC
_WORD = 4


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("hdr", _Msghdr), ("len", ctypes.c_uint))


_recvmmsg = _libc.recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
_sendmmsg = _libc.sendmmsg
_sendmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int)

_sendmsg = _libc.sendmsg
_sendmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

_SOL_UDP, _UDP_SEGMENT = 17, 103
_SEGMENTS = 64  # UDP_MAX_SEGMENTS until Linux 6.9, which has 128
_LARGEST = 65507  # octets of payload in one IPv4 datagram, and so in one segmented message
_WORTHWHILE = 3  # datagrams; below that two system calls are as quick
_CMSG = struct.Struct("@NiiH6x")  # struct cmsghdr and a u16, padded as CMSG_SPACE has it
_CMSG_LEN = struct.calcsize("@NiiH")
_MARKED = struct.Struct("@NiiI4x")  # the same with a u32: SO_MARK, which comes with SO_RCVMARK (Linux 5.19)

_HIGH = 0 if sys.byteorder == "little" else ctypes.sizeof(ctypes.c_size_t) - _WORD
_LOW, _CONTROL_LOW = _Iovec.len.offset + _HIGH, _Msghdr.controllen.offset + _HIGH


class Batch:
    """Room for `count` datagrams of up to `size` octets, with their senders' addresses where `names` is true, and with
    the firewall's marks where `marks` is.

    For loops that cannot pay a method call per message, four views are public: `data` is the whole mapping, of which
    message i has `data[i * size : (i + 1) * size]`; `received[i]` is the length that the last receive found, and
    `lengths[i]` the one that a send will use (writable, by whoever has also written the payload: see `touch`).
    """

    __slots__ = (
        "_at",
        "_control",
        "_control_lengths",
        "_dirty",
        "_flags",
        "_full",
        "_hdrs",
        "_iovs",
        "_long",
        "_long_at",
        "_map",
        "_mark_full",
        "_mark_none",
        "_marks",
        "_name_full",
        "_name_lengths",
        "_names",
        "_segment",
        "count",
        "data",
        "lengths",
        "received",
        "size",
    )

    def __init__(self, count: int, size: int, *, names: bool, marks: bool = False) -> None:
        self.count = count
        self.size = size
        self._map = mmap.mmap(-1, count * self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages has no such advice
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.data = memoryview(self._map)
        self._names = bytearray(count * SOCKADDR if names else 0)
        self._iovs = (_Iovec * count)()
        self._hdrs = (_Mmsghdr * count)()
        self._at = ctypes.addressof(self._hdrs)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        name = ctypes.addressof(ctypes.c_char.from_buffer(self._names)) if names else None
        self._marks = bytearray(count * _MARKED.size if marks else 0)
        mark = ctypes.addressof(ctypes.c_char.from_buffer(self._marks)) if marks else None
        for i, (hdr, iov) in enumerate(zip(self._hdrs, self._iovs, strict=True)):
            iov.base = base + i * self.size
            iov.len = size
            hdr.hdr.iov = ctypes.addressof(iov)
            hdr.hdr.iovlen = 1
            if name is not None:
                hdr.hdr.name = name + i * SOCKADDR
                hdr.hdr.namelen = SOCKADDR
            if mark is not None:
                hdr.hdr.control = mark + i * _MARKED.size
        self.lengths = _column(self._iovs, _LOW, ctypes.sizeof(_Iovec))
        self.received = _column(self._hdrs, _Mmsghdr.len.offset, ctypes.sizeof(_Mmsghdr))
        self._flags = _column(self._hdrs, _Msghdr.flags.offset, ctypes.sizeof(_Mmsghdr))
        self._name_lengths = _column(self._hdrs, _Msghdr.namelen.offset, ctypes.sizeof(_Mmsghdr)) if names else None
        self._control_lengths = _column(self._hdrs, _CONTROL_LOW, ctypes.sizeof(_Mmsghdr)) if marks else None
        self._mark_full, self._mark_none = _constant(_MARKED.size, count), _constant(0, count)
        # One header whose iovecs are the messages': to sendmsg(2) their array is one datagram's pieces.
        self._control = ctypes.create_string_buffer(_CMSG.pack(_CMSG_LEN, _SOL_UDP, _UDP_SEGMENT, 0))
        self._segment = ctypes.c_uint16.from_buffer(self._control, _CMSG_LEN - 2)
        self._long = _Msghdr(control=ctypes.addressof(self._control), controllen=_CMSG.size)
        self._long_at = ctypes.addressof(self._long)
        self._full = _constant(size, count)
        self._name_full = _constant(SOCKADDR, count)
        self._dirty = 0

    def recv(self, fd: int) -> int:
        """Take what waits on `fd`, without blocking: the number of datagrams, 0 if there are none.

        OSError with the kernel's errno otherwise, such as an error of an earlier send that a connected socket reports
        (ConnectionRefusedError and the like, ip(7)); the datagrams that wait are still there then.
        """
        dirty = self._dirty
        if dirty == 1:
            self.lengths[0] = self.size
        elif dirty:
            self.lengths[:dirty] = self._full[:dirty]
        if dirty and self._name_lengths is not None:
            self._name_lengths[:dirty] = self._name_full[:dirty]
        controls = self._control_lengths
        if controls is not None:
            controls[:] = self._mark_full
        count: int = _recvmmsg(fd, self._at, self.count, _DONTWAIT, None)
        if controls is not None:
            controls[:] = self._mark_none  # a send would pass a mark on, which takes a privilege
        if count < 0:
            self._dirty = 0
            return _nothing()
        self._dirty = count
        if count == 1:
            self.lengths[0] = self.received[0]
        else:
            self.lengths[:count] = self.received[:count]
        return count

    def send(self, fd: int, count: int, start: int = 0) -> int:
        """Send messages `start` to `start + count` without blocking; how many the kernel took, 0 if its queue is full.

        OSError if already the first cannot go; an error of a later one ends the call early and is found by the next.
        """
        if start < 0 or count < 0 or start + count > self.count:
            raise IndexError(f"messages {start} to {start + count} of {self.count}")
        done: int = _sendmmsg(fd, self._at + start * _HDR, count, _DONTWAIT)
        return done if done >= 0 else _nothing()

    def relay(self, fd: int, count: int, start: int = 0) -> int:
        """As `send`, for datagrams just received; a run of one size goes as one message in segments (UDP_SEGMENT).

        The kernel carries such a message through its layers once and cuts it at the end (udp(7), Linux 4.18), which
        saves most of what a small datagram costs. Where the route's device cannot, OSError with EINVAL or EIO.
        """
        if count < _WORTHWHILE:
            return self.send(fd, count, start)
        lengths = self.received[start : start + count].tolist()
        size = lengths[0]
        if not size or lengths.count(size) + (lengths[-1] < size) != count:
            return self.send(fd, count, start)
        run = min(count, _SEGMENTS, _LARGEST // size)
        if run < _WORTHWHILE:
            return self.send(fd, count, start)
        self._segment.value = size
        self._long.iov = ctypes.addressof(self._iovs) + start * ctypes.sizeof(_Iovec)
        self._long.iovlen = run
        if _sendmsg(fd, self._long_at, _DONTWAIT) < 0:
            return _nothing()
        return run

    def payload(self, i: int) -> memoryview:
        """Message `i`, in place: what was received, or set, last."""
        at = i * self.size
        return self.data[at : at + self.lengths[i]]

    def set_payload(self, i: int, payload: bytes | bytearray | memoryview) -> None:
        """Write message `i` and its length; IndexError if it does not fit the slot."""
        length = len(payload)
        if length > self.size:
            raise IndexError(f"a datagram of {length} octets in a slot of {self.size}")
        at = i * self.size
        self.data[at : at + length] = payload
        self.lengths[i] = length
        self.touch(i + 1)

    def touch(self, count: int) -> None:
        """Say that `lengths` of the first `count` messages were written, so that the next receive restores them."""
        self._dirty = max(self._dirty, count)

    def name(self, i: int) -> bytes:
        """The sender of message `i`: a raw struct sockaddr, empty if the batch was made without names."""
        if self._name_lengths is None:
            return b""
        at = i * SOCKADDR
        return bytes(self._names[at : at + min(self._name_lengths[i], SOCKADDR)])

    def mark(self, i: int) -> int:
        """The mark of received message `i`; 0 where the socket does not tell it."""
        return _MARKED.unpack_from(self._marks, i * _MARKED.size)[3] if self._marks else 0

    def set_name(self, i: int, name: bytes) -> None:
        """Where message `i` goes: a raw struct sockaddr. IndexError if it is too long or the batch has no names."""
        if self._name_lengths is None or len(name) > SOCKADDR:
            raise IndexError(f"a socket address of {len(name)} octets; this batch has no room for it")
        at = i * SOCKADDR
        self._names[at : at + len(name)] = name
        self._name_lengths[i] = len(name)
        self.touch(i + 1)

    def truncated(self, i: int) -> bool:
        """Whether received message `i` was longer than its slot (MSG_TRUNC), and its end is lost."""
        return bool(self._flags[i] & _TRUNC)


_HDR = ctypes.sizeof(_Mmsghdr)


def _column(array: ctypes.Array[_Iovec] | ctypes.Array[_Mmsghdr], offset: int, step: int) -> memoryview:
    """One 32-bit field of every element, as a strided view of unsigned numbers."""
    return memoryview(array).cast("B").cast("I")[offset // _WORD :: step // _WORD]


def _constant(value: int, count: int) -> memoryview:
    return memoryview((value.to_bytes(_WORD, sys.byteorder)) * count).cast("I")


def _nothing() -> int:
    """0 for "not now"; any other errno as an OSError."""
    number = ctypes.get_errno()
    if number in (errno.EAGAIN, errno.EINTR):
        return 0
    raise OSError(number, os.strerror(number))
