"""Several captioners as one: the mixture of their distributions at every word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.decoders.base import Decoder
from capdistill.errors import (
    CheckpointError,
    ConfigError,
    IncompatibleModels,
    as_float,
    shortened,
    suggest,
)
from capdistill.files import user_path
from capdistill.generation.decode import CaptionGenerator
from capdistill.losses.divergence import full
from capdistill.losses.token import first_difference
from capdistill.outputs import LOGITS, Batch, CaptionerOutput, ModelSpec, select_images
from capdistill.runtime import SAFE_SEED, stable_hash
from capdistill.saving import ENSEMBLE, PRETRAINED
from capdistill.teachers.cached import CachedTeacher, is_cached
from capdistill.teachers.directory import HUB, is_pretrained, read, read_pretrained, write
from capdistill.teachers.mixing import EnsembleDecoder, EnsembleFeatures, mixture
from capdistill.tokenizer import Tokenizer

Mixing: TypeAlias = Literal["fixed", "confidence", "draw"]
Needs: TypeAlias = Mapping[str, frozenset[str]]


class Ensemble(CaptionGenerator):
    """Several captioners with one vocabulary as one model, a teacher or any other captioner.

    At every word its distribution is the weighted mean of those of its members, in probabilities:
    `p(word) = sum_m w_m p_m(word)`, computed in float32 log space.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> large, small = (cd.Captioner.create(f"debug_{role}", tokenizer=tokenizer)
        ...                 for role in ("teacher", "student"))
        >>> ensemble = Ensemble({"large": large, "small": small}, weights=[3, 1])
        >>> ensemble.name, ensemble.weights
        ('ensemble of 2: large, small', {'large': 0.75, 'small': 0.25})
        >>> isinstance(ensemble.caption(torch.zeros(3, 64, 64, dtype=torch.uint8)), str)
        True

    Args:
        members: Captioners, wrapped captioners or ensembles: a list, or a mapping from the names by
            which losses choose one of them. In a list, members have their own names.
        weights: One number >= 0 per member, in their order, or by name; they are normalised to a
            sum of 1. Equal by default. A member of weight 0 is no part of the mixture.
        mixing: "fixed": these weights at every word. "confidence": at every word
            `w_m exp(-H_m) / sum_n w_n exp(-H_n)`, with the entropy H_m (nats) of the member's
            distribution there; a member that is certain counts more. "draw": in training, one
            member for each image and epoch, drawn with these weights; a function of seed, epoch
            and image id. Captions, and the losses of validation, are those of the fixed mixture.
        name: Name of the model in messages and reports.

    Raises:
        ConfigError: no member, something else than a captioner, or invalid weights.
        IncompatibleModels: the vocabularies differ; names the first differing entry.

    Source:
        Hinton, Vinyals, Dean (2015), section 2, for the mean of the members' distributions; Kwon,
        Na, Lee, Kim (2020), "Adaptive knowledge distillation based on entropy", for larger weights
        of members with lower entropy (the exponential form is ours); Fukuda et al. (2017),
        "Efficient knowledge distillation from an ensemble of teachers", for one teacher at a time
        (they draw one per mini-batch).
    """

    def __init__(
        self,
        members: Mapping[str, nn.Module] | Sequence[nn.Module],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        mixing: Mixing = "fixed",
        *,
        name: str | None = None,
    ) -> None:
        super().__init__()
        named = _named(members)
        if mixing not in get_args(Mixing):
            hint = suggest(str(mixing), get_args(Mixing))
            raise ConfigError(f"Ensemble: mixing={mixing!r} is unknown. {hint}")
        self._names, self._members = tuple(named), nn.ModuleList(named.values())
        self.tokenizer: Tokenizer = _one_vocabulary(named)
        self.weights, self.mixing = _normalised(weights, self._names), mixing
        self.name = name or f"ensemble of {len(named)}: {', '.join(named)}"
        self.rereads_prefix = any(member.rereads_prefix for member in named.values())

    def __repr__(self) -> str:
        weights = ", ".join(f"{name} {weight:.3g}" for name, weight in self.weights.items())
        return (
            f"Ensemble '{self.name}': mixing {self.mixing} ({weights}), "
            f"{len(self.tokenizer.vocabulary):,} vocabulary entries, "
            f"{self.num_parameters():,} parameters"
        )

    @property
    def members(self) -> dict[str, CaptionGenerator]:
        """The members by name."""
        return dict(zip(self._names, self._members, strict=True))  # type: ignore[arg-type]

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """The mixture's logits, which are log-probabilities, aligned with `batch.targets`.

        Args:
            batch: B = I * k captions.
            need: Of several members there are no common features, hidden states or attention;
                `outputs` gives those of each.

        Raises:
            ConfigError: `need` names something that only a member has.
        """
        if len(self._names) == 1:
            output: CaptionerOutput = self._members[0](batch, need=need)
            return replace(output, members=None)
        if need - LOGITS:
            raise ConfigError(
                f"'{self.name}' has no {', '.join(sorted(need - LOGITS))} of its own. Name the "
                f'member to read: {{"name": ..., "teacher": "{self._names[0]}"}} in a loss '
                f"(members: {', '.join(self._names)})."
            )
        return self.outputs(batch, {})

    def outputs(
        self, batch: Batch, needs: Needs, mixed: bool = True, draw: tuple[int, int] | None = None
    ) -> CaptionerOutput:
        """The mixture, and with it the outputs of members; each member runs at most once.

        Args:
            batch: B = I * k captions.
            needs: Member -> what is needed of it, beside what the mixture needs.
            mixed: Whether the mixture is needed; otherwise logits are None.
            draw: Seed and epoch of a draw, where mixing is "draw"; None is the fixed mixture.

        Raises:
            ConfigError: there is no such member.
        """
        for name in needs.keys() - set(self._names):
            raise ConfigError(f"There is no teacher '{name}'. {suggest(name, self._names)}")
        drawn = draw if mixed and self.mixing == "draw" else None
        in_mixture = {n for n in self._names if self.weights[n] and mixed and drawn is None}
        found: dict[str, CaptionerOutput] = {}
        for name, member in self.members.items():
            need = needs.get(name, frozenset()) | (LOGITS if name in in_mixture else frozenset())
            if need:
                found[name] = member(batch, need=need)
        logits = None
        if drawn is not None:
            logits = self._drawn(batch, found, drawn)
        elif mixed:
            logits = self.mix([_logits(found, n) for n in self._names if n in in_mixture])
        mask = self.as_read(batch).target_mask
        return CaptionerOutput(logits=logits, mask=mask, members=found)

    def mix(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits (..., V) of the members with a weight to log-probabilities of the mixture."""
        weights = [weight for weight in self.weights.values() if weight]
        return mixture(logits, weights, by_confidence=self.mixing == "confidence")

    def _drawn(
        self, batch: Batch, found: Mapping[str, CaptionerOutput], draw: tuple[int, int]
    ) -> Tensor:
        """(B, T, V) logits, those of each image from the member that is drawn for it."""
        k = batch.captions_per_image
        chosen = [self._draw(*draw, image_id) for image_id in batch.image_ids]
        order: list[int] = []
        parts: list[Tensor] = []
        for name in dict.fromkeys(chosen):
            images = [image for image, each in enumerate(chosen) if each == name]
            rows = [image * k + caption for image in images for caption in range(k)]
            if name in found and found[name].logits is not None:
                parts.append(full(_logits(found, name)[rows]))
            else:
                output = self.members[name](select_images(batch, images), need=LOGITS)
                parts.append(full(_logits({name: output}, name)))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]

    def _draw(self, seed: int, epoch: int, image_id: str) -> str:
        """The member for an image in an epoch."""
        uniform = stable_hash("member", seed, epoch, image_id) / SAFE_SEED
        ends = itertools.accumulate(self.weights.values())
        below = (n for n, end in zip(self._names, ends, strict=True) if uniform < end)
        last = [n for n in self._names if self.weights[n]][-1]  # the sum may be 1 - eps
        return next(below, last)

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, EnsembleFeatures]:
        """A decoder that runs those of the members side by side, and the features of each."""
        used = [member for name, member in self.members.items() if self.weights[name]]
        decoders, features = zip(*(member.decoding(images) for member in used), strict=True)
        decoder = EnsembleDecoder(decoders, self.mix, len(self.tokenizer.vocabulary))
        return decoder, EnsembleFeatures(features)

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification: that of a single member; of several, the vocabulary alone."""
        if len(self._names) == 1:
            return replace(self.members[self._names[0]].spec(batch), name=self.name)
        first, words = self.members[self._names[0]], self.tokenizer
        reads = type(first).as_read is not CaptionGenerator.as_read
        about = (words.vocabulary, False, self.name, words, reads)
        return ModelSpec(None, None, 0, None, (), *about)

    def as_read(self, batch: Batch) -> Batch:
        """The batch with the ids that the members read."""
        return self.members[self._names[0]].as_read(batch)

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the largest images that a member reads; each resizes them itself."""
        return max(member.image_size or 0 for member in self.members.values()) or None

    def save(self, directory: str | Path) -> None:
        """Write every member to a directory within, then ensemble.json, which lists them.

        The old ensemble in the directory, or the new one, is complete at any time.

        Raises:
            ConfigError: a member cannot be saved (a wrapped captioner cannot), or the directory
                cannot be written or holds something else.
        """
        for name, member in self.members.items():
            if not callable(getattr(member, "save", None)):
                raise ConfigError(
                    f"Ensemble.save: '{name}' is a wrapped captioner, which no file describes. "
                    "Save the others, and build the ensemble again around it."
                )
        about = {"name": self.name, "mixing": self.mixing, "weights": list(self.weights.values())}
        write(user_path(directory), self.members, about)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        device: str | torch.device = "cpu",
    ) -> Ensemble:
        """Read what `save` wrote, without a hub or pickle.

        Args:
            directory: As given to `save`.
            tokenizer: The members' tokenizer, unless it is in the directory.
            device: Device of the loaded model.

        Raises:
            CheckpointError: a file is missing, damaged, or does not fit.
        """
        about, directories = read(user_path(directory, CheckpointError))
        members = {name: load(place, tokenizer=tokenizer) for name, place in directories.items()}
        try:
            return cls(members, **about).to(device).eval()
        except ConfigError as error:
            raise CheckpointError(f"{directory} does not hold an ensemble: {error}") from error


def load(
    directory: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device = "cpu",
) -> Captioner | Ensemble | CachedTeacher | CaptionGenerator:
    """A saved captioner or ensemble, or cached targets of one; of several, an ensemble.

    A directory of Hugging Face transformers, "hf:" before a name on the Hub, and what
    `HuggingFaceTeacher.save` wrote give what `from_pretrained` makes of it.

    Example:
        >>> import tempfile, capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cd.Captioner.create("debug_student", tokenizer=tokenizer).save(folder)
        ...     load(folder).name
        'debug_student'

    Args:
        directory: One, a list, or a mapping from the names of the members.
        tokenizer: As in `Captioner.load`.
        device: Device of the loaded model.

    Raises:
        CheckpointError: it holds neither, or one that is damaged.
        IncompatibleModels: several with different vocabularies.
    """
    how: Any = {"tokenizer": tokenizer, "device": device}
    if isinstance(directory, Mapping):
        return Ensemble({name: load(place, **how) for name, place in directory.items()})
    if isinstance(directory, Sequence) and not isinstance(directory, (str, bytes)):
        return Ensemble([load(place, **how) for place in directory])
    path, named = user_path(directory, CheckpointError), is_pretrained(directory)
    if named or (path / PRETRAINED).is_file():
        from capdistill.teachers.huggingface.loading import from_pretrained

        by_name = {"name_or_path_or_module": str(directory).removeprefix(HUB)}
        arguments = by_name if named else read_pretrained(path)
        teacher = from_pretrained(**arguments)
        return teacher if "device_map" in arguments else teacher.to(device)
    if is_cached(path):
        return CachedTeacher(path, tokenizer).to(device)
    several = (path / ENSEMBLE).is_file()
    cls: type[Captioner | Ensemble] = Ensemble if several else Captioner
    return cls.load(directory, **how)


def leaves(model: nn.Module) -> list[nn.Module]:
    """The captioners of an ensemble, those of ensembles within it too; any other model itself.

    In place of a teacher that reads for a student with another vocabulary it is the teacher within.
    """
    within = getattr(model, "retokenized", None)
    if isinstance(within, nn.Module):
        return leaves(within)
    if not isinstance(model, Ensemble):
        return [model]
    return [leaf for member in model.members.values() for leaf in leaves(member)]


def _named(members: Any) -> dict[str, CaptionGenerator]:
    if isinstance(members, Mapping):
        named = dict(members)
    elif isinstance(members, Sequence) and not isinstance(members, str):
        named = {}
        for member in members:
            name = str(getattr(member, "name", type(member).__name__))
            free = (f"{name}-{number}" for number in itertools.count(2))
            named[next(free) if name in named else name] = member
    else:
        named = {}
    if not named:
        raise ConfigError(
            f"Ensemble: {shortened(members)} was given. Give a list of captioners, or a mapping "
            'such as {"large": teacher, "small": other}.'
        )
    for name, member in named.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"Ensemble: {name!r} is not the name of a member; expected text.")
        if not isinstance(member, CaptionGenerator):
            raise ConfigError(
                f"Ensemble: '{name}' is {type(member).__name__}. Give a capdistill.Captioner, an "
                "Ensemble, or capdistill.teachers.wrap(model, adapt, tokenizer)."
            )
        if isinstance(member, Ensemble) and member.mixing == "draw":
            raise ConfigError(
                f"Ensemble: '{name}' is an ensemble with mixing='draw', which must be the whole "
                "teacher. Give its members to this ensemble, or give it another mixing."
            )
    return named


def _one_vocabulary(members: Mapping[str, CaptionGenerator]) -> Tokenizer:
    """The tokenizer of the first member, once the others are known to read and write its ids."""
    (first, reference), *others = members.items()
    ours = reference.tokenizer
    for name, member in others:
        theirs = member.tokenizer
        place = first_difference(ours.vocabulary, theirs.vocabulary)
        if place is not None:
            mine, other = (
                repr(each[place]) if place < len(each) else "no entry"
                for each in (ours.vocabulary, theirs.vocabulary)
            )
            raise IncompatibleModels(
                f"Ensemble: the vocabularies differ at entry {place}: '{first}' has {mine} "
                f"({len(ours.vocabulary)} entries), '{name}' has {other} "
                f"({len(theirs.vocabulary)} entries). {_one_tokenizer(ours, theirs)}"
            )
        for special in ("start_id", "end_id"):
            if getattr(ours, special) != getattr(theirs, special):
                raise IncompatibleModels(
                    f"Ensemble: {special} is {getattr(ours, special)} in '{first}' but "
                    f"{getattr(theirs, special)} in '{name}'. Train all members with one tokenizer."
                )
    return ours


def _one_tokenizer(*both: Any) -> str:
    """How two members come to one vocabulary; one may be trimmed from that of the other."""
    for one, other in (both, both[::-1]):
        if tuple(getattr(one, "full_vocabulary", ())) == tuple(other.vocabulary):
            return "Give the larger one as capdistill.teachers.TrimmedTeacher(teacher, tokenizer)."
    return "Train all members with one tokenizer."


def _normalised(weights: Any, names: Sequence[str]) -> dict[str, float]:
    """Weights by member, with a sum of 1."""
    if weights is None:
        weights = [1.0] * len(names)
    listed: list[Any] = []
    if isinstance(weights, Mapping):
        for name in weights.keys() - set(names):
            raise ConfigError(f"Ensemble: weights name '{name}'. {suggest(str(name), names)}")
        listed = [weights.get(name) for name in names]
    elif isinstance(values := getattr(weights, "tolist", lambda: weights)(), Sequence):
        listed = [] if isinstance(values, str) else list(values)  # arrays and tensors too
    numbers = [as_float(weight) for weight in listed]
    fits = len(numbers) == len(names) and all(0 <= weight < math.inf for weight in numbers)
    if not fits or not 0 < sum(numbers) < math.inf:
        raise ConfigError(
            f"Ensemble: weights are {shortened(weights)} for {len(names)} members "
            f"({', '.join(names)}). Give each a finite number >= 0, at least one of them > 0."
        )
    return {name: w / sum(numbers) for name, w in zip(names, numbers, strict=True)}


def _logits(found: Mapping[str, CaptionerOutput], name: str) -> Tensor:
    logits = found[name].logits
    if logits is None:
        raise IncompatibleModels(f"'{name}' gives no logits, which the mixture needs.")
    return logits
