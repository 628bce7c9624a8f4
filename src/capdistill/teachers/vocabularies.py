"""Teachers that read for a student of another vocabulary, trimmed or different.

`for_student` chooses; `Distiller` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from capdistill.decoders.base import Decoder, DecoderState
from capdistill.errors import ConfigError, IncompatibleModels, shortened
from capdistill.generation.decode import CaptionGenerator
from capdistill.losses.divergence import full
from capdistill.losses.token import first_difference
from capdistill.outputs import Batch, CaptionerOutput, DecoderOutput, ModelSpec
from capdistill.teachers.cached import cached_parts
from capdistill.teachers.ensemble import Ensemble
from capdistill.tokenizer import Tokenizer, pad_batch

_CHUNK = 8  # captions whose logits are converted to float32 at once
_KEPT = 2**16  # captions whose ids are kept


class RetokenizingTeacher(CaptionGenerator):
    """A teacher that reads the captions of a batch with its own tokenizer.

    Its logits, hidden states and attention belong to its own tokens: (B, T' - 1, ...). Losses
    across vocabularies ("word", "universal") align them with the student's. Its features belong to
    images, as those of any teacher.

    Example:
        >>> import capdistill as cd
        >>> teacher, student = (
        ...     cd.Captioner.create(f"debug_{role}", tokenizer=cd.WordTokenizer(words))
        ...     for role, words in {"teacher": ["a", "dog"], "student": ["dog"]}.items()
        ... )
        >>> ids = torch.tensor([[1, 3, 4, 2]])
        >>> batch = Batch(
        ...     torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ids, ids > 0, ("a dog",), ("1",)
        ... )
        >>> RetokenizingTeacher(teacher).as_read(batch).input_ids.tolist()
        [[1, 4, 5, 2]]

    Args:
        teacher: A captioner of any kind.

    Raises:
        ConfigError: something else was given.
    """

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        _require_teacher("RetokenizingTeacher", teacher)
        self.retokenized = teacher
        self.tokenizer: Tokenizer = teacher.tokenizer
        self.name = str(getattr(teacher, "name", type(teacher).__name__))
        self.rereads_prefix = getattr(teacher, "rereads_prefix", False)
        self._ids: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ids": {}}

    def as_read(self, batch: Batch) -> Batch:
        """The batch with the teacher's ids of its captions."""
        ids, mask = pad_batch([self._encode(c) for c in batch.captions], self.tokenizer.pad_id)
        device = batch.input_ids.device
        return replace(batch, input_ids=ids.to(device), mask=mask.to(device))

    def _encode(self, caption: str) -> list[int]:
        if caption not in self._ids:
            if len(self._ids) >= _KEPT:
                self._ids.clear()
            self._ids[caption] = list(self.tokenizer.encode(caption))
        return self._ids[caption]

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """The teacher's outputs for its own ids of the captions; `mask` is of those."""
        own = self.as_read(batch)
        output: CaptionerOutput = self.retokenized(own, need=need)
        return replace(output, mask=own.target_mask)

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """That of the teacher, with its tokenizer."""
        own = None if batch is None else self.as_read(batch)
        theirs: ModelSpec = self.retokenized.spec(own)
        return replace(theirs, tokenizer=self.tokenizer, retokenizes=True)

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Any]:
        """That of the teacher."""
        decoding: tuple[Decoder, Any] = self.retokenized.decoding(images)
        return decoding

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images it reads."""
        size: int | None = getattr(self.retokenized, "image_size", None)
        return size


class TrimmedTeacher(CaptionGenerator):
    """A teacher as one of the student's vocabulary, which is a part of its own.

    The student's ids are mapped to the teacher's, and of its logits those of the student's entries
    are taken: softmax gives the probability of all dropped entries to these, in proportion.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "cat"])
        >>> class Trimmed(cd.WordTokenizer):
        ...     full_ids, full_vocabulary = (0, 1, 2, 3, 5), tokenizer.vocabulary
        >>> captioner = cd.Captioner.create("debug_teacher", tokenizer=tokenizer)
        >>> teacher = TrimmedTeacher(captioner, Trimmed(["dog"]))
        >>> ids = torch.tensor([[1, 4, 2]])
        >>> batch = Batch(
        ...     torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ids, ids > 0, ("dog",), ("1",)
        ... )
        >>> teacher(batch).logits.shape[-1], 0 < teacher.dropped_mass < 1
        (5, True)

    Args:
        teacher: A captioner of any kind.
        tokenizer: The student's, with `full_ids`: the teacher's id of each of its entries.

    Raises:
        IncompatibleModels: the tokenizer was not made from the teacher's vocabulary.
        ConfigError: no teacher was given, or its targets are cached, its most probable words alone.
    """

    full_ids: Tensor

    def __init__(self, teacher: Any, tokenizer: Any) -> None:
        super().__init__()
        _require_teacher("TrimmedTeacher", teacher)
        if not is_trimmed(tokenizer, teacher.tokenizer):
            raise IncompatibleModels(
                f"TrimmedTeacher: the tokenizer given is not trimmed from that of "
                f"'{getattr(teacher, 'name', 'the teacher')}'. Make it by "
                "capdistill.tokenizers.HuggingFace(teacher.tokenizer, keep=captions)."
            )
        for part in cached_parts(teacher):
            if part.top_k is not None:
                raise ConfigError(
                    f"'{part.name}' keeps its most probable words alone, some of which the "
                    "student's vocabulary lacks. Cache TrimmedTeacher(teacher, tokenizer) with "
                    "top_k=, or the teacher without it."
                )
        self.retokenized = teacher
        self.tokenizer = tokenizer
        self.name = str(getattr(teacher, "name", type(teacher).__name__))
        self.rereads_prefix = getattr(teacher, "rereads_prefix", False)
        self.register_buffer("full_ids", torch.tensor(tokenizer.full_ids), persistent=False)
        self._dropped: Tensor | None = None  # sum over tokens, and their number

    def _in_full(self, batch: Batch) -> Batch:
        return replace(batch, input_ids=_mapped(batch.input_ids, self.full_ids))

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """The teacher's outputs, with logits of the student's entries."""
        output: CaptionerOutput = self.retokenized(self._in_full(batch), need=need)
        if output.logits is None:
            return output
        self._measure(output.logits, batch.target_mask)
        return replace(output, logits=_kept(output.logits, self.full_ids))

    @torch.no_grad()
    def _measure(self, logits: Tensor, mask: Tensor) -> None:
        parts = zip(torch.split(logits, _CHUNK), torch.split(mask, _CHUNK), strict=True)
        masses = [self._mass(full(rows))[valid].sum() for rows, valid in parts]
        new = torch.stack([torch.stack(masses).sum(), mask.sum()])
        self._dropped = new if self._dropped is None else self._dropped.to(new) + new

    def _mass(self, logits: Tensor) -> Tensor:
        """(B, T) the probability of the dropped entries."""
        kept = _kept(logits, self.full_ids).logsumexp(-1)
        return -torch.expm1(kept - logits.logsumexp(-1)).clamp(max=0)

    @property
    def dropped_mass(self) -> float:
        """The mean probability of the entries that the student lacks.

        It is NaN if no token was read.
        """
        if self._dropped is None:
            return math.nan
        total, count = self._dropped.tolist()
        return total / count if count else math.nan

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """That of the teacher, with the student's vocabulary."""
        whole: ModelSpec = self.retokenized.spec(None if batch is None else self._in_full(batch))
        return replace(whole, vocabulary=self.tokenizer.vocabulary)

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Any]:
        """The teacher's decoder with the student's ids and entries, and what it reads."""
        decoder, features = self.retokenized.decoding(images)
        return _TrimmedDecoder(decoder, self.full_ids), features

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images it reads."""
        size: int | None = getattr(self.retokenized, "image_size", None)
        return size


def _require_teacher(owner: str, teacher: object) -> None:
    if not isinstance(teacher, nn.Module) or not hasattr(teacher, "tokenizer"):
        raise ConfigError(
            f"{owner}: {shortened(teacher)} was given as the teacher. Give a captioner, an "
            "ensemble, or capdistill.teachers.load(directory), wrap(...) or from_pretrained(name)."
        )


class _TrimmedDecoder(Decoder):
    """Another decoder, on some of its entries."""

    def __init__(self, decoder: Decoder, full_ids: Tensor) -> None:
        super().__init__()
        self.decoder, self.full_ids = decoder, full_ids
        self.vocabulary, self.has_attention = len(full_ids), decoder.has_attention

    def build_vocabulary(self, vocabulary: int) -> None:
        """Do nothing: the vocabulary is the student's."""

    def forward(
        self, input_ids: Tensor, features: Any, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """As the other one."""
        output: DecoderOutput = self.decoder(_mapped(input_ids, self.full_ids), features, need)
        return replace(output, logits=_kept(output.logits, self.full_ids))

    def start(self, features: Any) -> DecoderState:
        """As the other one."""
        return self.decoder.start(features)

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """As the other one."""
        logits, state = self.decoder.step(_mapped(tokens, self.full_ids), state)
        return _kept(logits, self.full_ids), state


def _mapped(ids: Tensor, full_ids: Tensor) -> Tensor:
    """The student's ids as the teacher's, where a placed teacher reads them."""
    return full_ids.to(ids.device)[ids]


def _kept(logits: Tensor, full_ids: Tensor) -> Tensor:
    """The logits of the student's entries."""
    return logits.index_select(-1, full_ids.to(logits.device))


def is_trimmed(student: Any, teacher: Tokenizer) -> bool:
    """Whether the entries of a tokenizer are some of the other's, under ids that it maps."""
    ids, entries = getattr(student, "full_ids", None), getattr(student, "full_vocabulary", None)
    if ids is None or entries is None:
        return False
    same = first_difference(tuple(entries), tuple(teacher.vocabulary)) is None
    names = ("start_id", "end_id")
    return same and all(ids[getattr(student, n)] == getattr(teacher, n) for n in names)


def for_student(teacher: Any, student: Any) -> Any:
    """The teacher as it reads for a student; itself if both have one vocabulary.

    For a trimmed vocabulary it is a `TrimmedTeacher`, which may teach by any loss; for any other
    one it is a `RetokenizingTeacher`. The members of an ensemble are wrapped one by one.

    Args:
        teacher: A captioner of any kind, an ensemble, or None.
        student: The captioner that is trained.
    """
    if isinstance(teacher, Ensemble):
        members = {n: for_student(member, student) for n, member in teacher.members.items()}
        if all(member is teacher.members[name] for name, member in members.items()):
            return teacher
        return Ensemble(members, teacher.weights, teacher.mixing, name=teacher.name)
    mine, theirs = (getattr(each, "tokenizer", None) for each in (student, teacher))
    if mine is None or theirs is None:
        return teacher
    if isinstance(teacher, (TrimmedTeacher, RetokenizingTeacher)):
        return teacher
    if first_difference(tuple(mine.vocabulary), tuple(theirs.vocabulary)) is None:
        return teacher
    if is_trimmed(mine, theirs):
        return TrimmedTeacher(teacher, mine)
    return RetokenizingTeacher(teacher)


class DroppedMass:
    """Callback that writes into each epoch's row how much probability trimmed teachers lose.

    `row["dropped_mass"]` is the mean probability that a teacher gives to entries that the student's
    vocabulary lacks, over the targets that it has read in the epoch.

    Args:
        teachers: By name.
    """

    def __init__(self, teachers: Sequence[TrimmedTeacher]) -> None:
        self.teachers, self._resumed = teachers, False

    def on_fit_start(self, trainer: object) -> None:
        """Forget what was read before the run, unless it is continued."""
        for teacher in () if self._resumed else self.teachers:
            teacher._dropped = None

    def on_epoch(self, trainer: object, row: dict[str, Any]) -> None:
        """Add the number, and begin anew."""
        totals = [teacher._dropped for teacher in self.teachers if teacher._dropped is not None]
        if totals:
            total, count = torch.stack([each.cpu() for each in totals]).sum(0).tolist()
            row["dropped_mass"] = total / count if count else math.nan
        for teacher in self.teachers:
            teacher._dropped = None

    def state_dict(self) -> dict[str, Any]:
        """The sums since the epoch began."""
        return {"dropped": [each._dropped for each in self.teachers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there."""
        self._resumed = True
        for teacher, dropped in zip(self.teachers, state["dropped"], strict=False):
            teacher._dropped = dropped


def trimmed_parts(model: nn.Module | None) -> list[TrimmedTeacher]:
    """The trimmed teachers in a model."""
    parts: Iterator[nn.Module] = iter(()) if model is None else model.modules()
    return [part for part in parts if isinstance(part, TrimmedTeacher)]


def with_dropped_mass(callbacks: Sequence[Any], teacher: nn.Module | None) -> list[Any]:
    """The callbacks, behind that of trimmed teachers if there are any."""
    parts = trimmed_parts(teacher)
    return [*([DroppedMass(parts)] if parts else []), *callbacks]


def share_dropped_mass(event: str, teacher: nn.Module | None, ranks: Any) -> None:
    """Of several processes, add up what was read at the end of an epoch, for the callback.

    Args:
        event: Method of the callbacks that is called next.
        teacher: Of this process.
        ranks: The processes.
    """
    for part in trimmed_parts(teacher) if event in ("on_fit_start", "on_epoch") else ():
        if event == "on_epoch":
            own = [0.0, 0.0] if part._dropped is None else part._dropped.tolist()
            whole = torch.tensor(ranks.total(own))
            part._dropped = whole if ranks.main else None
        elif not ranks.main:
            part._dropped = None
