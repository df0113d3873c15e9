"""What a look at the host gives: the same for every engine."""

from __future__ import annotations

from typing import Literal

import msgspec

from openvmnet.errors import MissingFeature

State = Literal["found", "degraded", "optional", "missing", "untested"]


class Finding(msgspec.Struct, frozen=True):
    """One thing the host needs: `detail` is what was found, `purpose` what it is for, `remedy` one command."""

    name: str
    state: State
    detail: str
    purpose: str
    remedy: str | None = None

    def error(self) -> MissingFeature:
        """The finding as the engine's exception."""
        return MissingFeature(f"{self.name}: {self.detail}", hint=self.remedy)
