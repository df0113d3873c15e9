"""Blocks as the system takes them, and XPC values there and back."""

from __future__ import annotations

import ctypes
import logging
import threading
import uuid
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openvmnet.engine.darwin import symbols, xpc
from openvmnet.engine.darwin.blocks import Block, Kind, _Descriptor, _Literal
from openvmnet.errors import MissingFeature

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework
    from tests.engine.darwin.conftest import Controls


def call(block: Block, kind: Kind, *values: object) -> object:
    """Call a block as C does."""
    _, result, arguments = kind.value
    literal = _Literal.from_address(block.pointer)
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)(literal.invoke)(block.pointer, *values)


@pytest.mark.parametrize("kind", Kind)
def test_literal_is_a_global_block_with_a_signature(framework: Framework, kind: Kind) -> None:
    block = Block(framework, kind)
    literal = _Literal.from_address(block.pointer)
    descriptor = _Descriptor.from_address(literal.descriptor)
    assert literal.isa == framework.system.address("_NSConcreteGlobalBlock")
    assert literal.flags == 0x50000000
    assert (literal.reserved, descriptor.reserved, descriptor.size) == (0, 0, 32)
    assert descriptor.signature == kind.value[0].encode()


def test_the_system_copies_and_releases_it_without_effect(framework: Framework, controls: Controls) -> None:
    copy, release = controls.library._Block_copy, controls.library._Block_release
    copy.restype, copy.argtypes, release.argtypes = ctypes.c_void_p, (ctypes.c_void_p,), (ctypes.c_void_p,)
    block = Block(framework, Kind.COMPLETION)
    assert copy(block.pointer) == block.pointer
    release(block.pointer)
    release(block.pointer)


def test_it_runs_on_a_thread_of_the_systems(framework: Framework, controls: Controls) -> None:
    ran: list[int] = []
    done = threading.Event()

    def work(*_: object) -> None:
        ran.append(threading.get_ident())
        done.set()

    queue = framework.system_call("dispatch_queue_create", b"test", None)
    block = Block.take(framework, Kind.COMPLETION, work)
    controls.library.dispatch_async(ctypes.c_void_p(queue), ctypes.c_void_p(block.pointer))
    assert done.wait(5)
    assert ran[0] != threading.get_ident()
    framework.system_call("dispatch_release", queue)


def test_what_is_given_back_serves_again_and_calls_nobody_meanwhile(framework: Framework) -> None:
    got: list[int] = []
    block = Block.take(framework, Kind.COMPLETION, got.append)
    call(block, Kind.COMPLETION, 1)
    block.give_back()
    call(block, Kind.COMPLETION, 2)
    again = Block.take(framework, Kind.COMPLETION, got.append)
    assert again is block
    call(again, Kind.COMPLETION, 3)
    assert got == [1, 3]
    again.give_back()


def test_an_exception_does_not_leave_it(framework: Framework, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)

    def fail(*_: object) -> bool:
        raise ZeroDivisionError

    assert call(Block.take(framework, Kind.APPLY, fail), Kind.APPLY, b"key", None) is False
    assert "ZeroDivisionError" in caplog.text


VALUES = {
    "uint64": st.integers(0, 2**64 - 1),
    "bool": st.booleans(),
    "string": st.text(st.characters(exclude_characters="\0", codec="utf-8")),
    "uuid": st.uuids(),
}


@given(st.fixed_dictionaries({}, optional={key.name: VALUES[key.kind] for key in symbols.KEYS.values()}))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_dictionary_comes_back_as_it_was(framework: Framework, values: dict[str, xpc.Scalar]) -> None:
    with xpc.dictionary(framework, values) as made:
        found = xpc.read_dictionary(framework, made)
    assert found == values
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in values.items()}


def test_nothing_arrays_and_numbers_with_a_sign_are_read(framework: Framework, controls: Controls) -> None:
    library = controls.library
    for name in ("xpc_array_create", "xpc_int64_create", "xpc_string_create"):
        getattr(library, name).restype = ctypes.c_void_p
    items = [library.xpc_int64_create(ctypes.c_int64(-5)), library.xpc_string_create(b"en0")]
    array = library.xpc_array_create((ctypes.c_void_p * 2)(*items), ctypes.c_size_t(2))
    assert xpc.read(framework, array) == [-5, "en0"]
    assert xpc.read_dictionary(framework, array) == {}
    assert xpc.read(framework, None) is None
    for each in (*items, array):
        framework.system_call("xpc_release", each)


def test_a_failed_dictionary_leaves_nothing(macos: Callable[[int], tuple[Controls, Framework]]) -> None:
    _, older = macos(1015)
    values = {"vmnet_mtu": 1500, "vmnet_network_identifier": uuid.uuid4()}
    with pytest.raises(MissingFeature, match=r"macOS 11\.0"), xpc.dictionary(older, values):
        pass
