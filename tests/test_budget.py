"""One owner's share of the time, what it may spend at once, and what it has to pay back."""

from __future__ import annotations

from openvmnet.budget import WINDOW, Budget


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def crowded(share: float, burst: int = 1) -> tuple[Budget, Clock, Clock]:
    """A budget while there are several guests, and its clocks."""
    cpu, wall = Clock(), Clock()
    wall.now = 50.0
    budget = Budget(share, burst, cpu=cpu, wall=wall)
    budget.crowded = True
    return budget, cpu, wall


def test_share_of_a_window() -> None:
    budget, cpu, wall = crowded(0.4)
    budget.begin()
    for _ in range(5):
        assert budget.allows(1)
        cpu.now += WINDOW / 10
        budget.charge(1)
    assert not budget.allows(1)
    assert budget.allows(2)
    budget.begin()
    assert not budget.allows(1)  # a new turn is not a new window
    wall.now += WINDOW * 1.01
    budget.begin()
    assert budget.allows(1)


def test_what_was_not_used_may_be_spent_at_once() -> None:
    budget, cpu, wall = crowded(0.1, 5)

    def spend() -> float:
        """Until there is no more, in pieces of a hundredth of a window."""
        began = cpu.now
        budget.begin()
        while budget.allows(1):
            cpu.now += WINDOW / 100
            budget.charge(1)
        return (cpu.now - began) / WINDOW

    assert 0.5 <= spend() < 0.53
    wall.now += WINDOW * 1.01
    assert 0.1 <= spend() < 0.13
    assert budget.allows(2)
    wall.now += WINDOW * 100
    assert 0.5 <= spend() < 0.53


def test_a_piece_that_was_too_large_is_paid_for() -> None:
    budget, cpu, wall = crowded(0.1)
    budget.begin()
    cpu.now += WINDOW * 0.35
    budget.charge(1)
    allowed = []
    for _ in range(4):
        wall.now += WINDOW * 1.01
        budget.begin()
        allowed.append(budget.allows(1))
    assert allowed == [False, False, True, True]


def test_alone_there_is_no_limit() -> None:
    cpu = Clock()
    budget = Budget(0.1, cpu=cpu, wall=Clock())
    budget.begin()
    cpu.now += 10
    budget.charge(1)
    assert budget.allows(1)


def test_what_nobody_measures_is_charged_too() -> None:
    budget, _, wall = crowded(0.5)
    budget.begin()
    budget.spend(1, WINDOW)
    assert not budget.allows(1)
    assert budget.allows(2)
    wall.now += WINDOW * 1.01
    budget.begin()
    assert budget.allows(1)


def test_nothing_is_charged_to_who_is_alone() -> None:
    budget, _, _ = crowded(0.5)
    budget.crowded = False
    budget.spend(1, 10 * WINDOW)
    budget.crowded = True
    assert budget.allows(1)
