"""The lane's turns: work that goes on in the next one, and descriptors that rest for some."""

from __future__ import annotations

import asyncio
import logging
import time

from openvmnet.kernel.loop import EDGE, READ, WRITE, Lane, run
from tests.kernel.test_loop import Drain


def test_work_goes_on_in_the_next_turn_without_a_wait(pair):
    lane, done = Lane(), []
    drain = Drain(pair[0])
    lane.watch(pair[0].fileno(), READ, drain)

    def work() -> None:
        done.append(len(drain.data))
        if len(done) < 3:
            lane.again(work)

    lane.again(work)
    pair[1].send(b"x")
    began = time.monotonic()
    lane.select(0)
    assert done == [1]  # after the events
    lane.select(0.05)
    assert done == [1, 1, 1]
    lane.select(0.05)
    assert time.monotonic() - began >= 0.05  # nothing is left to do
    lane.close()


def test_work_that_fails_is_said_and_the_rest_is_done(caplog):
    lane, done = Lane(), []

    def fail() -> None:
        raise ZeroDivisionError

    lane.again(fail)
    lane.again(lambda: done.append(1))
    with caplog.at_level(logging.ERROR):
        lane.select(0)
    assert (len(caplog.records), done) == (1, [1])
    lane.close()


def test_rest(pair):
    one, other = pair

    async def main(lane: Lane) -> None:
        seen = []
        lane.watch(one.fileno(), READ, seen.append)
        other.send(b"x")
        lane.rest(one.fileno(), 0.05)
        await asyncio.sleep(0.02)
        assert seen == []
        await asyncio.sleep(0.06)
        assert READ in seen  # level-triggered: what came meanwhile is there
        lane.forget(one.fileno())

    run(main)


def test_a_rest_is_over_with_its_descriptor(pair):
    """Who gets the number next has its own events."""
    one, other = pair

    async def main(lane: Lane) -> None:
        old, new = [], []
        number = one.fileno()
        lane.watch(number, READ, old.append)
        lane.rest(number, 0.02)
        lane.forget(number)
        lane.watch(number, WRITE | EDGE, new.append)
        other.send(b"x")
        await asyncio.sleep(0.06)
        assert (old, new) == ([], [WRITE])
        lane.forget(number)

    run(main)
