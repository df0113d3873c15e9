"""What each port has of the TCP uplink, and the bounds for it: addresses can be made up, a port cannot.

A connection is *held* from its first packet on, first as an opening, then as a flow. One port may have
OPENINGS_PER_OWNER openings, and seven eighths of all that may be held.
"""

from __future__ import annotations

OPENINGS_PER_OWNER = 512


class Account:
    """What one owner has: `openings`, and all that is `held`, openings and flows."""

    __slots__ = ("held", "openings")

    def __init__(self) -> None:
        self.openings = 0
        self.held = 0


class Accounts:
    """The accounts of those who hold anything, by owner; at most `limit` things are held in all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.openings = 0
        self.held = 0
        self._share = limit - limit // 8
        self._by_owner: dict[int, Account] = {}

    def __len__(self) -> int:
        return len(self._by_owner)

    def of(self, owner: int) -> Account:
        """The account of `owner`, an empty one where nothing is held."""
        return self._by_owner.get(owner) or Account()

    def full(self, owner: int) -> bool:
        """Whether `owner`, or all of them, have as much as they may."""
        account = self._by_owner.get(owner)
        if account is not None and (account.openings >= OPENINGS_PER_OWNER or account.held >= self._share):
            return True
        return self.held >= self.limit

    def take(self, owner: int) -> None:
        """An opening begins."""
        account = self._by_owner.get(owner)
        if account is None:
            account = self._by_owner[owner] = Account()
        account.openings += 1
        account.held += 1
        self.openings += 1
        self.held += 1

    def settle(self, owner: int) -> None:
        """An opening has become a flow."""
        self._by_owner[owner].openings -= 1
        self.openings -= 1

    def give_back(self, owner: int, *, opening: bool = False) -> None:
        """A flow ends, or an opening that has become none."""
        account = self._by_owner[owner]
        if opening:
            account.openings -= 1
            self.openings -= 1
        account.held -= 1
        self.held -= 1
        if not account.held:
            del self._by_owner[owner]
