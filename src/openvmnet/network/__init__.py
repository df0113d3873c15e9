"""A running network: its life and ports (`life`), what answers at its gateway, its way out, and how it is shown."""

from __future__ import annotations

from openvmnet.network.life import Network
from openvmnet.network.port import Port, Record, read_record

__all__ = ["Network", "Port", "Record", "read_record"]
