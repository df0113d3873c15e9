"""Echo and ICMP errors of a guest, through a whole network, to an internet of the lab's."""

from __future__ import annotations

import re

import pytest

from lab.world import BLACKHOLE, PROHIBITED, ROUTER, SERVER, UNREACHABLE, WEB

pytestmark = pytest.mark.kernel


def ping(guest, *words: str) -> str:
    return guest.run(["ping", "-n", "-i", "0.05", *words], check=False).stdout


def test_echo_has_a_real_round_trip(guest, world):
    out = ping(guest, "-c", "4", SERVER)
    assert "4 received" in out
    rtts = [float(value) for value in re.findall(r"time=([\d.]+) ms", out)]
    assert all(0.02 < rtt < 100 for rtt in rtts)
    assert {int(value) for value in re.findall(r"ttl=(\d+)", out)} == {62}  # the router's and the gateway's hop


@pytest.mark.parametrize("size", [0, 8, 56, 1472, 1473, 8000, 65507])
def test_echo_of_any_size(guest, size):
    assert "2 received" in ping(guest, "-c", "2", "-s", str(size), SERVER)


def test_echo_without_fragments(guest):
    assert "1 received" in ping(guest, "-c", "1", "-M", "do", "-s", "1472", SERVER)


def test_many_at_once_are_told_apart(guest):
    processes = [guest.popen(["ping", "-n", "-c", "5", "-i", "0.02", where], stdout=-1) for where in (SERVER, WEB) * 4]
    assert all(b"5 received" in process.communicate(timeout=10)[0] for process in processes)


def test_the_gateway_answers_itself(guest, network):
    assert "2 received" in ping(guest, "-c", "2", network.gateway)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (UNREACHABLE, f"From {ROUTER} icmp_seq=1 Destination Host Unreachable"),
        (PROHIBITED, f"From {ROUTER} icmp_seq=1 Packet filtered"),
        ("169.254.169.254", "Dest"),
    ],
    ids=["unreachable", "prohibited", "metadata"],
)
def test_errors_come_back_from_the_router_that_sent_them(guest, where, said):
    out = ping(guest, "-c", "1", "-W", "1", where)
    assert said in out
    assert "0 received" in out


def test_each_request_has_its_own_error(guest):
    out = ping(guest, "-c", "3", "-W", "1", UNREACHABLE)
    assert re.findall(r"icmp_seq=(\d+) Dest", out) == ["1", "2", "3"]


def test_silence_is_silence(guest):
    out = ping(guest, "-c", "1", "-W", "0.5", BLACKHOLE)
    assert "0 received" in out
    assert "From" not in out


@pytest.mark.parametrize("ttl", [1, 2])
def test_time_exceeded(guest, network, ttl):
    out = ping(guest, "-c", "1", "-W", "1", "-t", str(ttl), SERVER)
    assert f"From {(network.gateway, ROUTER)[ttl - 1]} icmp_seq=1 Time to live exceeded" in out


@pytest.mark.parametrize("how", ["-U", "-I", "-T"], ids=["udp", "icmp", "tcp"])
def test_traceroute_shows_gateway_router_and_target(guest, network, how):
    words = ["traceroute", "-n", "-w", "1", "-q", "1", "-m", "5"]
    words += {"-U": ["-U", "-p", "33434"], "-I": ["-I"], "-T": ["-T", "-p", "7"]}[how]
    out = guest.run([*words, SERVER]).stdout
    hops = re.findall(r"^ *\d+  ([\d.*]+)", out, re.MULTILINE)
    if how == "-T":  # a SYN is answered by the gateway in the target's name, so the hops between do not show
        assert (hops[0], hops[-1]) == (network.gateway, SERVER)
    else:
        assert hops == [network.gateway, ROUTER, SERVER]


def test_a_narrow_path_is_told(guest, world):
    world.narrow(1200)
    try:
        done = guest.run(
            ["ping", "-n", "-c", "4", "-i", "0.1", "-W", "0.5", "-M", "do", "-s", "1300", SERVER], check=False
        )
        assert re.search(r"mtu ?= ?1200", done.stdout + done.stderr)
    finally:
        world.narrow(1500)
        guest.run(["ip", "route", "flush", "cache"])
