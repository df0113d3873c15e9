"""interfaces: the table and the JSON, of made-up links."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest

from openvmnet.cli.interfaces_linux import Report
from openvmnet.cli.main import main
from openvmnet.engine.linux import bridged_record, interfaces
from openvmnet.engine.linux.bridged_record import BridgedPort
from openvmnet.engine.linux.interfaces import Interface

if TYPE_CHECKING:
    from collections.abc import Iterator

LINKS = [
    Interface("lo", "loopback", None, "up", "", 65536, reason="is the loopback"),
    Interface("br0", "bridge", "bridge", "up", "02:00:00:00:00:01", 1500, needs="sudo x", note="silent for 8 s"),
]
PORT = BridgedPort("web", "net0", "br0", "bridge", "vmtap0", "52:54:00:00:00:01", True, 77)


@pytest.fixture(autouse=True)
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interfaces, "inventory", lambda: LINKS)
    fds = [bridged_record.write(PORT, index) for index in (0, 1)]
    yield
    for fd in fds:
        os.close(fd)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["interfaces"]) == 0
    head, loopback, bridge = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["IFNAME", "KIND", "STATE", "HOW", "MTU", "VMS", "REMARK"]
    assert loopback == ["lo", "loopback", "up", "-", "65536", "-", "is", "the", "loopback"]
    assert " ".join(bridge) == "br0 bridge up bridge 1500 web first sudo x; silent for 8 s"


def test_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["interfaces", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Report) == Report(LINKS, [PORT, PORT])


def test_the_help_says_macvtaps_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["interfaces", "--help"]) == 0
    assert "a VM and its own host do not hear each other" in " ".join(capsys.readouterr().out.split())


def test_ls_names_bridged_vms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[1].split() == ["web", "net0", "br0", "bridge", "52:54:00:00:00:01", "yes", "77"]
