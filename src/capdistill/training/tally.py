"""Sums of terms over batches, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from capdistill.outputs import LossTerm


class Tally:
    """Raw sums and weights of terms, added over batches and divided once.

    Example:
        >>> tally = Tally()
        >>> tally.add({"ce": LossTerm(torch.tensor(6.0), count=2.0, weight=0.5)})
        >>> tally.add({"ce": LossTerm(torch.tensor(2.0), count=2.0, weight=0.5)})
        >>> tally.means({"ce": 4.0})
        {'ce': {'raw': 2.0, 'weighted': 1.0}}
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.weighted: dict[str, Tensor | float] = {}

    def add(self, terms: Mapping[str, LossTerm]) -> None:
        """Add the terms of a batch."""
        for name, term in terms.items():
            value = term.sum.detach()
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.weighted[name] = self.weighted.get(name, 0.0) + term.weight * value

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Add the means of a step's row, times its counts."""
        for name, term in row["terms"].items():
            count = row["counts"][name]
            self.sums[name] = self.sums.get(name, 0.0) + term["raw"] * count
            self.weighted[name] = self.weighted.get(name, 0.0) + term["weighted"] * count

    def means(self, counts: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """Each term's mean, raw and weighted."""
        return {
            name: {
                "raw": float(value) / max(counts[name], 1.0),
                "weighted": float(self.weighted[name]) / max(counts[name], 1.0),
            }
            for name, value in self.sums.items()
        }

    def summary(self, counts: Mapping[str, float]) -> dict[str, Any]:
        """The means and the loss they add up to."""
        terms = self.means(counts)
        return {"loss": sum(term["weighted"] for term in terms.values()), "terms": terms}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The sums as plain numbers."""
        return {
            "sums": {name: float(value) for name, value in self.sums.items()},
            "weighted": {name: float(value) for name, value in self.weighted.items()},
        }

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Go on from saved sums."""
        self.sums, self.weighted = dict(state["sums"]), dict(state["weighted"])
