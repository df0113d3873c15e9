"""ls and show: what a network says of itself, as text and as JSON."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import pytest

from openvmnet import control
from openvmnet.cli.main import main
from openvmnet.errors import HostError
from openvmnet.messages import NetworkView, PortView

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def view() -> NetworkView:
    """A network with a VM of two NICs, one of them isolated and with a hostile name."""
    now = time.time()
    ports = [
        PortView(
            "vm1",
            "web",
            "net0",
            "52:54:00:00:00:01",
            False,
            "192.168.64.2",
            "web",
            now + 3600.9,
            1500,
            3,
            2_500_000,
            9,
            0,
            77,
            reservation="192.168.64.2",
        ),
        PortView("vm2", "web", "net1", "52:54:00:00:00:02", True, None, "\x1b]0;owned\x07", None, 0, 0, 0, 0, 4, 77),
    ]
    return NetworkView(
        "shared", "shared", "192.168.64.0/24", "192.168.64.1", "192.168.64.2", "192.168.64.254", "192.168.64.1",
        "vmnet.internal", 1500, 55, 65.0, ports, {"tcp": 3, "udp": 0}, {"firewall_limited": 1}, ["taken over"],
    )  # fmt: skip


class Client:
    """In place of a connection: this test is about what is printed of an answer."""

    def __init__(self, view: NetworkView) -> None:
        self._view = view
        self.closed = False

    def show(self) -> NetworkView:
        return self._view

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def client(view: NetworkView, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    client = Client(view)
    monkeypatch.setattr(control, "connect", {"shared": client}.__getitem__)
    yield client
    assert client.closed


@pytest.mark.usefixtures("client")
def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "shared"]) == 0
    out = capsys.readouterr().out.replace("\N{REPLACEMENT CHARACTER}", "?")
    expected = """\
network   shared
mode      shared
subnet    192.168.64.0/24
gateway   192.168.64.1
pool      192.168.64.2 to 192.168.64.254
DNS       192.168.64.1
domain    vmnet.internal
MTU       1500
flows     3 tcp
firewall  1 limited
uptime    1 min 5 s
pid       55
note: taken over

PORT  VM   NETDEV  MAC                ADDRESS       NAME        LEASE  RECEIVED    SENT  DROPPED  ISOLATED  PID
vm1   web  net0    52:54:00:00:00:01  192.168.64.2  web           1 h    1.5 kB  2.5 MB        0  no         77
vm2   web  net1    52:54:00:00:00:02  -             ?]0;owned?      -       0 B     0 B        4  yes        77
vm1 has 192.168.64.2 reserved
"""
    assert out == expected


@pytest.mark.usefixtures("client")
def test_show_json_is_the_whole_view(capsys: pytest.CaptureFixture[str], view: NetworkView) -> None:
    assert main(["show", "shared", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=NetworkView) == view


def test_ls(capsys: pytest.CaptureFixture[str], view: NetworkView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "list_networks", lambda: ([view], []))
    assert main(["ls"]) == 0
    said = capsys.readouterr()
    assert (
        said.out
        == """\
NETWORK  MODE    SUBNET           GATEWAY       VMS     UPTIME  PID
shared   shared  192.168.64.0/24  192.168.64.1    1  1 min 5 s   55
"""
    )
    assert said.err == "note: shared: taken over\n"
    assert main(["ls", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=list[NetworkView]) == [view]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ls_lists_what_answers_before_it_fails_for_what_does_not(
    capsys: pytest.CaptureFixture[str], view: NetworkView, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    silent = [HostError("network 'one' does not answer"), HostError("network 'two' does not answer")]
    monkeypatch.setattr(control, "list_networks", lambda: ([view], silent))
    assert main(["ls", *options]) == HostError.exit_code
    said = capsys.readouterr()
    assert "shared" in said.out
    assert "note: network 'two' does not answer\n" in said.err
    assert "network 'one' does not answer" in said.err
    monkeypatch.setattr(control, "list_networks", lambda: ([], silent))
    assert main(["ls"]) == HostError.exit_code
    assert "no network is running" not in capsys.readouterr().err


def test_ls_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert capsys.readouterr() == ("", "no network is running\n")
    assert main(["ls", "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", "")
