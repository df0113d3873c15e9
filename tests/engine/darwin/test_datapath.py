"""The relay between vmnet and a VM's socket: order, batches, back pressure without spin, bad frames, both limits."""

from __future__ import annotations

import errno
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.darwin import datapath
from openvmnet.engine.darwin.batch import Batch
from openvmnet.engine.darwin.datapath import Relay, socketpair
from openvmnet.engine.darwin.framework import Mode
from openvmnet.engine.darwin.handle import Handle
from tests.engine.darwin.conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

SHARED = {"vmnet_operation_mode": Mode.SHARED}


def frame(number: int, size: int = 60) -> bytes:
    return (b"\x52\x54\x00" + number.to_bytes(4, "big")).ljust(size, b"\xaa")


def number(data: bytes) -> int:
    return int.from_bytes(data[3:7], "big")


class Line:
    """A relay with vmnet's wire in memory at one end and the VM's socket at the other."""

    def __init__(self, framework: Framework, controls: Controls, *, pad: bool = True, **desc: object) -> None:
        self.controls = controls
        controls.library.standin_memory()
        self.handle = Handle(framework, SHARED | desc)
        self.ours, self.vm = socketpair()
        self.gone = threading.Event()
        self.relay = Relay(framework, self.handle, self.ours, gone=self.gone.set, pad=pad)

    def send(self, *frames: bytes) -> None:
        for each in frames:
            assert self.controls.library.standin_send(each, len(each))

    def sent(self, count: int, seconds: float = 5.0) -> list[bytes]:
        """What the VM sent, as it came out of vmnet."""
        import ctypes

        room = ctypes.create_string_buffer(70000)
        got: list[bytes] = []
        deadline = time.monotonic() + seconds
        while len(got) < count and time.monotonic() < deadline:
            size = self.controls.library.standin_receive(ctypes.addressof(room), len(room))
            got.append(room.raw[:size]) if size else time.sleep(0.001)
        return got

    def received(self, count: int) -> list[bytes]:
        """What came to the VM."""
        self.vm.settimeout(5)
        return [self.vm.recv(70000) for _ in range(count)]

    def close(self) -> None:
        self.relay.stop()
        self.handle.stop()
        self.ours.close()
        self.vm.close()


@pytest.fixture
def line(framework: Framework, controls: Controls) -> Iterator[Line]:
    made = Line(framework, controls)
    made.relay.start()
    yield made
    made.close()


def test_thousands_of_frames_in_order_both_ways(line: Line) -> None:
    line.send(*(frame(n, 60 + n % 1455) for n in range(3000)))
    got = line.received(3000)
    assert [(number(each), len(each)) for each in got] == [(n, 60 + n % 1455) for n in range(3000)]
    for n in range(3000):
        line.vm.send(frame(n, 60 + n % 1455))
    sent = line.sent(3000)
    assert [(number(each), len(each)) for each in sent] == [(n, 60 + n % 1455) for n in range(3000)]
    counters = line.relay.counters
    assert (counters.down_packets, counters.up_packets) == (3000, 3000)
    assert (counters.down_dropped, counters.up_dropped) == (0, 0)
    assert counters.down_batches < 1500


def test_a_frame_at_any_moment_is_not_left_lying(line: Line) -> None:
    for n in range(300):
        line.send(frame(n))
        assert number(line.received(1)[0]) == n
        if n % 3:
            time.sleep(0.0003 * (n % 5))


@pytest.mark.parametrize("size", [14, 42, 59, 60, 61, 255, 256, 511, 512, 1514])
def test_short_frames_are_filled_up_with_zeros(line: Line, size: int) -> None:
    line.send(frame(9, 1514), frame(1, size), frame(2, 600))
    got = line.received(3)
    assert got[0] == frame(9, 1514)
    assert got[1] == frame(1, size).ljust(60, b"\0")
    assert got[2] == frame(2, 600)


def test_without_padding_they_are_as_they_came(framework: Framework, controls: Controls) -> None:
    line = Line(framework, controls, pad=False)
    line.relay.start()
    line.send(frame(1, 42))
    assert line.received(1) == [frame(1, 42)]
    line.close()


def test_padding_finds_short_among_any_lengths() -> None:
    lengths = [0, 1, 14, 59, 60, 255, 256, 300, 512, 515, 1514, 65536, 65540, 65550, 59]
    batch = Batch(len(lengths), 65600)
    batch.data[:] = b"\xff" * len(batch.data)
    for at, length in enumerate(lengths):
        batch.vm_pkt_size[at] = length
    batch.read(len(lengths))
    batch.pad(len(lengths))
    assert list(batch.iov_len) == [max(60, length) for length in lengths]
    for at, length in enumerate(lengths):
        assert bytes(batch.frame(at)) == (b"\xff" * length).ljust(60, b"\0")


# Back pressure.


def busy(seconds: float) -> float:
    """This process's share of a CPU over the next seconds, all its threads together."""
    began, used = time.monotonic(), time.process_time()
    time.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - began)


@pytest.mark.parametrize("as_macos", [0, 1], ids=["EAGAIN", "ENOBUFS"])
def test_a_full_vm_disarms_the_event_costs_no_cpu_and_loses_nothing(
    line: Line, controls: Controls, as_macos: int
) -> None:
    controls.set("full_is_enobufs", as_macos)
    line.send(*(frame(n, 1514) for n in range(5000)))
    assert eventually(lambda: line.relay.counters.full == 1)
    assert eventually(lambda: not line.handle.armed)
    events = controls.count("events")
    assert busy(1.0) < 0.02
    assert controls.count("events") - events <= 1  # one may have been on its way
    line.send(*(frame(n, 1514) for n in range(5000, 5100)))
    assert [number(each) for each in line.received(5100)] == list(range(5100))
    assert eventually(lambda: line.handle.armed)  # on drain it is armed again
    line.send(frame(7))
    assert number(line.received(1)[0]) == 7


def test_a_refusal_that_passes_is_tried_again_at_once(line: Line, controls: Controls) -> None:
    controls.set("enobufs", 5)  # fewer than would make the VM count as full
    line.send(frame(1))
    assert number(line.received(1)[0]) == 1
    assert line.relay.counters.full == 0


def test_a_vm_that_stops_and_goes_on_at_random(line: Line) -> None:
    line.send(*(frame(n) for n in range(2000)))
    got: list[int] = []
    for pause in range(40):
        got += [number(each) for each in line.received(50)]
        time.sleep(0.0007 * (pause % 7))
    assert got == list(range(2000))


def test_an_idle_line_costs_nothing(line: Line) -> None:
    line.send(frame(1))
    line.received(1)
    assert busy(0.5) < 0.02


def test_sends_that_stop_half_way_are_taken_up(line: Line, controls: Controls) -> None:
    controls.set("sendmsg_most", 3)
    line.send(*(frame(n) for n in range(100)))
    assert [number(each) for each in line.received(100)] == list(range(100))


def test_stop_while_the_vm_is_full(framework: Framework, controls: Controls) -> None:
    line = Line(framework, controls)
    line.relay.start()
    line.send(*(frame(n, 1514) for n in range(5000)))
    assert eventually(lambda: line.relay.counters.full == 1)
    began = time.monotonic()
    line.close()
    assert time.monotonic() - began < 1


# What is wrong with a frame.


def test_one_bad_frame_does_not_take_its_batch_with_it(
    framework: Framework, controls: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    line = Line(framework, controls)
    for each in (frame(0), frame(1, 13), frame(2), frame(3, 1550), frame(4), frame(5, 9000), frame(6)):
        line.vm.send(each)
    line.relay.start()  # all of them are one batch
    assert [number(each) for each in line.sent(4)] == [0, 2, 4, 6]
    assert eventually(lambda: line.relay.counters.up_dropped == 3)
    assert "vmnet: packet is too big, 1550 > 1514" in caplog.text
    assert "invalid argument specified (13 octets)" in caplog.text
    assert caplog.text.count("too big") == 1  # the first of a kind is told, the rest is counted
    line.close()


def test_exhausted_buffers_are_waited_for_and_then_it_is_dropped(line: Line, controls: Controls) -> None:
    controls.set("exhausted", 4)
    line.vm.send(frame(1))
    assert number(line.sent(1)[0]) == 1
    controls.set("exhausted", 11)
    line.vm.send(frame(2))
    assert eventually(lambda: line.relay.counters.up_dropped == 1)
    line.vm.send(frame(3))
    assert number(line.sent(1)[0]) == 3


def test_a_read_that_fails_is_told_and_does_not_spin(
    line: Line, controls: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    controls.set("vmnet_read", 1001)
    line.send(frame(1))
    assert eventually(lambda: "vmnet: read failed: general failure" in caplog.text)
    assert busy(0.3) < 0.1
    controls.set("vmnet_read", 0)
    assert number(line.received(1)[0]) == 1


def test_a_vm_that_closes_its_socket_ends_the_relay(line: Line) -> None:
    line.vm.close()
    line.send(frame(1))
    assert line.gone.wait(5)


def test_a_vm_that_shuts_its_socket_ends_the_relay_and_does_not_make_it_turn(line: Line) -> None:
    line.ours.shutdown(socket.SHUT_RD)  # reads as a socket does on macOS whose peer is gone: for ever, and nothing
    assert line.gone.wait(5)


def test_a_frame_that_the_socket_does_not_take_is_skipped(
    framework: Framework, controls: Controls, caplog: pytest.LogCaptureFixture
) -> None:
    line = Line(framework, controls, vmnet_enable_tso=True)
    line.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2304)
    line.relay.start()
    line.send(frame(1), frame(2, 60000), frame(3))
    assert [number(each) for each in line.received(2)] == [1, 3]
    assert "a packet of 60000 octets is more than the VM's socket takes" in caplog.text
    assert eventually(lambda: line.relay.counters.down_dropped == 1)
    line.close()


# Limits.


@pytest.mark.parametrize(("version", "packets"), [(1200, 173), (1500, 173)])
def test_a_batch_keeps_within_packets_and_octets(
    macos: Callable[[int], tuple[Controls, Framework]], version: int, packets: int
) -> None:
    controls, framework = macos(version)
    line = Line(framework, controls)
    assert line.relay.geometry == (packets, 1600)
    line.relay.start()
    line.send(*(frame(n, 1514) for n in range(600)))
    assert [number(each) for each in line.received(600)] == list(range(600))
    for n in range(600):
        line.vm.send(frame(n, 1514))
    assert [number(each) for each in line.sent(600)] == list(range(600))
    assert line.relay.counters.up_dropped == 0
    line.close()


@pytest.mark.parametrize(("version", "packets"), [(1200, 3), (2600, 16)])
def test_frames_of_64_kb(macos: Callable[[int], tuple[Controls, Framework]], version: int, packets: int) -> None:
    controls, framework = macos(version)
    line = Line(framework, controls, vmnet_enable_tso=True)
    assert line.relay.geometry[0] == packets
    line.relay.start()
    line.send(*(frame(n, 65550) for n in range(40)))
    assert [number(each) for each in line.received(40)] == list(range(40))
    for n in range(40):
        line.vm.send(frame(n, 65550))
    assert [number(each) for each in line.sent(40)] == list(range(40))
    line.close()


def test_single_calls_move_the_same(framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framework, "batch_calls", lambda: None)
    line = Line(framework, controls)
    assert line.relay._recv.__module__ == "openvmnet.engine.darwin.single"
    line.relay.start()
    line.send(*(frame(n) for n in range(50)))
    assert [number(each) for each in line.received(50)] == list(range(50))
    for n in range(50):
        line.vm.send(frame(n, 100))
    assert [(number(each), len(each)) for each in line.sent(50)] == [(n, 100) for n in range(50)]
    line.close()


def test_the_batch_calls_refuse_what_xnu_refuses(framework: Framework) -> None:
    import ctypes

    recv, send = datapath.calls(framework)
    ours, theirs = socketpair()
    batch = Batch(2, 100)
    batch.put(0, bytes(60))
    batch.msg_datalen[0] = 60  # has to be 0 on input
    assert send(ours.fileno(), batch.messages, 1, socket.MSG_DONTWAIT) == -1
    assert ctypes.get_errno() == errno.EINVAL
    batch.renew(1)
    assert send(ours.fileno(), batch.messages, 1, socket.MSG_PEEK) == -1
    batch.put(0, bytes(60))
    assert send(ours.fileno(), batch.messages, 1, socket.MSG_DONTWAIT) == 1
    assert recv(theirs.fileno(), batch.messages, 2, socket.MSG_DONTWAIT) == 1
    assert batch.msg_datalen[0] == 60
    ours.close()
    theirs.close()


def test_a_socketpair_has_room_for_the_largest_datagram() -> None:
    ours, theirs = socketpair()
    assert ours.send(bytes(69632)) == 69632
    assert len(theirs.recv(70000)) == 69632
    ours.close()
    theirs.close()
    assert int(Path("/proc/sys/net/core/wmem_max").read_text()) > 0
