"""Dynamic libraries whose symbols are looked up one by one.

A symbol that is not there is `MissingFeature`, which says with which macOS it came. No function is called without its
argument and result types: on 64 bits ctypes would cut a pointer to an int.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

from openvmnet.errors import MissingFeature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openvmnet.engine.darwin.symbols import Function


class Library:
    """One library, loaded from `path` (None: what the process has already), with the functions of one table."""

    def __init__(self, path: str | None, functions: Mapping[str, Function], *, errno: bool = False) -> None:
        try:
            self._library = ctypes.CDLL(path, use_errno=errno)
        except OSError as error:
            raise MissingFeature(f"{path} cannot be loaded: {error}") from error
        self._functions = functions
        self._found: dict[str, Callable[..., Any]] = {}

    def has(self, symbol: str) -> bool:
        """Whether this macOS exports `symbol`, a function or data."""
        try:
            self._library[symbol]
        except AttributeError:
            return False
        return True

    def function(self, name: str) -> Callable[..., Any]:
        """The function of that name, typed by the table. Raises MissingFeature."""
        found = self._found.get(name)
        if found is None:
            row = self._functions[name]
            try:
                made = self._library[name]
            except AttributeError:
                raise missing(name, row.since) from None
            made.restype, made.argtypes = row.result, row.arguments
            found = self._found[name] = made
        return found

    def address(self, symbol: str) -> int:
        """Where a data symbol lies. Raises MissingFeature."""
        try:
            return ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol))
        except ValueError:
            raise MissingFeature(f"this macOS has no {symbol}") from None

    def text(self, symbol: str, since: str) -> bytes:
        """What a data symbol `const char *` points to. Raises MissingFeature."""
        try:
            value = ctypes.c_char_p.in_dll(self._library, symbol).value
        except ValueError:
            raise missing(symbol, since) from None
        if value is None:
            raise missing(symbol, since)
        return value


def missing(symbol: str, since: str) -> MissingFeature:
    """A symbol's absence as an error."""
    return MissingFeature(f"this macOS has no {symbol}: it came with macOS {since}")


@functools.cache
def system_version() -> tuple[int, ...]:
    """The macOS version as this program is told; see `mac.Mac.version`. () where there is none."""
    import platform

    return version_of(platform.mac_ver()[0])


def version_of(text: str) -> tuple[int, ...]:
    """(26, 1) of "26.1"."""
    return tuple(int(part) for part in text.strip().split(".") if part.isdigit())
