"""QEMU's option text and JSON, taken apart and put together.

As text an option is a list of `key=value`, parted by commas, where a comma that belongs to a value is doubled, the
first item without `=` is the type, and a bare key is a boolean (`key` is on, `nokey` off; deprecated since QEMU 6.0,
still taken). As JSON it is an object with typed members, whose strings QEMU also takes in single quotes.
"""

from __future__ import annotations

import re

import msgspec

from openvmnet.errors import OptionError

Items = list[tuple[str | None, str | None]]
"""Items of an option text in order: (key, value); (None, value) is the implied first key, (key, None) a bare key."""

_SINGLE_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)


def split(text: str) -> Items:
    """Take QEMU's option text apart; any text gives a list, and `join` gives an equivalent text back."""
    items: Items = []
    at = 0
    while at < len(text):
        stop = next((i for i in range(at, len(text)) if text[i] in "=,"), len(text))
        if text[stop : stop + 1] == "=":
            value, after = _value(text, stop + 1)
            items.append((text[at:stop], value))
        elif not items:
            value, after = _value(text, at)
            items.append((None, value))
        else:
            items.append((text[at:stop], None))
            after = stop + 1
        at = after
    return items


def join(items: Items) -> str:
    """Write items as QEMU's option text, commas of values doubled."""
    texts = [
        (key or "") if value is None else (escape(value) if key is None else f"{key}={escape(value)}")
        for key, value in items
    ]
    # An empty last item needs a comma after it to be one.
    return ",".join(texts) + ("," if texts and not texts[-1] else "")


def escape(value: str) -> str:
    """Double the commas of a value."""
    return value.replace(",", ",,")


def lookup(items: Items, key: str) -> str | None:
    """The value of `key` as QEMU finds it: the last one (of `id` the first); a bare key has the value `on`."""
    found = [("on" if value is None else value) for name, value in items if name == key]
    if not found:
        return None
    return found[0] if key == "id" else found[-1]


def backend(items: Items) -> str | None:
    """The `type` of a netdev's items: given by name, or implied by a first item without a name."""
    named = lookup(items, "type")
    if named is not None:
        return named
    return items[0][1] if items and items[0][0] is None else None


def load_json(text: str) -> dict[str, object]:
    """Decode the JSON form's object; QEMU's single-quoted strings are taken too. Raises OptionError."""
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.DecodeError:
        try:
            return msgspec.json.decode(_SINGLE_QUOTED.sub(_requote, text), type=dict[str, object])
        except msgspec.DecodeError as error:
            message = str(error)
    raise OptionError(f"JSON parse error, {message.removeprefix('JSON is malformed: ')}", option="netdev", value=text)


def _value(text: str, at: int) -> tuple[str, int]:
    """The value that begins at `at` and where the next item begins."""
    out = []
    while at < len(text):
        comma = text.find(",", at)
        if comma < 0:
            out.append(text[at:])
            return "".join(out), len(text)
        out.append(text[at:comma])
        if text[comma + 1 : comma + 2] != ",":
            return "".join(out), comma + 1
        out.append(",")
        at = comma + 2
    return "".join(out), at


def _requote(match: re.Match[str]) -> str:
    inner = match.group(1)
    if inner is None:
        return match.group(0)
    return '"' + inner.replace("\\'", "'").replace('"', '\\"') + '"'
