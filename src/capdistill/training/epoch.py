"""What has been done of the current epoch, so that a run stopped within it can go on there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from capdistill.training.history import Row
from capdistill.training.tally import Tally


class EpochSoFar:
    """Sums, images, batches and seconds of the steps of one epoch.

    Example:
        >>> epoch = EpochSoFar()
        >>> terms = {"ce": {"raw": 2.0, "weighted": 1.0}}
        >>> row = epoch.add({"terms": terms, "counts": {"ce": 3.0}, "images": 4}, batches=1)
        >>> epoch.row()["train"]["loss"], epoch.row()["images"], "counts" in row
        (1.0, 4, False)
    """

    def __init__(self) -> None:
        self.tally = Tally()
        self.images = 0
        self.batches = 0
        self.began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the epoch began, the time before a stop included."""
        return time.perf_counter() - self.began

    def add(self, row: Row, batches: int) -> Row:
        """Add a step; its row without the counts, which only these sums need."""
        self.tally.add_means(row["terms"], row.pop("counts"))
        self.images += row["images"]
        self.batches += batches
        return row

    def row(self) -> Row:
        """What the epoch's row says of its training."""
        return {
            "train": self.tally.summary(),
            "images": self.images,
            "images_per_second": self.images / self.seconds,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        numbers = {"images": self.images, "batches": self.batches, "seconds": self.seconds}
        return {"tally": self.tally.state_dict(), **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.tally.load_state_dict(state["tally"])
        self.images, self.batches = state["images"], state["batches"]
        self.began = time.perf_counter() - state["seconds"]
