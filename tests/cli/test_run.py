"""run: what the VM's process is given, and what it costs.

The network is replaced here where only exec is looked at, and so is QEMU: a script that prints what it was given.
That a real QEMU on a real network has its port is looked at below, under `kernel`, and with a guest in tests/qemu.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from openvmnet.messages import NetworkView

if TYPE_CHECKING:
    from pathlib import Path

VMNET = [sys.executable, "-m", "openvmnet"]

# Not QEMU: it prints its arguments and its descriptors, then leaves with code 7.
SCRIPT = f"""#!{sys.executable}
import json, os, sys
fds = {{n: os.readlink("/proc/self/fd/%d" % n) for n in range(3, 256) if os.path.exists("/proc/self/fd/%d" % n)}}
print(json.dumps({{"argv": sys.argv, "fds": fds, "pid": os.getpid()}}))
sys.exit(7)
"""

# In place of control.open_network: a network whose ports are one end of a socket pair each.
DRIVER = """
import socket, sys
import msgspec
from openvmnet import control, messages
from openvmnet.cli.main import main

class Client:
    def __init__(self, spec):
        self.spec = spec
        self.ends = []
    def plug(self, request):
        print(msgspec.json.encode({"spec": self.spec, "plug": request}).decode(), file=sys.stderr)
        ours, theirs = socket.socketpair()
        self.ends.append(ours)
        mac = request.mac or "52:54:00:00:00:%02x" % request.index
        return messages.PlugReply("vm1", mac, "shared"), theirs.detach()
    def close(self):
        print("closed", file=sys.stderr)

control.open_network = lambda spec, *, first, progress: Client(spec)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    """An executable that tells what it was given."""
    path = tmp_path / "qemu-system-test"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    return str(path)


def drive(*argv: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ if path is None else {**os.environ, "PATH": path}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *argv], capture_output=True, text=True, check=False, env=env, timeout=30
    )


def plugged(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


def test_the_vm_gets_its_port_and_nothing_else(script: str) -> None:
    done = drive(
        "run", "--", script, "-S", "-netdev", "vmnet-shared,id=n,isolated=on", "-device", "e1000,netdev=n", "-name", "a"
    )
    assert done.returncode == 7
    given = json.loads(done.stdout)
    (fd,) = given["fds"]
    assert given["fds"][fd].startswith("socket:")
    assert given["argv"] == [
        script, "-S", "-netdev", f"tap,id=n,fd={fd}", "-device", "e1000,netdev=n,mac=52:54:00:00:00:00", "-name", "a",
    ]  # fmt: skip
    (request,) = plugged(done)
    assert request["plug"] == {
        "op": "plug",
        "vm": "a",
        "netdev": "n",
        "mac": None,
        "identity": "a",
        "index": 0,
        "isolated": True,
        "pid": given["pid"],
    }
    assert done.stderr.splitlines()[-1] == "closed"


def test_options_become_the_network_that_is_asked_for(script: str) -> None:
    addresses = "start-address=10.9.0.1,end-address=10.9.0.99,subnet-mask=255.255.255.0"
    done = drive(
        "run", "--name", "lab", "--linger", "1.5", "--force", script,
        "-nic", f"vmnet-shared,{addresses}", "-nic", "vmnet-shared,mac=52:54:00:1:2:3",
        "-nic", f"vmnet-shared,{addresses}",
    )  # fmt: skip
    first, second, third = plugged(done)
    assert first["spec"] == third["spec"]
    assert first["spec"] == {
        "name": "lab",
        "start_address": "10.9.0.1",
        "end_address": "10.9.0.99",
        "subnet_mask": "255.255.255.0",
        "force": True,
        "linger": 1.5,
    }
    assert second["spec"] == {"name": "lab", "force": True, "linger": 1.5}
    assert second["plug"]["mac"] == "52:54:00:01:02:03"
    assert [each["plug"]["index"] for each in (first, second, third)] == [0, 1, 2]
    assert [line for line in done.stderr.splitlines() if line == "closed"] == ["closed", "closed"]
    assert len(json.loads(done.stdout)["fds"]) == 3


@pytest.mark.parametrize("option", [["--name", "lab"], ["--host-loopback"]])
def test_what_is_said_of_a_network_needs_one(script: str, option: list[str]) -> None:
    done = drive("run", *option, script, "-nic", "vmnet-bridged,ifname=eth0")
    assert done.returncode == 2
    assert done.stderr == (
        f"vmnet: '{' '.join(option)}' is for vmnet-shared and vmnet-host: "
        "a vmnet-bridged netdev is on the LAN of its ifname\n"
    )


def test_a_reserved_address_goes_with_its_nic(script: str) -> None:
    done = drive(
        "run", script, "-netdev", "vmnet-shared,id=a,address=192.168.64.50", "-netdev", "vmnet-shared,id=b",
        "-device", "e1000,netdev=a", "-netdev", "vmnet-host,id=c,address=192.168.128.50",
    )  # fmt: skip
    addresses = [request["plug"].get("address") for request in plugged(done)]
    assert addresses == ["192.168.64.50", None, "192.168.128.50"]
    assert [line for line in done.stderr.splitlines() if "later" in line] == [
        "vmnet: a NIC that is plugged into c later needs mac=52:54:00:00:00:02 to be given 192.168.128.50"
    ]


def test_a_vm_without_name_and_disk_is_known_by_its_command(script: str) -> None:
    argv = ["run", script, "-nic", "vmnet-shared", "-kernel", "k"]
    one, again, other = (plugged(drive(*each))[0]["plug"] for each in (argv, argv, [*argv, "-S"]))
    assert one["identity"] == again["identity"] != other["identity"]
    assert re.fullmatch(r"qemu-system-test-\d+", one["vm"])


def test_a_vm_is_started_from_a_directory_that_is_gone(script: str, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    leave = 'cd "$1"; rmdir "$1"; shift; exec "$@"'
    argv = ["run", script, "-nic", "vmnet-shared", "-kernel", "k"]
    command = ["sh", "-c", leave, "sh", str(tmp_path / "gone"), sys.executable, "-c", DRIVER, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 7, done.stderr
    assert plugged(done)[0]["plug"]["identity"] == "\0".join(["/", *argv[1:]])


def test_closed_streams_are_not_the_ports(script: str) -> None:
    argv = [sys.executable, "-c", DRIVER, "run", script, "-nic", "vmnet-shared"]
    closing = 'exec 3>&1; "$@" <&- >&- 2>&-; echo $? >&3'
    done = subprocess.run(["sh", "-c", closing, "sh", *argv], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout == "7\n"
    with open(script, "w") as file:
        file.write(f"#!{sys.executable}\nimport os\n")
        file.write("os.write(9, repr([os.readlink(f'/proc/self/fd/{n}') for n in range(3)]).encode())\n")
    closing = 'exec 9>&1; "$@" <&- >&- 2>&-'
    seen = subprocess.run(["sh", "-c", closing, "sh", *argv], capture_output=True, text=True, check=False, timeout=30)
    assert seen.stdout == repr(["/dev/null"] * 3)


def test_the_program_is_found_on_the_path(script: str, tmp_path: Path) -> None:
    done = drive("run", "qemu-system-test", "-nic", "vmnet-shared", path=f"/nowhere:{tmp_path}")
    assert (done.returncode, json.loads(done.stdout)["argv"][0]) == (7, script)


def test_ignored_signals_are_the_callers(script: str, tmp_path: Path) -> None:
    probe = tmp_path / "signals"
    probe.write_text("#!/bin/sh\nexec grep SigIgn /proc/self/status\n")
    probe.chmod(0o755)
    done = drive("run", str(probe), "-nic", "vmnet-shared")
    ignored = int(done.stdout.split()[1], 16)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores for itself
        assert not ignored & 1 << (number - 1)
    for number in (signal.SIGINT, signal.SIGHUP):  # a test run in the background, or under nohup(1), ignores them
        assert bool(ignored & 1 << (number - 1)) == (signal.getsignal(number) is signal.SIG_IGN)


@pytest.mark.parametrize(
    ("text", "mode", "code", "sentence"),
    [
        ("#!/no/interpreter\n", 0o755, 127, "cannot be started: No such file or directory"),
        ("not a program", 0o755, 126, "cannot be started: Exec format error"),
        ("#!/bin/sh\n", 0o644, 126, "cannot be started: Permission denied"),
    ],
)
def test_what_cannot_be_started(tmp_path: Path, text: str, mode: int, code: int, sentence: str) -> None:
    program = tmp_path / "program"
    program.write_text(text)
    program.chmod(mode)
    done = drive("run", str(program), "-nic", "vmnet-shared")
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == f"vmnet: '{program}' {sentence}"


def test_a_command_with_a_mistake_asks_for_no_port(script: str) -> None:
    done = drive("run", script, "-nic", "vmnet-shared", "-netdev", "vmnet-shared,id=n,a=b")
    assert (done.returncode, plugged(done), done.stdout) == (2, [], "")


@pytest.mark.kernel
class TestRealNetwork:
    """With the real network process, agent and TAPs."""

    def test_exit_code_port_and_end(self, script: str, home: Path) -> None:
        argv = [*VMNET, "run", "--linger", "0.2", script, "-nic", "vmnet-shared", "-nic", "vmnet-shared,isolated=on"]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 7, done.stderr
        given = json.loads(done.stdout)
        assert set(given["fds"].values()) == {"/dev/net/tun"}
        assert len(given["fds"]) == 2
        macs = re.findall(r"mac=(52:54:00:\S{8})", " ".join(given["argv"]))
        assert len(set(macs)) == 2
        runtime = home / "xdg_runtime_dir" / "openvmnet"
        deadline = time.monotonic() + 5
        while list(runtime.glob("*/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(runtime.glob("*/*"))

    def test_qemu_takes_the_descriptors(self, home: Path) -> None:
        argv = [
            *VMNET, "run", "--linger", "0.2", "--", "qemu-system-x86_64", "-M", "pc", "-S", "-display", "none",
            "-serial", "none", "-monitor", "none", "-qmp", "stdio", "-name", "web",
            "-netdev", "vmnet-shared,id=net0", "-device", "virtio-net-pci,netdev=net0",
            "-nic", "vmnet-shared,model=e1000",
            "-netdev", '{"type":"vmnet-shared","id":"n3","isolated":true}',
            "-device", '{"driver":"e1000","netdev":"n3"}',
        ]  # fmt: skip
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as vm:
            assert vm.stdin is not None
            assert vm.stdout is not None
            vm.stdout.readline()
            answers = []
            for order in ('{"execute":"qmp_capabilities"}', INFO, '{"execute":"quit"}'):
                vm.stdin.write(order + "\n")
                vm.stdin.flush()
                if order == '{"execute":"quit"}':
                    break
                if order == INFO:
                    shown = subprocess.run([*VMNET, "show", "shared", "--json"], capture_output=True, check=True)
                answers.append(json.loads(vm.stdout.readline()))
            vm.stdout.read()
        assert vm.returncode == 0
        view = msgspec.json.decode(shown.stdout, type=NetworkView)
        assert {(port.vm, port.isolated, port.pid) for port in view.ports} == {
            ("web", False, vm.pid),
            ("web", True, vm.pid),
        }
        for port in view.ports:
            assert f"macaddr={port.mac}" in answers[1]["return"]

    def test_the_time_to_exec(self, script: str) -> None:
        """The budget: 0.4 s to start the network, 0.2 s to join it; here with room for a busy machine."""
        argv = [*VMNET, "run", "--linger", "2", script, "-nic", "vmnet-shared"]
        times = []
        for _ in range(4):
            begin = time.monotonic()
            subprocess.run(argv, capture_output=True, check=False, timeout=30)
            times.append(time.monotonic() - begin)
        assert times[0] < 1.2
        assert min(times[1:]) < 0.4


INFO = '{"execute":"human-monitor-command","arguments":{"command-line":"info network"}}'
