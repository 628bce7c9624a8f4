"""Distillation of the words that the teacher finds most probable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from capdistill.errors import ConfigError, require_int, suggest
from capdistill.losses.base import Schedule
from capdistill.losses.divergence import top_k_divergence
from capdistill.losses.entries import entries_divergence
from capdistill.losses.token import LogitsLoss
from capdistill.outputs import Batch, TopWords

REST = ("bucket", "renormalise")


class TopKD(LogitsLoss):
    """Match the student's next-token distribution on the teacher's k most probable words.

    The many improbable words, on which a teacher says little that is reliable, are not told apart.
    The term is scaled by T². With k >= V it is `TokenKD`. For large T and rest="renormalise" it
    approaches the squared difference of the k logits, each vector centred, over 2 k.

    Example:
        >>> TopKD(k=5, rest="renormalise")
        TopKD(k=5, rest='renormalise', temperature=4.0)

    Args:
        k: Number of words, at each position those with the largest logits of the teacher.
        rest: "bucket": the probabilities of all other words are added up to one more entry, so the
            student also learns how probable they are together. "renormalise": they are ignored,
            and both distributions are those among the k words.
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: `rest` is neither, k is less than 1 (less than 2 for "renormalise", where one
            entry says nothing), or T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ.

    Source:
        Hinton, Vinyals, Dean (2015), section 2, on fewer entries; section 2.1 for large T.
    """

    def __init__(
        self,
        k: int = 20,
        rest: Literal["bucket", "renormalise"] = "bucket",
        temperature: Schedule = 4.0,
    ) -> None:
        super().__init__(temperature)
        if rest not in REST:
            raise ConfigError(f"TopKD: rest={rest!r} is unknown. {suggest(str(rest), REST)}")
        self.k = require_int("TopKD: k", k, 1 if rest == "bucket" else 2)
        self.rest = rest

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(teacher || student) on k entries."""
        bucket = self.rest == "bucket"
        return top_k_divergence(
            student, teacher, batch.target_mask, self.k, temperature, bucket=bucket
        )

    def require_words(self, k: int, temperatures: Sequence[float]) -> None:
        """Of the words that a teacher keeps, the first k are read."""
        if self.k > k:
            raise ConfigError(
                f"TopKD: k={self.k}, but the cached teacher keeps the {k} most probable words. Use "
                f"k={k} or less, or cache it with a larger top_k=."
            )
        if self.rest == "bucket":
            self._require_temperature(temperatures)

    def divergence_on_words(
        self, student: Tensor, words: TopWords, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(teacher || student) on the first k words."""
        target = words.log_probs(temperature, self.k, self.rest == "bucket")
        ids = words.ids[..., : self.k]
        return entries_divergence(student, ids, target, batch.target_mask, temperature)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, rest={self.rest!r}, {super().extra_repr()}"
