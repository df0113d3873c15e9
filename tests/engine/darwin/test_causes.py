"""Why vmnet refuses, found by looking and never by the number; who may use it; what doctor says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from openvmnet import engine
from openvmnet.engine.darwin import diagnosis, entitlement, probe
from openvmnet.engine.darwin.handle import Handle, StartFailed
from openvmnet.engine.darwin.library import system_version
from openvmnet.engine.darwin.mac import Mac
from openvmnet.errors import Conflict, Exhausted, HostError, MissingFeature, OptionError, VmnetError
from openvmnet.netdev import Bridged, Host, Shared
from openvmnet.status import Status
from tests.engine.darwin.macs import BRIDGE, ENTITLED, IFCONFIG, MEMBER, NAT, SHARING_ON, TUNNEL, FakeMac

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls

HERE = Shared(start_address="192.168.64.1", end_address="192.168.64.99", subnet_mask="255.255.255.0")
AT_HOME = Shared(start_address="192.168.1.1", end_address="192.168.1.9", subnet_mask="255.255.255.0")
PUBLIC = Shared(start_address="169.254.1.1", end_address="169.254.1.9", subnet_mask="255.255.255.0")
SIGNED = {"/usr/bin/codesign --display": ENTITLED}
FULL = "".join(f"vmenet{n}: flags=8963<UP> mtu 1500\n" for n in range(32))
REFUSALS = (Status.FAILURE, Status.MEM_FAILURE, Status.NOT_AUTHORIZED)


def explain(mac: Mac, options: Shared | Host | Bridged = HERE, status: Status = Status.FAILURE) -> VmnetError:
    return diagnosis.explain(StartFailed("cannot create vmnet interface: x", status=status), options, mac)


@pytest.mark.parametrize("status", REFUSALS)
@pytest.mark.parametrize(
    ("mac", "options", "error", "words", "hint"),
    [
        (
            FakeMac((15, 6)),
            HERE,
            MissingFeature,
            r"macOS 15\.6 lets only root use vmnet",
            "sudo vmnet setup -- program.py",
        ),
        (FakeMac((26, 1)), HERE, MissingFeature, r"signed with com\.apple\.security\.virtualization", "vmnet setup"),
        (FakeMac(root=True), PUBLIC, OptionError, "RFC 1918", None),
        (FakeMac(said=SIGNED, files={NAT: SHARING_ON}), HERE, Conflict, "Internet Sharing is on", "turn it off"),
        (FakeMac(root=True, ifconfig=IFCONFIG + FULL), HERE, Exhausted, "32 vmnet interfaces", "stop a virtual"),
        (
            FakeMac(root=True, ifconfig=IFCONFIG + BRIDGE + MEMBER),
            HERE,
            Conflict,
            "bridge100 has 192.168.64.1/24",
            None,
        ),
        (FakeMac(root=True, ifconfig=IFCONFIG + BRIDGE), HERE, HostError, "a crash left it", "ifconfig bridge100"),
        (FakeMac(root=True), AT_HOME, Conflict, "en0 has 192.168.1.23/24", "another start-address"),
        (FakeMac(root=True), HERE, HostError, "give no reason", "vmnet doctor"),
    ],
)
def test_the_cause_is_found_whatever_the_number(
    status: Status, mac: FakeMac, options: Shared, error: type, words: str, hint: str | None
) -> None:
    found = explain(mac, options, status)
    assert type(found) is error
    assert found.status is status
    import re

    assert re.search(words, found.message), found.message
    assert hint is None or hint in (found.hint or "")


def test_a_missing_right_hides_the_rest_and_bridged_knows_no_sharing() -> None:
    assert isinstance(explain(FakeMac((15,), files={NAT: SHARING_ON})), MissingFeature)
    bridged = explain(FakeMac(root=True, files={NAT: SHARING_ON}), Bridged(ifname="en0"))
    assert "give no reason" in bridged.message


def test_a_busy_service_without_internet_sharing_is_somebody_elses() -> None:
    found = explain(FakeMac(root=True), HERE, Status.SHARING_SERVICE_BUSY)
    assert isinstance(found, Conflict)
    assert "another program" in found.message


def test_open_link_asks_for_the_cause(
    framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    from uuid import uuid4

    from openvmnet.contract.interface import LinkRequest
    from openvmnet.engine.darwin.interface import open_link

    controls.set("not_root", 1)
    monkeypatch.setattr(diagnosis, "Mac", lambda: FakeMac((26, 0)))
    with pytest.raises(MissingFeature, match="signed with") as caught:
        open_link(LinkRequest(Shared(), uuid4()), framework)
    assert (caught.value.hint, caught.value.status) == ("vmnet setup", Status.FAILURE)


def test_property_lists_and_ifconfig_of_any_kind_are_read() -> None:
    for content in (b"", b"nonsense", b"bplist00\xff", SHARING_ON[:50], b"<plist><array/></plist>"):
        assert FakeMac(files={NAT: content}).plist(NAT) == {}
    assert diagnosis.sharing(FakeMac(files={NAT: SHARING_ON}))
    assert not diagnosis.sharing(FakeMac(files={NAT: SHARING_ON.replace(b">1<", b">0<")}))
    links = {link.name: link for link in FakeMac(ifconfig=IFCONFIG + BRIDGE + MEMBER + TUNNEL).links()}
    assert list(links) == ["lo0", "en0", "bridge100", "utun4"]
    assert links["bridge100"].members == ("vmenet0",)
    assert [link.bridge for link in links.values()] == [False, False, True, False]
    assert (links["utun4"].tunnel, str(links["utun4"].networks[0][1])) == (True, "10.99.0.2/32")
    assert FakeMac(ifconfig="bridge0: flags=1\n\tinet nonsense netmask 0xffffff00\n").links()[0].networks == ()


@pytest.mark.skipif(engine.DARWIN, reason="this is a Mac")
def test_this_machine_answers_though_it_is_no_mac() -> None:
    mac = Mac()
    assert mac.run("/nowhere/command") == ""
    assert mac.read("/nowhere/file") is None
    assert mac.version == ()
    assert mac.program == sys.executable


def test_a_subnet_that_vmnet_chose_may_be_the_hosts_own() -> None:
    home = FakeMac(ifconfig=IFCONFIG.replace("192.168.1.23", "192.168.2.23") + BRIDGE.replace("64.1 ", "2.1 ") + MEMBER)
    found = diagnosis.clash_of("192.168.2.1", "255.255.255.0", home)
    assert found is not None
    assert "en0 has 192.168.2.23/24" in found.sentence
    assert diagnosis.clash_of("192.168.64.1", "255.255.255.0", home) is None


# Who may.


@pytest.mark.parametrize(
    ("told", "said", "version"),
    [
        ("15.6.1", "26.1", (15, 6, 1)),  # not asked: it is true
        ("26.1", "", (26, 1)),
        ("16.0", "26.0.1\n", (26, 0, 1)),
        ("10.16", "12.7\n", (12, 7)),
        ("16.0", "", (16, 0)),
        ("", "", ()),
    ],
)
def test_the_version_that_a_python_of_an_older_sdk_is_not_told(
    told: str, said: str, version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Mac):
        def run(self, *argv: str) -> str:
            assert argv == ("/usr/bin/env", "SYSTEM_VERSION_COMPAT=0", "/usr/bin/sw_vers", "-productVersion")
            return said

    system_version.cache_clear()
    monkeypatch.setattr("platform.mac_ver", lambda: (told, ("", "", ""), "arm64"))
    assert Told().version == version
    system_version.cache_clear()


@pytest.mark.parametrize(
    ("version", "root", "said", "permitted"),
    [
        ((14, 0), True, {}, True),
        ((14, 0), False, SIGNED, False),  # of no use there
        ((15, 7), False, {}, False),
        ((26, 0), False, {}, False),
        ((26, 0), False, SIGNED, True),
        ((26, 0), False, {"/usr/bin/codesign": ENTITLED.replace("virtualization", "hypervisor")}, False),
        ((27, 0), True, {}, True),
    ],
)
def test_the_matrix_of_versions_and_rights(version: tuple[int, ...], root: bool, said: dict, permitted: bool) -> None:
    assert entitlement.permitted(FakeMac(version, root=root, said=said)) is permitted


def test_the_interpreter_that_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert entitlement.interpreter(FakeMac(root=True))[0] == sys.executable
    with pytest.raises(MissingFeature, match="lets only root"):
        entitlement.interpreter(FakeMac((15, 0)))
    with pytest.raises(MissingFeature, match="signed with"):
        entitlement.interpreter(FakeMac((26, 0)))
    entitlement.copy_path().parent.mkdir(parents=True)
    entitlement.copy_path().write_text("")
    assert entitlement.interpreter(FakeMac((26, 0), said=SIGNED))[0] == "/usr/bin/python3"
    program, environment = entitlement.interpreter(FakeMac((26, 0)))
    assert program == str(entitlement.copy_path())
    assert environment["PYTHONHOME"] == sys.base_prefix
    assert str(Path(entitlement.__file__).parents[3]) in environment["PYTHONPATH"].split(":")


class SigningMac(FakeMac):
    """A Mac whose codesign signs, or only says so."""

    signs = True

    @property
    def program(self) -> str:
        return sys.executable

    def run(self, *argv: str) -> str:
        if argv[:2] == ("/usr/bin/codesign", "--force"):
            assert argv[2:5] == ("--sign", "-", "--entitlements")
            assert b"<key>com.apple.security.virtualization</key><true/>" in Path(argv[5]).read_bytes()
            self.said["/usr/bin/codesign --display"] = ENTITLED if self.signs else ""
            return "" if self.signs else "error: no space"
        return super().run(*argv)


def test_setup_makes_a_copy_signs_and_tries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "Library/bin/copy"
    assert entitlement.make_copy(SigningMac(), target) == target
    assert entitlement.make_copy(SigningMac(), target) == target
    assert target.read_bytes() == Path(sys.executable).resolve().read_bytes()
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]
    # Where a Python of uv's looks for its library: @executable_path/../lib.
    assert (target.parent / "../lib").resolve() == (Path(sys.base_prefix) / "lib").resolve()
    assert sorted(each.name for each in (tmp_path / "Library").iterdir()) == ["bin", "lib"]
    again = SigningMac()
    again.signs = False
    with pytest.raises(HostError, match=r"did not sign .*no space"):
        entitlement.make_copy(again, target)
    monkeypatch.setattr(entitlement, "environment", lambda: {"PYTHONHOME": "/nowhere"})
    with pytest.raises(HostError, match="does not run"):
        entitlement.make_copy(SigningMac(), tmp_path / "other/bin/copy")
    assert not (tmp_path / "other/bin/copy").exists()
    with pytest.raises(MissingFeature, match="only root"):
        entitlement.make_copy(SigningMac((15, 0)))


def test_each_python_has_a_copy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first = entitlement.copy_path()
    monkeypatch.setattr(sys, "base_prefix", "/opt/another")
    assert entitlement.copy_path() != first


def test_a_copy_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"file/bin/copy cannot be made: Not a directory"):
        entitlement.make_copy(SigningMac(), tmp_path / "file/bin/copy")


def test_a_copy_that_does_not_run_any_more_is_told_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    copy = entitlement.copy_path()
    copy.parent.mkdir(parents=True)
    copy.write_text("#!/bin/sh\necho 'dyld: Library not loaded' >&2\necho more >&2\nkill -ABRT $$\n")
    copy.chmod(0o755)
    mac = SigningMac(said={f"/usr/bin/codesign --display --entitlements - --xml {copy}": ENTITLED})
    assert probe.signed_copy(mac).detail == f"{copy} does not run: dyld: Library not loaded"
    assert (probe.signed_copy(mac).state, probe.signed_copy(mac).remedy) == ("degraded", "vmnet setup")
    assert (probe.rights(mac).state, probe.rights(mac).remedy) == ("missing", "vmnet setup")
    monkeypatch.setattr("os.execve", Mock(side_effect=FileNotFoundError(2, "no such file")))
    with pytest.raises(HostError, match="cannot be started"):
        entitlement.run_signed(mac, ["program.py"])
    assert entitlement.fault(copy) is None
    assert probe.signed_copy(mac).state == "found"


def test_a_program_of_ones_own_is_run_by_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str], str]] = []

    def become(program: str, argv: list[str], environment: dict[str, str]) -> None:
        started.append((program, argv, environment["PYTHONHOME"]))
        raise FileNotFoundError(2, "no such file")

    monkeypatch.setattr("os.execve", become)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    copy = str(entitlement.copy_path())
    for mac in (SigningMac(), SigningMac(), FakeMac(root=True), FakeMac(said=SIGNED)):
        with pytest.raises(HostError, match="cannot be started: no such file"):
            entitlement.run_signed(mac, ["program.py", "-x"])
    assert [each[0] for each in started] == [copy, copy, "/usr/bin/python3", "/usr/bin/python3"]
    assert all(argv == [program, "program.py", "-x"] for program, argv, _ in started)
    assert {home for _, _, home in started} == {sys.base_prefix}
    with pytest.raises(MissingFeature, match="only root") as caught:
        entitlement.run_signed(FakeMac((15, 0)), ["program.py"])
    assert caught.value.hint == "sudo vmnet setup -- program.py"
    assert explain(FakeMac((26, 0))).hint == "vmnet setup -- program.py"


def test_whose_sudo_it_was_and_what_the_vm_inherits() -> None:
    assert entitlement.sudo_user({"SUDO_UID": "501", "SUDO_GID": "20"}) == (501, 20)
    for environ in ({}, {"SUDO_UID": "501"}, {"SUDO_UID": "0", "SUDO_GID": "0"}, {"SUDO_UID": "x", "SUDO_GID": "1"}):
        assert entitlement.sudo_user(environ) is None
    changed = entitlement.user_environment(0, {"SUDO_UID": "501", "HOME": "/x", "TERM": "dumb"})
    assert "SUDO_UID" not in changed
    assert (changed["USER"], changed["TERM"]) == ("root", "dumb")
    assert changed["HOME"] != "/x"
    assert entitlement.user_environment(987654, {"SUDO_GID": "1", "HOME": "/x"}) == {"HOME": "/x"}


# Doctor.

GOOD = {
    "/usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate": "Firewall is disabled. (State = 0)",
}
FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"


def states(mac: FakeMac, framework: Framework) -> dict[str, tuple[str, str | None]]:
    return {finding.name: (finding.state, finding.remedy) for finding in probe.examine(mac, lambda: framework)}


def test_doctor_on_a_mac_where_all_is_well(
    framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entitlement, "fault", lambda _: None)
    found = states(FakeMac((26, 1), said=SIGNED | GOOD), framework)
    assert {name: state for name, (state, _) in found.items() if name != "qemu"} == {
        "macOS": "found",
        "vmnet.framework": "found",
        "rights": "found",
        "signed copy": "found",
        "Internet Sharing": "found",
        "firewall": "found",
        "Local Network": "untested",
        "subnet": "found",
        "VPN": "found",
        "interfaces": "found",
    }


@pytest.mark.parametrize(
    ("mac", "name", "state", "remedy"),
    [
        (FakeMac((10, 14)), "macOS", "missing", None),
        (FakeMac((15, 1)), "rights", "missing", "sudo vmnet run ..."),
        (FakeMac((26, 1)), "rights", "missing", "vmnet setup"),
        (FakeMac((26, 1), root=True), "rights", "found", None),
        (FakeMac((15, 1)), "signed copy", "optional", None),
        (FakeMac(files={NAT: SHARING_ON}), "Internet Sharing", "missing", "Sharing"),
        (
            FakeMac(said={FIREWALL: "Firewall is enabled. (State = 1)", f"{FIREWALL} --getblockall": "is enabled!"}),
            "firewall",
            "missing",
            "--setblockall off",
        ),
        (
            FakeMac(
                said={
                    f"{FIREWALL} --getglobalstate": "Firewall is enabled. (State = 1)",
                    f"{FIREWALL} --getblockall": "Block all DISABLED!",
                    f"{FIREWALL} --getappblocked": "Incoming connection to the application is blocked",
                }
            ),
            "firewall",
            "degraded",
            "--unblockapp /usr/libexec/bootpd",
        ),
        (
            FakeMac(
                said={
                    f"{FIREWALL} --getglobalstate": "Firewall is enabled. (State = 1)",
                    f"{FIREWALL} --getappblocked": "Incoming connection to the application is permitted",
                }
            ),
            "firewall",
            "found",
            None,
        ),
        (FakeMac((14, 0)), "Local Network", "found", None),
        (FakeMac(root=True), "Local Network", "found", None),
        (FakeMac(ifconfig=IFCONFIG + BRIDGE), "subnet", "degraded", "ifconfig bridge100 destroy"),
        (FakeMac(ifconfig=IFCONFIG.replace("192.168.1.23", "192.168.64.23")), "subnet", "degraded", "start-address"),
        (FakeMac(ifconfig=IFCONFIG + TUNNEL), "VPN", "degraded", "net.inet.ip.forwarding"),
    ],
)
def test_doctor_names_each_obstacle_and_its_cure(
    framework: Framework, controls: Controls, mac: FakeMac, name: str, state: str, remedy: str | None
) -> None:
    found = states(mac, framework)[name]
    assert found[0] == state
    assert remedy is None or remedy in (found[1] or "")


def test_doctor_without_a_framework_or_with_a_stuck_one(
    framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Framework:
        raise MissingFeature("there is none")

    found = {finding.name: finding for finding in probe.examine(FakeMac(), none)}
    assert (found["vmnet.framework"].state, found["interfaces"].state) == ("missing", "optional")
    controls.set("no_interfaces", 1)
    assert probe.interfaces(lambda: framework).detail == "vmnet names no interface that can be bridged to"
    controls.set("no_interfaces", 0)
    monkeypatch.setattr("openvmnet.engine.darwin.patience.ASK", 0.1)
    controls.set("hang_list", 1)
    assert "gave no answer" in probe.interfaces(lambda: framework).detail
    controls.set("hang_list", 0)
    Handle(framework, {"vmnet_operation_mode": 1001}).stop()
