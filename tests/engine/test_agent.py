"""The agent: what it makes, what it refuses, when it stays and when it goes."""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openvmnet.engine.linux import agent
from tests.netns import real_root

pytestmark = pytest.mark.kernel


@pytest.fixture
def path(lab, tmp_path):
    return tmp_path / "agent.sock"


@pytest.fixture
def forked(path):
    """An agent's pid; it is ended at the end."""
    pid = agent.fork(str(path))
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


class Client:
    def __init__(self, path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(5)
        self.sock.connect(str(path))

    def ask(self, request: object) -> tuple[dict, list[int]]:
        return self.send(json.dumps(request).encode())

    def send(self, data: bytes) -> tuple[dict, list[int]]:
        self.sock.send(data)
        reply, ancillary, _, _ = self.sock.recvmsg(1 << 18, socket.CMSG_SPACE(4 * 64))
        fds = array.array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload)
        return json.loads(reply), list(fds)


@pytest.fixture
def client(forked, path):
    made = Client(path)
    yield made
    made.sock.close()


def gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            return True
        time.sleep(0.02)
    return False


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_it_is_root_in_namespaces_of_its_own_and_has_no_descriptor_of_ours(path):
    read, write = os.pipe()
    os.set_inheritable(write, True)
    pid = agent.fork(str(path))
    try:
        for kind in ("net", "user"):
            assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        assert Path(f"/proc/{pid}/uid_map").read_text().split() == ["0", str(os.getuid()), "1"]
        os.close(write)
        assert os.read(read, 1) == b""  # nobody else holds the other end
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_its_caller_left_uncollected_closes_no_descriptor_of_its_own(path):
    threshold = gc.get_threshold()
    gc.collect()
    gc.set_threshold(20_000)  # there as well: it collects when it is told to, by a request of so many lists
    for _ in range(20):
        cycle: list[object] = [select.epoll()]  # closes its descriptor when it is collected, without a warning
        cycle.append(cycle)
    pid = agent.fork(str(path))
    gc.set_threshold(*threshold)
    try:
        with contextlib.ExitStack() as stack:
            clients = []
            for _ in range(40):  # their descriptors there come to have the numbers of those
                clients.append(Client(path))
                stack.enter_context(clients[-1].sock)
                clients[-1].ask({"op": "links"})
            clients[-1].ask({"op": "links", "collect": [[] for _ in range(40_000)]})
            for client in clients:
                assert client.ask({"op": "links"})[0]["links"] == ["lo"]
    finally:
        del cycle
        gc.collect()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_quit_ends_it_and_removes_its_socket(forked, client, path):
    client.sock.send(b'{"op": "quit"}')
    assert gone(forked, 2)
    assert not path.exists()


def test_it_leaves_anothers_socket_alone(forked, client, path):
    path.unlink()
    other = agent.fork(str(path))
    try:
        client.sock.send(b'{"op": "quit"}')
        assert gone(forked, 2)
        assert path.exists()
        another = Client(path)
        assert another.ask({"op": "links"})[0]["links"] == ["lo"]
        another.sock.close()
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)


def test_sockets_are_made_in_its_namespace_with_their_options(forked, client):
    reply, fds = client.ask(
        {
            "op": "socket", "id": 7, "family": socket.AF_INET, "type": socket.SOCK_DGRAM, "count": 32,
            "options": [[socket.SOL_IP, 19, 1], [socket.SOL_SOCKET, socket.SO_REUSEADDR, 1]],
            "bind": ["203.0.113.77", 4711],
        }
    )  # fmt: skip
    assert (reply["ok"], reply["id"], len(fds)) == (True, 7, 32)
    for fd in fds:
        with socket.socket(fileno=fd) as sock:
            assert sock.getsockname() == ("203.0.113.77", 4711)  # transparent: an address that nobody has
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)),
    ):
        sock.bind(("203.0.113.77", 4711))


def test_a_failed_request_leaves_no_descriptor(forked, client):
    client.ask({"op": "links"})
    before = descriptors(forked)
    bad = [
        {"op": "socket", "family": 2, "type": 2, "count": 8, "bind": ["203.0.113.77", 4711]},
        {"op": "socket", "family": 2, "type": 2, "count": 5000},
        {"op": "socket", "family": 999, "type": 2},
        {"op": "tap", "name": "lo"},
        {"op": "run", "argv": ["ip", "no such thing"]},
    ]
    for request in bad:
        client.ask(request)
    for _ in range(50):
        _, fds = client.ask({"op": "socket", "family": 2, "type": 1, "count": 16})
        for fd in fds:
            os.close(fd)
    client.ask({"op": "links"})  # it closes its copies after it has answered
    assert descriptors(forked) == before


NONSENSE = [
    b"{", b"[]", b"null", b"7", b'"op"', b"{}", b'{"op": 5}', b'{"op": "fork"}', b'{"op": {}}', b"\xff\xfe",
    b'{"op": "run", "argv": []}', b'{"op": "run", "argv": "ip"}', b'{"op": "run", "argv": ["ip", 5]}',
    b'{"op": "run", "argv": ["ip"], "input": 5}', b'{"op": "run", "argv": ["ip\\u0000"]}',
    b'{"op": "tap"}', b'{"op": "tap", "name": 5}', b'{"op": "tap", "name": "a/b"}',
    b'{"op": "socket"}', b'{"op": "socket", "family": "x", "type": 1}',
    b'{"op": "socket", "family": 2, "type": 1, "options": [[1, 2, 99999999999999]]}',
    b'{"op": "socket", "family": 2, "type": 1, "options": [[1]]}',
    b'{"op": "socket", "family": 2, "type": 1, "bind": ["x"]}',
    b'{"op": "socket", "family": 2, "type": 1, "bind": ["127.0.0.1", 99999]}',
    b'{"op": "socket", "family": 2, "type": 1, "count": "x"}',
    b'{"op": "sysctl", "values": []}', b'{"op": "sysctl", "values": {"net.ipv4.ip_forward": 1}}',
    b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("data", NONSENSE, ids=lambda data: data[:60].decode(errors="replace"))
def test_nonsense_is_refused_and_survived(forked, client, data):
    reply, fds = client.send(data)
    assert "error" in reply
    assert fds == []
    assert client.ask({"op": "links", "id": 1}) == ({"links": ["lo"], "ok": True, "id": 1}, [])


@pytest.mark.parametrize("argv", [["sh", "-c", "true"], ["/bin/ip"], ["../../bin/sh"], ["nft "], ["IP"]])
def test_no_other_program_is_run(client, argv):
    reply, _ = client.ask({"op": "run", "argv": argv})
    assert reply["errno"] == errno.EINVAL


@pytest.mark.parametrize(
    "name",
    ["kernel.core_pattern", "net.../kernel/core_pattern", "net/../kernel/core_pattern", "/kernel/core_pattern", "",
     "vm.swappiness", "net.ipv4/../../kernel.hostname", "network.x"],
)  # fmt: skip
def test_no_other_sysctl_is_written(client, name):
    reply, _ = client.ask({"op": "sysctl", "values": {name: "x"}})
    assert reply["errno"] == errno.EINVAL


def test_sysctls_are_of_its_namespace_only(client):
    with open("/proc/sys/net/ipv4/ip_forward") as file:
        before = file.read()
    assert client.ask({"op": "sysctl", "values": {"net.ipv4.ip_forward": "1", "net.no.such": "1"}})[0] == {
        "missing": ["net.no.such"], "ok": True, "id": None,
    }  # fmt: skip
    with open("/proc/sys/net/ipv4/ip_forward") as file:
        assert file.read() == before


def test_programs_are_run_and_their_words_come_back(client):
    reply, _ = client.ask({"op": "run", "argv": ["ip", "-batch", "-"], "input": "link add d0 type bridge\n"})
    assert (reply["status"], reply["stderr"]) == (0, "")
    assert sorted(client.ask({"op": "links"})[0]["links"]) == ["d0", "lo"]
    reply, _ = client.ask({"op": "run", "argv": ["nft", "-f", "-"], "input": "no rule"})
    assert reply["status"] != 0
    assert "syntax error" in reply["stderr"]


def test_it_stays_while_a_guest_has_its_tap_and_goes_when_nobody_has(forked, client, path):
    reply, (tap,) = client.ask({"op": "tap", "name": "vm1"})
    assert reply["ok"]
    client.sock.close()
    assert not gone(forked, 4.5)
    again = Client(path)
    assert "vm1" in again.ask({"op": "links"})[0]["links"]
    again.sock.close()
    os.close(tap)
    assert gone(forked, 6)
    assert not path.exists()


def test_other_taps_than_guests_keep_nobody(forked, client):
    _, (tun,) = client.ask({"op": "tun", "name": "up0"})
    client.sock.close()
    assert gone(forked, 6)
    os.close(tun)


def test_several_clients_and_one_that_leaves_in_the_middle(forked, path):
    clients = [Client(path) for _ in range(4)]
    for one in clients:
        one.sock.send(b'{"op": "links"}')
    clients[0].sock.close()
    for one in clients[1:]:
        assert json.loads(one.sock.recv(1000))["ok"]
        assert one.ask({"op": "links"})[0]["ok"]
        one.sock.close()


def test_what_the_kernel_refuses_is_the_callers_error(path, lab):
    path.write_text("something else is here")
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        agent.fork(str(path))
    with pytest.raises(OSError, match="too long"):
        agent.fork(str(path.parent / ("x" * 120)))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # no child is left, not even a dead one


UNPRIVILEGED = """
import sys
sys.path[:0] = {paths}
from tests.engine.taps import net
from pathlib import Path
with net(Path(sys.argv[1])) as made:
    one, other = made.plug(), made.plug()
    assert made.passes(one.marker(other), one, other) == []
    assert made.packets() == []
    print(sorted(made.engine.links()))
"""


@real_root("becoming another user")
def test_all_of_it_as_an_ordinary_user(lab, tmp_path):
    """A whole engine: agent, bridge, rules, ports, by a user without any right."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    program = UNPRIVILEGED.format(paths=sys.path)
    done = subprocess.run(
        ["setpriv", "--reuid=60001", "--regid=60001", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--",
         sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['vm1', 'vm2']\n"
