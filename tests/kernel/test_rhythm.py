"""The lane in a rhythm of question and answer: awake when the next is due, else asleep; the clock is the test's own."""

from __future__ import annotations

import pytest

from openvmnet.kernel import loop as loop_module
from openvmnet.kernel.loop import READ, Lane


class Score:
    """An epoll whose events come at known times, and the clock that goes with it; a look takes 1 us, a wake-up 50."""

    def __init__(self, due: list[float]) -> None:
        self.due = due
        self.now = 0.0
        self.slept = 0.0
        self.sleeps = 0

    def poll(self, wait: float, _: int) -> list[tuple[int, int]]:
        self.now += 1e-6
        ready = [(1, READ) for one in self.due if one <= self.now]
        if not ready and wait:
            self.sleeps += 1
            until = min([*self.due, self.now + wait if wait > 0 else 1e9])
            self.slept += until - self.now
            self.now = until + 50e-6
            ready = [(1, READ) for one in self.due if one <= self.now]
        self.due = [one for one in self.due if one > self.now]
        return ready

    def clock(self) -> float:
        return self.now


def played(monkeypatch, lane: Lane, gap: float, turns: int, *, work: float = 20e-6) -> Score:
    """`turns` events, each `gap` after the one before was dealt with, which takes `work`."""
    score = Score([])
    monkeypatch.setattr(loop_module.time, "monotonic", score.clock)
    lane.close()
    lane._epoll = score
    for _ in range(turns):
        score.due.append(score.now + gap)
        assert lane._wait(-1.0) == [(1, READ)]
        score.now += work
    return score


def test_a_rhythm_is_met_awake(monkeypatch):
    score = played(monkeypatch, Lane(), 25e-6, 1000)
    assert score.sleeps < 20  # until the rhythm was sure
    assert score.now < 1000 * (20e-6 + 30e-6)


@pytest.mark.parametrize("gap", [0.0, 200e-6, 1e-3])
def test_bulk_and_pauses_are_no_rhythm(monkeypatch, gap):
    lane = Lane()
    score = played(monkeypatch, lane, gap, 200)
    assert lane._rhythm == 0
    assert score.sleeps == (200 if gap else 0)


def test_a_rhythm_ends_with_one_pause(monkeypatch):
    lane = Lane()
    score = played(monkeypatch, lane, 25e-6, 100)
    sleeps, begun = score.sleeps, score.now
    assert lane._wait(0.5) == []
    assert (score.sleeps, lane._rhythm) == (sleeps + 1, 0)
    assert score.now - begun - score.slept < 200e-6  # it looked for a moment, then it slept
    assert lane._wait(0.0) == []
    assert score.sleeps == sleeps + 1
