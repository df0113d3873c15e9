"""The options of QEMU's three vmnet backends, in QEMU's names, syntax and words.

How it works. A netdev comes as text or as JSON (see `syntax`). Both end in the same struct, one for each backend, whose
strings stay as typed; `format` writes the text form back. A field is called like its option, with `_` for `-`; a
backend takes the fields of its struct and nothing else.

Each value is validated where it is read, which QEMU does not: a wrong address comes back from the host's framework as
"general failure". Where QEMU has a message for the case, the sentence begins with QEMU's words (tried with 7.2): an
unknown key is `Invalid parameter` in text and `Parameter ... is unexpected` in JSON; the first `id` counts, of any
other key the last.

`mtu` is ours: QEMU leaves a vmnet interface its 1,500. So is `hostfwd`, of which each counts: it is the one of
`-netdev user`, in its syntax and words (see `hostfwd`); and `address`, the one that DHCP gives to this NIC.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, TypeVar

import msgspec

from openvmnet.errors import OptionError
from openvmnet.netdev import hostfwd as rules
from openvmnet.netdev.subnet import Subnet, reservable, unique_local
from openvmnet.netdev.syntax import Items, backend, join, load_json, split

if TYPE_CHECKING:
    from collections.abc import Mapping
    from ipaddress import IPv4Address, IPv6Network

    from openvmnet.netdev.hostfwd import Forward

MTU_LEAST, MTU_MOST = 1280, 65520  # RFC 8200 section 5; what a TAP and a guest's driver take with headers

_TRUTH = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False, "n": False}
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_Value = TypeVar("_Value")


class Netdev(msgspec.Struct, frozen=True):
    """What the three backends have in common; `id` is None only where QEMU lets it be (`-nic`, `-net`).

    `isolated`: the VM reaches the gateway and, where there is one, the outside, but no other VM.
    """

    type: ClassVar[str]

    id: str | None = None
    isolated: bool = False

    def format(self) -> str:
        """The text form: `parse(x.format()) == x`."""
        items: Items = [(None, self.type)]
        for option, field in _fields(type(self)).items():
            value = getattr(self, field)
            if option == "isolated":
                if value:
                    items.append((option, "on"))
            elif option == "hostfwd":
                items += [(option, rule) for rule in value]
            elif value is not None:
                items.append((option, str(value)))
        return join(items)

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        if self.id is not None and not _IDENTIFIER.fullmatch(self.id):
            raise OptionError(
                "Parameter 'id' expects an identifier (letters, digits, '-', '.', '_', starting with a letter), "
                f"not '{self.id}'",
                option="id",
                value=self.id,
            )
        mtu = getattr(self, "mtu", None)
        if mtu is not None and not MTU_LEAST <= mtu <= MTU_MOST:
            raise OptionError(
                f"Parameter 'mtu' expects a number from {MTU_LEAST} to {MTU_MOST}, not '{mtu}'",
                option="mtu",
                value=str(mtu),
            )


class _Publishing(Netdev, frozen=True, kw_only=True):
    """A backend that publishes ports: `hostfwd` has those of the host's, each as in QEMU's `-netdev user`."""

    hostfwd: tuple[str, ...] = ()

    @property
    def forwards(self) -> tuple[Forward, ...]:
        """The published ports. Raises OptionError."""
        return rules.parse_all(self.hostfwd)

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        super().validate()
        _ = self.forwards


class _Addressed(_Publishing, frozen=True):
    """A backend with a subnet of its own: `start_address` is the gateway, the pool follows up to `end_address`."""

    start_address: str | None = None
    end_address: str | None = None
    subnet_mask: str | None = None

    @property
    def subnet(self) -> Subnet | None:
        """The addresses asked for, or None: the network chooses."""
        return Subnet.from_options(self.start_address, self.end_address, self.subnet_mask)

    @property
    def reservation(self) -> IPv4Address | None:
        """The address kept for this NIC (`address`), or None: DHCP chooses one."""
        value: str | None = getattr(self, "address", None)
        return None if value is None else reservable(value, self.subnet)

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        super().validate()
        _ = self.subnet
        _ = self.reservation


class Shared(_Addressed, frozen=True):
    """`vmnet-shared`: the outside through the host, the host, and other VMs; `mtu` in octets, None the network's."""

    type: ClassVar[str] = "vmnet-shared"

    nat66_prefix: str | None = None
    mtu: int | None = None
    address: str | None = None

    @property
    def prefix(self) -> IPv6Network | None:
        """The IPv6 prefix asked for, or None: the network chooses."""
        return None if self.nat66_prefix is None else unique_local(self.nat66_prefix)

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        super().validate()
        _ = self.prefix


class Host(_Addressed, frozen=True):
    """`vmnet-host`: the host and the other VMs, and no way out.

    `net_uuid` names a private network instead: VMs with the same UUID, and the host only where addresses are given.
    """

    type: ClassVar[str] = "vmnet-host"

    net_uuid: str | None = None
    mtu: int | None = None
    address: str | None = None

    @property
    def uuid(self) -> str | None:
        """The private network asked for, in lower case. Raises OptionError for what is no UUID of RFC 9562."""
        if self.net_uuid is None:
            return None
        if not _UUID.fullmatch(self.net_uuid):
            raise OptionError(
                f"Invalid UUID provided in 'net-uuid': it expects 32 hexadecimal digits such as "
                f"a0e6b6f2-9f0e-4f5c-8d8e-2f2a6d4b1c3d, not '{self.net_uuid}'",
                option="net-uuid",
                value=self.net_uuid,
            )
        return self.net_uuid.lower()

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        super().validate()
        if self.uuid is None or self.subnet is not None:
            return
        if self.hostfwd:
            rules.refuse(
                self.hostfwd[0],
                "the host is not on a private network (net-uuid) without start-address, end-address and subnet-mask",
            )
        if self.address is not None:
            raise OptionError(
                f"Parameter 'address' needs DHCP, which a private network ('net-uuid') has only with 'start-address', "
                f"'end-address' and 'subnet-mask', so not '{self.address}'",
                option="address",
                value=self.address,
            )


class Bridged(Netdev, frozen=True):
    """`vmnet-bridged`: the LAN behind `ifname`, a bridge or a wired NIC of this host."""

    type: ClassVar[str] = "vmnet-bridged"
    # What a backend of the LAN's has none of: its ports and addresses are the LAN's.
    hostfwd: ClassVar[tuple[str, ...]] = ()
    forwards: ClassVar[tuple[rules.Forward, ...]] = ()
    address: ClassVar[None] = None
    reservation: ClassVar[None] = None

    ifname: str | None = None

    def validate(self) -> None:
        """Raise OptionError for the first value that is wrong."""
        super().validate()
        if not self.ifname:
            raise OptionError(
                "Parameter 'ifname' is missing: name the bridge or wired NIC, as in vmnet-bridged,id=net0,ifname=eth0",
                option="ifname",
                value="",
                hint="vmnet interfaces",
            )


KINDS: dict[str, type[Shared | Host | Bridged]] = {
    "vmnet-shared": Shared,
    "vmnet-host": Host,
    "vmnet-bridged": Bridged,
}


def parse(text: str) -> Shared | Host | Bridged:
    """Read the argument of `-netdev`, text or JSON. Raises OptionError for anything but a valid vmnet netdev."""
    if not isinstance(text, str):
        raise OptionError(
            f"parse() takes text such as 'vmnet-shared,id=net0', not {text!r}", option="netdev", value=repr(text)
        )
    return from_json(text) if text.startswith("{") else from_items(split(text), need_id=True)


def from_items(items: Items, *, need_id: bool) -> Shared | Host | Bridged:
    """Read a taken-apart text form. `need_id` is what tells `-netdev` from `-nic` and `-net`."""
    kind = _kind(backend(items))
    fields = _fields(kind)
    values: dict[str, object] = {}
    forwards: list[str] = []
    for key, given in items:
        if key is None or key == "type":
            continue
        value = "on" if given is None else given
        if given is None and key == "noisolated":
            key, value = "isolated", "off"
        if key not in fields:
            raise OptionError(f"Invalid parameter '{key}'", option=key, value=given or "", hint=_known(kind))
        if key == "id" and "id" in values:
            continue
        if key == "hostfwd":
            forwards.append(value)
        else:
            values[fields[key]] = _typed(key, value)
    return _build(kind, values | ({"hostfwd": tuple(forwards)} if forwards else {}), need_id=need_id)


def from_json(text: str) -> Shared | Host | Bridged:
    """Read the JSON form. Raises OptionError."""
    members = load_json(text)
    kind = _kind(_checked(members, "type", str, "string"))
    fields = _fields(kind)
    values: dict[str, object] = {}
    for key in members:
        if key == "type":
            continue
        if key not in fields:
            raise OptionError(
                f"Parameter '{key}' is unexpected", option=key, value=str(members[key]), hint=_known(kind)
            )
        if key == "isolated":
            values["isolated"] = _checked(members, key, bool, "boolean")
        elif key == "mtu":
            values["mtu"] = _checked(members, key, int, "integer")
        elif key == "hostfwd":
            values["hostfwd"] = _rules(members)
        else:
            values[fields[key]] = _checked(members, key, str, "string")
    return _build(kind, values, need_id=True)


def _fields(kind: type[Netdev]) -> dict[str, str]:
    """Field by option name."""
    return {field.replace("_", "-"): field for field in kind.__struct_fields__}


def _build(
    kind: type[Shared | Host | Bridged], values: Mapping[str, object], *, need_id: bool
) -> Shared | Host | Bridged:
    if need_id and values.get("id") is None:
        raise OptionError(
            f"Parameter 'id' is missing: give the netdev a name, as in {kind.type},id=net0", option="id", value=""
        )
    netdev = msgspec.convert(values, kind)
    netdev.validate()
    return netdev


def _kind(name: str | None) -> type[Shared | Host | Bridged]:
    if name is None:
        raise OptionError("Parameter 'type' is missing", option="type", value="")
    if name not in KINDS:
        raise OptionError(
            f"Parameter 'type' does not accept value '{name}', only {', '.join(KINDS)}", option="type", value=name
        )
    return KINDS[name]


def _checked(members: Mapping[str, object], key: str, kind: type[_Value], word: str) -> _Value | None:
    if key not in members:
        return None
    value = members[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise OptionError(f"Invalid parameter type for '{key}', expected: {word}", option=key, value=str(value))
    return value


def _rules(members: Mapping[str, object]) -> tuple[str, ...]:
    """QEMU's StringList of `hostfwd`: [{"str": RULE}, ...]."""
    found = []
    for member in _checked(members, "hostfwd", list, "array") or []:
        rule = member.get("str") if isinstance(member, dict) and len(member) == 1 else None
        if not isinstance(rule, str):
            raise OptionError(
                'Invalid parameter type for \'hostfwd\', expected: objects such as {"str":"tcp::2222-:22"}',
                option="hostfwd",
                value=str(member),
            )
        found.append(rule)
    return tuple(found)


def _typed(key: str, value: str) -> object:
    if key == "isolated":
        if value not in _TRUTH:
            raise OptionError(f"Parameter '{key}' expects 'on' or 'off', not '{value}'", option=key, value=value)
        return _TRUTH[value]
    if key == "mtu":
        if not value.isascii() or not value.isdigit() or len(value) > 9:
            raise OptionError(
                f"Parameter 'mtu' expects a number from {MTU_LEAST} to {MTU_MOST}, not '{value}'",
                option=key,
                value=value,
            )
        return int(value)
    return value


def _known(kind: type[Netdev]) -> str:
    return f"{kind.type} takes {', '.join(_fields(kind))}"
