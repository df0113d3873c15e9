"""The lab itself: what its services promise holds, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest

from lab import world as places
from lab.netns import mounted
from lab.paths import CHECKOUT
from lab.world import World

pytestmark = pytest.mark.kernel


def connect(world, address, port, timeout=2.0):
    sock = world.host.socket()
    sock.settimeout(timeout)
    try:
        sock.connect((address, port))
    except BaseException:
        sock.close()
        raise
    return sock


def test_lab_sees_no_interface_of_the_machine(lab):
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(OSError, match="unreachable"):
        sock.connect((places.SERVER, 9))


def test_product_is_unprivileged(world):
    status = world.product_run(["cat", "/proc/self/status"]).stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["CapEff"] == "0000000000000000"
    assert fields["Uid"].split()[0] != "0"


def test_product_reads_the_checkout_and_runs_the_installed_copy(world):
    assert "openvmnet" in world.product_run(["cat", str(CHECKOUT / "pyproject.toml")]).stdout
    assert world.product_run(["vmnet", "--help"]).stdout.startswith("Usage")


def test_product_sees_only_the_host(world):
    out = world.product_run(["ip", "-br", "-4", "address"]).stdout.split("\n")
    assert [line.split()[-1] for line in out if line] == ["127.0.0.1/8", "192.0.2.2/24"]
    assert Path("/etc/resolv.conf").read_text() == f"nameserver {places.NAMESERVER}\n"


@pytest.mark.parametrize(("port", "sent", "answer"), [(7, b"hello", b"hello"), (14, b"four", b"4\n")])
def test_tcp_services(world, port, sent, answer):
    with connect(world, places.SERVER, port) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == answer
        assert sock.recv(100) == b""


def test_udp_answers_come_from_the_address_asked(world):
    with world.host.socket(kind=socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        for address in (places.SERVER, places.WEB):
            sock.sendto(b"?", (address, 13))
            data, source = sock.recvfrom(100)
            assert source == (address, 13)
            assert data.split()[0].decode() == places.HOST


@pytest.mark.parametrize(
    ("address", "port", "number"),
    [
        (places.SERVER, 81, errno.ECONNREFUSED),
        (places.UNREACHABLE, 80, errno.EHOSTUNREACH),
        (places.PROHIBITED, 80, errno.EHOSTUNREACH),
    ],
)
def test_failures_have_their_error(world, address, port, number):
    with pytest.raises(OSError, match=os.strerror(number)):
        connect(world, address, port)


def test_blackhole_swallows(world):
    with pytest.raises(TimeoutError):
        connect(world, places.BLACKHOLE, 80, timeout=0.3)


def test_reset_port(world):
    with pytest.raises(ConnectionResetError), connect(world, places.SERVER, 11) as sock:  # it may come that early
        sock.recv(1)


def test_web_page_by_name(world):
    assert world.product_run(["curl", "-s", "http://www.example.test/"]).stdout == places.PAGE
    assert "A www.example.test" in world.queries()


def test_names_that_do_not_exist(world):
    out = world.product_run(["dig", "+noall", "+comments", "nothing.invalid"]).stdout
    assert "status: NXDOMAIN" in out


def test_nameserver_stops_and_starts(world):
    world.stop_nameserver()
    out = world.product_run(["dig", "+tries=1", "+time=1", "www.example.test"], check=False)
    assert out.returncode != 0
    world.start_nameserver()
    assert world.product_run(["dig", "+short", "www.example.test"]).stdout == f"{places.WEB}\n"


def test_path_mtu_is_found(world):
    world.narrow(1300)
    try:
        out = world.product_run(["ping", "-c1", "-W1", "-M", "do", "-s", "1400", places.SERVER], check=False).stdout
        assert "mtu = 1300" in out
    finally:
        world.narrow(1500)
        world.as_root(["ip", "route", "flush", "cache"])


def test_leftovers_are_found_and_ended(lab):
    with World(hops=0) as made:
        assert made.network_namespaces() == 0
        script = (
            "exec >/dev/null 2>&1 </dev/null; setsid sleep 1000 & unshare -Urn sleep 1001 & : >$XDG_RUNTIME_DIR/file"
        )
        made.product_run(["sh", "-c", script])
        assert made.files() == ["file"]
        deadline = time.monotonic() + 5
        while {p.command for p in made.leftovers()} != {"sleep 1000", "sleep 1001"} and time.monotonic() < deadline:
            time.sleep(0.02)
        assert sorted(process.command for process in made.leftovers()) == ["sleep 1000", "sleep 1001"]
        assert made.network_namespaces() == 1
        directory = made.directory
    assert made.leftovers() == []
    assert not directory.exists()
    assert not [name for name in mounted() if name.startswith(made.tag)]
