"""Starting an interface from a program: arguments checked, the engine asked, the vmnet contract put over its link."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID, uuid4

import msgspec

from openvmnet import engine
from openvmnet.contract.interface import Interface, LinkRequest
from openvmnet.errors import CallerError, HostError, OptionError
from openvmnet.netdev import Bridged, Host, Shared

if TYPE_CHECKING:
    from collections.abc import Generator

    from openvmnet.contract.interface import Link

_T = TypeVar("_T")
_FIELDS: dict[str, type] = {"isolated": bool, "mtu": int}  # the others are text


def start(
    options: Shared | Host | Bridged | None = None,
    *,
    interface_id: UUID | str | None = None,
    allocate_mac_address: bool = True,
    name: str | None = None,
    linger: float = 5.0,
    force: bool = False,
) -> Interface:
    """Start an interface on the network that `options` mean (None: `Shared()`), and the network where none runs yet.

    `interface_id`: the same UUID gets the same MAC, and so the same lease, each time; None takes a new one.
    `allocate_mac_address=False`: no MAC is chosen, any may be used. `name` and `linger` (seconds that the network stays
    after its last user) and `force` (take addresses that another network overlaps) are as in `vmnet run`.

    Takes some tenths of a second. Raises CallerError or OptionError (INVALID_ARGUMENT) for a wrong value, Conflict
    where the addresses are taken, HostError where this machine cannot do it; then nothing is left behind.
    """
    return Interface(_open(_request(options, interface_id, allocate_mac_address, name, linger, force)))


def start_async(
    options: Shared | Host | Bridged | None = None,
    *,
    interface_id: UUID | str | None = None,
    allocate_mac_address: bool = True,
    name: str | None = None,
    linger: float = 5.0,
    force: bool = False,
) -> Starting:
    """The same for an event loop, which goes on meanwhile: `async with start_async() as interface`, or `await` it.

    It is the same Interface; `async for frames in interface` reads it.
    """
    return Starting(_request(options, interface_id, allocate_mac_address, name, linger, force))


def interfaces() -> list[str]:
    """The names that `Bridged(ifname=...)` takes on this host; [] where nothing can be bridged."""
    if engine.DARWIN:
        from openvmnet.engine.darwin.bridged import shared_interfaces

        return shared_interfaces()
    from openvmnet.engine.linux.interfaces import inventory

    return [interface.name for interface in inventory() if interface.how is not None]


class Starting:
    """An interface that is to be started: awaited it gives it, as an asynchronous context it also stops it."""

    def __init__(self, request: LinkRequest) -> None:
        self._request = request
        self._interface: Interface | None = None

    def __await__(self) -> Generator[object, None, Interface]:
        return self._start().__await__()

    async def __aenter__(self) -> Interface:
        self._interface = await self._start()
        return self._interface

    async def __aexit__(self, *_: object) -> None:
        if self._interface is not None:
            # The kernel takes a moment to let go of a device.
            await asyncio.to_thread(self._interface.stop)

    async def _start(self) -> Interface:
        work = asyncio.ensure_future(asyncio.to_thread(lambda: Interface(_open(self._request))))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_discard)  # its thread cannot be interrupted; what it makes is given back
            raise


def _discard(work: asyncio.Future[Interface]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().stop()


def _open(request: LinkRequest) -> Link:
    try:
        if engine.DARWIN:
            from openvmnet.engine.darwin import interface

            return interface.open_link(request)
        from openvmnet.attach import tap

        return tap.open_link(request)
    except OSError as error:
        raise HostError(f"the interface cannot be started: {error}") from error


def _request(
    options: object, interface_id: object, allocate: object, name: object, linger: object, force: object
) -> LinkRequest:
    """Raises CallerError or OptionError for what is not as it should be."""
    chosen = Shared() if options is None else options
    if not isinstance(chosen, Shared | Host | Bridged):
        raise CallerError(f"start() takes openvmnet.Shared, Host or Bridged, not {chosen!r}")
    for field in msgspec.structs.fields(chosen):
        value = getattr(chosen, field.name)
        wanted = _FIELDS.get(field.name, str)
        if field.name == "hostfwd":
            if type(value) is not tuple or not all(type(rule) is str for rule in value):
                raise OptionError(
                    "Invalid parameter type for 'hostfwd', expected: tuple of text such as ('tcp::2222-:22',)",
                    option="hostfwd",
                    value=repr(value),
                )
            continue
        if type(value) is not wanted and not (value is None and wanted is not bool):
            option = field.name.replace("_", "-")
            raise OptionError(
                f"Invalid parameter type for '{option}', expected: {wanted.__name__}", option=option, value=repr(value)
            )
    chosen.validate()
    if allocate is False and chosen.address is not None:
        raise OptionError(
            f"'address' goes with a MAC that is known, so not with allocate_mac_address=False: {chosen.address!r}",
            option="address",
            value=chosen.address,
        )
    if isinstance(chosen, Bridged) and name is not None:
        raise OptionError(
            f"'name' is for openvmnet.Shared and Host: a Bridged interface is on the LAN of its ifname: {name!r}",
            option="name",
            value=repr(name),
        )
    if type(linger) not in (int, float) or not isinstance(linger, int | float) or not 0 <= linger <= sys.float_info.max:
        raise OptionError(f"'linger' expects seconds from 0 on, not {linger!r}", option="linger", value=repr(linger))
    return LinkRequest(
        options=chosen,
        interface_id=_uuid(interface_id),
        allocate_mac_address=_typed("allocate_mac_address", allocate, bool),
        name=None if name is None else _typed("name", name, str),
        linger=float(linger),
        force=_typed("force", force, bool),
    )


def _typed(option: str, value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise OptionError(f"'{option}' expects {kind.__name__}, not {value!r}", option=option, value=repr(value))
    return value


def _uuid(value: object) -> UUID:
    if value is None:
        return uuid4()
    if isinstance(value, UUID):
        return value
    try:
        return UUID(_typed("interface_id", value, str))
    except ValueError as error:
        raise OptionError(
            f"'interface_id' expects a UUID, such as {uuid4()}, not {value!r}", option="interface_id", value=repr(value)
        ) from error
