"""The relays' records: whose are read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from openvmnet import state
from openvmnet.engine.darwin import records
from openvmnet.engine.darwin.datapath import Counters

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def record(vm: str, started: float) -> records.Record:
    return records.Record(
        pid=os.getpid(),
        vm_pid=os.getpid(),
        vm=vm,
        netdev="net0",
        mode="shared",
        mac=None,
        isolated=False,
        started=started,
        parameters={},
        counters=Counters(),
    )


def test_root_by_sudo_sees_the_records_of_the_relays_that_are_the_users_by_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "openvmnet-501" / "relays"
    theirs.mkdir(parents=True)
    (theirs / "1.json").write_bytes(msgspec.json.encode(record("theirs", 1.0)))
    (theirs / "2.json").write_bytes(b"no record")
    records.write(record("own", 2.0))
    assert [one.vm for one in records.read()] == ["own"]
    monkeypatch.setattr(state, "sudoer_root", lambda: theirs.parent)
    assert [one.vm for one in records.read()] == ["theirs", "own"]
    assert [path.name for path in theirs.iterdir()] == ["1.json"]
