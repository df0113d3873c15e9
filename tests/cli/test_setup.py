"""`vmnet setup` where nothing has to be set up."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from openvmnet.cli.main import main
from openvmnet.errors import MissingFeature

if TYPE_CHECKING:
    import pytest


def test_on_linux_there_is_nothing_to_set_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["setup"]) == 0
    assert "vmnet doctor" in capsys.readouterr().out
    assert main(["setup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"interpreter": None, "entitlement": None}
    assert main(["setup", "--", "program.py"]) == MissingFeature.exit_code
    assert "macOS 26" in capsys.readouterr().err
