"""Checks that a model matches its specification, and that two models fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, IncompatibleModels, suggest
from capdistill.losses.alignment import WordAlignment
from capdistill.losses.base import DistillationLoss
from capdistill.losses.token import ACROSS_VOCABULARIES, first_difference
from capdistill.outputs import LOGITS, Batch, CaptionerOutput, ModelSpec, TopWords
from capdistill.runtime import inference
from capdistill.tokenizer import pad_batch

Needs: TypeAlias = Mapping[str | None, frozenset[str]]  # of each teacher by name; None: as a whole


def image_size(*models: Any) -> int:
    """Side in pixels of the images to load: the largest that a model or its encoder reads, or 224.

    Each model downsizes the images itself.
    """
    parts = [part for model in models for part in (model, getattr(model, "encoder", None))]
    sizes = [getattr(part, "image_size", None) for part in parts]
    return max((int(size) for size in sizes if size), default=224)


def probe_batch(captioner: Captioner, models: Iterable[nn.Module]) -> Batch:
    """Two grey images with two captions each, of two lengths, at the size the models share."""
    size = image_size(*models)
    tokenizer = captioner.tokenizer
    words = [tokenizer.start_id, *[len(tokenizer.vocabulary) - 1] * 2, tokenizer.end_id]
    ids, mask = pad_batch([words, words[1:], words[1:], words], tokenizer.pad_id)
    return Batch(
        images=torch.full((2, 3, size, size), 127, dtype=torch.uint8),
        input_ids=ids,
        mask=mask,
        captions=("",) * 4,
        image_ids=("0", "1"),
    )


def checked_forward(model: Any, batch: Batch, needed: frozenset[str]) -> CaptionerOutput:
    """A model's output for a batch, on the CPU, once its shapes are checked.

    Runs in evaluation mode without gradients; flags, buffers and random state do not change.

    Raises:
        IncompatibleModels: the output is not as in the model's specification.
    """
    batch = as_read(model, batch).to(device_of(model))
    with inference(model, fork_rng=True):
        output: CaptionerOutput = model(batch, need=needed)
    spec = model.spec(batch)
    required = needed or LOGITS
    if not spec.has_attention:  # FeatureKD("auto") works without it
        required -= {"attention"}
    require_output(f"'{spec.name}' gives", output, batch, required, len(spec.vocabulary), spec)
    return output_to(output, torch.device("cpu"))


def as_read(model: Any, batch: Batch) -> Batch:
    """The batch with the ids that a model reads: a teacher may encode the captions itself."""
    reads = getattr(model, "as_read", None)
    return batch if reads is None else cast(Batch, reads(batch))


def require_output(
    source: str,
    output: object,
    batch: Batch,
    needed: Set[str],
    vocabulary: int,
    spec: ModelSpec | None = None,
) -> None:
    """Compare every shape of an output with the batch, the vocabulary and the specification.

    Example:
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 5, 2]]), mask=torch.ones(1, 3, dtype=torch.bool),
        ...     captions=("dog",), image_ids=("a.jpg",),
        ... )
        >>> output = CaptionerOutput(logits=torch.zeros(1, 2, 6))
        >>> require_output("theirs: adapt returned", output, batch, {"logits"}, vocabulary=6)

    Args:
        source: Beginning of the messages, such as "theirs: adapt returned".
        output: The returned value; it must be a `CaptionerOutput`.
        batch: The input.
        needed: Fields that must not be None.
        vocabulary: V, the number of entries.
        spec: Number of tokens and widths, if known.

    Raises:
        IncompatibleModels: names what was given, the expected shape and its meaning.
    """
    if not isinstance(output, CaptionerOutput):
        raise IncompatibleModels(
            f"{source} {type(output).__name__}, but must return a CaptionerOutput."
        )
    for what in sorted(needed):
        if not output.gives(what):
            raise IncompatibleModels(
                f"{source} None for {what}, which is needed.\n"
                f"Return CaptionerOutput(..., {what}=...), or remove the loss that needs it."
            )
    rows, length = batch.targets.shape
    tokens, width = (spec.tokens, spec.feature_dim) if spec else (None, None)
    if output.features is not None and tokens is None and output.features.ndim == 3:
        tokens = output.features.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int | None, ...]]] = {
        "logits": (output.logits, (rows, length, vocabulary)),
        "mask": (output.mask, (rows, length)),
        "features": (output.features, (batch.num_images, tokens, width)),
        "attention": (output.attention, (rows, length, tokens)),
    }
    hidden = output.hidden
    widths = spec.hidden_dims if spec else (None,) * len(hidden or ())
    if hidden is not None and len(hidden) != len(widths):
        raise IncompatibleModels(
            f"{source} {len(hidden)} hidden states, but the spec has {len(widths)}. "
            "Return one per layer, then the input of the vocabulary projection."
        )
    for place, layer in enumerate(hidden or ()):
        expected[f"hidden[{place}]"] = (layer, (rows, length, widths[place]))
    for what, (value, shape) in expected.items():
        if value is not None:
            _require_shape(source, what, value, shape)


_MEANING = {
    "logits": "captions, target positions (batch.targets), entries of tokenizer.vocabulary",
    "mask": "captions, target positions; return batch.target_mask or leave it out",
    "features": "images (not captions), visual tokens, width",
    "attention": "captions, target positions, visual tokens",
    "hidden": "captions, target positions, width",
}


def _require_shape(source: str, what: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    """None in `shape` matches any size."""
    found = tuple(value.shape)
    fits = len(found) == len(shape)
    if fits and all(size in (None, given) for size, given in zip(shape, found, strict=True)):
        return
    shown = ", ".join("any" if size is None else str(size) for size in shape)
    raise IncompatibleModels(
        f"{source} {what} of shape {found}, but this batch needs ({shown}): "
        f"{_MEANING[what.split('[')[0]]}. Fix the model's output, or its specification."
    )


def build_losses(
    losses: Sequence[DistillationLoss],
    student: ModelSpec,
    teachers: Mapping[str | None, ModelSpec],
) -> None:
    """Build losses whose models fit: vocabularies are equal where words are compared by position.

    Raises:
        IncompatibleModels: names the first entry that differs, and what to do.
    """
    _require_one_vocabulary(losses, student, teachers, frozenset({"features", "attention"}))
    for loss in losses:
        loss.build(student, teachers[loss.teacher])
    _require_one_vocabulary(losses, student, teachers, frozenset({"features"}))


def _require_one_vocabulary(
    losses: Sequence[DistillationLoss],
    student: ModelSpec,
    teachers: Mapping[str | None, ModelSpec],
    harmless: frozenset[str],
) -> None:
    for loss in losses:
        if not loss.from_teacher or loss.across_vocabularies or not loss.needs - harmless:
            continue
        teacher = teachers[loss.teacher]
        place = first_difference(student.vocabulary, teacher.vocabulary)
        if place is not None:
            mine, theirs = (_entry(spec, place) for spec in (student, teacher))
            raise IncompatibleModels(
                f"{type(loss).__name__}: the vocabularies differ at entry {place}: "
                f"'{student.name}' has {mine}, '{teacher.name}' has {theirs}. Different words "
                f"would be compared. {ACROSS_VOCABULARIES} "
                f"{recommended(student.tokenizer, teacher.tokenizer).text}"
            )


ENOUGH_WORDS = 0.5  # share of the words that must be aligned to learn from them


class Advice(NamedTuple):
    """A way of learning between two vocabularies.

    Args:
        loss: Name of the loss, or None for captions of the teacher.
        text: What is recommended, and why.
    """

    loss: str | None
    text: str


def recommended(student: Any, teacher: Any, captions: Sequence[str] = ()) -> Advice:
    """Which way of learning between two tokenizers is recommended, and why.

    Example:
        >>> from capdistill.tokenizer import WordTokenizer
        >>> one, other = WordTokenizer(["a", "dog"]), WordTokenizer(["dog", "a"])
        >>> print(recommended(one, other, ["a dog"]).text)
        Recommended: the loss "word"; of 3 words, 3 begin at the same character for both models, \
and 3 are one token in both vocabularies.

    Args:
        student, teacher: The tokenizers.
        captions: Some that are trained on; by default the words of the student's vocabulary.
    """
    if not all(callable(getattr(each, "encode_spans", None)) for each in (student, teacher)):
        why = "words cannot be aligned, since a tokenizer has no encode_spans"
        return Advice(None, f"Recommended: captions of the teacher; {why}.")
    alignment = WordAlignment(student, teacher)
    if not captions:
        known, size = alignment.contexts[-1].student, len(student.vocabulary)
        share = len(known.ids) / size
        why = f"{len(known.ids)} of {size} entries are a token for both"
    else:
        words, aligned, single = alignment.coverage(captions)
        share = aligned / max(words, 1)
        why = (
            f"of {words} words, {aligned} begin at the same character for both models, and "
            f"{single} are one token in both vocabularies"
        )
    if share >= ENOUGH_WORDS:
        return Advice("word", f'Recommended: the loss "word"; {why}.')
    return Advice(None, f"Recommended: captions of the teacher, with pooled features; {why}.")


def _entry(spec: ModelSpec, place: int) -> str:
    words = spec.vocabulary
    return f"{words[place]!r} ({len(words)} entries)" if place < len(words) else "no entry"


def teachers_of(teacher: nn.Module) -> dict[str, nn.Module]:
    """The teachers that a loss may name: the members of an ensemble, or the only one there is."""
    members = getattr(teacher, "members", None)
    if isinstance(members, Mapping):
        return dict(members)
    return {str(getattr(teacher, "name", type(teacher).__name__)): teacher}


def require_named_teachers(losses: Mapping[str, DistillationLoss], teacher: nn.Module) -> None:
    """Check that every loss reads a teacher that there is; the place of one becomes its name.

    Raises:
        ConfigError: a loss names an unknown teacher, or none of several although it needs more than
            logits, which alone a mixture has.
    """
    names = list(teachers_of(teacher))
    for term, loss in losses.items():
        place: Any = loss.teacher
        if type(place) is int and 0 <= place < len(names):
            loss.teacher = names[place]
        if loss.teacher is not None and not loss.from_teacher:
            raise ConfigError(f"losses: '{term}' names a teacher, but reads none. Leave it out.")
        if loss.teacher is not None and loss.teacher not in names:
            hint = suggest(str(loss.teacher), names)
            raise ConfigError(f"losses: '{term}' names the teacher {loss.teacher!r}. {hint}")
        needed = ", ".join(sorted(loss.needs - LOGITS))
        if needed and len(names) > 1 and loss.from_teacher and loss.teacher is None:
            raise ConfigError(
                f"losses: '{term}' needs {needed}, which {len(names)} teachers do not have in "
                f'common. Name one of them: {{"name": ..., "teacher": "{names[0]}"}}, or '
                f"loss.teacher = '{names[0]}' (teachers: {', '.join(names)}). Or leave the loss "
                'out: losses={"token": {"name": "token"}} learns from the mixture alone.'
            )


def teacher_specs(teacher: Any, needs: Needs, batch: Batch | None) -> dict[str | None, ModelSpec]:
    """The specification of each teacher that is read, by name.

    Raises:
        ConfigError: one has to be probed on a batch, and none was given.
    """
    named = teachers_of(teacher)
    readers = {name: teacher if name is None else named[name] for name in (None, *needs)}
    return {name: cast(Any, reader).spec(batch) for name, reader in readers.items()}


def checked_teaching(teacher: nn.Module, batch: Batch, needs: Needs) -> CaptionerOutput:
    """The outputs that the losses read, on the CPU, once the shapes of each are checked.

    Raises:
        IncompatibleModels: an output is not as in the specification of its teacher.
    """
    named = teachers_of(teacher)
    if len(named) == 1:
        return checked_forward(teacher, batch, frozenset[str]().union(*needs.values()))
    whole = checked_forward(teacher, batch, LOGITS) if None in needs else CaptionerOutput()
    outputs = {n: checked_forward(named[n], batch, needs[n]) for n in needs if n is not None}
    return replace(whole, members=outputs)


def require_scalars(
    losses: Mapping[str, DistillationLoss],
    student: CaptionerOutput,
    teacher: CaptionerOutput | None,
    batch: Batch,
) -> None:
    """Check that every built loss gets its inputs and returns one number; nothing is changed.

    Raises:
        IncompatibleModels: a model lacks an output, or the loss returns something else.
    """
    for name, loss in losses.items():
        theirs = teacher and teacher.of(loss.teacher)
        outputs = (("student", student), ("teacher", theirs if loss.from_teacher else student))
        for role, output in outputs:
            for what in sorted(loss.needs):
                if output is None or not output.gives(what):
                    raise IncompatibleModels(
                        f"The loss '{name}' ({type(loss).__name__}) needs {what}, which the "
                        f"{role} does not return. Remove the loss, or use a {role} that has it."
                    )
        value = loss_value(loss, student, theirs, batch)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise IncompatibleModels(
                f"The loss '{name}' ({type(loss).__name__}) returns {given}, but must return one "
                "number: the sum over tokens or images, a floating-point tensor of shape ()."
            )


def loss_value(
    loss: DistillationLoss,
    student: CaptionerOutput,
    teacher: CaptionerOutput | None,
    batch: Batch,
) -> Tensor:
    """The sum that a built loss returns, on any device; nothing is changed."""
    device = device_of(loss)
    with inference(loss, fork_rng=True):
        theirs = None if teacher is None else output_to(teacher, device)
        value: Tensor = loss(output_to(student, device), theirs, batch.to(device))
    return value


def device_of(module: nn.Module) -> torch.device:
    """Where a model reads its inputs; parts that are loaded when they run are left out."""
    values = (value for each in (module.parameters(), module.buffers()) for value in each)
    return next((v.device for v in values if v.device.type != "meta"), torch.device("cpu"))


def output_to(output: CaptionerOutput, device: torch.device) -> CaptionerOutput:
    """The output of a model, and of its members, on a device."""
    members = output.members and {n: output_to(m, device) for n, m in output.members.items()}

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    return replace(
        output,
        logits=move(output.logits),
        hidden=None if output.hidden is None else tuple(h.to(device) for h in output.hidden),
        features=move(output.features),
        attention=move(output.attention),
        mask=move(output.mask),
        words=output.words and _words_to(output.words, device),
        members=members,
    )


def _words_to(words: TopWords, device: torch.device) -> TopWords:
    rest = {temperature: each.to(device) for temperature, each in words.rest.items()}
    return TopWords(words.ids.to(device), words.logits.to(device), rest)


def require_apart(teacher: nn.Module, objective: nn.Module) -> None:
    """What is trained, student and losses, may share frozen modules with the teacher, no others.

    Raises:
        ConfigError: it shares trainable parameters; names them.
    """
    theirs = {key for p in teacher.parameters() for key in _memory(p)}
    shared = [
        n for n, p in objective.named_parameters() if p.requires_grad and theirs & {*_memory(p)}
    ]
    if shared:
        raise ConfigError(
            "Parameters of the teacher would be trained, because the student or a loss contains "
            f"them: {', '.join(shared[:5])}{' ...' if len(shared) > 5 else ''}. Give the student "
            "or the loss a copy (copy.deepcopy), or freeze them with requires_grad_(False)."
        )


def _memory(parameter: nn.Parameter) -> tuple[tuple[str, int], ...]:
    """What two parameters have in common if training one changes the other."""
    own: Any = parameter
    local: Tensor = own.to_local() if hasattr(own, "to_local") else own  # of a sharded model
    place = local.untyped_storage().data_ptr()
    return (("object", id(parameter)), *([("memory", place)] if place else []))


def shared_modules(teacher: nn.Module, objective: nn.Module) -> list[nn.Module]:
    """Modules of the student or the losses that are also part of the teacher.

    Example:
        >>> encoder = nn.Linear(1, 1)
        >>> shared_modules(nn.Sequential(encoder, nn.ReLU()), nn.Sequential(encoder)) == [encoder]
        True
    """
    theirs = set(teacher.modules())
    return [module for module in objective.modules() if module in theirs]
