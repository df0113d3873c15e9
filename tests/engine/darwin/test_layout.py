"""Structures, symbols, keys and values against the table of the SDKs' headers."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import pytest

from openvmnet import engine
from openvmnet.engine.darwin import symbols
from openvmnet.engine.darwin.blocks import _Descriptor, _Literal
from openvmnet.engine.darwin.framework import Framework, Iovec, Mode, MsghdrX, Vmpktdesc
from openvmnet.errors import MissingFeature
from openvmnet.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.engine.darwin.conftest import Controls

LAYOUTS = {
    Vmpktdesc: (24, {"size": (0, 8), "iov": (8, 8), "iovcnt": (16, 4), "flags": (20, 4)}),
    Iovec: (16, {"base": (0, 8), "len": (8, 8)}),
    MsghdrX: (
        56,
        {
            "name": (0, 8),
            "namelen": (8, 4),
            "iov": (16, 8),
            "iovlen": (24, 4),
            "control": (32, 8),
            "controllen": (40, 4),
            "flags": (44, 4),
            "datalen": (48, 8),
        },
    ),
    _Literal: (32, {"isa": (0, 8), "flags": (8, 4), "reserved": (12, 4), "invoke": (16, 8), "descriptor": (24, 8)}),
    _Descriptor: (24, {"reserved": (0, 8), "size": (8, 8), "signature": (16, 8)}),
    symbols.InAddr: (4, {"octets": (0, 4)}),
}
ADDED_SINCE_11 = {"vmnet_network_identifier", "vmnet_host_ip_address", "vmnet_enable_tso", "vmnet_enable_isolation"}


@pytest.mark.parametrize("structure", LAYOUTS, ids=lambda structure: structure.__name__)
def test_structure_has_its_size_and_offsets(structure: type[ctypes.Structure]) -> None:
    size, fields = LAYOUTS[structure]
    assert ctypes.sizeof(structure) == size
    found = {name: getattr(structure, name) for name, *_ in structure._fields_}
    assert {name: (field.offset, field.size) for name, field in found.items()} == fields


def test_modes_and_statuses_have_their_numbers() -> None:
    assert (Mode.HOST, Mode.SHARED, Mode.BRIDGED) == (1000, 1001, 1002)
    assert [int(status) for status in Status] == list(range(1000, 1011))


def test_every_function_is_there_and_typed(framework: Framework) -> None:
    assert len(symbols.VMNET) == 32
    for library in (framework.vmnet, framework.system, framework.foundation):
        for name, row in library._functions.items():
            function = library.function(name)
            assert function.restype is row.result, name
            assert tuple(function.argtypes) == row.arguments, name


def test_every_key_says_its_own_name(framework: Framework) -> None:
    assert len(symbols.KEYS) == 23
    for name, key in symbols.KEYS.items():
        assert key.symbol == f"{name}_key"
        assert framework.key(name) == name.encode()
        assert framework.has(name)


@pytest.mark.parametrize(
    ("version", "missing", "there"),
    [
        (1015, ADDED_SINCE_11 | {"vmnet_enable_checksum_offload", "vmnet_network_create"}, {"vmnet_mtu", "vmnet_read"}),
        (1100, {"vmnet_enable_checksum_offload", "vmnet_read_max_packets"}, ADDED_SINCE_11),
        (1200, {"vmnet_read_max_packets", "vmnet_enable_virtio_header"}, {"vmnet_enable_checksum_offload"}),
        (1500, {"vmnet_enable_virtio_header", "vmnet_network_create"}, {"vmnet_write_max_packets"}),
        (1504, {"vmnet_interface_start_with_network"}, {"vmnet_enable_virtio_header"}),
    ],
)
def test_older_macos_says_which_feature_it_lacks(
    macos: Callable[[int], tuple[Controls, Framework]], version: int, missing: set[str], there: set[str]
) -> None:
    _, older = macos(version)
    for name in there:
        assert older.has(name), name
    for name in missing:
        assert not older.has(name), name
        since = symbols.KEYS[name].since if name in symbols.KEYS else symbols.VMNET[name].since
        with pytest.raises(MissingFeature, match=rf"{name}(_key)?: it came with macOS {since}"):
            older.key(name) if name in symbols.KEYS else older.vmnet.function(name)


@pytest.mark.skipif(engine.DARWIN, reason="this is a Mac: its framework is there")
def test_a_library_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(MissingFeature, match="cannot be loaded"):
        Framework("/nowhere/vmnet.so")
    with pytest.raises(MissingFeature, match="vmnet"):
        Framework()  # this is no Mac


def test_without_the_batch_calls_there_are_single_ones(framework: Framework, monkeypatch: pytest.MonkeyPatch) -> None:
    from openvmnet.engine.darwin import datapath, single

    assert framework.batch_calls() is not None
    monkeypatch.setattr(framework.system, "has", lambda symbol: symbol != "sendmsg_x")
    assert datapath.calls(framework) == (single.recvmsg_x, single.sendmsg_x)
