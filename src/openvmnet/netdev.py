"""The options of `-netdev vmnet-shared`, in QEMU's names, syntax and words.

How it works. QEMU takes a netdev in two forms. As text it is a list of `key=value`, parted by commas, where a comma
that belongs to a value is doubled, the first item without `=` is the type, and a bare key is a boolean (`key` is on,
`nokey` off; deprecated since QEMU 6.0, still taken). As JSON it is an object with typed members. Both end in the
same struct, `Shared`, whose strings stay as typed; `format` writes the text form back.

QEMU itself looks at no value beyond its type: a wrong address comes back from the host's framework as "general
failure". Here each value is validated where it is read, and the sentence names the option, the value and what would
be right. Where QEMU has a message for the case, the sentence begins with QEMU's words (tried with 7.2):
an unknown key is `Invalid parameter` in text and `Parameter ... is unexpected` in JSON; the first `id` counts, of any
other key the last.

The three address options become a `Subnet`: the first address is the gateway, the addresses after it up to the last
are the DHCP pool, and any other address of the subnet is free for static use. Without them a network takes one of
`candidates`, the 64 networks of 24 bits that macOS chooses from in shared mode.
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network, NetmaskValueError
from typing import TYPE_CHECKING, NoReturn

import msgspec

from openvmnet.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Items = list[tuple[str | None, str | None]]
"""Items of an option text in order: (key, value); (None, value) is the implied first key, (key, None) a bare key."""

_TYPES_OF_LATER = ("vmnet-host", "vmnet-bridged")
_TEXTS = {
    "start-address": "start_address",
    "end-address": "end_address",
    "subnet-mask": "subnet_mask",
    "nat66-prefix": "nat66_prefix",
}
_TRIPLE = ("start-address", "end-address", "subnet-mask")
_TRUTH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_PRIVATE = (IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16"))
_UNIQUE_LOCAL = IPv6Network("fd00::/8")
_SINGLE_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"|\'((?:[^\'\\]|\\.)*)\'', re.DOTALL)
_DEFAULT_THIRD = range(64, 128)


class Subnet(msgspec.Struct, frozen=True):
    """Addresses of a network: the gateway, the DHCP pool from `first` to `last` (both in it), and the mask's length.

    The pool directly follows the gateway. Built by `from_options` or `candidates`, which validate.
    """

    gateway: IPv4Address
    first: IPv4Address
    last: IPv4Address
    prefixlen: int

    @property
    def network(self) -> IPv4Network:
        """The subnet itself, host bits cleared."""
        return IPv4Network((int(self.gateway), self.prefixlen), strict=False)

    @property
    def mask(self) -> IPv4Address:
        """The subnet mask."""
        return self.network.netmask

    def overlaps(self, other: Subnet | IPv4Network) -> bool:
        """Whether any address lies in both."""
        return self.network.overlaps(other.network if isinstance(other, Subnet) else other)

    @classmethod
    def from_options(cls, start: str | None, end: str | None, mask: str | None) -> Subnet | None:
        """The subnet that `start-address`, `end-address` and `subnet-mask` mean, or None if none of them is given.

        Raises OptionError unless all three are given and name a gateway and a pool inside one private subnet.
        """
        given = dict(zip(_TRIPLE, (start, end, mask), strict=True))
        if start is None and end is None and mask is None:
            return None
        if start is None or end is None or mask is None:
            absent = [name for name, value in given.items() if value is None]
            raise OptionError(
                f"'start-address', 'end-address', 'subnet-mask' should be provided together: "
                f"{_join([repr(name) for name in absent])} {'is' if len(absent) == 1 else 'are'} missing",
                option=absent[0],
                value="",
            )
        first, last = _address("start-address", start), _address("end-address", end)
        length = _prefixlen(mask)
        subnet = IPv4Network((int(first), length), strict=False)
        if not _private(subnet):
            need = next(net.prefixlen for net in _PRIVATE if first in net)
            _wrong(
                "subnet-mask",
                mask,
                f"a mask of /{need} to /30 with start-address {first}, or the subnet leaves RFC 1918",
            )
        if last not in subnet:
            _wrong("end-address", end, f"an address of {subnet}, the subnet of start-address {first}")
        _host("start-address", first, subnet)
        _host("end-address", last, subnet)
        if last <= first:
            _wrong("end-address", end, f"an address after start-address {first}")
        return cls(first, first + 1, last, length)


class Shared(msgspec.Struct, frozen=True):
    """Options of one `vmnet-shared`, strings as typed; `id` is None only where QEMU lets it be (`-nic`, `-net`)."""

    id: str | None
    start_address: str | None = None
    end_address: str | None = None
    subnet_mask: str | None = None
    isolated: bool = False
    nat66_prefix: str | None = None

    @property
    def subnet(self) -> Subnet | None:
        """The addresses asked for, or None: the network chooses."""
        return Subnet.from_options(self.start_address, self.end_address, self.subnet_mask)

    def format(self) -> str:
        """The text form: `parse(x.format()) == x`."""
        items: Items = [(None, "vmnet-shared")]
        if self.id is not None:
            items.append(("id", self.id))
        for name, field in _TEXTS.items():
            if (value := getattr(self, field)) is not None:
                items.append((name, value))
        if self.isolated:
            items.append(("isolated", "on"))
        return join(items)

    def refuse_unserved(self) -> None:
        """Raise OptionError for what is well-formed but not served by this version: IPv6."""
        if self.nat66_prefix is not None:
            raise OptionError(
                f"'nat66-prefix' is not available yet: this version serves IPv4 only, "
                f"so leave out nat66-prefix={self.nat66_prefix}",
                option="nat66-prefix",
                value=self.nat66_prefix,
            )


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


def parse(text: str) -> Shared:
    """Read the argument of `-netdev`, text or JSON. Raises OptionError for anything but a valid vmnet-shared."""
    return from_json(text) if text.startswith("{") else from_items(split(text), need_id=True)


def from_items(items: Items, *, need_id: bool) -> Shared:
    """Read a taken-apart text form. `need_id` is what tells `-netdev` from `-nic` and `-net`."""
    _check_type(backend(items))
    values: dict[str, str] = {}
    isolated = False
    seen_id: str | None = None
    for key, value in items:
        if key is None or key == "type":
            continue
        if value is None and key.startswith("no") and key[2:] == "isolated":
            isolated = False
        elif key == "isolated":
            isolated = _truth("on" if value is None else value)
        elif key == "id":
            seen_id = seen_id if seen_id is not None else ("on" if value is None else value)
        elif key in _TEXTS:
            values[key] = "on" if value is None else value
        else:
            raise OptionError(f"Invalid parameter '{key}'", option=key, value=value or "", hint=_known())
    return _build(seen_id, values, isolated, need_id=need_id)


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


def from_json(text: str) -> Shared:
    """Read the JSON form. Raises OptionError."""
    members = load_json(text)
    values: dict[str, str] = {}
    _check_type(_string(members, "type"))
    for key, value in members.items():
        if key in _TEXTS:
            values[key] = _string(members, key) or ""
        elif key == "isolated" and not isinstance(value, bool):
            raise OptionError(
                "Invalid parameter type for 'isolated', expected: boolean", option="isolated", value=str(value)
            )
        elif key not in ("type", "id", "isolated"):
            raise OptionError(f"Parameter '{key}' is unexpected", option=key, value=str(value), hint=_known())
    return _build(_string(members, "id"), values, members.get("isolated") is True, need_id=True)


def candidates() -> Iterator[Subnet]:
    """The subnets a network without addresses may take, in order: 192.168.64.0/24 to 192.168.127.0/24."""
    for third in _DEFAULT_THIRD:
        base = IPv4Address(f"192.168.{third}.0")
        yield Subnet(base + 1, base + 2, base + 254, 24)


def stable_mac(identity: str, index: int, attempt: int = 0) -> str:
    """A MAC for the `index`th NIC of the VM that `identity` (its name or disk) tells apart: always the same one.

    QEMU's own prefix 52:54:00 (locally administered), then 24 bits of a hash. Of n VMs on one network two meet with
    a probability of about n^2 / 2^25; whoever sees that happen asks for the next `attempt`.
    """
    import hashlib

    digest = hashlib.sha256(f"{identity}\0{index}\0{attempt}".encode("utf-8", "surrogateescape")).digest()
    return "52:54:00:" + digest[:3].hex(":")


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


def _build(id_: str | None, values: Mapping[str, str], isolated: bool, *, need_id: bool) -> Shared:
    if id_ is None and need_id:
        raise OptionError(
            "Parameter 'id' is missing: give the netdev a name, as in vmnet-shared,id=net0", option="id", value=""
        )
    if id_ is not None and not _IDENTIFIER.fullmatch(id_):
        raise OptionError(
            "Parameter 'id' expects an identifier (letters, digits, '-', '.', '_', starting with a letter), "
            f"not '{id_}'",
            option="id",
            value=id_,
        )
    shared = Shared(id_, isolated=isolated, **{_TEXTS[name]: value for name, value in values.items()})
    _ = shared.subnet
    if shared.nat66_prefix is not None:
        _nat66(shared.nat66_prefix)
    return shared


def _check_type(kind: str | None) -> None:
    if kind == "vmnet-shared":
        return
    if kind is None:
        raise OptionError("Parameter 'type' is missing", option="type", value="")
    only = ": this version has vmnet-shared only" if kind in _TYPES_OF_LATER else ", only vmnet-shared"
    raise OptionError(f"Parameter 'type' does not accept value '{kind}'{only}", option="type", value=kind)


def _string(members: Mapping[str, object], key: str) -> str | None:
    value = members.get(key)
    if key in members and not isinstance(value, str):
        raise OptionError(f"Invalid parameter type for '{key}', expected: string", option=key, value=str(value))
    return value if isinstance(value, str) else None


def _requote(match: re.Match[str]) -> str:
    inner = match.group(1)
    if inner is None:
        return match.group(0)
    return '"' + inner.replace("\\'", "'").replace('"', '\\"') + '"'


def _truth(value: str) -> bool:
    if value not in _TRUTH:
        raise OptionError(f"Parameter 'isolated' expects 'on' or 'off', not '{value}'", option="isolated", value=value)
    return _TRUTH[value]


def _address(option: str, value: str) -> IPv4Address:
    try:
        address = IPv4Address(value)
    except AddressValueError:
        _wrong(option, value, "an IPv4 address such as 192.168.64.1")
    if not any(address in net for net in _PRIVATE):
        _wrong(option, value, "a private address of RFC 1918 (in 10.0.0.0/8, 172.16.0.0/12 or 192.168.0.0/16)")
    return address


def _prefixlen(value: str) -> int:
    # IPv4Network also takes a bare length and a host mask (0.0.0.255); subnet-mask is a dotted mask and nothing else.
    try:
        bits = int(IPv4Address(value))
        length = IPv4Network((0, value)).prefixlen
    except (AddressValueError, NetmaskValueError):
        bits, length = 0, 0
    if not 8 <= length <= 30 or bits >> 31 == 0:
        _wrong("subnet-mask", value, "a contiguous mask from 255.0.0.0 (/8) to 255.255.255.252 (/30)")
    return length


def _private(subnet: IPv4Network) -> bool:
    return any(subnet.subnet_of(net) for net in _PRIVATE)


def _host(option: str, address: IPv4Address, subnet: IPv4Network) -> None:
    for special, what in ((subnet.network_address, "network"), (subnet.broadcast_address, "broadcast")):
        if address == special:
            first, last = subnet.network_address + 1, subnet.broadcast_address - 1
            _wrong(option, str(address), f"a host's address of {subnet} ({first} to {last})", f"the {what} address ")


def _nat66(value: str) -> None:
    text, _, length = value.partition("/")
    try:
        prefix = IPv6Address(text)
    except AddressValueError:
        prefix = None
    right = prefix is not None and prefix in _UNIQUE_LOCAL and int(prefix) & ((1 << 64) - 1) == 0 and "%" not in text
    if not right or (length != "64" and "/" in value):
        _wrong("nat66-prefix", value, "a unique local IPv6 prefix (fd00::/8) of 64 bits such as fd12:3456:789a:1::")


def _wrong(option: str, value: str, right: str, what: str = "") -> NoReturn:
    raise OptionError(f"Parameter '{option}' expects {right}, not {what}'{value}'", option=option, value=value)


def _known() -> str:
    return "vmnet-shared takes id, start-address, end-address, subnet-mask, isolated, nat66-prefix"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
