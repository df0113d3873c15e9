"""The network process: started twice at once, started in vain, killed, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.netns import eventually

if TYPE_CHECKING:
    from lab.world import World

pytestmark = pytest.mark.kernel
HOLD = ["sh", "-c", "exec sleep 1000", "sh", "-netdev", "vmnet-shared,id=n0"]
"""A VM that does nothing but hold its port."""


def run(name: str, *options: str) -> list[str]:
    return ["vmnet", "run", "--name", name, "--linger", "0", *options, "--"]


def record(world: World, name: str) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = json.loads((world.runtime / "openvmnet" / name / "network.json").read_bytes())
    except FileNotFoundError:
        return None
    return read


def ports(world: World, name: str) -> int:
    found = record(world, name)
    return len(found["ports"]) if found else 0


@pytest.fixture
def hold(world):
    """Start a VM that holds a port; all of them end with the test, and so does every network."""
    held = []

    def start(name: str, *options: str) -> subprocess.Popen:
        held.append(world.product([*run(name, *options), *HOLD], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE))
        return held[-1]

    yield start
    for one in held:
        one.kill()
        one.communicate()
    assert world.wait_gone(8), world.leftovers()
    assert world.files() == [".lock"] or [file for file in world.files() if not file.endswith(".lock")] == []


def test_a_file_that_is_called_like_a_module_is_not_run(world):
    """The directory that a VM is started from may be anybody's."""
    trap = world.directory / "trap"
    trap.mkdir(mode=0o755)
    for name in ("msgspec", "asyncio", "openvmnet", "select"):
        (trap / f"{name}.py").write_text("raise SystemExit('a trap')\n")
    process = world.product([*run("trap"), "true", *HOLD[-2:]], cwd=trap, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=30)[1]
    assert (process.returncode, said) == (0, "")
    assert world.wait_gone(8)


def test_no_tls_is_loaded(world, hold):
    """OpenSSL's libraries are a fifth of the memory, and a part of the time to start."""
    hold("lean")
    assert eventually(lambda: ports(world, "lean") == 1, 8)
    maps = (Path("/proc") / str(record(world, "lean")["pid"]) / "maps").read_text()
    assert "libpython" in maps or "python" in maps
    assert "libcrypto" not in maps


def test_two_commands_at_once_make_one_network(world, hold):
    for _ in range(4):
        hold("once")
    assert eventually(lambda: ports(world, "once") == 4, 8)
    daemons = [one for one in world.leftovers() if "openvmnet.daemon" in one.command]
    assert len(daemons) == 2  # the network process, and the agent that it forked


def test_two_networks_at_once_take_different_subnets(world, hold):
    for name in ("left", "right", "third"):
        hold(name)
    assert eventually(lambda: all(ports(world, name) for name in ("left", "right", "third")), 8)
    gateways = {record(world, name)["config"]["subnet"]["gateway"] for name in ("left", "right", "third")}
    assert len(gateways) == 3


BROKEN = {
    "/dev/net/tun": "/dev/net/tun cannot be opened",
    "/usr/sbin/nft": "cannot be run: nft: Permission denied",
    "/usr/sbin/ip": "ip",
}


def run_without(world: World, path: str, name: str) -> subprocess.CompletedProcess[str]:
    """Start a network on a host where `path` may not be opened by the user."""
    closed = world.directory / "closed"
    closed.touch(mode=0o600)
    script = f'mount --bind {closed} {os.path.realpath(path)} && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *world._as_user(), *run(name), *HOLD]
    return world.host.run(command, check=False, env=world.environment(), cwd=world.home)


@pytest.mark.parametrize("path", BROKEN)
def test_a_start_in_vain_leaves_nothing(world, path):
    """At once, not after a while: the next start follows on its heels."""
    if not os.path.exists(path):
        pytest.skip(f"{path} lies elsewhere on this system")
    before = world.files(), world.network_namespaces(), world.leftovers()
    done = run_without(world, path, "vain")
    assert done.returncode in (69, 71), done.stderr
    assert BROKEN[path] in done.stderr
    assert "Traceback" not in done.stderr
    assert eventually(lambda: world.leftovers() == before[2], 0.5), world.leftovers()
    assert (world.files(), world.network_namespaces()) == before[:2]


@pytest.fixture
def small(world):
    """The environment of a user whose runtime directory is a disk of its own, and a file that can fill it."""
    disk = world.directory / "small"
    disk.mkdir()
    owner = world.runtime.stat()
    options = f"size=64k,mode=0700,uid={owner.st_uid},gid={owner.st_gid}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "small", disk], check=True)
    yield {"XDG_RUNTIME_DIR": str(disk)}, disk / "fill"
    assert world.wait_gone(8), world.leftovers()
    subprocess.run(["umount", disk], check=True)
    disk.rmdir()


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_start_on_a_full_disk_leaves_nothing(world, small):
    environment, filler = small
    fill(filler)
    done = world.product_run([*run("full"), *HOLD], check=False, env=environment)
    assert done.returncode == 71
    assert "network.json cannot be written: No space left on device" in done.stderr
    assert eventually(lambda: not world.leftovers(), 0.5), world.leftovers()
    assert list(filler.parent.glob("openvmnet/full/*")) == []


def test_a_disk_that_is_full_later_loses_no_port(world, small):
    environment, filler = small

    def vms() -> list[str]:
        shown = world.product_run(["vmnet", "show", "full", "--json"], env=environment).stdout
        return [port["netdev"] for port in json.loads(shown)["ports"]]

    one = world.product([*run("full"), *HOLD], env=environment)
    assert eventually(lambda: (filler.parent / "openvmnet/full/control.sock").exists() and vms() == ["n0"])
    fill(filler)
    two = world.product([*run("full"), *HOLD[:-1], "vmnet-shared,id=n1"], env=environment)
    assert eventually(lambda: vms() == ["n0", "n1"])
    two.kill()
    two.wait()
    assert eventually(lambda: vms() == ["n0"])
    one.kill()
    one.wait()


def test_a_start_after_one_in_vain(world, hold):
    """Nothing that the first left running takes away what the second has made."""
    assert run_without(world, "/dev/net/tun", "again").returncode == 69
    hold("again")
    assert eventually(lambda: ports(world, "again"))
    time.sleep(4)  # more than an agent waits for a network process
    assert (world.runtime / "openvmnet/again/agent.sock").exists()
    assert (world.runtime / "openvmnet/again/control.sock").exists()


def test_starts_and_ends_in_a_row(world):
    """Each network ends as its VM does, while the next command already asks for it."""
    for number in range(12):
        done = world.product_run([*run("row"), "true", "-netdev", "vmnet-shared,id=n0"], check=False)
        assert done.returncode == 0, f"{number}: {done.stderr}"
    assert world.wait_gone(8), world.leftovers()
    assert not (world.runtime / "openvmnet/row").exists()


def test_an_ended_network_leaves_no_file(world, hold):
    one = hold("brief")
    assert eventually(lambda: ports(world, "brief"))
    one.kill()
    assert eventually(lambda: not (world.runtime / "openvmnet/brief").exists())


def test_sigterm_ends_it_in_order(world, hold):
    hold("term")
    assert eventually(lambda: ports(world, "term"))
    os.kill(record(world, "term")["pid"], signal.SIGTERM)
    assert eventually(lambda: not (world.runtime / "openvmnet/term").exists())


def test_a_killed_process_is_taken_over_with_its_ports(world, hold):
    vms = [hold("dead"), hold("dead")]
    assert eventually(lambda: all(holding(vm) for vm in vms))
    before = record(world, "dead")
    os.kill(before["pid"], signal.SIGKILL)
    shown = json.loads(world.product_run(["vmnet", "show", "dead", "--json"]).stdout)
    assert [port["port"] for port in shown["ports"]] == [port_link(port) for port in before["ports"]]
    assert [port["mac"] for port in shown["ports"]] == [port["mac"] for port in before["ports"]]
    assert any("had died" in note for note in shown["notes"])
    assert record(world, "dead")["agent"] == before["agent"]
    hold("dead")  # and it takes new ones, with numbers of their own
    assert eventually(lambda: ports(world, "dead") == 3)
    assert len({port["number"] for port in record(world, "dead")["ports"]}) == 3


def holding(vm: subprocess.Popen) -> bool:
    """Whether the command has become the VM, which has the port then."""
    with open(f"/proc/{vm.pid}/comm") as file:
        return file.read() == "sleep\n"


def port_link(port: dict[str, Any]) -> str:
    return f"vm{port['number']}"


def test_a_killed_process_without_vms_is_swept_away(world, hold):
    one = hold("empty")
    assert eventually(lambda: ports(world, "empty"))
    before = record(world, "empty")
    os.kill(before["pid"], signal.SIGKILL)
    one.kill()
    one.wait()
    assert eventually(lambda: not _alive(before["agent"]), 6)  # the agent notices that nobody needs it
    done = world.product_run(["vmnet", "show", "empty"], check=False)
    assert done.returncode == 4
    assert not (world.runtime / "openvmnet/empty").exists()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it goes between open(2) and read(2)
        return False


def test_an_agent_that_dies_ends_its_network_with_a_sentence(world, hold):
    hold("orphan")
    assert eventually(lambda: ports(world, "orphan"))
    before = record(world, "orphan")
    os.kill(before["agent"], signal.SIGKILL)
    assert eventually(lambda: not _alive(before["pid"]))
    assert not (world.runtime / "openvmnet/orphan").exists()
    log = (world.home / ".local/state/openvmnet/orphan/log").read_text()
    assert "the agent of network 'orphan'" in log
    assert "Traceback" not in log


def test_the_process_keeps_nothing_of_the_command_that_started_it(world, hold):
    """Whoever reads the command's output to its end is not kept waiting by the network."""
    read, write = os.pipe()
    command = [*run("pipe"), *HOLD]
    process = world.product(command, stdin=subprocess.DEVNULL, stdout=write, stderr=write, pass_fds=(write,))
    os.close(write)
    assert eventually(lambda: ports(world, "pipe"))
    process.kill()
    process.wait()
    os.set_blocking(read, False)
    assert eventually(lambda: _ended(read), 1)
    os.close(read)
    assert world.wait_gone(8)


def _ended(read: int) -> bool:
    try:
        return not os.read(read, 65536)
    except BlockingIOError:
        return False
