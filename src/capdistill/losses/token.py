"""Distillation of the next-token distribution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.base import (
    DistillationLoss,
    Schedule,
    check_schedule,
    given,
    require_specs,
    scheduled,
)
from capdistill.losses.divergence import kl_divergence
from capdistill.losses.entries import entries_divergence
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec, TopWords

ACROSS_VOCABULARIES = (
    "A student whose tokenizer is the teacher's, trimmed to the captions, learns by any loss: "
    "capdistill.tokenizers.HuggingFace(teacher.tokenizer, keep=captions). Between different "
    'vocabularies there are losses={"word": "word"} and "universal", pooled features ({"name": '
    '"feature", "match": "pooled"}), and captions of the teacher (capdistill.teachers.caption).'
)


class LogitsLoss(DistillationLoss):
    """Base class of losses on the next-token distributions, softened by a temperature.

    A subclass defines `divergence`; `forward` scales it by T².

    Args:
        temperature: Softening T > 0 applied to both logits (dimensionless): a number, a pair
            (first, last) that is interpolated linearly over the run, or a function of the run's
            progress in [0, 1].

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ; names the first differing entry.
    """

    needs = frozenset({"logits"})
    per = "token"

    def __init__(self, temperature: Schedule = 4.0) -> None:
        super().__init__()
        self.temperature = check_schedule(self._temperature, temperature, positive=True)

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Compare the vocabularies entry by entry.

        Raises:
            IncompatibleModels: they differ in an entry or in size.
        """
        require_specs(type(self).__name__, student=student, teacher=teacher)
        place = first_difference(student.vocabulary, teacher.vocabulary)
        if place is not None:
            raise IncompatibleModels(
                f"{type(self).__name__}: the vocabularies differ at entry {place}: "
                f"{_entry(student, place)}, {_entry(teacher, place)}.\n"
                "Token distillation compares one entry with the same entry: build both models with "
                f"one tokenizer, or remove this loss. {ACROSS_VOCABULARIES}"
            )

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """T² times the sum of the divergence over valid tokens."""
        name = type(self).__name__
        ours = given(name, "logits", "student", student.logits)  # (B, T, V)
        now = self._temperature_at(self.progress)
        if teacher.words is not None:
            return now**2 * self.divergence_on_words(ours, teacher.words, batch, now)
        theirs = given(name, "logits", "teacher", teacher.logits)
        return now**2 * self.divergence(ours, theirs, batch, now)

    def settings(self, progress: float) -> dict[str, float]:
        """The temperature at `progress`, if it changes over the run."""
        if isinstance(self.temperature, (int, float)):
            return {}
        return {"temperature": self._temperature_at(progress)}

    @abstractmethod
    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """The sum over valid tokens, at one temperature, of logits (B, T, V)."""

    def require_words(self, k: int, temperatures: Sequence[float]) -> None:
        """Check that a teacher's k most probable words will do; by default all are needed.

        Args:
            k: How many there are.
            temperatures: Those at which the probability of all others is known.

        Raises:
            ConfigError: they will not.
        """
        raise ConfigError(words_missing(self, k))

    def divergence_on_words(
        self, student: Tensor, words: TopWords, batch: Batch, temperature: float
    ) -> Tensor:
        """As `divergence`, where the teacher gives its most probable words alone."""
        raise NotImplementedError

    def _require_temperature(self, temperatures: Sequence[float]) -> None:
        if self.temperature not in temperatures:
            known = ", ".join(f"{each:g}" for each in temperatures)
            raise ConfigError(
                f"{self._temperature} is {self.temperature}, but the cached teacher knows how "
                f"probable the words are that it left out at {known} alone. Use one of these, or "
                "give temperatures= to capdistill.teachers.cache, with overwrite=True."
            )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"temperature={self.temperature}"

    def _temperature_at(self, progress: float) -> float:
        return scheduled(self._temperature, self.temperature, progress, positive=True)

    @property
    def _temperature(self) -> str:
        return f"{type(self).__name__}: temperature"


class TokenKD(LogitsLoss):
    """Match the student's next-token distribution to the teacher's.

    Example:
        >>> import torch
        >>> from capdistill.outputs import Batch, CaptionerOutput
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 5, 2]]), mask=torch.ones(1, 3, dtype=torch.bool),
        ...     captions=("dog",), image_ids=("a.jpg",),
        ... )
        >>> def output(scale):
        ...     return CaptionerOutput(scale * torch.eye(2, 6)[None], None, None, None, batch.mask)
        >>> loss = TokenKD(temperature=4.0)
        >>> total = loss(output(1.0), output(4.0), batch)  # sum over valid tokens
        >>> round(float(total / loss.count(batch)), 3)
        0.937

    Args:
        temperature: Softening T > 0 applied to both logits (dimensionless): a number, a pair
            (first, last) that is interpolated linearly over the run, or a function of the run's
            progress in [0, 1]. The term is scaled by T², which keeps the size of its gradient when
            T changes.

    Raises:
        ConfigError: T is not positive and finite.
        IncompatibleModels: (in `build`) the vocabularies differ; names the first differing entry.

    Source:
        Hinton, Vinyals, Dean (2015), section 2.
    """

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(teacher || student)."""
        return kl_divergence(student, teacher, batch.target_mask, temperature)

    def require_words(self, k: int, temperatures: Sequence[float]) -> None:
        """The other words are then one more entry, as in `TopKD`."""
        self._require_temperature(temperatures)

    def divergence_on_words(
        self, student: Tensor, words: TopWords, batch: Batch, temperature: float
    ) -> Tensor:
        """KL(teacher || student) on the words that there are, and all others together."""
        target = words.log_probs(temperature)
        return entries_divergence(student, words.ids, target, batch.target_mask, temperature)


def words_missing(loss: object, k: int) -> str:
    """The message about a loss that needs more than a teacher's k most probable words."""
    return (
        f"{type(loss).__name__} compares the logits of all words, but the cached teacher keeps the "
        f"{k} most probable ones. Cache it without top_k=, or use TokenKD or TopKD."
    )


def first_difference(student: Sequence[str], teacher: Sequence[str]) -> int | None:
    """Index at which two vocabularies first differ, or None; a missing entry is a difference.

    Example:
        >>> first_difference(["a", "b"], ["a", "c"]), first_difference(["a"], ["a", "b"])
        (1, 1)
        >>> first_difference(["a"], ["a"]) is None
        True
    """
    for place, (mine, theirs) in enumerate(zip(student, teacher, strict=False)):
        if mine != theirs:
            return place
    if len(student) == len(teacher):
        return None
    return min(len(student), len(teacher))


def _entry(model: ModelSpec, place: int) -> str:
    size = len(model.vocabulary)
    what = repr(model.vocabulary[place]) if place < size else "no entry"
    return f"'{model.name}' has {what} ({size} entries)"
