"""What may be bridged to, by vmnet's own list, and QEMU's words for what may not."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from openvmnet.contract.interface import LinkRequest
from openvmnet.engine.darwin import bridged
from openvmnet.engine.darwin.interface import open_link
from openvmnet.engine.darwin.patience import Late
from openvmnet.errors import OptionError
from openvmnet.netdev import Bridged, Shared
from tests.engine.darwin.macs import FakeMac

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls


def test_the_interfaces_that_may_be_bridged_to(
    framework: Framework, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bridged.shared_interfaces(framework) == ["en0", "en1"]
    controls.set("no_interfaces", 1)
    assert bridged.shared_interfaces(framework) == []
    controls.set("no_interfaces", 0)
    monkeypatch.setattr("openvmnet.engine.darwin.patience.ASK", 0.1)
    controls.set("hang_list", 1)
    with pytest.raises(Late):
        bridged.shared_interfaces(framework)


def test_another_name_is_refused_before_a_start(framework: Framework, controls: Controls) -> None:
    bridged.refuse(Bridged(ifname="en1"), framework)
    bridged.refuse(Shared(), framework)
    starts = controls.count("vmnet_start_interface")
    with pytest.raises(OptionError) as caught:
        open_link(LinkRequest(Bridged(ifname="en9"), uuid.uuid4()), framework)
    assert caught.value.message == "unsupported ifname 'en9', expected one of [ en0 en1 ]"
    assert caught.value.hint == "vmnet interfaces"
    assert controls.count("vmnet_start_interface") == starts


def test_where_vmnet_names_none_rights_come_first(framework: Framework, controls: Controls) -> None:
    controls.set("no_interfaces", 1)
    with pytest.raises(OptionError, match="unsupported ifname 'en0', no supported interfaces available"):
        bridged.refuse(Bridged(ifname="en0"), framework, FakeMac(root=True))
    bridged.refuse(Bridged(ifname="en0"), framework, FakeMac((26, 0)))  # the start will say why
