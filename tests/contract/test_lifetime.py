"""How an interface ends: stop from anywhere, twice, forgotten, at the program's end, and after a fork."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface
from openvmnet.errors import Stopped
from openvmnet.status import Status
from tests.contract.conftest import until
from tests.contract.engines import MemoryLink, frame

if TYPE_CHECKING:
    from tests.contract.engines import Rig


def uses(interface: Interface) -> None:
    """Every use of a stopped interface is an error that says so."""
    calls = (
        interface.read,
        lambda: interface.write([frame(0)]),
        lambda: interface.on_packets_available(print),
        interface.arm,
        lambda: interface.wait(0),
        interface.fileno,
        lambda: interface.fd,
        interface.__aiter__,
    )
    for call in calls:
        with pytest.raises(Stopped, match="was stopped") as caught:
            call()
        assert caught.value.status is Status.SETUP_INCOMPLETE


def files() -> list[str]:
    """What this process has open, by kind."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}").partition("[")[0])
        except FileNotFoundError:  # the directory's own
            continue
    return sorted(names)


def test_a_second_stop_is_harmless_and_every_use_after_it_an_error(rig: Rig) -> None:
    interface = Interface(rig.link())
    assert interface.running
    interface.stop()
    interface.stop()
    assert not interface.running
    uses(interface)
    with interface:
        pass


def test_stop_of_another_thread_wakes_who_waits(rig: Rig) -> None:
    interface = Interface(rig.link())
    ended: list[float] = []

    def wait() -> None:
        try:
            interface.wait()
        except Stopped:
            ended.append(time.monotonic())

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiters:
        thread.start()
    time.sleep(0.05)
    began = time.monotonic()
    interface.stop()
    for thread in waiters:
        thread.join(5)
    assert len(ended) == 3
    assert max(ended) - began < 0.5


def test_stop_in_a_signal_handler_that_interrupts_anything(rig: Rig) -> None:
    old = signal.getsignal(signal.SIGALRM)
    try:
        for turn in range(30):
            interface = Interface(rig.link())
            signal.signal(signal.SIGALRM, lambda *_, interface=interface: interface.stop())
            signal.setitimer(signal.ITIMER_REAL, 0.001 + turn * 0.0001)
            with pytest.raises(Stopped):  # noqa: PT012 - whichever call it meets
                while True:
                    interface.on_packets_available(interface.read)
                    interface.write([frame(0)] * 20)
                    interface.wait(0)
                    interface.arm()
                    interface.on_packets_available(None)
    finally:
        signal.signal(signal.SIGALRM, old)


def test_nothing_is_left_of_interfaces_that_were_stopped_or_forgotten(rig: Rig) -> None:
    Interface(rig.link()).stop()  # what is opened once for the process is open now
    gc.collect()
    assert until(lambda: "openvmnet events" not in [thread.name for thread in threading.enumerate()])
    before = files()
    for turn in range(10):
        interface = Interface(rig.link())
        interface.on_packets_available(interface.read)
        rig.send([frame(0)])
        interface.wait(0)
        if turn % 2:
            interface.stop()
        else:
            interface.on_packets_available(None)
        del interface
    gc.collect()
    assert until(lambda: files() == before), (files(), before)
    assert "openvmnet events" not in [thread.name for thread in threading.enumerate()]


def test_a_forgotten_interface_is_collected_though_it_had_a_callback() -> None:
    link = MemoryLink()
    interface = Interface(link)
    interface.on_packets_available(interface.read)
    link.put([frame(0)])
    assert until(lambda: link.batches)
    other = Interface(MemoryLink())  # keeps the thread, which waits with the first one's event in its hands
    other.on_packets_available(other.read)
    interface.on_packets_available(None)
    gone = weakref.ref(interface)
    del interface
    assert until(lambda: gc.collect() >= 0 and gone() is None)
    other.stop()


def test_a_callback_keeps_its_interface() -> None:
    link = MemoryLink()
    got: list[bytes] = []
    interface = Interface(link)
    interface.on_packets_available(lambda interface=interface: got.extend(interface.read()))
    del interface
    gc.collect()
    link.put([frame(0)])
    assert until(lambda: got == [frame(0)])
    (last,) = [each for each in gc.get_objects() if isinstance(each, Interface) and each._core.link is link]
    last.stop()


def test_a_program_that_forgets_is_cleaned_up_after_at_its_end() -> None:
    program = (
        "from tests.contract.engines import MemoryLink, frame\n"
        "from openvmnet.contract.interface import Interface\n"
        "class Told(MemoryLink):\n"
        "    def close(self):\n"
        "        if self._open: print('closed', flush=True)\n"
        "        super().close()\n"
        "interface = Interface(Told())\n"
        "interface.on_packets_available(interface.read)\n"
        "interface._core.link.put([frame(0)])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_child_of_a_fork_cannot_use_it_and_does_not_disturb_it(interface: Interface, rig: Rig) -> None:
    got: list[bytes] = []
    interface.on_packets_available(lambda: got.extend(interface.read()))
    rig.send([frame(0)])
    assert until(lambda: got == [frame(0)])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for call in (interface.read, lambda: interface.write([frame(9)]), lambda: interface.wait(0)):
                with pytest.raises(Stopped, match="belongs to process") as caught:
                    call()
                assert caught.value.status is Status.INVALID_ACCESS
                assert str(os.getppid()) in caught.value.message
            interface.stop()
            own = MemoryLink()
            with Interface(own) as mine:  # one of its own works in the child
                seen: list[bytes] = []
                mine.on_packets_available(lambda: seen.extend(mine.read()))
                own.put([frame(5)])
                assert until(lambda: seen == [frame(5)])
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    rig.send([frame(1)])
    assert until(lambda: got == [frame(0), frame(1)])
    interface.write([frame(2)])
    assert rig.received(1) == [frame(2)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_port_ends_with_the_parents_stop_whatever_a_child_inherited(rig: Rig) -> None:
    interface = Interface(rig.link())
    read, write = os.pipe()
    born, cry = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.write(cry, b"\0")
        os.read(read, 1)  # lives on
        os._exit(0)
    try:
        os.read(born, 1)
        interface.stop()
        second = rig.link()  # the same name, taken at once: the child holds nothing of the first
        second.close()
    finally:
        for fd in (write, read, born, cry):
            os.close(fd)
        os.waitpid(pid, 0)
