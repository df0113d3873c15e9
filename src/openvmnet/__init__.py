"""vmnet networks for virtual machines, on any host: what vmnet.framework gives a program, for Python.

    import openvmnet

    with openvmnet.start(openvmnet.Shared(start_address="192.168.70.1", end_address="192.168.70.254",
                                          subnet_mask="255.255.255.0")) as interface:
        interface.on_packets_available(lambda: handle(interface.read()))
        interface.write([frame])

`start` gives an `Interface`, `start_async` the same in an event loop (`async for frames in interface`). `Shared`,
`Host` and `Bridged` are the options of the three modes, and `netdev.parse` reads them from QEMU's text. Every error
is a `VmnetError` with a sentence and a `status`, one of vmnet's result codes. Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from openvmnet import errors, netdev
    from openvmnet.contract.interface import Interface, Parameters
    from openvmnet.errors import (
        CallerError,
        Conflict,
        Exhausted,
        HostError,
        LinkError,
        MissingFeature,
        OptionError,
        PacketTooBig,
        Stopped,
        VmnetError,
    )
    from openvmnet.library import interfaces, start, start_async
    from openvmnet.netdev import Bridged, Host, Shared
    from openvmnet.status import Status

__all__ = [
    "Bridged",
    "CallerError",
    "Conflict",
    "Exhausted",
    "Host",
    "HostError",
    "Interface",
    "LinkError",
    "MissingFeature",
    "OptionError",
    "PacketTooBig",
    "Parameters",
    "Shared",
    "Status",
    "Stopped",
    "VmnetError",
    "__version__",
    "errors",
    "interfaces",
    "netdev",
    "start",
    "start_async",
]
__version__ = "0.1.0"

_HOME = {
    "Bridged": "netdev",
    "Host": "netdev",
    "Shared": "netdev",
    "Interface": "contract.interface",
    "Parameters": "contract.interface",
    "Status": "status",
    "interfaces": "library",
    "start": "library",
    "start_async": "library",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'openvmnet' has no attribute {name!r}")
    import importlib

    if name in ("errors", "netdev"):
        return importlib.import_module(f"openvmnet.{name}")
    value = getattr(importlib.import_module(f"openvmnet.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
