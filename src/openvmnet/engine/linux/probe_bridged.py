"""What this host has for vmnet-bridged: all of it optional, since the other two modes do without.

As in `probe`, what can be tried is tried: a macvtap is made in the sandbox. The bridge helper is only looked at. To run
it would put a port into a bridge of the host's.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from openvmnet.engine.finding import Finding
from openvmnet.engine.linux import bridge_helper, interfaces
from openvmnet.errors import VmnetError
from openvmnet.kernel import linkinfo

if TYPE_CHECKING:
    from openvmnet.engine.linux.namespace import Namespace

_HELPER, _ACL, _MACVTAP = "bridge helper", "bridge ACL", "macvtap"
_HELPER_FOR = "vmnet-bridged on a Linux bridge without root"
_MACVTAP_FOR = "vmnet-bridged on a wired NIC, as root"
_TRY = """\
tuntap add dev probe0 mode tap
link add link probe0 name probe1 type macvtap mode bridge
link delete probe1
tuntap delete dev probe0 mode tap
"""


def helper() -> Finding:
    """QEMU's setuid helper: there, and with rights."""
    if interfaces.may_administer():
        return Finding(_HELPER, "found", f"not needed: uid {os.getuid()} has CAP_NET_ADMIN", _HELPER_FOR)
    obstacle = bridge_helper.rights()
    if obstacle is not None:
        return Finding(_HELPER, "optional", obstacle.sentence, _HELPER_FOR, obstacle.remedy)
    return Finding(_HELPER, "found", f"{bridge_helper.path()} has root's rights", _HELPER_FOR)


def access_list() -> Finding:
    """Which of the host's bridges the helper's access list allows."""
    if interfaces.may_administer():
        return Finding(_ACL, "found", f"not needed: uid {os.getuid()} has CAP_NET_ADMIN", _HELPER_FOR)
    file = bridge_helper.acl()
    bridges = [link.name for link in linkinfo.links() if link.kind == "bridge"]
    if not bridges:
        return Finding(_ACL, "optional", "this host has no bridge", _HELPER_FOR)
    verdicts = {bridge: bridge_helper.allows(bridge) for bridge in bridges}
    if None in verdicts.values():
        return Finding(_ACL, "found", f"{file} may not be read: what it allows, only the helper knows", _HELPER_FOR)
    allowed = [bridge for bridge, verdict in verdicts.items() if verdict]
    if not allowed:
        detail = f"{file} allows none of {', '.join(bridges)}"
        return Finding(_ACL, "optional", detail, _HELPER_FOR, bridge_helper.allow_command(bridges[0]))
    return Finding(_ACL, "found", f"{file} allows {', '.join(allowed)}", _HELPER_FOR)


def macvtap(inside: Namespace) -> Finding:
    """A macvtap, made in the sandbox on a TAP as its NIC, and removed."""
    try:
        done = inside.request("run", argv=["ip", "-batch", "-"], input=_TRY).values
        refused = "" if done["status"] == 0 else " ".join(done["stderr"].split()) or "ip(8) fails"
    except VmnetError as error:
        refused = error.message
    if refused:
        detail = f"none can be made (CONFIG_MACVTAP): {refused}"
        return Finding(_MACVTAP, "optional", detail, _MACVTAP_FOR, "sudo modprobe macvtap")
    return Finding(_MACVTAP, "found", "a macvtap can be made", _MACVTAP_FOR)


def untried() -> Finding:
    """`macvtap` where there is no sandbox."""
    return Finding(_MACVTAP, "untested", "not tried: it needs what is missing above", _MACVTAP_FOR)
