"""A home of its own for each test: no network of the user's is seen, none of a test's is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runtime and state directories below tmp_path, for this process and those it starts."""
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        directory = tmp_path / name.lower()
        directory.mkdir(mode=0o700)
        monkeypatch.setenv(name, str(directory))
    return tmp_path
