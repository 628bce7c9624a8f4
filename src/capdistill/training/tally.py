"""Sums of terms over batches, kept on the device until somebody reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from capdistill.outputs import LossTerm

Number = Tensor | float


class Tally:
    """Raw and weighted sums of terms, added over batches and divided once by their counts.

    Example:
        >>> tally = Tally()
        >>> for value in (6.0, 2.0):
        ...     tally.add({"ce": LossTerm(torch.tensor(value), count=4.0, weight=0.5)}, {"ce": 2.0})
        >>> tally.summary()
        {'loss': 1.0, 'terms': {'ce': {'raw': 2.0, 'weighted': 1.0}}}
    """

    def __init__(self) -> None:
        self.sums: dict[str, Number] = {}
        self.weighted: dict[str, Number] = {}
        self.counts: dict[str, float] = {}

    def add(self, terms: Mapping[str, LossTerm], counts: Mapping[str, float]) -> None:
        """Add the terms of a batch, and what the batch counts for."""
        for name, term in terms.items():
            value = term.sum.detach()
            _add(self.sums, name, value)
            _add(self.weighted, name, term.weight * value)
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def add_means(
        self, means: Mapping[str, Mapping[str, float]], counts: Mapping[str, float]
    ) -> None:
        """Add what another tally came to: means times counts, so that every token weighs alike."""
        for name, term in means.items():
            _add(self.sums, name, term["raw"] * counts[name])
            _add(self.weighted, name, term["weighted"] * counts[name])
            self.counts[name] = self.counts.get(name, 0.0) + counts[name]

    def read(self, *others: Tensor) -> list[float]:
        """Turn all sums into plain numbers, and others with them, in one transfer."""
        values = [*self.sums.values(), *self.weighted.values(), *others]
        numbers = to_floats(values)
        for sums in (self.sums, self.weighted):
            for name in sums:
                sums[name] = numbers.pop(0)
        return numbers

    def summary(self) -> dict[str, Any]:
        """Each term's mean, raw and weighted, and the loss they add up to."""
        self.read()
        terms = {
            name: {"raw": self._mean(name, self.sums), "weighted": self._mean(name, self.weighted)}
            for name in self.sums
        }
        return {"loss": sum(term["weighted"] for term in terms.values()), "terms": terms}

    def _mean(self, name: str, sums: Mapping[str, Number]) -> float:
        return float(sums[name]) / max(self.counts[name], 1.0)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The sums as plain numbers."""
        self.read()
        return {"sums": self.sums, "weighted": self.weighted, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, dict[str, Any]]) -> None:
        """Go on from saved sums."""
        self.sums, self.weighted = dict(state["sums"]), dict(state["weighted"])
        self.counts = dict(state["counts"])


def to_floats(values: Sequence[Number]) -> list[float]:
    """Scalars on a device to numbers here, with one synchronisation for all of them.

    Example:
        >>> to_floats([torch.tensor(1.5), 2.0])
        [1.5, 2.0]
    """
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(read) if isinstance(value, Tensor) else value for value in values]


def _add(sums: dict[str, Number], name: str, value: Number) -> None:
    sums[name] = sums[name] + value if name in sums else value
