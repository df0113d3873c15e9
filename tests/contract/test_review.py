"""The points of the review of QEMU's vmnet patches (v15 3/8), one test each, over every engine."""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import Interface
from openvmnet.errors import LinkError, PacketTooBig, Stopped
from openvmnet.status import Status
from tests.contract.conftest import cpu, until
from tests.contract.engines import frame, number

if TYPE_CHECKING:
    from tests.contract.engines import Rig


def test_no_event_is_lost_between_scheduled_and_clear(interface: Interface, rig: Rig) -> None:
    # A frame comes at every possible moment of a callback's life: before its read, between its last read and its end.
    got: list[int] = []
    interface.on_packets_available(lambda: got.extend(map(number, interface.read())))
    dice = random.Random(1)
    for sent in range(2000):
        rig.send([frame(sent)])
        if dice.random() < 0.5:
            time.sleep(dice.random() * 0.0002)
        if sent % 100 == 99:  # each pause would leave the last frame lying if its event were lost
            assert until(lambda: len(got) == sent + 1), f"{len(got)} of {sent + 1}"  # noqa: B023 - called at once
    assert got == list(range(2000))


def test_a_burst_of_1000_packets_is_drained_not_just_the_first_200(interface: Interface, rig: Rig) -> None:
    got: list[int] = []
    calls: list[int] = []

    def consume() -> None:
        frames = interface.read()
        calls.append(len(frames))
        got.extend(map(number, frames))

    rig.send([frame(n) for n in range(1000)])
    interface.on_packets_available(consume)
    assert until(lambda: len(got) == 1000)
    assert got == list(range(1000))
    assert max(calls) <= 200


def test_one_read_drains_1000_packets_where_that_many_are_asked_for(interface: Interface, rig: Rig) -> None:
    rig.send([frame(n) for n in range(1000)])
    assert interface.wait(5)
    assert [number(each) for each in interface.read(5000)] == list(range(1000))
    assert interface.read(5000) == []


def test_back_pressure_disarms_the_source_and_costs_no_cpu(interface: Interface, rig: Rig) -> None:
    calls: list[float] = []

    def refuse() -> bool:
        calls.append(time.monotonic())
        return False

    interface.on_packets_available(refuse)
    rig.send([frame(n) for n in range(500)])
    assert until(lambda: calls)
    with cpu() as share:
        time.sleep(1.0)
        assert share() < 0.02
    assert len(calls) == 1
    interface.arm()
    assert until(lambda: len(calls) == 2)
    time.sleep(0.05)
    assert len(calls) == 2


def test_a_callback_that_only_tells_another_thread_is_not_called_in_vain(interface: Interface, rig: Rig) -> None:
    calls: list[None] = []
    told = threading.Event()

    def tell() -> None:
        calls.append(None)
        told.set()

    interface.on_packets_available(tell)
    for round_ in range(20):
        rig.send([frame(n) for n in range(300)])
        assert told.wait(5)
        time.sleep(0.01)  # the reader is slow: a level-triggered source without a park would call thousands of times
        told.clear()
        assert until(lambda: interface.read(1000) == []), round_
    assert len(calls) <= 20 * 4


def test_nothing_is_lost_or_reordered_when_a_refused_burst_is_drained(interface: Interface, rig: Rig) -> None:
    interface.on_packets_available(lambda: False)
    rig.send([frame(n) for n in range(700)])
    time.sleep(0.05)
    rig.send([frame(n) for n in range(700, 1000)])
    got: list[int] = []

    def some() -> bool:
        got.extend(map(number, interface.read(7)))
        return True

    interface.on_packets_available(some)
    assert until(lambda: len(got) == 1000)
    assert got == list(range(1000))


def test_10000_refusals_at_random_instants_leave_the_source_armed(interface: Interface, rig: Rig) -> None:
    # The consumer's own thread becomes ready while the callback is refusing: the race that loses the wake-up.
    dice = random.Random(2)
    got: list[int] = []
    refusals = 0
    asked = threading.Event()
    over = False

    def consume() -> bool:
        nonlocal refusals
        if refusals < 10_000:
            refusals += 1
            asked.set()
            for _ in range(dice.randrange(40)):
                pass
            return False
        got.extend(map(number, interface.read(3)))
        return True

    def ready() -> None:
        own = random.Random(3)
        while not over:
            if asked.wait(1):
                asked.clear()
                for _ in range(own.randrange(60)):
                    pass
                interface.arm()

    thread = threading.Thread(target=ready)
    thread.start()
    try:
        rig.send([frame(n) for n in range(500)])
        interface.on_packets_available(consume)
        assert until(lambda: len(got) == 500, 20), f"stalled after {refusals} refusals with {len(got)} frames"
    finally:
        over = True
        asked.set()
        thread.join()
    assert refusals == 10_000
    assert got == list(range(500))


def test_reads_of_another_thread_at_random_instants_leave_the_source_armed(interface: Interface, rig: Rig) -> None:
    got: list[int] = []
    told = threading.Event()
    total = 3000

    def reader() -> None:
        own = random.Random(4)
        while len(got) < total and told.wait(5):
            told.clear()
            got.extend(map(number, interface.read(own.randrange(1, 5))))
            if own.random() < 0.3:
                time.sleep(0.0001)

    interface.on_packets_available(told.set)
    thread = threading.Thread(target=reader)
    thread.start()
    for first in range(0, total, 30):
        rig.send([frame(n) for n in range(first, first + 30)])
        time.sleep(0.0005)
    thread.join(20)
    assert got == list(range(total))


def test_the_oversize_error_tells_the_true_size(interface: Interface, rig: Rig) -> None:
    with pytest.raises(PacketTooBig, match=r"^packet is too big, 1777 > 1514") as caught:
        interface.write([frame(0), frame(1, 1777), frame(2)])
    assert (caught.value.size, caught.value.limit) == (1777, 1514)
    assert caught.value.status is Status.PACKET_TOO_BIG
    interface.write([frame(3)])
    assert [number(each) for each in rig.received(2, 0.3)] == [3]  # of the refused three none had gone


def test_a_write_error_is_an_error_with_its_status(interface: Interface, rig: Rig) -> None:
    interface.write([frame(0)])
    rig.break_writes()
    with pytest.raises(LinkError, match="write error") as caught:
        interface.write([frame(1), frame(2)])
    assert caught.value.status is rig.broken
    assert caught.value.sent == 0


def test_stop_while_packets_are_in_flight_neither_hangs_nor_crashes(rig: Rig) -> None:
    for _ in range(20):
        interface = Interface(rig.link())
        outcome: list[BaseException | None] = []

        def stream(work: object, outcome: list[BaseException | None] = outcome) -> None:
            try:
                while True:
                    work()  # type: ignore[operator]
            except Stopped:
                outcome.append(None)
            except BaseException as error:  # noqa: BLE001 - told by the assertion below
                outcome.append(error)

        frames = [frame(n) for n in range(100)]
        interface.on_packets_available(lambda interface=interface: interface.read(10))
        works = (lambda i=interface, f=frames: i.write(f), interface.read, lambda i=interface: i.wait(5))
        threads = [threading.Thread(target=stream, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        rig.send(frames * 3)
        time.sleep(0.005)
        began = time.monotonic()
        stoppers = [threading.Thread(target=interface.stop) for _ in range(2)]
        for thread in stoppers:
            thread.start()
        for thread in [*stoppers, *threads]:
            thread.join(5)
            assert not thread.is_alive()
        assert time.monotonic() - began < 2
        assert outcome == [None, None, None]


def test_a_failing_callback_is_told_and_does_not_spin(
    interface: Interface, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    calls: list[None] = []

    def fail() -> None:
        calls.append(None)
        raise ZeroDivisionError

    interface.on_packets_available(fail)
    rig.send([frame(0)])
    assert until(lambda: "ZeroDivisionError" in caplog.text)
    time.sleep(0.1)
    assert len(calls) == 1
    assert [number(each) for each in interface.read()] == [0]
    rig.send([frame(1)])
    assert until(lambda: len(calls) == 2)
