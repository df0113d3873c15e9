"""probe: each finding from a host that has the thing, and from one that lacks it."""

from __future__ import annotations

import errno
import os
import resource
import socket
from pathlib import Path

import pytest

from openvmnet.engine.linux import probe
from openvmnet.errors import MissingFeature
from tests.netns import real_root


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("6.18.44-x", "found"),
        ("5.10.0-30-amd64", "found"),
        ("5.9.16", "missing"),
        ("4.19.0", "missing"),
        ("odd", "missing"),
    ],
)
def test_kernel(release: str, state: str) -> None:
    finding = probe.kernel(release)
    assert finding.state == state
    assert (finding.remedy is None) == (state == "found")


@pytest.mark.parametrize(
    ("number", "sysctls", "remedy"),
    [
        (errno.ENOSPC, {}, "sudo sysctl -w user.max_user_namespaces=15000"),
        (
            errno.ENOSPC,
            {"user/max_user_namespaces": "9", "user/max_net_namespaces": "0"},
            "sudo sysctl -w user.max_net_namespaces=15000",
        ),
        (errno.EPERM, {"user/max_user_namespaces": "0"}, "sudo sysctl -w user.max_user_namespaces=15000"),
        (
            errno.EPERM,
            {"kernel/unprivileged_userns_clone": "0"},
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        (
            errno.EACCES,
            {"kernel/unprivileged_userns_clone": "1", "kernel/apparmor_restrict_unprivileged_userns": "1"},
            "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        (errno.EINVAL, {}, "sudo apt install linux-image-$(dpkg --print-architecture)"),
        (
            errno.EPERM,
            {"kernel/apparmor_restrict_unprivileged_userns": "0"},
            "start the container with --security-opt seccomp=unconfined --device /dev/net/tun",
        ),
    ],
)
def test_the_remedy_for_namespaces(tmp_path: Path, number: int, sysctls: dict[str, str], remedy: str) -> None:
    for name, value in sysctls.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(value + "\n")
    finding = probe.namespaces(OSError(number, "unshare: no"), tmp_path)
    assert (finding.state, finding.remedy) == ("missing", remedy)
    assert finding.detail == f"uid {os.getuid()} may not make user and network namespaces: unshare: no"
    error = finding.error()
    assert isinstance(error, MissingFeature)
    assert (error.message, error.hint) == (f"namespaces: {finding.detail}", remedy)
    assert error.exit_code == 69


def test_tun(tmp_path: Path) -> None:
    missing = probe.tun(tmp_path / "tun")
    assert (missing.state, missing.remedy) == ("missing", "sudo modprobe tun")
    assert missing.detail == f"{tmp_path}/tun does not exist"
    (tmp_path / "tun").touch(mode=0o600)
    assert probe.tun(tmp_path / "tun").detail == f"{tmp_path}/tun has mode 0600"


@real_root("becoming another user")
def test_a_tun_of_roots_alone(tmp_path: Path) -> None:
    path = Path("/dev/shm") / f"tun-{os.getpid()}"
    path.touch(mode=0o600)
    read, write = os.pipe()
    try:
        if (pid := os.fork()) == 0:
            try:  # the child is no second pytest, whatever happens to it
                os.setresuid(65534, 65534, 65534)
                finding = probe.tun(path)
                os.write(write, f"{finding.state}|{finding.detail}|{finding.remedy}".encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        said = os.read(read, 4096).decode()
    finally:
        path.unlink()
        os.close(read)
        os.close(write)
    assert said == f"missing|{path} has mode 0600, and uid 65534 may not open it|sudo chmod 0666 {path}"


def test_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TOOL_PATH", str(tmp_path))
    gone = probe.nft()
    assert (gone.state, gone.remedy) == ("missing", "sudo apt install nftables")
    assert gone.detail == f"no program 'nft' in {tmp_path}"
    program = tmp_path / "nft"
    program.write_text("#!/bin/sh\necho nftables v0.9.8\n")
    program.chmod(0o755)
    assert probe.nft().detail == f"{program} is 'nftables v0.9.8', and 1.0 is needed"
    program.write_text("#!/bin/sh\necho 'nftables v1.0.6 (x)'\n")
    assert probe.nft().detail == f"{program}: nftables v1.0.6 (x)"
    assert probe.ip().remedy == "sudo apt install iproute2"


def test_qemu(tmp_path: Path) -> None:
    assert probe.qemu(str(tmp_path)).remedy == "sudo apt install qemu-system"
    for name in ("qemu-system-zz", "qemu-system-aa", "qemu-img"):
        (tmp_path / name).write_text("#!/bin/sh\necho QEMU emulator version 9.9\n")
        (tmp_path / name).chmod(0o755)
    finding = probe.qemu(f"/nowhere:{tmp_path}")
    assert (finding.state, finding.detail) == ("found", "qemu-system-aa and 1 more: QEMU emulator version 9.9")
    (tmp_path / f"qemu-system-{os.uname().machine}").symlink_to(tmp_path / "qemu-system-zz")
    assert probe.qemu(str(tmp_path)).detail.startswith(f"qemu-system-{os.uname().machine} and 2 more: ")


def test_files() -> None:
    assert probe.files(1024).detail == "1024 open files a process: about 480 connections"
    assert probe.files(1024).state == "degraded"
    assert probe.files(1 << 20).state == "found"
    assert probe.files(resource.RLIM_INFINITY).detail == "no limit of open files a process"
    assert str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]) in probe.files().detail


def test_pipes() -> None:
    assert probe.pipes(16384).state == probe.pipes(0).state == "found"
    assert (probe.pipes(1).state, probe.pipes(1).remedy) == ("degraded", "sudo sysctl -w fs.pipe-user-pages-soft=16384")
    assert probe.pipes().detail.endswith("pages of pipe buffers a user")


def test_ping_says_what_the_kernel_says() -> None:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
        allowed = True
    except OSError:
        allowed = False
    finding = probe.ping()
    assert finding.state == ("found" if allowed else "degraded")
    assert (finding.remedy is None) == allowed


@pytest.mark.kernel
class TestSandbox:
    """In a real namespace."""

    def test_everything_is_tried_and_nothing_is_left(self) -> None:
        before = set(os.listdir("/proc/self/fd")), socket.if_nameindex()
        with probe.sandbox() as inside:
            assert probe.tap(inside).state == "found"
            assert probe.bridge(inside).state == "found"
            assert [each.state for each in probe.firewall_rules(inside)] == ["found"]
            assert probe.received_mark(inside).state == "found"
            assert "vmnet0" in inside.request("links").values["links"]
        assert (set(os.listdir("/proc/self/fd")), socket.if_nameindex()) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)

    def test_a_rule_that_the_kernel_lacks_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lacking = ("frobnicate", "nft_frobnicate", "ip prerouting mangle|frobnicate accept")
        monkeypatch.setattr(probe, "_RULES", (*probe._RULES, lacking))
        with probe.sandbox() as inside:
            (finding,) = probe.firewall_rules(inside)
        assert (finding.name, finding.state) == ("nft frobnicate", "missing")
        assert finding.remedy == "sudo modprobe -a nft_frobnicate"

    def test_a_bridge_that_is_there_already_is_a_refusal(self) -> None:
        with probe.sandbox() as inside:
            assert probe.bridge(inside).state == "found"
            again = probe.bridge(inside)
        assert again.state == "missing"
        assert "File exists" in again.detail
