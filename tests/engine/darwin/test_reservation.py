"""The option `address` on a Mac: relays that keep an address, over the stand-in, with files of the test's own."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab.paths import CHECKOUT
from openvmnet.attach import darwin, relays
from openvmnet.attach.command import plan
from openvmnet.contract.interface import LinkRequest
from openvmnet.engine.darwin import bootptab, interface, launch, leases, publish, records, reservation
from openvmnet.engine.darwin.framework import Mode
from openvmnet.engine.darwin.handle import Handle
from openvmnet.engine.darwin.mac import Mac
from openvmnet.engine.darwin.ports import Forward, Rules
from openvmnet.errors import Conflict, HostError, MissingFeature, OptionError
from openvmnet.netdev import Shared
from tests.engine.darwin.conftest import eventually

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.engine.darwin.launch import Port
    from tests.engine.darwin.conftest import Controls

ID = uuid.UUID("a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d")


@pytest.fixture
def bootpd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of what bootpd reads and writes and of what it was told; a runtime directory of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'src'}")
    for name in ("SUDO_UID", "SUDO_GID"):
        monkeypatch.delenv(name, raising=False)
    directory = tmp_path / "bootpd"
    directory.mkdir()
    monkeypatch.setenv("STANDIN_BOOTPD", str(directory))
    return directory


def _command(controls: Controls) -> list[str]:
    return [sys.executable, "-m", "tests.engine.darwin.on_standin", str(controls.path), "relay"]


def kept(bootpd: Path) -> list[tuple[str, str]]:
    return [(each.mac, str(each.address)) for each in bootptab.parse((bootpd / "bootptab").read_text())]


def keeping(controls: Controls, mac: str, address: str) -> Port:
    """A relay with this address for this MAC."""
    options = f"vmnet-shared,id=net0,address={address}"
    return launch.start(options, vm="alpha", netdev="net0", interface_id=ID, mac=mac, command=_command(controls))


FIRST, SECOND = "52:54:00:00:00:01", "52:54:00:00:00:02"


def test_two_relays_both_have_their_address_kept(controls: Controls, bootpd: Path) -> None:
    one = keeping(controls, FIRST, "192.168.64.50")
    other = keeping(controls, SECOND, "192.168.64.51")
    try:
        assert kept(bootpd) == [(FIRST, "192.168.64.50"), (SECOND, "192.168.64.51")]
        assert (bootpd / "told").read_text() == f"{' '.join(reservation.RELOAD)}\n" * 2
        assert eventually(lambda: len(records.read()) == 2)
        (view,) = relays.networks(given=[])
        assert [port.reservation for port in view.ports] == ["192.168.64.50", "192.168.64.51"]
    finally:
        one.close()
        assert kept(bootpd) == [(SECOND, "192.168.64.51")]
        other.close()
    assert kept(bootpd) == []


def test_published_ports_lead_to_the_address_that_is_kept(framework: Framework) -> None:
    options = Shared("n", address="192.168.64.50", hostfwd=("tcp::2222-:22", "udp::53-192.168.64.9:53"))
    found = publish.forwards(options)
    publish.refuse_leased(found)  # for a program's interface too, which sees no lease
    handle = Handle(framework, {"vmnet_operation_mode": Mode.SHARED})
    rules = Rules(framework, handle)
    publish.Publisher(rules, found, None, None).begin()
    kept, named = Forward("tcp", 2222, "192.168.64.50", 22), Forward("udp", 53, "192.168.64.9", 53)
    assert sorted(rules.get(), key=str) == [kept, named]
    handle.stop()


def test_a_killed_relays_line_is_taken_out_by_the_next(controls: Controls, bootpd: Path) -> None:
    one = keeping(controls, FIRST, "192.168.64.50")
    os.kill(one.pid, signal.SIGKILL)
    one.close()
    assert kept(bootpd) == [(FIRST, "192.168.64.50")]
    other = keeping(controls, SECOND, "192.168.64.50")
    assert kept(bootpd) == [(SECOND, "192.168.64.50")]
    other.close()


def _may_become(uid: int) -> bool:
    """Whether this root is no user namespace's, or one's that has `uid` and may set groups."""
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    known = any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)
    return known and Path("/proc/self/setgroups").read_text().strip() == "allow"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, whose rights are given up")
def test_a_line_outlives_the_rights_to_take_it_out_and_is_held_until_the_end(
    controls: Controls, bootpd: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not _may_become(65534):
        pytest.skip("this root may not become another user")
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    for name in ("SUDO_UID", "SUDO_GID"):
        monkeypatch.setenv(name, "65534")
    one = keeping(controls, FIRST, "192.168.64.50")
    try:
        status = Path(f"/proc/{one.pid}/status").read_text()
        assert "Uid:\t65534\t65534\t65534\t65534\n" in status
        with pytest.raises(Conflict, match=r"keeps 192\.168\.64\.50 for 52:54:00:00:00:01 already"):
            keeping(controls, SECOND, "192.168.64.50")
    finally:
        one.close()
    assert kept(bootpd) == [(FIRST, "192.168.64.50")]
    other = keeping(controls, SECOND, "192.168.64.51")
    assert kept(bootpd) == [(SECOND, "192.168.64.51")]
    other.close()


LEASES = """{
\tname=web
\tip_address=192.168.64.50
\thw_address=1,52:54:0:0:0:9
\tidentifier=1,52:54:0:0:0:9
\tlease=0xffffffff
}
{
\tip_address=192.168.64.51
\thw_address=ff,0:0:0:2:0:0:ab:11
\tlease=0xffffffff
}
{
\tip_address=192.168.64.52
\thw_address=1,52:54:0:0:0:9
\tlease=0x10
}
{
\tip_address=192.168.64.53
\thw_address=1,52:54:0:0:0:1
\tlease=0xffffffff
}
"""


def test_what_is_in_the_way_on_a_mac_is_a_sentence(controls: Controls, bootpd: Path) -> None:
    (bootpd / "dhcpd_leases").write_text(LEASES)
    for address, words in (
        ("192.168.64.1", "is the gateway's on this network, which gives 192.168.64.2 to 192.168.64.254"),
        ("10.0.0.5", "is not in the DHCP pool on this network"),
        ("192.168.64.50", r"is leased to 52:54:00:00:00:09 \('web'\) until 2106-02-07"),
    ):
        with pytest.raises(Conflict, match=words) as caught:
            keeping(controls, FIRST, address)
        assert caught.value.exit_code == 3
    for address in ("192.168.64.51", "192.168.64.52", "192.168.64.53"):
        keeping(controls, FIRST, address).close()
    assert kept(bootpd) == []


def test_a_bootptab_that_cannot_be_written_starts_nothing(
    controls: Controls, bootpd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_BOOTPD", str(bootpd / "nowhere"))
    with pytest.raises(HostError, match="nowhere/bootptab cannot be written"):
        keeping(controls, FIRST, "192.168.64.50")
    assert records.read() == []


class Another(Mac):
    """A Mac that this process is not root on."""

    def __init__(self, *version: int) -> None:
        self._version = version

    @property
    def version(self) -> tuple[int, ...]:
        return self._version

    @property
    def root(self) -> bool:
        return False


def test_without_root_or_dhcp_an_address_is_refused_before_anything_starts() -> None:
    for version, words in (((15, 6), "is root's to write$"), ((26, 1), "VMs could not share its network")):
        with pytest.raises(MissingFeature, match=words) as caught:
            darwin.plug(plan(["qemu", "-nic", "vmnet-shared,address=192.168.64.50"]), mac_os=Another(*version))
        assert "address=192.168.64.50 is a line of /etc/bootptab" in caught.value.message
        assert caught.value.hint == "sudo vmnet run ..."
    addresses = "start-address=10.0.0.1,end-address=10.0.0.9,subnet-mask=255.255.255.0"
    with pytest.raises(OptionError, match="does not have on macOS"):
        darwin.plug(plan(["qemu", "-nic", f"vmnet-host,net-uuid={ID},{addresses},address=10.0.0.5"]))


def test_the_library_keeps_an_address_as_long_as_its_interface_runs(
    framework: Framework, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootptab, "PATH", tmp_path / "bootptab")
    monkeypatch.setattr(bootptab, "HOLDERS", tmp_path / "held")
    monkeypatch.setattr(leases, "PATH", tmp_path / "dhcpd_leases")
    monkeypatch.setattr(reservation, "RELOAD", ("/bin/echo", "no such service"))
    monkeypatch.setattr(Mac, "root", property(lambda _: True))
    request = LinkRequest(Shared(address="192.168.64.50"), ID)
    link = interface.open_link(request, framework)
    mac = link.parameters.mac_address
    assert bootptab.parse((tmp_path / "bootptab").read_text()) == [
        bootptab.Reservation(mac, IPv4Address("192.168.64.50"))
    ]
    link.close()
    assert bootptab.parse((tmp_path / "bootptab").read_text()) == []
    with pytest.raises(Conflict, match="is the gateway's"):
        interface.open_link(LinkRequest(Shared(address="192.168.64.1"), ID), framework)
    monkeypatch.setattr(Mac, "root", property(lambda _: False))
    with pytest.raises(MissingFeature, match="is root's to write"):
        interface.open_link(request, framework)
