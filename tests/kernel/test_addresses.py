"""The host's own addresses, beside what ip(8) gave a namespace made for the test."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

SCRIPT = """
import socket, subprocess, sys
from openvmnet.kernel import addresses
for words in sys.argv[1:]:
    subprocess.run(["ip", *words.split()], check=True)
print([socket.inet_ntoa(one) for one in addresses.own(socket.AF_INET)])
print([socket.inet_ntop(socket.AF_INET6, one) for one in addresses.own(socket.AF_INET6)])
"""


def told(*commands: str) -> list[list[str]]:
    """What is found in a fresh namespace in which `ip` was told `commands`."""
    argv = ["unshare", "-rn", sys.executable, "-c", SCRIPT, *commands]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=20)
    if "unshare" in done.stderr:
        pytest.skip(f"no user and network namespace here (CONFIG_USER_NS, CONFIG_NET_NS): {done.stderr}")
    assert not done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


@pytest.mark.kernel
def test_what_others_could_reach_and_nothing_else():
    ipv4, ipv6 = told(
        "link set lo up",
        "addr add 127.1.2.3/32 scope global dev lo",
        "link add name one type bridge",
        "link set one up",
        "addr add 10.1.2.3/24 dev one",
        "addr add 10.9.2.4/24 scope link dev one",
        "addr add 169.254.3.4/16 scope link dev one",
        "addr add 2001:db8::1/64 nodad dev one",
        "addr add 2001:db8::2/64 nodad preferred_lft 0 dev one",
        "addr add fd00:1::1/64 nodad dev one",
    )
    assert ipv4 == ["10.1.2.3"]
    assert sorted(ipv6) == ["2001:db8::1", "fd00:1::1"]


@pytest.mark.kernel
def test_a_host_that_nobody_reaches_has_none():
    assert told("link set lo up") == [[], []]
