"""Said once, counted after that, said again later with the count."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from openvmnet.notice import QUIET, Notice

if TYPE_CHECKING:
    import pytest


def test_said_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    notice = Notice(logging.getLogger("test"), lambda: now[0])
    for _ in range(5):
        notice.warn("%d of %s", 1, "them")
    assert [record.getMessage() for record in caplog.records] == ["1 of them"]
    now[0] += QUIET
    notice.warn("%d of %s", 2, "them")
    notice.warn("%d of %s", 3, "them")
    assert caplog.records[-1].getMessage() == "2 of them (4 times more since it was last said)"
    assert len(caplog.records) == 2
