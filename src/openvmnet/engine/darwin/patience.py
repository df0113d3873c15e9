"""Calls that may never return, with a limit on how long anybody waits for them.

vmnet's calls into its daemon can hang for ever, and a thread in one cannot be ended. So such a call gets a thread of
its own, and who asked for it goes on without it when the time is up.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

from openvmnet.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

START = 30.0  # s; vmnet-helper's users report starts of up to 10 s on a busy Mac
STOP = 10.0  # s
ASK = 10.0  # s


class Late(HostError):
    """A call that has had its time: `what` gave no answer in `seconds`."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(
            f"{what} gave no answer in {seconds:g} s",
            hint="restart the Mac if it happens again: its networking daemons (InternetSharing, pfd) are stuck",
        )


def within(seconds: float, what: str, call: Callable[[], _T], *, discard: Callable[[_T], object] | None = None) -> _T:
    """What `call()` gives or raises, on a thread of its own. Raises Late when it takes longer than `seconds`.

    What it gives after that goes to `discard`, on that thread.
    """
    result: list[_T] = []
    raised: list[BaseException] = []
    lock = threading.Lock()
    done = threading.Event()
    late = False

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            raised.append(error)
        with lock:
            done.set()
        if late and result and discard is not None:
            discard(result[0])

    threading.Thread(target=run, name=what, daemon=True).start()
    if not done.wait(seconds):
        with lock:
            late = not done.is_set()
        if late:
            raise Late(what, seconds)
    if raised:
        raise raised[0]
    return result[0]
