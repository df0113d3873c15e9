"""What commands and networks say to each other: requests and answers on the control socket, each a line of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from openvmnet import errors
from openvmnet.config import Mode, PortKind
from openvmnet.errors import HostError, VmnetError
from openvmnet.netdev import Host, Shared

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

    from openvmnet.netdev import Forward


class Spec(msgspec.Struct, frozen=True, omit_defaults=True):
    """What network is wanted: by name, by addresses, by both or by neither; None is "as it comes"."""

    name: str | None = None
    mode: Mode = "shared"
    start_address: str | None = None
    end_address: str | None = None
    subnet_mask: str | None = None
    nat66_prefix: str | None = None
    net_uuid: str | None = None
    mtu: int | None = None
    host_loopback: bool = False
    force: bool = False
    linger: float = 5.0

    @classmethod
    def of(cls, options: Shared | Host, base: Spec) -> Spec:
        """The network that a netdev's options mean; what they cannot say (name, force, ...) is `base`'s."""
        return cls(
            name=base.name,
            mode="host" if isinstance(options, Host) else "shared",
            start_address=options.start_address,
            end_address=options.end_address,
            subnet_mask=options.subnet_mask,
            nat66_prefix=options.nat66_prefix if isinstance(options, Shared) else None,
            net_uuid=options.uuid if isinstance(options, Host) else None,
            mtu=options.mtu,
            host_loopback=base.host_loopback,
            force=base.force,
            linger=base.linger,
        )


class PlugRequest(msgspec.Struct, frozen=True, tag="plug", tag_field="op", omit_defaults=True):
    """A port for one NIC of a VM; `identity` (its name or disk) and `index` decide the MAC where none is given.

    `offloads`: each frame bears a virtio_net_hdr, and may be longer than the MTU or lack its checksum. Without
    `allocate_mac` no MAC is decided, and the NIC's is not known. `hostfwd` has the rules of its published ports;
    `address` is kept for it.
    """

    vm: str
    netdev: str
    mac: str | None
    identity: str
    index: int
    isolated: bool
    pid: int
    offloads: bool = True
    allocate_mac: bool = True
    hostfwd: tuple[str, ...] = ()
    address: str | None = None

    @property
    def kind(self) -> PortKind:
        """What is known of the port before it is asked for."""
        return PortKind(self.isolated, self.offloads)


class ShowRequest(msgspec.Struct, frozen=True, tag="show", tag_field="op"):
    """The network as it is now."""


Request = PlugRequest | ShowRequest


class PlugReply(msgspec.Struct, frozen=True):
    """The port's name, and the MAC its NIC has to use, empty where none was to be decided."""

    port: str
    mac: str
    network: str


class PublishedView(msgspec.Struct, frozen=True):
    """A port of the host's, `host_port` at `host_address`, that leads to `guest_port` of the VM.

    `guest_address` is where a client would be led now, None where the VM has no address yet.
    """

    protocol: Literal["tcp", "udp"]
    host_address: str
    host_port: int
    guest_address: str | None
    guest_port: int

    @classmethod
    def of(cls, forward: Forward, guest: IPv4Address | IPv6Address | str | None) -> PublishedView:
        """How `forward` is shown while its guest is at `guest`."""
        host = "0.0.0.0" if forward.host is None else str(forward.host)  # noqa: S104 - shown, not bound
        address = None if guest is None else str(guest)
        return cls(forward.protocol, host, forward.host_port, address, forward.guest_port)


class PortView(msgspec.Struct, frozen=True):
    """One port: rx and tx as the guest sees them (rx: what it received), in bytes and frames.

    `reservation` is the address kept for its NIC, leased or not.
    """

    port: str
    vm: str
    netdev: str
    mac: str
    isolated: bool
    address: str | None
    hostname: str | None
    lease_expires: float | None
    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int
    dropped: int
    pid: int
    addresses6: list[str] = []
    published: list[PublishedView] = []
    reservation: str | None = None


class NetworkView(msgspec.Struct, frozen=True):
    """A network as `vmnet show` tells it; `uptime` in seconds, `flows` by kind, `notes` what a person should know.

    Addresses are None where the host has none on the network (`net-uuid`, and bridged, which is one on macOS only).
    """

    name: str
    mode: Mode | Literal["bridged"]
    subnet: str | None
    gateway: str | None
    pool_start: str | None
    pool_end: str | None
    dns: str | None
    domain: str | None
    mtu: int
    pid: int
    uptime: float
    ports: list[PortView] = []
    flows: dict[str, int] = {}
    counters: dict[str, int] = {}
    notes: list[str] = []
    net_uuid: str | None = None
    host_loopback: bool = False
    prefix6: str | None = None
    gateway6: str | None = None


class Fault(msgspec.Struct, frozen=True):
    """An error of openvmnet's own, on its way through a socket: `kind` is the class's name."""

    kind: str
    message: str
    hint: str | None = None
    option: str = ""
    value: str = ""

    @classmethod
    def of(cls, error: VmnetError) -> Fault:
        """Pack `error`."""
        option, value = getattr(error, "option", ""), getattr(error, "value", "")
        return cls(type(error).__name__, error.message, error.hint, option, value)

    def error(self) -> VmnetError:
        """Unpack it: the same class where it takes just a message, its exit code and status with it."""
        kind = getattr(errors, self.kind, HostError)
        if kind is errors.OptionError:
            return errors.OptionError(self.message, option=self.option, value=self.value, hint=self.hint)
        error: VmnetError = kind(self.message, hint=self.hint)
        return error


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one shape of every answer: a fault, or the field that the request asked for."""

    fault: Fault | None = None
    plugged: PlugReply | None = None
    network: NetworkView | None = None


class Started(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the network process says on its pipe once: ready, or the fault that ended it."""

    fault: Fault | None = None
    note: str | None = None
