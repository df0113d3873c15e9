"""The accounts of the TCP uplink: what one port may have, and all of them."""

from __future__ import annotations

from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from hypothesis.strategies import integers

from openvmnet.uplink import account
from openvmnet.uplink.account import Accounts

OWNERS = integers(1, 3)
LIMIT = 24


def test_one_owner_has_seven_eighths_and_the_others_the_rest():
    accounts = Accounts(16)
    for _ in range(14):
        accounts.take(1)
    assert accounts.full(1)
    assert not accounts.full(2)
    for owner in (2, 3):
        accounts.take(owner)
    assert accounts.full(4)  # all have what they may


def test_flows_do_not_count_as_openings(monkeypatch):
    monkeypatch.setattr(account, "OPENINGS_PER_OWNER", 2)
    accounts = Accounts(100)
    for _ in range(2):
        accounts.take(1)
    assert accounts.full(1)
    accounts.settle(1)
    assert not accounts.full(1)
    assert (accounts.of(1).openings, accounts.of(1).held) == (1, 2)


class Life(RuleBasedStateMachine):
    """Openings and flows come and go; the accounts agree with two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts(LIMIT)
        self.openings: list[int] = []
        self.flows: list[int] = []

    @rule(owner=OWNERS)
    def opens(self, owner: int) -> None:
        held = [*self.openings, *self.flows]
        full = held.count(owner) >= LIMIT * 7 // 8 or len(held) >= LIMIT
        assert self.accounts.full(owner) is full
        if not full:
            self.accounts.take(owner)
            self.openings.append(owner)

    @precondition(lambda self: self.openings)
    @rule(becomes=integers(0, 2))
    def answers(self, becomes: int) -> None:
        owner = self.openings.pop(0)
        if becomes:
            self.accounts.settle(owner)
            self.flows.append(owner)
        else:
            self.accounts.give_back(owner, opening=True)

    @precondition(lambda self: self.flows)
    @rule()
    def ends(self) -> None:
        self.accounts.give_back(self.flows.pop(0))

    @invariant()
    def agrees(self) -> None:
        assert (self.accounts.openings, self.accounts.held) == (
            len(self.openings),
            len(self.openings) + len(self.flows),
        )
        assert len(self.accounts) == len({*self.openings, *self.flows})
        for owner in (1, 2, 3):
            one = self.accounts.of(owner)
            assert one.openings == self.openings.count(owner)
            assert one.held == self.openings.count(owner) + self.flows.count(owner)


TestLife = Life.TestCase
