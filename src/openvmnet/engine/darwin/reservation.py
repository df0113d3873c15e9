"""The option `address` on a Mac: what stands in its way, and how bootpd comes to know of it.

A relay makes the line of bootptab when its interface is up, since only then the addresses are known, and before it
gives up root's rights. bootpd reads the file when it starts, so it is started anew. A lease of another VM's counts for
as long as bootpd wrote, a day as it comes: that the VM is gone bootpd does not know.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from openvmnet.engine.darwin import bootptab, entitlement, leases
from openvmnet.engine.darwin.mac import Mac
from openvmnet.engine.darwin.network26 import Reservation
from openvmnet.errors import Conflict, MissingFeature, OptionError
from openvmnet.netdev import Host, Subnet

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from openvmnet.engine.darwin.handle import Handle
    from openvmnet.netdev import Bridged, Shared

_LOG = logging.getLogger(__name__)
RELOAD = ("/bin/launchctl", "kickstart", "-k", "system/com.apple.bootpd")


def refuse(options: Shared | Host | Bridged, mac_os: Mac) -> None:
    """Before anything is started: raise OptionError or MissingFeature for an `address` that cannot be kept here."""
    if options.address is None:
        return
    if isinstance(options, Host) and options.net_uuid is not None:
        raise OptionError(
            f"Parameter 'address' needs DHCP, which a private network ('net-uuid') does not have on macOS, "
            f"so not '{options.address}'",
            option="address",
            value=options.address,
        )
    if not mac_os.root:
        newer = "; a reservation of macOS 26's own needs no root, but VMs could not share its network"
        raise MissingFeature(
            f"address={options.address} is a line of {bootptab.PATH}, which is root's to write"
            f"{newer if entitlement.signed_counts(mac_os) else ''}",
            hint="sudo vmnet run ...",
        )


def hold(options: Shared | Host | Bridged, mac: str | None, handle: Handle) -> bootptab.Hold | None:
    """Keep the `address` of the options, if they have one, for `mac` on the interface that runs, and tell bootpd.

    Raises Conflict for one that the network does not give, or that is another's, and as `bootptab.Hold`.
    """
    address = options.reservation
    if address is None:
        return None
    if mac is None:
        raise OptionError("'address' goes with a MAC that is known", option="address", value=str(address))
    start, end = handle.text("vmnet_start_address"), handle.text("vmnet_end_address")
    subnet = Subnet.from_options(start, end, handle.text("vmnet_subnet_mask"))
    if subnet is not None and not subnet.gives(address):
        raise Conflict(f"address={address} {subnet.why_not(address)} on this network, which gives {subnet.pool}")
    _refuse_leased(address, mac)
    kept = bootptab.Hold(Reservation(mac, address))
    said = Mac().run(*RELOAD)
    if said:
        _LOG.warning("bootpd may not know of address=%s: %s", address, said.strip())
    return kept


def _refuse_leased(address: IPv4Address, mac: str) -> None:
    now = time.time()
    for lease in leases.read():
        # Where bootpd knows a guest by another identifier its MAC is not to be had, and it may be this very one.
        if lease.address == address and lease.expires > now and lease.mac not in (None, mac.lower()):
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(lease.expires))
            name = f" ('{lease.name}')" if lease.name else ""
            raise Conflict(f"address={address} is leased to {lease.mac}{name} until {until}, says {leases.PATH}")
