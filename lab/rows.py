"""A benchmark's rows: what is measured, of whom, and how the figures are compared.

A row is a function that yields its contenders' samplers, made by the `row` decorator from a generator:

    @row("tcp-up", "one TCP stream, guest to outside", unit="Gbit/s", aims={"kernel": 0.95})
    def tcp_up(bench: Bench) -> Iterator[dict[str, Sampler]]:
        yield {OURS: ..., "kernel": ...}

A sampler measures once and gives a figure in the row's unit. The frame calls the samplers in turn, round after round
(A B C, A B C), so that what else the machine does meets them alike, and takes each one's median. A contender that is
not installed, or that breaks, is a line that says why, not the end of the run. Rows live in modules lab/bench_*.py.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.world import World

OURS = "openvmnet"

Sampler = Callable[[], float]


@dataclass(frozen=True)
class Row:
    """One row: `better` is "higher" or "lower"; `aims` the ratio to reach beside each rival."""

    name: str
    what: str
    unit: str
    better: str
    aims: dict[str, float]
    contenders: Callable[[Bench], AbstractContextManager[dict[str, Sampler]]]


@dataclass
class Outcome:
    """A row's samples by contender, and what went wrong by contender."""

    row: Row
    congestion: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, who: str) -> float | None:
        """The median of a contender's samples; None when it has none."""
        return statistics.median(self.samples[who]) if self.samples.get(who) else None

    def ratio(self, rival: str) -> float | None:
        """How many times better ours is than `rival`: 1 is equal, whichever direction is better."""
        ours, theirs = self.median(OURS), self.median(rival)
        if ours is None or theirs is None:
            return None
        over, under = (ours, theirs) if self.row.better == "higher" else (theirs, ours)
        return over / under if under else None


@dataclass
class Bench:
    """What a row measures in: the world, how long a sample takes (seconds), and what stays up between rows."""

    world: World
    seconds: float
    keep: contextlib.ExitStack
    kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], AbstractContextManager[Any]]) -> Any:  # noqa: ANN401 - whatever `make` makes
        """Enter `make()` the first time that `name` is asked for; it stays up as long as the world."""
        if name not in self.kept:
            self.kept[name] = self.keep.enter_context(make())
        return self.kept[name]


_rows: dict[str, Row] = {}


def row(
    name: str, what: str, *, unit: str, better: str = "higher", aims: dict[str, float] | None = None
) -> Callable[[Callable[[Bench], Iterator[dict[str, Sampler]]]], Row]:
    """Register a row; see the module's own words."""

    def register(function: Callable[[Bench], Iterator[dict[str, Sampler]]]) -> Row:
        made = Row(name, what, unit, better, aims or {}, contextlib.contextmanager(function))
        _rows[name] = made
        return made

    return register


def all_rows() -> dict[str, Row]:
    """Every row of the modules lab/bench_*.py, by name."""
    import lab

    for module in sorted(pkgutil.iter_modules(lab.__path__), key=lambda module: module.name):
        if module.name.startswith("bench_"):
            importlib.import_module(f"lab.{module.name}")
    return _rows


def measure(chosen: Row, bench: Bench, rounds: int, progress: Callable[[str], None]) -> Outcome:
    """Measure one row, its contenders in turn, back and forth: what one leaves behind meets each of the others."""
    outcome = Outcome(chosen, bench.world.congestion)
    try:
        with chosen.contenders(bench) as samplers:
            for number in range(rounds):
                turns = list(samplers.items())
                for who, sampler in reversed(turns) if number % 2 else turns:
                    if who not in outcome.failures:
                        progress(f"{chosen.name}: round {number + 1} of {rounds}, {who}")
                        _sample(outcome, who, sampler)
    except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError, ValueError, KeyError) as error:
        outcome.failures[OURS] = f"{type(error).__name__}: {error}"
    return outcome


def _sample(outcome: Outcome, who: str, sampler: Sampler) -> None:
    try:
        outcome.samples.setdefault(who, []).append(sampler())
    except (OSError, RuntimeError, AssertionError, subprocess.SubprocessError, ValueError, KeyError) as error:
        outcome.failures[who] = f"{type(error).__name__}: {error}"
