"""For readers of control's orders: what a former holder of the lease says late is not followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class EpochGuard:
    """Remembers the highest epoch seen."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self.refused = 0

    def accepts(self, fields: Mapping[str, Any]) -> bool:
        """Whether a message is of the control system that acts now (or of a later one)."""
        epoch = int(fields["epoch"])
        if epoch < self.epoch:
            self.refused += 1
            return False
        self.epoch = epoch
        return True
