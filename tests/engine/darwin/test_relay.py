"""The relay as a process: what it reports, how it ends, and what vmnet run, ls, show and interfaces make of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from lab.paths import CHECKOUT
from openvmnet.engine.darwin import launch, records
from openvmnet.errors import HostError, MissingFeature, OptionError, VmnetError
from openvmnet.netdev import stable_mac
from openvmnet.status import Status
from tests.engine.darwin.conftest import eventually

if TYPE_CHECKING:
    from openvmnet.engine.darwin.launch import Port
    from tests.engine.darwin.conftest import Controls

ID = uuid.UUID("a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d")
SHARED = "vmnet-shared,id=net0"


@pytest.fixture
def environment(controls: Controls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A runtime directory of the test's own, and nobody's sudo."""
    values = {"XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'src'}"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("SUDO_UID", "SUDO_GID"):
        monkeypatch.delenv(name, raising=False)
    return os.environ | values


def command(controls: Controls) -> list[str]:
    return [sys.executable, "-m", "tests.engine.darwin.on_standin", str(controls.path), "relay"]


def start(controls: Controls, options: str = SHARED, **more: object) -> Port:
    return launch.start(
        options, vm="alpha", netdev="net0", interface_id=ID, mac=stable_mac("a", 0), command=command(controls), **more
    )


@pytest.mark.usefixtures("environment")
def test_a_relay_reports_records_itself_and_ends_with_the_life_pipe(controls: Controls) -> None:
    port = start(controls)
    assert port.parameters["vmnet_start_address"] == "192.168.64.1"
    assert port.parameters["vmnet_interface_id"] == str(ID)
    with socket.socket(fileno=os.dup(port.vm_fd)) as vm:
        for n in range(300):
            vm.send(bytes(60 + n))
    assert eventually(lambda: [each.pid for each in records.read()] == [port.pid])
    assert eventually(lambda: records.read()[0].counters.up_packets == 300, 6)
    (record,) = records.read()
    assert (record.vm, record.netdev, record.mode, record.mac) == ("alpha", "net0", "shared", stable_mac("a", 0))
    assert record.counters.up_octets == sum(range(60, 360))
    port.close()
    assert port.process.returncode == 0
    assert records.read() == []
    assert list(records.directory().iterdir()) == []


@pytest.mark.usefixtures("environment")
def test_sigterm_ends_it_and_an_interrupt_does_not(controls: Controls) -> None:
    port = start(controls)
    assert eventually(records.read)
    os.kill(port.pid, signal.SIGINT)
    os.kill(port.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert port.process.poll() is None
    os.kill(port.pid, signal.SIGTERM)
    assert port.process.wait(5) == 0
    assert list(records.directory().iterdir()) == []
    port.close()


@pytest.mark.usefixtures("environment")
def test_a_relay_that_was_killed_leaves_a_record_that_the_next_reader_removes(controls: Controls) -> None:
    port = start(controls)
    assert eventually(records.read)
    os.kill(port.pid, signal.SIGKILL)
    assert port.process.wait(5) == -signal.SIGKILL
    assert len(list(records.directory().iterdir())) == 1
    assert records.read() == []
    assert list(records.directory().iterdir()) == []
    port.close()


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("variable", "value", "error", "words", "status"),
    [
        ("STANDIN_NULL_START", "1", HostError, "unable to create interface", 1001),
        ("STANDIN_VMNET_START_INTERFACE", "1002", HostError, "memory allocation failure", 1002),
        ("STANDIN_VMNET_START_INTERFACE", "1010", HostError, "not authorized", 1010),
        ("STANDIN_SHARING_BUSY", "1", VmnetError, "sharing service is in use", 1009),
    ],
)
def test_what_a_relay_cannot_do_is_the_launchers_error(
    controls: Controls,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    error: type[VmnetError],
    words: str,
    status: int,
) -> None:
    monkeypatch.setenv(variable, value)
    descriptors = set(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=words) as caught:
        start(controls)
    assert caught.value.status == status
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert records.read() == []


@pytest.mark.usefixtures("environment")
def test_a_mistake_in_the_options_comes_back_as_one(controls: Controls) -> None:
    with pytest.raises(OptionError, match="RFC 1918"):
        start(controls, f"{SHARED},start-address=8.8.8.1,end-address=8.8.8.9,subnet-mask=255.255.255.0")


@pytest.mark.usefixtures("environment")
def test_a_relay_that_says_nothing_and_one_that_is_not_there() -> None:
    for program, words in (("/bin/false", "ended with code 1"), ("/nowhere/python", "cannot be started")):
        with pytest.raises(HostError, match=words):
            launch.start(SHARED, vm="a", netdev="n", interface_id=ID, command=[program])
    killed = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    with pytest.raises(HostError, match=r"signal 9.*whose entitlements it does not accept"):
        launch.start(SHARED, vm="a", netdev="n", interface_id=ID, command=killed)


@pytest.mark.usefixtures("environment")
def test_a_relay_that_never_answers_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvmnet.engine.darwin.patience.START", 0.1)
    monkeypatch.setattr(launch, "_GRACE", 0.1)
    with pytest.raises(HostError, match="gave no answer"):
        launch.start(SHARED, vm="a", netdev="n", interface_id=ID, command=["/bin/sh", "-c", "exec sleep 60"])


def test_every_error_crosses_the_report_as_itself() -> None:
    from openvmnet import errors
    from openvmnet.engine.darwin.relay import Fault

    for kind in (errors.Conflict, errors.MissingFeature, errors.Exhausted, errors.OptionError, errors.NotFound):
        fault = Fault(kind.__name__, "a sentence", "a cure", kind.exit_code, int(Status.NOT_AUTHORIZED))
        error = launch.raised(msgspec.json.decode(msgspec.json.encode(fault), type=Fault))
        assert type(error) is kind
        assert (error.message, error.hint, error.exit_code) == ("a sentence", "a cure", kind.exit_code)
        assert error.status is Status.NOT_AUTHORIZED
    assert type(launch.raised(Fault("NoSuchError", "x", None, 71, 1001))) is HostError


# The commands.


def vmnet(controls: Controls, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    argv = [*command(controls)[:-1], *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, cwd=CHECKOUT, **more)


FAKE_QEMU = """#!/bin/sh
echo "$@"
ls -l /proc/$$/fd | grep -c socket >&2
exec sleep 60
"""


def test_run_ls_show_and_interfaces(controls: Controls, environment: dict[str, str], tmp_path: Path) -> None:
    qemu = tmp_path / "qemu-system-x86_64"
    qemu.write_text(FAKE_QEMU)
    qemu.chmod(0o755)
    argv = [*command(controls)[:-1], "run", "--", str(qemu), "-name", "alpha", "-netdev"]
    argv += [f"{SHARED},isolated=on", "-device", "virtio-net-pci,netdev=net0", "-nic", "vmnet-host,model=virtio"]
    vm = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    try:
        assert vm.stdout is not None
        words = vm.stdout.readline().split()
        netdev, device, nic = words[3], words[5], words[7]
        assert netdev.startswith("dgram,id=net0,local.type=fd,local.str=")
        assert device == f"virtio-net-pci,netdev=net0,mac={stable_mac('alpha', 0)}"
        assert nic.startswith("socket,fd=")
        assert nic.endswith(f",model=virtio,mac={stable_mac('alpha', 1)}")
        fds = [int(netdev.rpartition("=")[2]), int(nic.split(",")[1].partition("=")[2])]
        for fd in fds:
            assert os.readlink(f"/proc/{vm.pid}/fd/{fd}").startswith("socket:")
        assert eventually(lambda: len(records.read()) == 2)
        listed = json.loads(vmnet(controls, "ls", "--json").stdout)
        assert [(each["name"], each["subnet"]) for each in listed] == [
            ("shared-192.168.64.1", "192.168.64.0/24"),
            ("host-192.168.128.1", "192.168.128.0/24"),
        ]
        assert "shared-192.168.64.1" in vmnet(controls, "ls").stdout
        shown = json.loads(vmnet(controls, "show", "shared-192.168.64.1", "--json").stdout)
        (port,) = shown["ports"]
        assert (port["vm"], port["netdev"], port["isolated"], port["pid"]) == ("alpha", "net0", True, vm.pid)
        assert (port["mac"], shown["gateway"], shown["mtu"]) == (stable_mac("alpha", 0), "192.168.64.1", 1500)
        assert "alpha" in vmnet(controls, "show", "host-192.168.128.1").stdout
        missing = vmnet(controls, "show", "nonsense")
        assert missing.returncode == 4
        assert "shared-192.168.64.1" in missing.stderr
    finally:
        vm.kill()
        vm.wait()
        if vm.stdout is not None:
            vm.stdout.close()
    assert eventually(lambda: not records.read())
    assert "no network is running" in vmnet(controls, "ls").stderr


@pytest.mark.usefixtures("environment")
def test_what_a_mac_cannot_be_told_is_a_sentence(controls: Controls) -> None:
    for words, said in (
        (("run", "--name", "x", "--", "true", "-netdev", SHARED), "is for Linux"),
        (("run", "--host-loopback", "--", "true", "-netdev", SHARED), "is for Linux"),
        (
            ("run", "--", "true", "-netdev", "vmnet-bridged,id=n,ifname=en9"),
            "unsupported ifname 'en9', expected one of",
        ),
    ):
        done = vmnet(controls, *words)
        assert done.returncode not in (0, 1), done
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("environment")
def test_a_bridged_network_is_called_one(controls: Controls) -> None:
    port = start(controls, "vmnet-bridged,id=net0,ifname=en0")
    assert eventually(records.read)
    (listed,) = json.loads(vmnet(controls, "ls", "--json").stdout)
    assert (listed["name"], listed["mode"], listed["subnet"]) == ("bridged-en0", "bridged", None)
    assert "bridged" in vmnet(controls, "show", "bridged-en0").stdout
    port.close()


@pytest.mark.usefixtures("environment")
def test_a_program_that_is_not_there_is_had_from_homebrew(controls: Controls) -> None:
    done = vmnet(controls, "run", "--", "qemu-system-none", "-netdev", SHARED)
    assert (done.returncode, done.stderr.splitlines()[1:]) == (127, ["hint: brew install qemu"])


@pytest.mark.usefixtures("environment")
def test_interfaces_doctor_and_setup_run(controls: Controls) -> None:
    listed = json.loads(vmnet(controls, "interfaces", "--json").stdout)
    assert [each["name"] for each in listed["interfaces"]] == ["en0", "en1"]
    assert "en0" in vmnet(controls, "interfaces").stdout
    doctor = vmnet(controls, "doctor", "--json")
    findings = {each["name"]: each["state"] for each in json.loads(doctor.stdout)["findings"]}
    assert findings["vmnet.framework"] == "found"
    assert findings["macOS"] == "missing"  # it is none
    assert doctor.returncode == 69
    setup = vmnet(controls, "setup")
    assert (setup.returncode, "lets only root use vmnet" in setup.stderr) == (MissingFeature.exit_code, True)
    code = vmnet(controls, "setup", "--", "-c", "import openvmnet; print(openvmnet.__name__)")
    assert code.stdout == "openvmnet\n", code.stderr  # as root, the interpreter that runs


def test_on_a_mac_nothing_of_linuxs_is_imported() -> None:
    program = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("openvmnet.engine.linux", "openvmnet.kernel")):
            raise ImportError(f"{name} is Linux's")
sys.meta_path.insert(0, Refuse())
import select, socket
del select.epoll, socket.AF_NETLINK
sys.platform = "darwin"
from openvmnet import engine
assert engine.DARWIN
import openvmnet.cli, pkgutil
for name in ("main", "run", "ls", "show", "interfaces", "doctor", "setup"):
    importlib.import_module(f"openvmnet.cli.{name}")
for name in ("attach.darwin", "attach.relays", "doctor", "library", "contract.aio", "contract.dispatch"):
    importlib.import_module(f"openvmnet.{name}")
import openvmnet.engine.darwin
for module in pkgutil.iter_modules(openvmnet.engine.darwin.__path__):
    importlib.import_module(f"openvmnet.engine.darwin.{module.name}")
print("whole")
"""
    source = str(Path(records.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    assert done.stdout == "whole\n", done.stderr
