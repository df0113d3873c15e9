"""XPC dictionaries and arrays from Python values, and back: by type, never by key.

    uint64  int          string  str
    bool    bool         uuid    uuid.UUID
    array   list         dictionary  dict

What a handler is given is valid inside the handler only, so that `read` copies.
"""

from __future__ import annotations

import contextlib
import ctypes
import uuid
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import symbols
from openvmnet.engine.darwin.blocks import Block, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from openvmnet.engine.darwin.framework import Framework

Scalar = int | bool | str | uuid.UUID
Value = Scalar | list["Value"] | dict[str, "Value"] | None
"""None is a value of a type that is none of the above."""


@contextlib.contextmanager
def dictionary(framework: Framework, values: Mapping[str, Scalar]) -> Iterator[int]:
    """An XPC dictionary with the given entries, keyed by the names of `symbols.KEYS`; released at the end.

    Raises MissingFeature for a key that this macOS does not have.
    """
    entries = [(framework.key(name), value) for name, value in values.items()]
    made = int(framework.system_call("xpc_dictionary_create", None, None, 0))
    try:
        for key, value in entries:
            _set(framework, made, key, value)
        yield made
    finally:
        framework.system_call("xpc_release", made)


def _set(framework: Framework, made: int, key: bytes, value: Scalar) -> None:
    if isinstance(value, bool):
        framework.system_call("xpc_dictionary_set_bool", made, key, value)
    elif isinstance(value, int):
        framework.system_call("xpc_dictionary_set_uint64", made, key, value)
    elif isinstance(value, str):
        framework.system_call("xpc_dictionary_set_string", made, key, value.encode())
    else:
        framework.system_call("xpc_dictionary_set_uuid", made, key, value.bytes)


def read(framework: Framework, item: int | None) -> Value:
    """An XPC object's value, copied; None for NULL."""
    if not item:
        return None
    kind = _kind(framework, item)
    if kind == "dictionary":
        return _read_dictionary(framework, item)
    if kind == "array":
        count = framework.system_call("xpc_array_get_count", item)
        return [read(framework, framework.system_call("xpc_array_get_value", item, at)) for at in range(count)]
    if kind == "string":
        got = framework.system_call("xpc_string_get_string_ptr", item)
        return None if got is None else str(got, "utf-8", "replace")
    if kind == "uuid":
        return uuid.UUID(bytes=ctypes.string_at(framework.system_call("xpc_uuid_get_bytes", item), 16))
    if kind in ("uint64", "int64"):
        return int(framework.system_call(f"xpc_{kind}_get_value", item))
    return bool(framework.system_call("xpc_bool_get_value", item)) if kind == "bool" else None


def read_dictionary(framework: Framework, item: int | None) -> dict[str, Value]:
    """A dictionary's entries; none for NULL or for an object of another type."""
    value = read(framework, item)
    return value if isinstance(value, dict) else {}


def _kind(framework: Framework, item: int) -> str | None:
    found = framework.system_call("xpc_get_type", item)
    return next((kind for kind in symbols.XPC_TYPES if framework.system.address(f"_xpc_type_{kind}") == found), None)


def _read_dictionary(framework: Framework, item: int) -> dict[str, Value]:
    entries: dict[str, Value] = {}

    def each(key: bytes, value: int) -> bool:
        entries[str(key, "utf-8", "replace")] = read(framework, value)
        return True

    block = Block.take(framework, Kind.APPLY, each)
    framework.system_call("xpc_dictionary_apply", item, block.pointer)
    block.give_back()
    return entries
