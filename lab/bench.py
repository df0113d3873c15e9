"""The benchmark: `scripts/bench [OPTIONS] [ROW...]`. Runs in the lab; lab/rows.py says how rows are measured.

Prints a markdown table with one line for each rival. The ratio says how many times better openvmnet is in that run:
1.00 is equal, and above is better, whichever direction the unit has.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.rows import OURS, Bench, Outcome, Row, all_rows, measure
from lab.world import World

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 1 when one of openvmnet's own measurements failed."""
    options = _parser().parse_args(argv)
    rows = all_rows()
    if options.list:
        for row in rows.values():
            print(f"{row.name:20} {row.what} ({row.unit})")
        return 0
    chosen = _chosen(rows, options.rows)
    congestions = [_default_congestion() if name == "default" else name for name in options.congestion or ["reno"]]
    outcomes: list[Outcome] = []
    for congestion in dict.fromkeys(congestions):
        with World(hops=0, congestion=congestion) as world, contextlib.ExitStack() as keep:
            bench = Bench(world, options.seconds, keep)
            for row in chosen:
                outcomes.append(measure(row, bench, options.rounds, _progress))
                if not options.json:
                    _print_outcome(outcomes[-1], head=len(outcomes) == 1)
    if options.json:
        print(json.dumps([_plain(outcome) for outcome in outcomes], indent=1))
    return int(any(OURS in outcome.failures for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure openvmnet beside its rivals.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names or patterns of rows (default: all)")
    parser.add_argument("--list", action="store_true", help="list the rows")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each contender (default: 3)")
    parser.add_argument("--seconds", type=float, default=3, help="length of a sample (default: 3)")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON")
    parser.add_argument(
        "--congestion", action="append", metavar="NAME",
        help="TCP congestion control in all namespaces; may be repeated; 'default' is the machine's (default: reno)",
    )  # fmt: skip
    return parser


def _chosen(rows: dict[str, Row], patterns: list[str]) -> list[Row]:
    if not patterns:
        return list(rows.values())
    names = [name for name in rows if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    unknown = [pattern for pattern in patterns if not fnmatch.filter(rows, pattern)]
    if unknown:
        raise SystemExit(f"no row is called {', '.join(unknown)}; there are: {', '.join(rows)}")
    return [rows[name] for name in names]


def _default_congestion() -> str:
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def _print_outcome(outcome: Outcome, *, head: bool) -> None:
    if head:
        print("| what | congestion control | unit | openvmnet | beside | its figure | ratio | aim |")
        print("|---|---|---|---:|---|---:|---:|---|")
    row = outcome.row
    ours = outcome.failures.get(OURS) or _figure(outcome, OURS)
    rivals = [who for who in [*outcome.samples, *outcome.failures] if who != OURS]
    for rival in dict.fromkeys(rivals) or [""]:
        theirs = _one_line(outcome.failures[rival]) if rival in outcome.failures else _figure(outcome, rival)
        ratio = outcome.ratio(rival)
        cells = [row.what, outcome.congestion, row.unit, _one_line(ours), rival, theirs]
        cells += ["" if ratio is None else f"{ratio:.2f}", _aim(row, rival, ratio)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _figure(outcome: Outcome, who: str) -> str:
    samples = outcome.samples.get(who)
    if not samples:
        return ""
    median = outcome.median(who)
    return f"{_number(median or 0.0)} ({_number(min(samples))}-{_number(max(samples))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _aim(row: Row, rival: str, ratio: float | None) -> str:
    aim = row.aims.get(rival)
    if aim is None:
        return ""
    met = "" if ratio is None else ", met" if ratio >= aim else ", missed"
    return f"≥ {aim:g}{met}"


def _plain(outcome: Outcome) -> dict[str, object]:
    rivals = [who for who in outcome.samples if who != OURS]
    return {
        "row": outcome.row.name,
        "what": outcome.row.what,
        "unit": outcome.row.unit,
        "better": outcome.row.better,
        "congestion": outcome.congestion,
        "samples": outcome.samples,
        "medians": {who: outcome.median(who) for who in outcome.samples},
        "ratios": {who: outcome.ratio(who) for who in rivals},
        "aims": outcome.row.aims,
        "failures": outcome.failures,
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:120].replace("|", "/")


def _progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
