"""What an interface promises: limits, order, all or an error, and every mistake of the caller's as an error."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openvmnet.contract.interface import MAX_OCTETS, Interface
from openvmnet.errors import CallerError, LinkError, VmnetError
from openvmnet.status import Status
from tests.contract.conftest import until
from tests.contract.engines import PARAMETERS, MemoryLink, frame, number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.contract.engines import Rig


def test_read_without_frames_is_empty_and_at_once(interface: Interface) -> None:
    began = time.monotonic()
    assert interface.read() == []
    assert time.monotonic() - began < 0.1


def test_frames_come_whole_and_in_order_both_ways(interface: Interface, rig: Rig) -> None:
    sent = [frame(n, size) for n, size in enumerate((60, 61, 999, 1513, 1514) * 30)]
    rig.send(sent)
    got: list[bytes] = []
    while len(got) < len(sent) and interface.wait(5):
        got += interface.read()
    assert got == sent
    interface.write(sent)
    assert rig.received(len(sent)) == sent


def test_read_gives_200_frames_at_most_unless_more_are_asked_for(interface: Interface, rig: Rig) -> None:
    rig.send([frame(n) for n in range(450)])
    assert interface.wait(5)
    assert [number(each) for each in interface.read()] == list(range(200))
    assert len(interface.read(1)) == 1
    assert len(interface.read(230)) == 230
    assert len(interface.read()) == 19


def test_write_takes_any_number_of_frames_of_any_bytes(interface: Interface, rig: Rig) -> None:
    frames = [frame(n) for n in range(1000)]
    interface.write(frames)
    assert rig.received(1000) == frames
    interface.write([])
    interface.write(bytearray(each) if n % 2 else memoryview(each) for n, each in enumerate(frames[:10]))
    assert rig.received(10) == frames[:10]


def test_wait_says_whether_a_frame_came(interface: Interface, rig: Rig) -> None:
    assert not interface.wait(0)
    began = time.monotonic()
    assert not interface.wait(0.05)
    assert time.monotonic() - began >= 0.045
    rig.send([frame(0)])
    assert interface.wait()
    assert interface.wait()
    interface.read()
    assert not interface.wait(0)


def test_none_disarms(interface: Interface, rig: Rig) -> None:
    got: list[int] = []
    interface.on_packets_available(lambda: got.extend(map(number, interface.read())))
    rig.send([frame(0)])
    assert until(lambda: got == [0])
    interface.on_packets_available(None)
    rig.send([frame(1)])
    time.sleep(0.1)
    assert got == [0]
    interface.arm()  # harmless
    assert [number(each) for each in interface.read()] == [1]


def test_a_new_callback_replaces_the_old_and_hears_of_what_waits(interface: Interface, rig: Rig) -> None:
    first: list[None] = []
    interface.on_packets_available(lambda: bool(first.append(None)))  # False: refuses
    rig.send([frame(0)])
    assert until(lambda: first)
    second: list[bytes] = []
    interface.on_packets_available(lambda: second.extend(interface.read()))
    assert until(lambda: second == [frame(0)])
    assert len(first) == 1


def test_a_callback_may_change_and_stop_its_interface(rig: Rig) -> None:
    interface = Interface(rig.link())
    seen: list[str] = []

    def one() -> None:
        seen.append("one")
        interface.on_packets_available(two)

    def two() -> None:
        seen.append("two")
        interface.stop()

    interface.on_packets_available(one)
    rig.send([frame(0)])
    assert until(lambda: not interface.running)
    time.sleep(0.02)
    assert seen == ["one", "two"]


class Batches(MemoryLink):
    """Records the batches that it is asked for, and fails the write numbered `fail_at`."""

    def __init__(self, size: int, packets: int, fail_at: int = -1) -> None:
        super().__init__()
        self.parameters = msgspec.structs.replace(
            PARAMETERS, max_packet_size=size, read_max_packets=packets, write_max_packets=packets
        )
        self.asked: list[int] = []
        self.written: list[int] = []
        self.fail_at = fail_at

    def read(self, limit: int) -> list[bytes]:
        self.asked.append(limit)
        return super().read(limit)

    def write(self, frames: Sequence[object]) -> None:
        if len(self.written) == self.fail_at:
            raise LinkError("write error", sent=3, status=Status.BUFFER_EXHAUSTED)
        self.written.append(len(frames))


@given(size=st.integers(60, 65550), packets=st.integers(1, 300), want=st.integers(1, 1000), there=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_each_call_on_the_link_keeps_within_packets_and_256_kb(size: int, packets: int, want: int, there: int) -> None:
    link = Batches(size, packets)
    with Interface(link) as interface:
        link.put([frame(n) for n in range(there)])
        assert [number(each) for each in interface.read(want)] == list(range(min(want, there)))
        interface.write([frame(n) for n in range(want)])
        assert sum(link.written) == want
        for batch in link.asked + link.written:
            assert 1 <= batch <= packets
            assert batch * size <= MAX_OCTETS


def test_a_write_that_fails_in_its_third_batch_says_how_many_frames_had_gone() -> None:
    with Interface(Batches(1514, 200, fail_at=2)) as interface:
        with pytest.raises(LinkError) as caught:
            interface.write([frame(n) for n in range(600)])
        assert caught.value.sent == 2 * 173 + 3
        assert caught.value.status is Status.BUFFER_EXHAUSTED


_ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=20),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.lists(st.one_of(st.binary(max_size=13), st.text(max_size=3), st.none(), st.integers()), min_size=1, max_size=3),
    st.builds(object),
)  # fmt: skip


@pytest.fixture(scope="module")
def shared() -> Interface:
    """One interface for many examples."""
    return Interface(MemoryLink())


@given(value=_ANYTHING)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_users_mistake_is_never_an_assertion(shared: Interface, value: object) -> None:
    for call in (shared.read, shared.write, shared.on_packets_available, shared.wait):
        right = (
            (call == shared.read and (value is None or (type(value) is int and value >= 1)))
            or (call == shared.write and isinstance(value, list | dict) and not value)
            or (call == shared.on_packets_available and value is None)
            or (call == shared.wait and (value is None or (isinstance(value, int | float) and 0 <= value < 1e6)))
        )
        if right:
            continue
        with pytest.raises(VmnetError) as caught:
            call(value)  # type: ignore[operator]
        assert isinstance(caught.value, CallerError)
        assert caught.value.status is Status.INVALID_ARGUMENT
        assert len(caught.value.message) > 20


@given(sizes=st.lists(st.integers(0, 1600), max_size=8), odd=st.one_of(st.none(), _ANYTHING))
@settings(max_examples=200, deadline=None)
def test_nothing_is_sent_of_a_list_in_which_anything_is_wrong(sizes: list[int], odd: object) -> None:
    link = MemoryLink()
    frames: list[object] = [bytes(size) for size in sizes]
    if odd is not None:
        frames.append(odd)
    good = all(isinstance(each, bytes) and 14 <= len(each) <= 1514 for each in frames)
    with Interface(link) as interface:
        if good:
            interface.write(frames)  # type: ignore[arg-type]
            assert list(link.outbox) == frames
        else:
            with pytest.raises(CallerError):
                interface.write(frames)  # type: ignore[arg-type]
            assert not link.outbox
