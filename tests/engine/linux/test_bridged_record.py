"""bridged_record: a record is there as long as somebody holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.linux import bridged_record
from openvmnet.engine.linux.bridged_record import BridgedPort

if TYPE_CHECKING:
    from pathlib import Path

PORT = BridgedPort("web", "net0", "br0", "bridge", "vmtap0", "52:54:00:00:00:01", False, 77)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "openvmnet" / ".bridged"


def test_a_record_ends_with_its_last_holder(directory: Path) -> None:
    fd = bridged_record.write(PORT, 0)
    heir = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[fd])
    assert bridged_record.ports() == [PORT]
    os.close(fd)
    assert bridged_record.ports() == [PORT]  # as a VM inherits it by exec
    heir.kill()
    heir.communicate()
    assert [path.name for path in directory.iterdir()] == ["77-0.json"]
    assert bridged_record.ports() == []
    assert list(directory.iterdir()) == []


def test_two_ports_of_one_vm_and_what_is_no_record(directory: Path) -> None:
    fds = [bridged_record.write(PORT, index) for index in (0, 1)]
    odd = directory / "odd.json"
    odd.write_text("{")
    assert bridged_record.ports() == [PORT, PORT]
    assert not odd.exists()
    for fd in fds:
        os.close(fd)
    assert bridged_record.ports() == []


def test_a_directory_of_a_network_is_not_meant(directory: Path) -> None:
    from openvmnet import state

    os.close(bridged_record.write(PORT, 0))
    assert state.names() == []
