"""MAC addresses that follow from what a VM is."""

from __future__ import annotations


def stable_mac(identity: str, index: int, attempt: int = 0) -> str:
    """A MAC for the `index`th NIC of the VM that `identity` (its name or disk) tells apart: always the same one.

    QEMU's own prefix 52:54:00 (locally administered), then 24 bits of a hash. Of n VMs on one network two meet with
    a probability of about n^2 / 2^25; whoever sees that happen asks for the next `attempt`.
    """
    import hashlib  # what `vmnet run` does without before it is the VM

    digest = hashlib.sha256(f"{identity}\0{index}\0{attempt}".encode("utf-8", "surrogateescape")).digest()
    return "52:54:00:" + digest[:3].hex(":")


def gateway_mac(name: str) -> str:
    """A locally administered MAC for the gateway of network `name`: the same each time, so guests' ARP caches hold."""
    import hashlib

    return "5a:" + hashlib.sha256(f"openvmnet gateway {name}".encode()).digest()[:5].hex(":")
