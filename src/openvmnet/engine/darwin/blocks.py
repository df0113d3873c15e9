"""Blocks: C's closures, as the system's calls take them, with a Python function inside.

How it works. A block is a structure whose fourth field is the function that is called, with the block itself as its
first argument. One without captured variables is a *global* block: the system neither copies nor frees it. It looks at
it, though, whenever it copies or releases a reference, and the last of these comes after the call of the function, at
no time that anybody could know. So a block is never freed: when it is done with, which for an interface's is after the
stop was answered, it goes back to the framework's spare ones, and serves another time.

    literal      isa 0 (address of _NSConcreteGlobalBlock), flags 8, reserved 12, invoke 16, descriptor 24
    descriptor   reserved 0, size 8 (of the literal), signature 16

The function is called on a thread of the system's. Nothing may leave it as an exception, and it should do next to
nothing: wake whoever does the work.
"""

from __future__ import annotations

import ctypes
import logging
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework

_LOG = logging.getLogger(__name__)

_IS_GLOBAL = 1 << 28
_HAS_SIGNATURE = 1 << 30


class _Descriptor(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ulong), ("size", ctypes.c_ulong), ("signature", ctypes.c_char_p))


class _Literal(ctypes.Structure):
    _fields_ = (
        ("isa", ctypes.c_void_p),
        ("flags", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("invoke", ctypes.c_void_p),
        ("descriptor", ctypes.c_void_p),
    )


_u32, _object, _text = ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p


class Kind(Enum):
    """A block's type: its signature in Objective-C's encoding, its result and its visible arguments."""

    NEWS = ("v@?I@", None, (_u32, _object))
    """Start's handler: status, xpc dictionary of parameters or NULL; the event callback: mask, xpc dictionary."""
    COMPLETION = ("v@?I", None, (_u32,))
    """Stop's and a port forwarding rule's handler: status."""
    RULES = ("v@?@", None, (_object,))
    """The handler of a list of rules: xpc array or NULL."""
    APPLY = ("B@?r*@", ctypes.c_bool, (_text, _object))
    """What xpc_dictionary_apply calls for each entry: key, value; true goes on."""


class Block:
    """A global block that calls a Python function; `pointer` is its address, valid for ever."""

    __slots__ = ("_descriptor", "_framework", "_function", "_invoke", "_kind", "_literal", "pointer")

    def __init__(self, framework: Framework, kind: Kind) -> None:
        self._framework, self._kind = framework, kind
        self._function: Callable[..., Any] = _nothing
        signature, result, arguments = kind.value
        otherwise = None if result is None else result().value

        def invoke(_block: int, *given: object) -> Any:  # noqa: ANN401 - the kind's result
            try:
                return self._function(*given)
            except Exception:  # noqa: BLE001 - ctypes would print it and go on, whatever it is
                _LOG.exception("a callback of vmnet.framework failed")
                return otherwise

        prototype = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)
        self._invoke = prototype(invoke)
        self._descriptor = _Descriptor(0, ctypes.sizeof(_Literal), signature.encode())
        self._literal = _Literal(
            framework.system.address("_NSConcreteGlobalBlock"),
            _IS_GLOBAL | _HAS_SIGNATURE,
            0,
            ctypes.cast(self._invoke, ctypes.c_void_p).value,
            ctypes.addressof(self._descriptor),
        )
        self.pointer = ctypes.addressof(self._literal)

    @classmethod
    def take(cls, framework: Framework, kind: Kind, function: Callable[..., Any]) -> Block:
        """A block that calls `function` until it is given back."""
        try:
            block = framework.spare_blocks[kind].pop()
        except (KeyError, IndexError):
            block = cls(framework, kind)
        block._function = function
        return block

    def give_back(self) -> None:
        """The system calls it no more, though it may still look at it."""
        self._function = _nothing
        self._framework.spare_blocks.setdefault(self._kind, []).append(self)


def _nothing(*_: object) -> None:
    """What a block calls that is given back."""
