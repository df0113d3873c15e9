"""Directories and files of networks."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvmnet import state
from openvmnet.errors import HostError, OptionError
from openvmnet.netdev import Subnet
from tests.netns import real_root


@pytest.fixture(autouse=True)
def directories(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "run").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["a", "shared", "Net-1_2.x", "9", "a" * 32, "shared-192.168.64.1"])
def test_names(name):
    assert state.check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "-x", ".x", "a/b", "a b", "a\n", "ä", "a" * 33, "a\0", "_"])
def test_no_names(name):
    with pytest.raises(OptionError, match="not a network name"):
        state.check_name(name)


@given(st.text(max_size=40))
def test_a_name_is_a_path_component(name):
    try:
        state.check_name(name)
    except OptionError:
        return
    assert "/" not in name
    assert name not in (".", "..")
    assert os.path.basename(name) == name


def test_directories_are_private_and_apart(directories):
    for path in (state.runtime("x"), state.remembered("x"), state.runtime_root(), state.state_root()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert state.runtime("x") == directories / "run/openvmnet/x"
    assert state.remembered("x") == directories / "state/openvmnet/x"
    assert state.names() == ["x"]


def test_others_may_not_write(directories):
    root = state.runtime_root()
    root.chmod(0o770)
    with pytest.raises(HostError, match="writable by nobody else"):
        state.runtime("x")


def test_a_link_is_refused(directories):
    (directories / "elsewhere").mkdir()
    (directories / "run/openvmnet").symlink_to(directories / "elsewhere")
    with pytest.raises(HostError, match="directory of yours"):
        state.runtime_root()


@real_root("to give a directory away")
def test_another_owners_is_refused(directories):
    root = state.runtime_root()
    os.chown(root, 60001, 60001)
    with pytest.raises(HostError, match="owner 60001"):
        state.runtime_root()


def test_a_file_in_the_way_is_an_error_of_ours(directories):
    (directories / "run/openvmnet").write_text("")
    with pytest.raises(HostError):
        state.runtime_root()


@real_root("to give a directory away")
# There is none; it is another user's, as it is to root after su(1).
@pytest.mark.parametrize("base", ["missing", "run"])
def test_without_a_runtime_directory_of_the_sessions(monkeypatch, directories, base):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directories / base))
    directories.joinpath("run").chmod(0o777)
    os.chown(directories / "run", 60001, 60001)
    made = []
    monkeypatch.setattr(state, "_private", lambda path: made.append(path) or path)
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    assert str(state.runtime_root()) == "/tmp/openvmnet-1234"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert str(state.runtime_root()) == "/run/openvmnet"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert str(state.runtime_root()) == "/var/run/openvmnet"


def test_without_a_home(monkeypatch):
    for name in ("XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # of whom no database of users knows
    with pytest.raises(HostError, match="uid 54321 has no home directory") as caught:
        state.state_root()
    assert "XDG_STATE_HOME" in caught.value.hint


class Thing(msgspec.Struct):
    subnet: Subnet
    text: str


def thing(text: str) -> Thing:
    subnet = Subnet.from_options("10.0.0.1", "10.0.0.9", "255.255.255.0")
    assert subnet is not None
    return Thing(subnet, text)


@given(st.text(max_size=50))
def test_what_is_written_is_read(text):
    assert state.decode(state.encode(thing(text)), Thing) == thing(text)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error_of_the_decoders(data):
    try:
        state.decode(data, Thing)
    except msgspec.DecodeError:
        return


@pytest.mark.parametrize(
    "data", [b'{"subnet":{"gateway":"x","first":"10.0.0.2","last":"10.0.0.9","prefixlen":24},"text":""}', b"[]", b""]
)
def test_a_damaged_file_is_an_error_of_the_decoders(data):
    with pytest.raises(msgspec.DecodeError):
        state.decode(data, Thing)


@pytest.mark.parametrize("durable", [False, True])
def test_files_are_replaced_whole_and_private(directories, durable):
    path = state.runtime("x") / "network.json"
    for text in ("a", "b" * 10_000, "c"):
        state.write(path, thing(text), durable=durable)
        assert state.decode(path.read_bytes(), Thing).text == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["network.json"]


def test_a_failed_write_leaves_the_old_file_and_no_new_one(directories, monkeypatch):
    path = state.runtime("x") / "network.json"
    state.write(path, thing("old"), durable=True)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostError, match="No space"):
        state.write(path, thing("new"), durable=True)
    assert state.decode(path.read_bytes(), Thing).text == "old"
    assert os.listdir(path.parent) == ["network.json"]


def test_the_directory_of_who_became_root_by_sudo(monkeypatch):
    path = Path("/tmp/openvmnet-4294967293")
    path.mkdir(mode=0o700)
    try:
        for root, uid, found in (
            (0, "4294967293", path),
            (0, "4294967292", None),
            (0, "", None),
            (0, "../x", None),
            (501, "4294967293", None),
        ):
            monkeypatch.setattr(os, "getuid", lambda root=root: root)
            monkeypatch.setenv("SUDO_UID", uid)
            assert state.sudoer_root() == found
    finally:
        path.rmdir()
