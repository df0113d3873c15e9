"""A home of its own for each test: no network of the user's is seen, none of a test's is left."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the runtime and state directories are, for this process and those it starts. Its path is short: a unix
    socket's may have 107 octets."""
    with tempfile.TemporaryDirectory(prefix="vmnet-") as home:
        for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
            directory = Path(home) / name.lower()
            directory.mkdir(mode=0o700)
            monkeypatch.setenv(name, str(directory))
        yield Path(home)
