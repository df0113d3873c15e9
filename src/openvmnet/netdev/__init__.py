"""What a netdev option says: the three backends, their addresses, QEMU's syntax."""

from __future__ import annotations

from openvmnet.netdev.hostfwd import Forward
from openvmnet.netdev.mac import gateway_mac, stable_mac
from openvmnet.netdev.options import KINDS, MTU_LEAST, MTU_MOST, Bridged, Host, Shared, from_items, from_json, parse
from openvmnet.netdev.subnet import Subnet, candidates, reservable, unique_local
from openvmnet.netdev.syntax import Items, backend, escape, join, load_json, lookup, split

__all__ = [
    "KINDS",
    "MTU_LEAST",
    "MTU_MOST",
    "Bridged",
    "Forward",
    "Host",
    "Items",
    "Shared",
    "Subnet",
    "backend",
    "candidates",
    "escape",
    "from_items",
    "from_json",
    "gateway_mac",
    "join",
    "load_json",
    "lookup",
    "parse",
    "reservable",
    "split",
    "stable_mac",
    "unique_local",
]
