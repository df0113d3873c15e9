"""An interface from start to stop: every end that a start can have, every status, the event, and stops at any time."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.darwin import handle as module
from openvmnet.engine.darwin.batch import Batch
from openvmnet.engine.darwin.datapath import socketpair
from openvmnet.engine.darwin.framework import Mode
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.patience import Late
from openvmnet.errors import HostError, MissingFeature, Stopped
from openvmnet.status import Status
from tests.engine.darwin.conftest import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

SHARED = {"vmnet_operation_mode": Mode.SHARED}


@pytest.fixture
def running(framework: Framework, controls: Controls) -> Iterator[Handle]:
    controls.library.standin_memory()
    made = Handle(framework, SHARED)
    yield made
    made.stop()


def put(controls: Controls, *frames: bytes) -> None:
    for frame in frames:
        assert controls.library.standin_send(frame, len(frame))


# The start.


def test_start_gives_parameters_and_limits(framework: Framework, controls: Controls) -> None:
    identity = uuid.uuid4()
    wanted = SHARED | {"vmnet_interface_id": identity, "vmnet_mtu": 9000, "vmnet_start_address": "10.1.2.1"}
    wanted |= {"vmnet_end_address": "10.1.2.99", "vmnet_subnet_mask": "255.255.255.0"}
    handle = Handle(framework, wanted)
    assert handle.parameters["vmnet_interface_id"] == identity
    assert (handle.mtu, handle.largest, handle.most_read) == (9000, 9014, 256)
    assert handle.text("vmnet_start_address") == "10.1.2.1"
    assert handle.text("vmnet_mac_address") is not None
    again_mac = handle.text("vmnet_mac_address")
    handle.stop()
    again = Handle(framework, wanted)
    assert again.text("vmnet_mac_address") == again_mac  # the same id, the same MAC
    again.stop()


def test_null_without_a_call_is_an_error_at_once(framework: Framework, controls: Controls) -> None:
    controls.set("null_start", 1)
    began = time.monotonic()
    with pytest.raises(StartFailed, match="unable to create interface with requested params"):
        Handle(framework, SHARED)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.SUCCESS])
def test_each_status_of_a_start_is_an_error_that_bears_it(
    framework: Framework, controls: Controls, status: Status
) -> None:
    controls.set("vmnet_start_interface", status)
    with pytest.raises(StartFailed) as caught:
        Handle(framework, SHARED)
    assert caught.value.status is status
    assert caught.value.message == f"cannot create vmnet interface: {status.text}"


def test_a_status_that_nobody_knows_keeps_its_number(framework: Framework, controls: Controls) -> None:
    controls.set("vmnet_start_interface", 1077)
    with pytest.raises(StartFailed, match="unknown vmnet error 1077"):
        Handle(framework, SHARED)


@pytest.mark.parametrize("how", ["hang_start", "silent_start"])
def test_a_start_that_gives_no_answer_is_given_up_and_a_late_success_is_stopped(
    framework: Framework, controls: Controls, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    stops = controls.count("stops")
    controls.set(how, 1)
    began = time.monotonic()
    with pytest.raises(Late, match=r"vmnet_start_interface gave no answer in 0.2 s"):
        Handle(framework, SHARED, timeout=0.2)
    assert time.monotonic() - began < 1
    controls.set(how, 0)
    assert eventually(lambda: controls.count("stops") == stops + 1)
    assert "nobody waits for" in caplog.text
    # Its queue stays: the system may still use it. The fixture counts what is left, so it is released here.
    (late,) = [each for each in module._forever if isinstance(each, module._Start)]
    module._forever.remove(late)
    time.sleep(0.05)
    framework.system_call("dispatch_release", late._queue)


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ({"vmnet_start_address": "192.168.70.1"}, 1003),
        ({"vmnet_start_address": "8.8.8.1", "vmnet_end_address": "8.8.8.9", "vmnet_subnet_mask": "255.0.0.0"}, 1001),
        ({"vmnet_shared_interface_name": "en0"}, 1003),
        ({"vmnet_host_ip_address": "10.0.0.1", "vmnet_host_subnet_mask": "255.0.0.0"}, 1003),
        ({"vmnet_network_identifier": uuid.uuid4()}, 1003),
        ({"vmnet_nat66_prefix": "2001:db8::"}, 1003),
        ({"vmnet_mtu": 100}, 1003),
        ({"vmnet_enable_checksum_offload": True, "vmnet_enable_virtio_header": True}, 1003),
        ({"vmnet_operation_mode": Mode.BRIDGED, "vmnet_shared_interface_name": "en7"}, 1003),
        ({"vmnet_operation_mode": Mode.BRIDGED, "vmnet_shared_interface_name": "en0", "vmnet_mtu": 9000}, 1003),
    ],
)
def test_each_mistake_in_a_description_has_its_status(
    framework: Framework, controls: Controls, wanted: dict, status: int
) -> None:
    with pytest.raises(StartFailed) as caught:
        Handle(framework, SHARED | wanted)
    assert caught.value.status == status


def test_internet_sharing_is_busy(framework: Framework, controls: Controls) -> None:
    controls.set("sharing_busy", 1)
    with pytest.raises(StartFailed) as caught:
        Handle(framework, SHARED)
    assert caught.value.status is Status.SHARING_SERVICE_BUSY


def test_without_a_right_there_is_no_interface_and_with_the_entitlement_there_is(
    framework: Framework, controls: Controls
) -> None:
    controls.set("not_root", 1)
    with pytest.raises(StartFailed) as caught:
        Handle(framework, SHARED)
    assert caught.value.status is Status.FAILURE
    controls.set("entitled", 1)
    Handle(framework, SHARED).stop()


def test_no_more_than_32_interfaces(framework: Framework, controls: Controls) -> None:
    handles = [Handle(framework, SHARED) for _ in range(32)]
    with pytest.raises(StartFailed) as caught:
        Handle(framework, SHARED)
    assert caught.value.status is Status.FAILURE
    for handle in handles:
        handle.stop()


def test_one_subnet_has_one_mode(framework: Framework, controls: Controls) -> None:
    addresses = {
        "vmnet_start_address": "10.9.0.1",
        "vmnet_end_address": "10.9.0.9",
        "vmnet_subnet_mask": "255.255.255.0",
    }
    first, second = Handle(framework, SHARED | addresses), Handle(framework, SHARED | addresses)
    with pytest.raises(StartFailed):
        Handle(framework, {"vmnet_operation_mode": Mode.HOST} | addresses)
    first.stop()
    second.stop()


def test_an_older_macos_lacks_a_key_and_a_failed_start_leaves_nothing(
    macos: Callable[[int], tuple[Controls, Framework]],
) -> None:
    _, older = macos(1015)
    with pytest.raises(MissingFeature, match=r"vmnet_enable_isolation_key: it came with macOS 11\.0"):
        Handle(older, SHARED | {"vmnet_enable_isolation": True})
    handle = Handle(older, SHARED)
    assert (handle.most_read, handle.octets) == (200, 256 * 1024)  # what is documented, where vmnet says nothing
    handle.stop()


# Packets.


def test_frames_go_both_ways(running: Handle, controls: Controls) -> None:
    batch = Batch(8, 2048)
    put(controls, b"\x52" * 60, b"\x53" * 1514)
    assert running.read(batch.packets, 8) == (1000, 2)
    batch.read(2)
    assert [bytes(batch.frame(at)) for at in range(2)] == [b"\x52" * 60, b"\x53" * 1514]
    batch.renew(2)
    assert running.read(batch.packets, 8) == (1000, 0)
    batch.put(0, b"\x54" * 100)
    assert running.write(batch.packets, 1) == (1000, 1)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_read_serves_whether_or_not_vmnet_writes_the_iovec(running: Handle, controls: Controls, kept: int) -> None:
    controls.set("iov_len_kept", kept)
    batch = Batch(4, 2048)
    for size in (60, 1514, 61):
        put(controls, bytes([1]) * size)
        assert running.read(batch.packets, 4) == (1000, 1)
        batch.read(1)
        assert len(batch.frame(0)) == size
        batch.renew(1)


def test_each_mistake_of_a_read_or_write_has_its_status(running: Handle, controls: Controls) -> None:
    batch = Batch(300, 2048)
    assert running.read(batch.packets, 300)[0] == Status.TOO_MANY_PACKETS
    assert running.read(batch.packets, 0)[0] == Status.INVALID_ARGUMENT
    assert running.write(batch.packets, 300)[0] == Status.TOO_MANY_PACKETS
    batch.put(0, bytes(2000))
    assert running.write(batch.packets, 1)[0] == Status.PACKET_TOO_BIG
    batch.put(0, bytes(5))
    assert running.write(batch.packets, 1)[0] == Status.INVALID_ARGUMENT
    batch.put(0, bytes(60))
    batch.vm_pkt_size[0] = 61  # not what the iovec says
    assert running.write(batch.packets, 1)[0] == Status.INVALID_ARGUMENT
    small = Batch(1, 1000)
    assert running.read(small.packets, 1)[0] == Status.INVALID_ARGUMENT
    for status in Status:
        for name, function in (("vmnet_read", running.read), ("vmnet_write", running.write)):
            controls.set(name, status if status is not Status.SUCCESS else 0)
            batch.renew(1)
            if name == "vmnet_write":
                batch.put(0, bytes(60))
            assert function(batch.packets, 1)[0] == status
    controls.set("vmnet_write", 0)
    controls.set("exhausted", 1)
    batch.put(0, bytes(60))
    assert running.write(batch.packets, 1)[0] == Status.BUFFER_EXHAUSTED


def test_more_than_256_kb_is_too_much_where_that_is_the_limit(
    macos: Callable[[int], tuple[Controls, Framework]],
) -> None:
    _, older = macos(1200)
    handle = Handle(older, SHARED | {"vmnet_enable_tso": True})
    assert handle.largest == 65550
    batch = Batch(5, 65600)
    for at in range(5):
        batch.put(at, bytes(65550))
    assert handle.write(batch.packets, 5)[0] == Status.TOO_MANY_PACKETS
    assert handle.write(batch.packets, 3)[0] == Status.SUCCESS
    handle.stop()


def test_virtio_header_takes_12_octets_more(framework: Framework, controls: Controls) -> None:
    handle = Handle(framework, SHARED | {"vmnet_enable_virtio_header": True})
    assert handle.largest == 1526
    batch = Batch(1, 1526)
    batch.put(0, bytes(1526))
    assert handle.write(batch.packets, 1)[0] == Status.SUCCESS
    handle.stop()


# The event.


def test_the_event_comes_again_until_it_is_cleared(running: Handle, controls: Controls) -> None:
    seen: list[int] = []
    running.on_available(lambda: seen.append(threading.get_ident()))
    running.arm()
    running.arm()  # the second time does nothing
    assert controls.count("armed") >= 1
    put(controls, bytes(60))
    assert eventually(lambda: len(seen) > 10)  # level-triggered: nobody reads
    running.disarm()
    time.sleep(0.05)
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count
    assert threading.get_ident() not in seen
    running.arm()
    assert eventually(lambda: len(seen) > count)  # what waits is told of when it is armed


def test_an_event_that_cannot_be_set_is_an_error(running: Handle, controls: Controls) -> None:
    controls.set("vmnet_interface_set_event_callback", 1003)
    with pytest.raises(HostError, match="event cannot be set: invalid argument"):
        running.arm()
    controls.set("vmnet_interface_set_event_callback", 0)


# The stop.


def test_the_event_is_off_before_the_stop(running: Handle, controls: Controls) -> None:
    armed_at_stop = controls.count("stopped_armed")
    running.arm()
    running.stop()
    running.stop()
    assert controls.count("stopped_armed") == armed_at_stop
    for use in (running.arm, running.disarm, lambda: running.read(0, 1), lambda: running.write(0, 1)):
        with pytest.raises(Stopped):
            use()


@pytest.mark.parametrize("how", ["hang_stop", "silent_stop"])
def test_a_stop_that_gives_no_answer_is_an_error(framework: Framework, controls: Controls, how: str) -> None:
    handle = Handle(framework, SHARED)
    controls.set(how, 1)
    with pytest.raises(Late, match="vmnet_stop_interface"):
        handle.stop(timeout=0.2)
    controls.set(how, 0)


def test_a_stop_that_is_refused_is_an_error(framework: Framework, controls: Controls) -> None:
    handle = Handle(framework, SHARED)
    controls.set("vmnet_stop_interface", 1001)
    with pytest.raises(HostError, match="does not stop the interface: general failure"):
        handle.stop()
    controls.set("vmnet_stop_interface", 0)
    second = Handle.__new__(Handle)
    second.__dict__ = handle.__dict__ | {"_ended": threading.Event()}
    second._stop(5)  # so that nothing is left of it


def test_stop_from_the_event_itself(framework: Framework, controls: Controls) -> None:
    controls.library.standin_memory()
    handle = Handle(framework, SHARED)
    handle.on_available(handle.stop)
    handle.arm()
    put(controls, bytes(60))
    assert eventually(lambda: handle.stopped and not controls.left()[0])


def read_until_stopped(handle: Handle, batch: Batch, deadline: float) -> None:
    while time.monotonic() < deadline:
        handle.read(batch.packets, 4)


def test_stop_from_a_signal_handler_while_the_same_thread_reads(framework: Framework, controls: Controls) -> None:
    old = signal.getsignal(signal.SIGALRM)
    try:
        for delay in range(1, 40):
            handle = Handle(framework, SHARED)
            signal.signal(signal.SIGALRM, lambda *_, handle=handle: handle.stop())
            signal.setitimer(signal.ITIMER_REAL, delay * 1e-4)
            batch = Batch(4, 2048)
            began = time.monotonic()
            with pytest.raises(Stopped):
                read_until_stopped(handle, batch, began + 5)
            assert time.monotonic() - began < 2
    finally:
        signal.signal(signal.SIGALRM, old)


def test_stops_while_others_are_inside(framework: Framework, controls: Controls) -> None:
    for _ in range(30):
        far, wire = socketpair()
        controls.wire(wire.fileno())
        handle = Handle(framework, SHARED)
        handle.on_available(lambda: None)
        handle.arm()
        over: list[type[BaseException]] = []

        def work(write: bool, handle: Handle = handle, over: list = over) -> None:
            batch = Batch(4, 2048)
            batch.put(0, bytes(60))
            try:
                while True:
                    handle.write(batch.packets, 1) if write else handle.read(batch.packets, 4)
                    batch.renew(4)
                    batch.put(0, bytes(60)) if write else None
            except BaseException as error:  # noqa: BLE001 - told by the assertion below
                over.append(type(error))

        threads = [threading.Thread(target=work, args=(write,)) for write in (True, False)]
        threads += [threading.Thread(target=handle.stop) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
            assert not thread.is_alive()
        assert over == [Stopped, Stopped]
        far.close()
        wire.close()


def test_in_a_child_of_a_fork_it_is_dead_and_the_parent_keeps_it(running: Handle, controls: Controls) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b"used"
        try:
            running.read(0, 1)
        except Stopped as error:
            said = error.message.encode()
        running.stop()
        os.write(write, said)
        os._exit(0)
    began = time.monotonic()
    assert os.waitpid(pid, 0)[1] == 0
    assert time.monotonic() - began < 2  # the child asked vmnet for nothing
    os.close(write)
    assert b"a fork of it" in os.read(read, 200)
    os.close(read)
    assert running.read(Batch(1, 2048).packets, 1) == (1000, 0)


def test_a_program_that_forgets_is_cleaned_up_after(controls: Controls) -> None:
    program = f"""
import atexit, ctypes
library = ctypes.CDLL({str(controls.path)!r})
atexit.register(lambda: print("left", library.standin_interfaces(), flush=True))  # runs after the engine's own
from openvmnet.engine.darwin.framework import Framework
from openvmnet.engine.darwin.handle import Handle
handle = Handle(Framework({str(controls.path)!r}), {{"vmnet_operation_mode": 1001}})
handle.arm()
print("runs", library.standin_interfaces(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, ["runs 1", "left 0"]), done


def test_nothing_leaks_over_a_hundred_lives(framework: Framework, controls: Controls) -> None:
    before, spare = len(module._forever), 0
    for round_ in range(100):
        Handle(framework, SHARED).stop()
        if round_ == 10:
            spare = sum(map(len, framework.spare_blocks.values()))
    assert len(module._forever) == before
    assert sum(map(len, framework.spare_blocks.values())) == spare
    assert not module._live


def test_logging_is_quiet_when_all_is_well(running: Handle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    running.arm()
    running.stop()
    assert caplog.text == ""
    assert ctypes.sizeof(ctypes.c_void_p) == 8
