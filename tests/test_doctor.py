"""doctor: on this host, and in namespaces where something has been taken away."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from openvmnet import doctor
from openvmnet.doctor import Report
from openvmnet.engine.linux import probe
from tests.netns import real_root

if TYPE_CHECKING:
    from openvmnet.engine.finding import Finding

NEEDS = [
    "kernel",
    "namespaces",
    "tun",
    "ip",
    "nft",
    "tap",
    "bridge",
    "nft rules",
    "rcvmark",
    "ping",
    "files",
    "pipes",
    "qemu",
    "bridge helper",
    "bridge ACL",
    "macvtap",
]


def test_without_a_namespace_what_needs_one_is_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(28, "no namespace")

    monkeypatch.setattr(probe, "sandbox", refuse)
    report = doctor.examine()
    states = {finding.name: finding.state for finding in report.findings}
    assert list(states) == NEEDS
    assert states["namespaces"] == "missing"
    assert {states[name] for name in ("tap", "bridge", "nft rules", "rcvmark")} == {"untested"}
    assert not report.healthy


def inside(setup: str, *argv: str) -> tuple[int, str, str]:
    """Run the doctor after `setup` in user, mount and network namespaces of its own."""
    line = f"{setup}\nexec {sys.executable} -m openvmnet doctor {' '.join(argv)}"
    done = subprocess.run(
        ["unshare", "-Urmn", "sh", "-ec", line], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def found(setup: str) -> tuple[int, dict[str, Finding]]:
    code, out, err = inside(setup, "--json")
    assert out, err
    report = msgspec.json.decode(out, type=Report)
    assert (code == 0) == report.healthy
    return code, {finding.name: finding for finding in report.findings}


@pytest.mark.kernel
class TestHost:
    """The real doctor, its own program, on hosts of different health."""

    def test_a_healthy_host(self) -> None:
        code, findings = found("echo 0 0 > /proc/sys/net/ipv4/ping_group_range")
        assert code == 0
        assert list(findings) == NEEDS
        assert {finding.state for finding in findings.values()} == {"found"}
        assert all(finding.remedy is None for finding in findings.values())

    def test_no_namespaces(self) -> None:
        code, findings = found("echo 0 > /proc/sys/user/max_user_namespaces")
        assert code == 69
        assert findings["namespaces"].state == "missing"
        assert findings["namespaces"].remedy == "sudo sysctl -w user.max_user_namespaces=15000"
        assert findings["tap"].state == "untested"

    def test_no_tun(self) -> None:
        code, findings = found("mount -t tmpfs none /dev/net")
        assert code == 69
        assert (findings["tun"].state, findings["tun"].remedy) == ("missing", "sudo modprobe tun")
        assert findings["namespaces"].state == "found"

    def test_no_nft_and_no_ip(self) -> None:
        hide = "if [ -e {0} ]; then mount --bind /dev/null {0}; fi"
        code, findings = found(
            "\n".join(hide.format(f"{d}/{p}") for d in ("/usr/sbin", "/usr/bin") for p in ("nft", "ip"))
        )
        assert code == 69
        assert (findings["nft"].state, findings["nft"].remedy) == ("missing", "sudo apt install nftables")
        assert (findings["ip"].state, findings["ip"].remedy) == ("missing", "sudo apt install iproute2")

    def test_no_qemu(self) -> None:
        code, findings = found("export PATH=/usr/sbin:/sbin")
        assert code == 69
        assert (findings["qemu"].state, findings["qemu"].remedy) == ("missing", "sudo apt install qemu-system")

    def test_no_ping_is_degraded_and_printed_with_its_remedy(self) -> None:
        code, out, err = inside(":  # a new namespace allows nobody")
        assert (code, err) == (0, "")
        assert "ping is degraded; to mend it: sudo sysctl -w net.ipv4.ping_group_range='0 2147483647'\n" in out
        assert out.startswith("NEED ")

    @real_root("becoming another user")
    def test_an_ordinary_user_has_all_that_root_has(self) -> None:
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "openvmnet"]
        done = subprocess.run([*argv, "doctor", "--json"], capture_output=True, text=True, check=False, timeout=60)
        report = msgspec.json.decode(done.stdout, type=Report)
        assert (done.returncode, report.healthy) == (0, True), done.stdout
        assert report.findings[1].detail == "uid 65534 may make user and network namespaces"
