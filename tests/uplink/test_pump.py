"""The pump over real loopback TCP connections."""

from __future__ import annotations

import os
import select
import socket
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openvmnet.uplink import pump
from tests.uplink.pumping import bench, pattern, reset

BLOB = os.urandom(8 << 20)
"""More than any socket buffer holds, so that whoever does not read blocks whoever writes."""

SIDES = pytest.mark.parametrize("side", [0, 1], ids=["guest", "host"])


BUFFERS = pytest.mark.parametrize("buffers", [4096, 200_000], ids=["copied", "spliced"])
"""Small ones never fill a read, so the flow stays in copying mode; with the others what a sink refuses is in a pipe."""


def feed(end, data: bytes, *, step) -> None:
    """Write until the stream takes no more (or all is written), with the pump running."""
    at = stuck = 0
    while at < len(data) and stuck < 50:
        count = end.write(data[at : at + (1 << 20)])
        at += count
        stuck = 0 if count else stuck + 1
        step()


actions = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["write", "write", "read", "finish", "step", "step"]),
        st.integers(1, 200_000),
    ),
    max_size=40,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions, st.sampled_from([None, 2048, 20_000]), st.integers(0, 2))
def test_bytes_out_are_bytes_in_whatever_the_order(script, buffers, pipes):
    with bench(pipes=pipes) as world:
        _, *ends = world.flow(buffers=buffers)
        for number, (side, action, amount) in enumerate(script):
            end = ends[side]
            if action == "write" and not end.finished:
                end.write(pattern(amount, number))
            elif action == "read":
                end.read(amount)
            elif action == "finish" and not end.finished:
                end.finish()
            else:
                world.step()
        world.until(lambda: ends[0].sent == ends[1].got and ends[1].sent == ends[0].got)
        for end in ends:
            if not end.finished:
                end.finish()
        world.until(lambda: world.ended and all(end.ended for end in ends))
        assert not any(end.broken for end in ends)


@SIDES
@pytest.mark.parametrize("pipes", [0, 4], ids=["copying", "splicing"])
def test_a_bulk_stream_arrives_whole_and_its_end_with_it(side, pipes):
    with bench(pipes=pipes) as world:
        flow, *ends = world.flow()
        source, sink = ends[side], ends[1 - side]
        at = 0
        while at < len(BLOB):
            at += source.write(BLOB[at : at + (1 << 20)])
            world.step()
            sink.read()
        assert (flow.up if side == 0 else flow.down).bulk == (pipes > 0)
        source.finish()
        world.until(lambda: sink.ended)
        assert sink.got == BLOB
        assert flow.guest >= 0  # the other direction is still open
        sink.write(b"and back")
        sink.finish()
        world.until(lambda: world.ended)
        assert source.got == b"and back"


@SIDES
def test_a_half_closed_connection_goes_on(side):
    with bench() as world:
        _, *ends = world.flow()
        one, other = ends[side], ends[1 - side]
        one.write(b"the question")
        one.finish()
        world.until(lambda: other.ended)
        for number in range(100):
            other.write(pattern(1000, number))
            world.until(lambda: one.got == other.sent)
        assert not world.ended
        other.finish()
        world.until(lambda: world.ended and one.ended)


@SIDES
@BUFFERS
def test_the_end_waits_for_what_is_before_it(side, buffers):
    """FIN right behind data that the sink does not take."""
    with bench(pipes=2) as world:
        _, *ends = world.flow(buffers=buffers)
        source, sink = ends[side], ends[1 - side]
        feed(source, BLOB, step=world.step)
        source.finish()
        for _ in range(20):
            world.step()
        assert len(source.sent) < len(BLOB)  # the sink's not reading went back to the source
        assert not sink.ended
        world.until(lambda: sink.ended)
        assert sink.got == source.sent


@SIDES
def test_back_pressure_stops_the_source(side):
    with bench() as world:
        flow, *ends = world.flow(buffers=20_000)
        source = ends[side]
        feed(source, BLOB, step=world.step)
        taken = -1
        while taken != len(source.sent):  # what was acknowledged late, on a busy machine, makes room once more
            taken = len(source.sent)
            time.sleep(0.1)
            for _ in range(50):
                world.step()
            feed(source, BLOB, step=world.step)
        assert taken < 2 << 20
        feed(source, BLOB, step=world.step)
        assert len(source.sent) == taken
        way = flow.up if side == 0 else flow.down
        assert way.blocked()
        # A blocked flow waits in silence.
        begin = time.process_time()
        world.lane.select(0.1)
        assert time.process_time() - begin < 0.05


@SIDES
@pytest.mark.parametrize("moved", [0, 100, 1 << 20])
def test_a_reset_is_a_reset_on_the_other_side(side, moved):
    with bench() as world:
        _, *ends = world.flow()
        one, other = ends[side], ends[1 - side]
        if moved:
            feed(one, BLOB[:moved], step=lambda: (world.step(), other.read()))
            world.until(lambda: other.got == one.sent)
        reset(one.sock)
        one.broken = True
        world.until(lambda: other.broken)
        assert world.ended


@SIDES
def test_a_reset_after_a_fin(side):
    with bench() as world:
        _, *ends = world.flow()
        one, other = ends[side], ends[1 - side]
        one.finish()
        world.until(lambda: other.ended)
        reset(one.sock)
        one.broken = True
        world.until(lambda: world.ended)
        poll = select.poll()
        poll.register(other.sock, 0)
        assert poll.poll(1000)[0][1] & select.POLLHUP
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            other.sock.send(b"x")


@SIDES
def test_a_reset_of_the_half_that_still_sends(side):
    """One side has sent FIN; then the other, which goes on, resets."""
    with bench() as world:
        _, *ends = world.flow()
        one, other = ends[side], ends[1 - side]
        one.finish()
        other.write(b"some")
        world.until(lambda: other.ended and one.got == b"some")
        reset(other.sock)
        world.until(lambda: one.broken)
        assert world.ended


@SIDES
@BUFFERS
def test_a_reset_by_a_source_whose_sink_is_blocked(side, buffers):
    """What came before the reset is delivered when the sink takes it; until then the flow says since when it waits."""
    with bench(pipes=2) as world:
        flow, *ends = world.flow(buffers=buffers)
        source, sink = ends[side], ends[1 - side]
        feed(source, BLOB, step=world.step)
        assert flow.lost == 0
        taken = (flow.up if side == 0 else flow.down).moved
        reset(source.sock)
        source.broken = True
        world.until(lambda: flow.lost, seconds=1, read=False)
        assert time.monotonic() - 1 < flow.lost <= time.monotonic()
        assert not world.ended
        world.until(lambda: sink.broken and world.ended)
        assert len(sink.got) >= taken
        assert source.sent.startswith(sink.got)


@SIDES
@BUFFERS
def test_two_ends_of_stream_with_a_blocked_sink_are_no_reset(side, buffers):
    """epoll says EPOLLHUP of a socket that is shut both ways, broken or not."""
    with bench(pipes=2) as world:
        flow, *ends = world.flow(buffers=buffers)
        source, sink = ends[side], ends[1 - side]
        sink.finish()
        world.until(lambda: source.ended)
        feed(source, BLOB, step=world.step)
        source.finish()
        for _ in range(20):
            world.step(0.001)
        assert flow.lost == 0
        world.until(lambda: world.ended and sink.ended)
        assert sink.got == source.sent


@SIDES
@BUFFERS
def test_a_reset_by_a_sink_that_is_blocked(side, buffers):
    with bench(pipes=2) as world:
        _, *ends = world.flow(buffers=buffers)
        source, sink = ends[side], ends[1 - side]
        feed(source, BLOB, step=world.step)
        reset(sink.sock)
        sink.broken = True
        world.until(lambda: world.ended, seconds=1, read=False)
        world.until(lambda: source.broken)


@SIDES
def test_a_close_with_unread_data_is_a_reset(side):
    """What a killed program's kernel does."""
    with bench() as world:
        _, *ends = world.flow()
        one, other = ends[side], ends[1 - side]
        other.write(b"never read")
        for _ in range(5):
            world.step(0.001)
        one.sock.close()
        one.broken = True
        world.until(lambda: other.broken)


@SIDES
@pytest.mark.parametrize("pipes", [0, 4], ids=["copying", "splicing"])
def test_urgent_data_does_not_stall_the_stream(side, pipes):
    with bench(pipes=pipes) as world:
        _, *ends = world.flow()
        source, sink = ends[side], ends[1 - side]
        expected = bytearray()

        def more(data: bytes, flags: int = 0) -> None:
            nonlocal expected
            at = 0
            while at < len(data):
                try:
                    at += source.sock.send(data[at:], flags)
                except BlockingIOError:
                    world.step()
                    sink.read()
            expected += data

        for number in range(4):
            more(pattern(300_000, number))
            more(b"!", socket.MSG_OOB)
            more(pattern(300_000, number + 9))
            for _ in range(number):
                world.step()
        world.until(lambda: sink.got == expected)
        more(b"!", socket.MSG_OOB)
        more(b"the last words")
        source.finish()
        world.until(lambda: sink.ended)
        assert sink.got == expected


@SIDES
@pytest.mark.parametrize("pipes", [0, 4], ids=["copying", "splicing"])
def test_urgent_data_at_the_very_end(side, pipes):
    """The mark, what follows it, and FIN, all there before the pump looks."""
    with bench(pipes=pipes) as world:
        _, *ends = world.flow()
        source, sink = ends[side], ends[1 - side]
        first = pattern(500_000, 1)
        feed(source, first, step=lambda: (world.step(), sink.read()))
        world.until(lambda: sink.got == first)
        source.sock.send(b"!", socket.MSG_OOB)
        source.sock.send(b"behind the mark")
        source.finish()
        time.sleep(0.01)
        world.until(lambda: sink.ended)
        assert sink.got == first + b"!behind the mark"


@SIDES
def test_a_single_urgent_octet_arrives(side):
    with bench() as world:
        _, *ends = world.flow()
        source, sink = ends[side], ends[1 - side]
        for number in range(1, 4):
            source.sock.send(b"!", socket.MSG_OOB)
            world.until(lambda number=number: sink.got == b"!" * number)


@SIDES
def test_urgent_data_behind_a_full_pipe(side):
    """The sink owes room while the mark arrives: first what is in the pipe, then past the mark."""
    with bench(pipes=1) as world:
        flow, *ends = world.flow(buffers=200_000)
        source, sink = ends[side], ends[1 - side]
        feed(source, BLOB, step=world.step)
        expected = bytes(source.sent)
        way = flow.up if side == 0 else flow.down
        assert way.held
        while True:
            try:
                source.sock.send(b"!", socket.MSG_OOB)
                break
            except BlockingIOError:
                world.step()
                sink.read(10_000)
        world.until(lambda: sink.got == expected + b"!")


def test_without_pipes_it_copies():
    with bench(pipes=1) as world:
        flows = [world.flow() for _ in range(3)]
        for _ in range(200):
            for _, guest, host in flows:
                guest.write(BLOB[: 1 << 18])
                host.read()
            world.step()
        assert world.pool.lent <= 1
        world.until(lambda: all(guest.sent == host.got for _, guest, host in flows))
        assert all(len(guest.sent) > 1 << 20 for _, guest, _ in flows)
        for _, guest, host in flows:
            assert guest.sent == host.got


def test_an_idle_flow_holds_no_pipe():
    with bench() as world:
        flow, guest, host = world.flow()
        feed(guest, BLOB, step=lambda: (world.step(), host.read()))
        world.until(lambda: host.got == guest.sent)
        world.step()
        assert flow.up.bulk
        assert flow.up.pipe is None
        assert world.pool.lent == 0


def test_a_fast_flow_yields_to_the_others():
    """One call moves a bounded amount, and a short exchange beside it is answered while the bulk goes on."""
    with bench(pipe_size=1 << 20) as world:
        fast, source, sink = world.flow()
        _, guest, host = world.flow()
        answered = 0
        began = time.monotonic()
        while answered < 50:
            assert time.monotonic() - began < 5
            source.write(BLOB[: 1 << 20])
            sink.read()
            if len(guest.sent) == answered:
                guest.write(b"?")
            before = fast.up.moved
            world.step()
            assert fast.up.moved - before <= 4 * pump.ROUNDS << 20
            host.read()
            if len(host.got) > answered:
                answered = len(host.got)
        assert fast.up.moved > 1 << 20


def test_flows_end_without_leaving_a_descriptor():
    # bench() compares the descriptors before and after; here the flows end in each of the ways there are.
    with bench(pipes=4) as world:
        for number in range(60):
            flow, guest, host = world.flow()
            guest.write(pattern(100_000 * (number % 3), number))
            world.step()
            kind = number % 6
            if kind == 0:
                guest.finish()
                host.finish()
            elif kind == 1:
                reset(guest.sock)
            elif kind == 2:
                reset(host.sock)
            elif kind == 3:
                guest.sock.close()
                host.sock.close()
            elif kind == 4:
                flow.abort()
            world.ends.clear() if kind in (1, 2, 3) else None
            if kind != 5:
                deadline = time.monotonic() + 2
                while flow not in world.ended:
                    assert time.monotonic() < deadline
                    world.step(0.001)
                    for end in (guest, host):
                        if end.sock.fileno() >= 0:
                            end.read()
            for end in (guest, host):
                end.sock.close()


def test_abort_is_a_reset_to_both_and_may_be_said_twice():
    with bench() as world:
        flow, guest, host = world.flow()
        guest.write(b"some")
        world.until(lambda: host.got == b"some")
        flow.abort()
        flow.abort()
        world.until(lambda: guest.broken and host.broken)
        assert world.ended == [flow]


def test_events_of_an_ended_flow_are_passed_over():
    with bench() as world:
        flow, *_ = world.flow()
        flow.abort()
        flow.on_guest(0x1F)
        flow.on_host(0x1F)
        assert world.ended == [flow]
