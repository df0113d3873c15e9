"""probe_bridged: each finding from a host that has the thing, and from one that lacks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from openvmnet.engine.linux import bridge_helper, interfaces, probe, probe_bridged
from openvmnet.engine.linux.bridge_helper import Obstacle
from openvmnet.kernel import linkinfo
from openvmnet.kernel.linkinfo import LinkInfo

if TYPE_CHECKING:
    from pathlib import Path

BR0 = LinkInfo(3, "br0", "bridge", 1, 1, 1500, "02:00:00:00:00:03", True, 0, 0, "", 0.0)


@pytest.fixture
def plain_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "capabilities", lambda: 0)


@pytest.mark.usefixtures("plain_user")
def test_the_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_helper, "rights", lambda: Obstacle("it is not setuid", "sudo chmod u+s it"))
    finding = probe_bridged.helper()
    assert (finding.state, finding.detail, finding.remedy) == ("optional", "it is not setuid", "sudo chmod u+s it")
    monkeypatch.setattr(bridge_helper, "rights", lambda: None)
    assert (probe_bridged.helper().state, probe_bridged.helper().remedy) == ("found", None)


@pytest.mark.usefixtures("plain_user")
def test_the_access_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "bridge.conf"
    monkeypatch.setattr(bridge_helper, "ACLS", (str(file),))
    monkeypatch.setattr(linkinfo, "links", lambda: [BR0._replace(kind="")])
    assert (probe_bridged.access_list().detail, probe_bridged.access_list().remedy) == ("this host has no bridge", None)
    monkeypatch.setattr(linkinfo, "links", lambda: [BR0, BR0._replace(name="br1")])
    finding = probe_bridged.access_list()
    assert (finding.state, finding.detail) == ("optional", f"{file} allows none of br0, br1")
    assert finding.remedy == f"sudo mkdir -p {tmp_path} && echo 'allow br0' | sudo tee -a {file}"
    file.write_text("allow br1\n")
    assert (probe_bridged.access_list().state, probe_bridged.access_list().detail) == ("found", f"{file} allows br1")
    file.unlink()
    file.mkdir()
    assert probe_bridged.access_list().state == "found"


def test_with_the_capability_neither_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "capabilities", lambda: 1 << 12)
    for finding in (probe_bridged.helper(), probe_bridged.access_list()):
        assert (finding.state, finding.remedy) == ("found", None)
        assert finding.detail.startswith("not needed: ")


@pytest.mark.kernel
def test_a_macvtap_is_tried_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    with probe.sandbox() as inside:
        before = inside.request("links").values["links"]
        finding = probe_bridged.macvtap(inside)
        assert finding.state in ("found", "optional")
        assert (finding.state == "optional") == ("CONFIG_MACVTAP" in finding.detail)
        assert inside.request("links").values["links"] == before
        monkeypatch.setattr(probe_bridged, "_TRY", "link add link lo name probe1 type nonsense\n")
        refused = probe_bridged.macvtap(inside)
    assert (refused.state, refused.remedy) == ("optional", "sudo modprobe macvtap")
    assert "CONFIG_MACVTAP" in refused.detail
