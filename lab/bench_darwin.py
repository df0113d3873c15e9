"""Rows: the macOS engine's data path over the stand-in for vmnet.framework, beside the same loop in C."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from lab.bench_small import environment
from lab.paths import CHECKOUT
from lab.rows import OURS, Bench, Sampler, row

if TYPE_CHECKING:
    from collections.abc import Iterator

_C = "the same loop in C"
_WHO = {OURS: "ours", _C: "C"}
_FRAMES = {"1514": 1514, "64k": 65534}  # octets: MTU 1500, and 65,520 with its header


def _sampler(bench: Bench, who: str, way: str, octets: int, figure: str) -> Sampler:
    command = [sys.executable, "-m", "lab.darwin_loop", _WHO[who], way, str(octets), str(bench.seconds)]

    def sample() -> float:
        done = subprocess.run(
            command, env=environment(), cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-500:])
        return float(json.loads(done.stdout)[figure])

    return sample


def _register(way: str, size: str, figure: str, unit: str) -> None:
    where = "vmnet to VM" if way == "down" else "VM to vmnet"
    name = f"darwin-{way}-{size}" + ("" if figure == "gbits" else "-batches")

    @row(name, f"macOS engine over the stand-in, {where}, frames of {_FRAMES[size]} octets", unit=unit, aims={_C: 0.8})
    def _row(bench: Bench) -> Iterator[dict[str, Sampler]]:
        yield {who: _sampler(bench, who, way, _FRAMES[size], figure) for who in _WHO}


for _way in ("down", "up"):
    for _size in _FRAMES:
        _register(_way, _size, "gbits", "Gbit/s")
        _register(_way, _size, "batches", "per s")
