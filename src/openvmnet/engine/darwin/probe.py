"""What this Mac has of what vmnet needs, and what stands in a guest's way: each with its cure.

Where a thing can be tried without a right it is tried; where it cannot, what the Mac says of itself is read. Three of
these checks are not about starting an interface, but about a guest that has one and still gets nowhere: the
application firewall, which keeps bootpd from answering; Local Network privacy, which gives programs that connect to a
guest "no route to host"; and a VPN, which takes the way out, or switches forwarding off.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import diagnosis, entitlement, framework, patience
from openvmnet.engine.darwin.library import missing
from openvmnet.engine.darwin.mac import Mac
from openvmnet.engine.finding import Finding, State
from openvmnet.errors import MissingFeature, VmnetError
from openvmnet.netdev import Shared

if TYPE_CHECKING:
    from collections.abc import Callable

    from openvmnet.engine.darwin.framework import Framework

_FIREWALL = "/usr/libexec/ApplicationFirewall/socketfilterfw"
_BOOTPD = "/usr/libexec/bootpd"
_SETUP = "vmnet setup"
_FEATURES = (
    ("vmnet_enable_isolation", "isolated=on, net-uuid"),
    ("vmnet_enable_checksum_offload", "checksum offload"),
    ("vmnet_enable_virtio_header", "the virtio header"),
    ("vmnet_network_create", "DHCP reservations, and services switched off"),
)
_LOCAL_NETWORK = (15,)
_OLDEST = (10, 15)


def examine(mac: Mac | None = None, load: Callable[[], Framework] = framework.load) -> list[Finding]:
    """Every finding, in the order in which one needs the other."""
    mac = mac or Mac()
    return [
        macos(mac),
        vmnet(load),
        rights(mac),
        signed_copy(mac),
        sharing(mac),
        firewall(mac),
        local_network(mac),
        subnet(mac),
        vpn(mac),
        interfaces(load),
        qemu(),
    ]


def macos(mac: Mac) -> Finding:
    """The system's version."""
    version = ".".join(map(str, mac.version)) or "none"
    state: State = "found" if mac.version >= _OLDEST else "missing"
    return Finding("macOS", state, version, "vmnet.framework as it is here: 10.15 or later")


def vmnet(load: Callable[[], Framework]) -> Finding:
    """The framework, and what of it this macOS lacks."""
    purpose = "networks of virtual machines"
    try:
        loaded = load()
    except MissingFeature as error:
        return Finding("vmnet.framework", "missing", error.message, purpose)
    lacking = [what for symbol, what in _FEATURES if not loaded.has(symbol)]
    if not loaded.has("vmnet_start_interface"):
        return Finding("vmnet.framework", "missing", missing("vmnet_start_interface", "10.10").message, purpose)
    if lacking:
        return Finding("vmnet.framework", "degraded", f"not on this macOS: {', '.join(lacking)}", purpose)
    return Finding("vmnet.framework", "found", "whole", purpose)


def rights(mac: Mac) -> Finding:
    """Whether `vmnet run` may start an interface: as root, or through a signed interpreter."""
    purpose = "starting an interface"
    if mac.root:
        return Finding("rights", "found", "root; given up before the VM starts, where sudo says whose it is", purpose)
    if not entitlement.signed_counts(mac):
        refusal = entitlement.refusal(mac)
        return Finding("rights", "missing", refusal.message, purpose, refusal.hint)
    if entitlement.entitled(mac):
        return Finding("rights", "found", f"{mac.program} is signed with {entitlement.ENTITLEMENT}", purpose)
    if entitlement.entitled(mac, str(entitlement.copy_path())):
        if entitlement.fault(entitlement.copy_path()) is not None:
            return Finding("rights", "missing", "the signed copy of the interpreter does not run", purpose, _SETUP)
        return Finding("rights", "found", "vmnet run uses the signed copy of the interpreter", purpose)
    refusal = entitlement.refusal(mac)
    return Finding("rights", "missing", refusal.message, purpose, refusal.hint)


def signed_copy(mac: Mac) -> Finding:
    """The copy that `vmnet setup` makes."""
    purpose = "vmnet without root, macOS 26 or later"
    path = entitlement.copy_path()
    if not entitlement.signed_counts(mac):
        return Finding("signed copy", "optional", "of no use before macOS 26", purpose)
    if not entitlement.entitled(mac, str(path)):
        return Finding("signed copy", "optional", f"{path} is not there, or not signed", purpose, _SETUP)
    reason = entitlement.fault(path)
    if reason is not None:
        return Finding("signed copy", "degraded", f"{path} does not run: {reason.splitlines()[0]}", purpose, _SETUP)
    return Finding("signed copy", "found", str(path), purpose)


def sharing(mac: Mac) -> Finding:
    """Internet Sharing, which vmnet's shared and host modes need for themselves."""
    purpose = "vmnet-shared and vmnet-host"
    if diagnosis.sharing(mac):
        remedy = "System Settings > General > Sharing > Internet Sharing: off"
        return Finding("Internet Sharing", "missing", "it is on, and vmnet cannot share its service", purpose, remedy)
    return Finding("Internet Sharing", "found", "off", purpose)


def firewall(mac: Mac) -> Finding:
    """The application firewall: does it let bootpd answer."""
    purpose = "guests' DHCP requests reach bootpd"
    state = mac.run(_FIREWALL, "--getglobalstate")
    if "enabled" not in state.lower():
        return Finding("firewall", "found", "off", purpose)
    if "enabled" in mac.run(_FIREWALL, "--getblockall").lower().replace("disabled", ""):
        remedy = f"sudo {_FIREWALL} --setblockall off"
        return Finding("firewall", "missing", "it blocks all incoming connections, DHCP's too", purpose, remedy)
    said = mac.run(_FIREWALL, "--getappblocked", _BOOTPD).lower()
    if "block" in said and "permitted" not in said:
        remedy = f"sudo {_FIREWALL} --add {_BOOTPD} --unblockapp {_BOOTPD}"
        return Finding("firewall", "degraded", "it is on, and blocks bootpd: guests get no address", purpose, remedy)
    return Finding("firewall", "found", "on, and bootpd may answer", purpose)


def local_network(mac: Mac) -> Finding:
    """Local Network privacy: of which nothing tells whether it was granted but a connection that fails."""
    purpose = "connecting from this Mac to a guest (ssh, curl)"
    if mac.version < _LOCAL_NETWORK:
        return Finding("Local Network", "found", "not before macOS 15", purpose)
    if mac.root:
        return Finding("Local Network", "found", "root needs no grant", purpose)
    return Finding(
        "Local Network",
        "untested",
        "the terminal needs it to reach a guest; without it a guest is 'No route to host', and packets of the guest's "
        "own are not concerned",
        purpose,
        "System Settings > Privacy & Security > Local Network: allow the terminal",
    )


def subnet(mac: Mac) -> Finding:
    """The subnets that vmnet would take by itself: is this Mac on one of them."""
    purpose = "a network of its own for guests"
    default = Shared(start_address="192.168.64.1", end_address="192.168.64.254", subnet_mask="255.255.255.0")
    for cause in diagnosis.about_subnets(default, mac):
        return Finding("subnet", "degraded", cause.sentence, purpose, cause.cure)
    return Finding("subnet", "found", "nothing else has 192.168.64.0/24, and no crash left a bridge", purpose)


def vpn(mac: Mac) -> Finding:
    """A VPN that has an address: guests' packets may not take its way, or none at all."""
    purpose = "guests reach the outside"
    tunnels = [link.name for link in mac.links() if link.tunnel and link.networks]
    if not tunnels:
        return Finding("VPN", "found", "none", purpose)
    remedy = "exclude the guests' subnet in the VPN's settings, or sudo sysctl net.inet.ip.forwarding=1"
    detail = f"{', '.join(tunnels)}: guests' packets may bypass it, or be dropped"
    return Finding("VPN", "degraded", detail, purpose, remedy)


def interfaces(load: Callable[[], Framework]) -> Finding:
    """What vmnet-bridged may name."""
    from openvmnet.engine.darwin.bridged import shared_interfaces

    purpose = "vmnet-bridged"
    try:
        names = shared_interfaces(load())
    except (MissingFeature, patience.Late) as error:
        return Finding("interfaces", "optional", error.message, purpose)
    except VmnetError as error:
        return Finding("interfaces", "degraded", error.message, purpose)
    if not names:
        return Finding("interfaces", "optional", "vmnet names no interface that can be bridged to", purpose)
    return Finding("interfaces", "found", ", ".join(names), purpose)


def qemu() -> Finding:
    """A QEMU: its dgram netdev came with 7.2."""
    purpose = "vmnet run; 7.2 or later has the dgram netdev"
    for name in ("qemu-system-aarch64", "qemu-system-x86_64"):
        if (path := shutil.which(name)) is not None:
            return Finding("qemu", "found", path, purpose)
    return Finding("qemu", "optional", "no qemu-system-* is on the PATH", purpose, "brew install qemu")
