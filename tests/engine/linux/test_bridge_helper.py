"""bridge_helper: what stands in the way, each thing in turn; the real helper is asked in tests/qemu."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.linux import bridge_helper
from openvmnet.errors import HostError, MissingFeature

if TYPE_CHECKING:
    from pathlib import Path

# Not QEMU's: it sends what it is told to, down the descriptor that it is given.
SCRIPT = """#!{python}
import os, socket, sys
given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
if given["br"] == "silent":
    sys.exit(0)
if given["br"] != "br0":
    sys.exit(f"access denied by acl file, {{sorted(given)}}")
sock = socket.socket(fileno=int(given["fd"]))
socket.send_fds(sock, [b"x"], [os.open("/dev/null", os.O_RDWR)])
"""


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "qemu-bridge-helper"
    path.write_text(SCRIPT.format(python=sys.executable))
    path.chmod(0o755)
    monkeypatch.setattr(bridge_helper, "PATHS", (str(tmp_path / "none"), str(path)))
    monkeypatch.setattr(bridge_helper, "ACLS", (str(tmp_path / "bridge.conf"),))
    return path


@pytest.fixture
def rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper has root's rights, as far as anyone can see."""
    monkeypatch.setattr(bridge_helper, "rights", lambda: None)


def test_a_missing_helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bridge_helper, "PATHS", ("/nowhere/helper",))
    monkeypatch.setattr(bridge_helper, "ACLS", (str(tmp_path / "bridge.conf"),))
    with pytest.raises(MissingFeature) as raised:
        bridge_helper.open_tap("br0")
    assert str(raised.value).endswith("and QEMU's qemu-bridge-helper is not installed")
    hint = str(raised.value.hint)
    allow = f"sudo mkdir -p {tmp_path} && echo 'allow br0' | sudo tee -a {tmp_path}/bridge.conf"
    assert hint.startswith(f"let the helper do it: sudo apt install qemu-system-common && {allow}; ")
    assert "; or have the capability: sudo setpriv " in hint
    assert hint.endswith("; or do without the bridge: -netdev vmnet-shared,id=net0")


def test_what_keeps_rights_from_it(helper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = bridge_helper.rights()
    assert found == (f"{helper} is not setuid root", f"sudo chmod u+s {helper}")
    if os.getuid() == 0:
        helper.chmod(0o4755)
        assert helper.stat().st_mode & stat.S_ISUID
        assert bridge_helper.rights() is None
        monkeypatch.setattr(bridge_helper, "_no_new_privileges", lambda: True)
        assert "no_new_privs" in str(bridge_helper.rights())
    monkeypatch.setattr(bridge_helper, "_file_capabilities", lambda path: True)
    monkeypatch.setattr(bridge_helper, "_no_new_privileges", lambda: False)
    assert bridge_helper.rights() is None
    helper.chmod(0o644)
    assert "members of its group" in str(bridge_helper.rights())


def test_a_descriptor_comes_and_is_not_inherited_by_others(helper: Path, rights: None) -> None:
    fd = bridge_helper.open_tap("br0")
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("offloads", "flags"), [(True, "['br', 'fd', 'use-vnet']"), (False, "['br', 'fd']")])
def test_a_refusal_is_explained(helper: Path, rights: None, tmp_path: Path, offloads: bool, flags: str) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MissingFeature, match=r"its access list .* is not there"):
        bridge_helper.open_tap("br1", offloads=offloads)
    (tmp_path / "bridge.conf").write_text("allow br1\n")
    said = bridge_helper._failure(str(helper), "br1", f"tun: {flags}")
    assert said.sentence == f"{helper} says: tun: {flags}"
    (tmp_path / "bridge.conf").write_text("allow all\n")
    with pytest.raises(MissingFeature, match="it ended with 0 and gave no descriptor"):
        bridge_helper.open_tap("silent")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_helper_that_cannot_be_run_or_does_not_end(
    helper: Path, rights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper.write_text("#!/no/interpreter\n")
    (helper.parent / "bridge.conf").write_text("allow all\n")
    with pytest.raises(MissingFeature, match="No such file"):
        bridge_helper.open_tap("br0")
    helper.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(bridge_helper, "_TIMEOUT", 0.1)
    with pytest.raises(HostError, match="did not answer"):
        bridge_helper.open_tap("br0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("allow br0\n", None),
        ("allow br1\n", "does not allow 'br0'"),
        ("allow all\ndeny br0\n", "denies 'br0'"),
        ("allow br0\nnonsense\n", "has a line that is none of allow, deny, include"),
    ],
)
def test_each_list_has_its_sentence(helper: Path, rights: None, text: str, sentence: str | None) -> None:
    (helper.parent / "bridge.conf").write_text(text)
    found = bridge_helper.obstacle("br0")
    assert (found is None) == (sentence is None)
    assert sentence is None or sentence in str(found)


def test_lists_that_include_themselves_end(helper: Path, rights: None) -> None:
    file = helper.parent / "bridge.conf"
    file.write_text(f"include {file}\nallow br0\n")
    assert bridge_helper.allows("br0")


def test_a_list_that_cannot_be_read_is_no_verdict(helper: Path, rights: None) -> None:
    (helper.parent / "bridge.conf").mkdir()
    assert bridge_helper.allows("br0") is None
    assert bridge_helper.obstacle("br0") is None  # the helper, who may read it, is to say
