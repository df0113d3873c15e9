"""What a host forbids, in one sentence with the command that mends it."""

from __future__ import annotations

import errno

import pytest

from openvmnet.engine.linux import namespace, remedy
from openvmnet.errors import HostError, MissingFeature


def explained(number: int, what: str) -> HostError:
    return namespace._explain(OSError(number, what))


@pytest.mark.parametrize("what", ["unshare: Operation not permitted", "/proc/self/uid_map: no", "setgroups: no"])
def test_a_forbidden_namespace_has_doctors_remedy(what):
    error = explained(errno.EPERM, what)
    assert isinstance(error, MissingFeature)
    assert what in error.message
    assert "make no user and network namespace" in error.message
    assert error.hint == remedy.namespaces(OSError(errno.EPERM, what))


def test_too_many_namespaces_are_a_limit(tmp_path):
    assert explained(errno.ENOSPC, "unshare: No space left on device").hint.startswith("sudo sysctl -w user.max_")
    assert remedy.namespaces(OSError(errno.ENOSPC, ""), tmp_path) == "sudo sysctl -w user.max_user_namespaces=15000"


@pytest.mark.parametrize("what", ["tap: Permission denied", "tun: No such file or directory"])
def test_a_device_that_cannot_be_opened(what):
    error = explained(errno.EACCES, what)
    assert isinstance(error, MissingFeature)
    assert "/dev/net/tun cannot be opened" in error.message
    assert error.hint == "sudo modprobe tun; sudo chmod 0666 /dev/net/tun"


def test_a_program_that_is_not_there():
    error = explained(errno.ENOENT, "run: nft: No such file or directory")
    assert isinstance(error, MissingFeature)
    assert "nft: No such file" in error.message
    assert error.hint == "sudo apt-get install iproute2 nftables"


def test_anything_else_says_what_was_asked():
    error = explained(errno.EIO, "sockets: Input/output error")
    assert type(error) is HostError
    assert "sockets: Input/output error" in error.message
