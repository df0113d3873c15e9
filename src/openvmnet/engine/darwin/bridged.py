"""What vmnet-bridged may name on this Mac: vmnet says which interfaces, and nothing of why not the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openvmnet.engine.darwin import entitlement, framework, patience, xpc
from openvmnet.engine.darwin.mac import Mac
from openvmnet.errors import OptionError
from openvmnet.netdev import Bridged

if TYPE_CHECKING:
    from openvmnet.engine.darwin.framework import Framework
    from openvmnet.netdev import Host, Shared


def shared_interfaces(loaded: Framework | None = None) -> list[str]:
    """The names that `vmnet-bridged,ifname=` takes: vmnet_copy_shared_interface_list. Raises Late."""
    library = loaded or framework.load()

    def ask() -> list[str]:
        found = library.call("vmnet_copy_shared_interface_list")
        if not found:
            return []
        try:
            names = xpc.read(library, found)
        finally:
            library.system_call("xpc_release", found)
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    return patience.within(patience.ASK, "vmnet_copy_shared_interface_list", ask)


def refuse(options: Shared | Host | Bridged, loaded: Framework, mac: Mac | None = None) -> None:
    """Before a start: raise OptionError, in QEMU's words, for an `ifname` that is none of vmnet's; raises Late."""
    if not isinstance(options, Bridged):
        return
    names = shared_interfaces(loaded)
    if options.ifname in names or not (names or entitlement.permitted(mac or Mac())):
        return  # who may not use vmnet is told that, whether or not the list is told to them
    listed = f"expected one of [ {' '.join(names)} ]" if names else "no supported interfaces available"
    raise OptionError(
        f"unsupported ifname '{options.ifname}', {listed}",
        option="ifname",
        value=options.ifname or "",
        hint="vmnet interfaces",
    )
