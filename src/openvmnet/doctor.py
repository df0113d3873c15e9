"""What this host lacks for openvmnet, and the one command that mends each thing.

The probes are the engine's own (`probe` of each); here they are put in the order in which one needs the
other, so that the first thing missing is the first to mend.
"""

from __future__ import annotations

import msgspec

from openvmnet import engine
from openvmnet.engine.finding import Finding

_INSIDE = (
    ("tap", "a guest's network card with offloads, and the uplink"),
    ("bridge", "VM to VM at the kernel's speed, and isolation of a VM"),
    ("nft rules", "the firewall"),
    ("rcvmark", "limits of DHCP and DNS for each port, whatever MAC or address a guest claims"),
)
_HEALTHY = ("found", "degraded", "optional")


class Report(msgspec.Struct, frozen=True):
    """Every finding; `healthy` is whether nothing that a network needs is missing."""

    healthy: bool
    findings: list[Finding]


def examine() -> Report:
    """Try everything; takes about half a second, and leaves nothing behind."""
    findings = _examine_mac() if engine.DARWIN else _examine_linux()
    return Report(all(finding.state in _HEALTHY for finding in findings), findings)


def _examine_mac() -> list[Finding]:
    from openvmnet.engine.darwin import probe

    return probe.examine()


def _examine_linux() -> list[Finding]:
    from openvmnet.engine.linux import probe, probe_bridged

    ip, nft, tun = probe.ip(), probe.nft(), probe.tun()
    inside: list[Finding] = []
    macvtap = probe_bridged.untried()
    refused: OSError | None = None
    try:
        with probe.sandbox() as sandbox:
            if "missing" not in (ip.state, nft.state, tun.state):
                inside = [
                    probe.tap(sandbox),
                    probe.bridge(sandbox),
                    *probe.firewall_rules(sandbox),
                    probe.received_mark(sandbox),
                ]
                macvtap = probe_bridged.macvtap(sandbox)
    except OSError as error:
        refused = error
    return [
        probe.kernel(),
        probe.namespaces(refused),
        tun,
        ip,
        nft,
        *(inside or [probe.untested(name, purpose) for name, purpose in _INSIDE]),
        probe.ping(),
        probe.files(),
        probe.pipes(),
        probe.qemu(),
        probe_bridged.helper(),
        probe_bridged.access_list(),
        macvtap,
    ]
