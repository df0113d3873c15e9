"""main: one sentence and an exit code for whatever goes wrong."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

import openvmnet
from openvmnet.cli.main import main

_EXAMPLE = "vmnet run -- qemu-system-x86_64 -netdev vmnet-shared,id=net0 -device virtio-net-pci,netdev=net0 ..."


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vmnet {openvmnet.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("run", "ls", "show", "interfaces", "doctor", "setup"):
        assert f"\n  {name} " in out


def test_nothing_given_is_help_and_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Usage: vmnet ")


@pytest.mark.parametrize(
    ("argv", "code", "err"),
    [
        (["fly"], 2, "vmnet: No such command 'fly'.\nhint: vmnet --help\n"),
        (["show"], 2, "vmnet: Missing argument 'NETWORK'.\nhint: vmnet show --help\n"),
        (["show", "web"], 4, "vmnet: no network 'web' is running\nhint: vmnet ls\n"),
        (
            ["run"],
            2,
            f"vmnet: no command is given: after -- comes the VM's own, QEMU first\nhint: {_EXAMPLE}\n",
        ),
        (
            ["run", "--linger", "nan", "--", "qemu", "-nic", "vmnet-shared"],
            2,
            "vmnet: Invalid value for '--linger': nan is not a number of seconds\nhint: vmnet run --help\n",
        ),
        (
            ["run", "--", "no-such-qemu", "-nic", "vmnet-shared"],
            127,
            "vmnet: no program 'no-such-qemu' is on the PATH\n",
        ),
        (["run", "/no/qemu", "-nic", "vmnet-shared"], 127, "vmnet: no program '/no/qemu' is there\n"),
        (["run", "/bin/sh", "-nic", "vmnet-shared,a=b"], 2, None),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], argv: list[str], code: int, err: str | None) -> None:
    assert main(argv) == code
    said = capsys.readouterr()
    assert said.out == ""
    if err is not None:
        assert said.err == err
    else:
        assert said.err.startswith("vmnet: Invalid parameter 'a'\nhint: ")


def test_errors_are_json_where_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "web", "--json"]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert msgspec.json.decode(said.err) == {
        "error": {"kind": "NotFound", "message": "no network 'web' is running", "hint": "vmnet ls", "exit_code": 4}
    }


def test_an_argument_that_is_no_text_is_an_error_like_any_other() -> None:
    argv = [sys.executable, "-m", "openvmnet", "show", b"\xff", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert msgspec.json.decode(done.stderr)["error"]["message"].startswith(r"'\udcff' is not a network name")


@pytest.mark.parametrize("words", [["--version"], ["ls", "--json"]])
def test_output_that_cannot_be_written_is_one_sentence(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "openvmnet", *words]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 71
    assert done.stderr == "vmnet: the system refused: No space left on device\n" or "--json" in words
    assert "the system refused: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--version"], ["ls"]])
def test_without_a_standard_output(words: list[str]) -> None:
    command = [sys.executable, "-m", "openvmnet", *words]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_json_after_the_dashes_is_the_vms(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--", "qemu", "--json"]) == 2
    assert capsys.readouterr().err.startswith("vmnet: the command has no vmnet netdev")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "openvmnet", "fly"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "vmnet: No such command 'fly'.\nhint: vmnet --help\n")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    script = "import sys, openvmnet.cli.main as m; sys.exit(m.main(['ls', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (1, b"")


def test_run_imports_nothing_slow() -> None:
    script = "import sys, openvmnet.cli.main, openvmnet.cli.run; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    slow = {"asyncio", "rich", "platformdirs", "ssl", "subprocess", "logging", "hashlib", "openvmnet.network"}
    assert not loaded & slow
