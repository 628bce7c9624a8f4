"""Losses on words between models of different vocabularies."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.losses.aligned import WordLogits, sorted_distance, word_divergence
from capdistill.losses.alignment import AlignedWords, Context, Side, Units, WordAlignment
from capdistill.losses.base import Schedule, given, require_specs
from capdistill.losses.divergence import kl_divergence
from capdistill.losses.token import LogitsLoss, first_difference
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec, places

ALIGN = ("word", "position")


class AlignedLoss(LogitsLoss):
    """Base class of losses on words whose teacher may have another vocabulary.

    The teacher then reads the same captions with its own tokenizer; see
    `capdistill.teachers.RetokenizingTeacher`. Words that begin at the same character are compared,
    and counted. Where both vocabularies are equal, every valid token is compared.
    """

    across_vocabularies = True
    alignment: WordAlignment | None = None

    def build(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Align the tokenizers, if the vocabularies differ.

        Raises:
            ConfigError: a tokenizer cannot say which characters its tokens cover.
            IncompatibleModels: the teacher reads the student's ids.
        """
        require_specs(type(self).__name__, student=student, teacher=teacher)
        if first_difference(student.vocabulary, teacher.vocabulary) is None:
            return
        if not teacher.retokenizes or student.tokenizer is None:
            raise IncompatibleModels(
                f"{type(self).__name__}: '{student.name}' and '{teacher.name}' have different "
                "vocabularies, but the teacher reads the student's ids. Give it as "
                "capdistill.teachers.RetokenizingTeacher(teacher), as Distiller does."
            )
        self.alignment = WordAlignment(student.tokenizer, teacher.tokenizer)

    def count(self, batch: Batch) -> float:
        """The number of positions that are compared."""
        if self.alignment is None:
            return super().count(batch)
        return float(len(self._positions(self.alignment, batch)[0]))

    def forward(self, student: CaptionerOutput, teacher: CaptionerOutput, batch: Batch) -> Tensor:
        """The sum over the positions that are compared."""
        name = type(self).__name__
        ours = given(name, "logits", "student", student.logits)  # (B, T, V)
        theirs = given(name, "logits", "teacher", teacher.logits)  # (B, T', V')
        now = self._temperature_at(self.progress)
        if self.alignment is None:
            return self.divergence(ours, theirs, batch, now)
        return self.aligned(self.alignment, ours, theirs, batch, now)

    @abstractmethod
    def aligned(
        self,
        alignment: WordAlignment,
        student: Tensor,
        teacher: Tensor,
        batch: Batch,
        temperature: float,
    ) -> Tensor:
        """The sum where student (B, T, V) and teacher (B, T', V') have different vocabularies."""

    def _positions(self, alignment: WordAlignment, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(n,) captions, and the positions in the student's and the teacher's targets."""
        words = alignment.of(batch)
        return words.student.rows, words.student.places, words.teacher.places


class WordKD(AlignedLoss):
    """Match the student's distribution of the next word to that of a teacher of any vocabulary.

    The models are compared wherever a word begins at the same character for both. The classes are
    all words that are one token in both vocabularies, a rest, and the word that stands in the
    caption: if it has several tokens, its probability is the product of those of its tokens. Upper
    and lower case are one class for a student that does not tell them apart. What a caption has
    beside words, such as a full stop that the student does not write, is not compared.

    With one vocabulary it is `TokenKD`. The term is scaled by T² and counts words.

    Example:
        >>> WordKD(temperature=2.0)
        WordKD(temperature=2.0)

    Args:
        temperature: Softening T > 0 of the distributions of words: a number, a pair (first, last)
            that is interpolated linearly over the run, or a function of the run's progress in
            [0, 1].

    Raises:
        ConfigError: T is not positive and finite, or a tokenizer has no `encode_spans`.
        IncompatibleModels: (in `build`) the teacher does not read the captions itself.

    Source:
        Minixhofer, Vulić, Ponti (2025), Universal Cross-Tokenizer Distillation via Approximate
        Likelihood Matching, section 3, on words in place of chunks; Hinton, Vinyals, Dean (2015),
        section 2, for the divergence.
    """

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """As `TokenKD`: T² times KL(teacher || student)."""
        return temperature**2 * kl_divergence(student, teacher, batch.target_mask, temperature)

    def aligned(
        self,
        alignment: WordAlignment,
        student: Tensor,
        teacher: Tensor,
        batch: Batch,
        temperature: float,
    ) -> Tensor:
        """T² times KL(teacher || student) on words."""
        words = alignment.of(batch)
        sums = [
            self._in_context(number, context, words, student, teacher, temperature)
            for number, context in enumerate(alignment.contexts)
        ]
        return temperature**2 * torch.stack(sums).sum()

    def _in_context(
        self,
        number: int,
        context: Context,
        words: AlignedWords,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
    ) -> Tensor:
        """The sum over the first words of captions, or over the others."""
        chosen = words.contexts == number
        mine = _chosen(student, words.student, context.student, chosen)
        theirs = _chosen(teacher, words.teacher, context.teacher, chosen)
        own, rest = words.classes[chosen], context.student.rest and context.teacher.rest
        return word_divergence(mine, theirs, own, context.size, temperature, rest)


def _chosen(logits: Tensor, side: Side, units: Units, chosen: Tensor) -> WordLogits:
    """A model's logits (B, T, V) at some of the aligned words, (n,) bool."""
    length, number = logits.shape[1], chosen.cumsum(0) - 1
    chain = side.chain[chosen[side.chain[:, 0]]]
    word, row, place, token = chain.unbind(1)
    return WordLogits(
        logits=logits.flatten(0, 1),
        rows=(side.rows * length + side.places)[chosen],
        first=side.ids[chosen],
        moves=side.moves[chosen],
        chain=torch.stack([number[word], row * length + place, token], 1),
        ids=units.ids.to(logits.device),
        classes=units.classes.to(logits.device),
    )


class UniversalKD(AlignedLoss):
    """Match the sorted probabilities of the next token, whatever the vocabularies are.

    The student learns how certain the teacher is, and how its probability is spread over the best
    entries, not which these are: the cross-entropy, or another loss, must tell it. It is the
    Wasserstein-1 distance for a uniform cost. The term is scaled by T and counts positions.

    Example:
        >>> UniversalKD(align="position")
        UniversalKD(align='position', temperature=1.0)

    Args:
        align: Which positions are compared, where the vocabularies differ: "word", where a word
            begins at the same character for both models; or "position", the first with the first,
            and so on up to the length of the shorter one, as published.
        temperature: Softening T > 0: a number, a pair (first, last) that is interpolated linearly
            over the run, or a function of the run's progress in [0, 1].

    Raises:
        ConfigError: `align` is neither, or T is not positive and finite.
        IncompatibleModels: (in `build`) the teacher does not read the captions itself.

    Source:
        Boizard et al. (2024), Towards Cross-Tokenizer Distillation: the Universal Logit
        Distillation Loss for LLMs. The temperature, and positions by words, are ours.
    """

    def __init__(
        self, align: Literal["word", "position"] = "word", temperature: Schedule = 1.0
    ) -> None:
        super().__init__(temperature)
        if align not in ALIGN:
            raise ConfigError(
                f"UniversalKD: align={align!r} is unknown. {suggest(str(align), ALIGN)}"
            )
        self.align = align

    def _positions(self, alignment: WordAlignment, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        if self.align == "word":
            return super()._positions(alignment, batch)
        return alignment.side_by_side(batch)

    def divergence(
        self, student: Tensor, teacher: Tensor, batch: Batch, temperature: float
    ) -> Tensor:
        """T times the distance, at every valid token."""
        valid = places(batch.target_mask)
        return temperature * self._distance(student, teacher, valid, valid, temperature)

    def aligned(
        self,
        alignment: WordAlignment,
        student: Tensor,
        teacher: Tensor,
        batch: Batch,
        temperature: float,
    ) -> Tensor:
        """T times the distance at aligned positions."""
        rows, mine, theirs = self._positions(alignment, batch)
        mine, theirs = rows * student.shape[1] + mine, rows * teacher.shape[1] + theirs
        return temperature * self._distance(student, teacher, mine, theirs, temperature)

    def _distance(
        self, student: Tensor, teacher: Tensor, mine: Tensor, theirs: Tensor, temperature: float
    ) -> Tensor:
        rows = student.flatten(0, 1)[mine]
        return sorted_distance(rows, teacher.flatten(0, 1), theirs, temperature)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"align={self.align!r}, {super().extra_repr()}"
