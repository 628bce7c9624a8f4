"""What would go wrong in a run, found before it: `check_training`, behind `Trainer.check()`.

Each function looks at one thing and yields rows; `_attempt` makes a row of what it raises.
"""

from __future__ import annotations

import copy
import math
import os
import random
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.encoders.base import Encoder
from capdistill.errors import CapdistillError, ConfigError, DataError, IncompatibleModels
from capdistill.losses.divergence import cross_entropy
from capdistill.losses.token import first_difference
from capdistill.outputs import Batch, LossTerm, ModelSpec
from capdistill.registry import stamp_of
from capdistill.training.probe import ask, asking, probe_batch
from capdistill.training.run import image_size, prepare_sources, wants_crops
from capdistill.training.runtime import autocast, seed_everything
from capdistill.training.source import FixedBatches, Source
from capdistill.training.stepper import total
from capdistill.training.validation import require_references

if TYPE_CHECKING:
    from capdistill.training.trainer import Trainer

_WORDS = 12  # of a made-up caption, the median of Flickr8k with its two ends
_READ = 4  # batches read to see how long that takes
_LOOKED_AT = 8  # images whose size is looked at
_CAPTIONS = 20_000  # captions whose words are counted
_FAINT = 1e-3  # a term with a smaller share of the gradient teaches nothing
_TRUNCATED, _UNKNOWN = 0.01, 0.05  # shares of captions and of words that are worth a note
_WAIT = 0.25  # share of a step that may be spent waiting for data
_UNTAUGHT = 0.9  # of log V: the cross-entropy of a teacher that knows no words
_NAMED = 20  # parameters in a message
_FULL = 0.9  # of the memory


@dataclass(frozen=True)
class CheckRow:
    """One finding.

    Args:
        topic: What was looked at.
        status: "ok", "note" (works, but look at it) or "fail".
        finding: What was seen.
        fix: What to do about it; empty where nothing needs doing.
    """

    topic: str
    status: Literal["ok", "note", "fail"]
    finding: str
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What a check found; `print` it.

    Example:
        >>> row = CheckRow("memory", "fail", "20.0 GB of 8.0 GB", "Lower batch_size (now 16).")
        >>> print(CheckReport((row,)))
        fail  memory  20.0 GB of 8.0 GB
                      -> Lower batch_size (now 16).
        not ready: 1 failure, 0 notes

    Args:
        rows: The findings, in the order of looking.
    """

    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.select("fail")

    def select(self, status: str) -> list[CheckRow]:
        """The rows of one status."""
        return [row for row in self.rows if row.status == status]

    def to_json(self) -> dict[str, Any]:
        """Plain data: `{"ok": bool, "rows": [{"topic", "status", "finding", "fix"}]}`."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        width = max((len(row.topic) for row in self.rows), default=0)
        lines = [line for row in self.rows for line in _lines(row, width)]
        failures, notes = len(self.select("fail")), len(self.select("note"))
        verdict = "ready" if self.ok else "not ready"
        many = (f"{failures} failure{'s' * (failures != 1)}", f"{notes} note{'s' * (notes != 1)}")
        return "\n".join([*lines, f"{verdict}: {', '.join(many)}"])


def _lines(row: CheckRow, width: int) -> list[str]:
    text = textwrap.wrap(row.finding, 100 - width - 8) or [""]
    text += textwrap.wrap(row.fix, 100 - width - 8, initial_indent="-> ", subsequent_indent="   ")
    heads = [f"{row.status:<4}  {row.topic:<{width}}", *[" " * (width + 6)] * (len(text) - 1)]
    return [f"{head}  {line}".rstrip() for head, line in zip(heads, text, strict=True)]


@dataclass
class _Trial:
    """What the checks share.

    Args:
        trainer: Whose run is checked; its configuration is the one for reading in this process.
        config: The configuration of the run.
        batch: Real, or made up where there are no data.
        source: Where it came from, if it is real.
        load_seconds, step_seconds: Of one batch; NaN until measured.
    """

    trainer: Trainer
    config: Any
    batch: Batch
    source: Source | None = None
    load_seconds: float = math.nan
    step_seconds: float = math.nan
    read: list[Batch] = field(default_factory=list)

    @property
    def roles(self) -> dict[str, Any]:
        """The models by what they do."""
        names = ("student", "teacher") if len(self.trainer.models) == 2 else ("model",)
        return dict(zip(names, self.trainer.models, strict=True))

    @property
    def need(self) -> frozenset[str]:
        """What the losses ask of the models."""
        return self.trainer.objective.need


def check_training(trainer: Trainer, train: Any = None, val: Any = None) -> CheckReport:
    """Look for what would go wrong in `trainer.fit(train, val)`; nothing is changed by it.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> report = check_training(cd.Trainer(captioner, batch_size=2))
        >>> report.ok, report.rows[0].topic
        (True, 'options')

    Args:
        trainer: A `Trainer` or `Distiller`.
        train: As for `fit`; without it a made-up batch of the configured size is used.
        val: As for `fit`.

    Returns:
        Rows with a finding, and a fix where one is due. A trouble is a row, never an exception.
    """
    rows: list[CheckRow] = []
    with _undisturbed(trainer):
        if not _attempt(rows, "options", _check_options, trainer, val):
            return CheckReport(tuple(rows))
        trial = _Trial(trainer, trainer.config, _made_up_batch(trainer))
        trainer.config = trainer.config.model_copy(update={"cache_features": False, "workers": 0})
        if train is not None:
            _attempt(rows, "data", _check_data, trial, train, val)
        for topic, check in _CHECKS.items():
            if not _attempt(rows, topic, check, trial):
                break  # the next would meet the same trouble
    return CheckReport(tuple(rows))


def _attempt(
    rows: list[CheckRow], topic: str, check: Callable[..., Iterable[CheckRow]], *args: Any
) -> bool:
    """Add the rows of a check; one for what it raises, and then False."""
    try:
        rows.extend(check(*args))
    except Exception as error:  # whatever a model, a loss or a data set raises is a finding
        rows.append(_failure(topic, error, args[0]))
        return False
    return True


_USUAL = {
    "data": "Give a data set with at least one readable image and a caption.",
    "shapes": "Correct the model's forward, or its specification.",
    "losses": "Leave the loss out, or give models that fit it.",
}


def _failure(topic: str, error: Exception, about: Any) -> CheckRow:
    text = str(error).strip()
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return CheckRow("memory", "fail", f"Out of memory: {text}", _less_memory(about.config))
    if not isinstance(error, CapdistillError):
        fix = "This error is not capdistill's: correct the model, loss or data it comes from."
        if isinstance(about, _Trial) and about.source is None:
            fix += " If only the made-up batch is to blame, give check() your data."
        return CheckRow(topic, "fail", f"{type(error).__name__}: {text}", fix)
    finding, _, fix = " ".join(text.split()).partition(". ")
    return CheckRow(topic, "fail", finding, fix or _USUAL.get(topic, "Correct what it names."))


# -- options and data -----------------------------------------------------------------------


def _check_options(trainer: Trainer, val: Any) -> Iterator[CheckRow]:
    """Device, precision, monitor and caching, as `fit` would choose or refuse them."""
    config = trainer.config
    if not hasattr(trainer, "device"):
        trainer._place()
    trainer._make_monitor(val)
    wants_crops(config)
    if config.cache_features and not any(_frozen(model) for model in trainer.models):
        raise ConfigError(
            "cache_features=True but no model has a frozen trunk. Create the encoder with "
            "trainable='none', or set cache_features=False."
        )
    size = f"{config.batch_size} images x {config.captions_per_image} captions"
    yield CheckRow("options", "ok", f"{trainer.device}, {trainer.precision}, batches of {size}")


def _check_data(trial: _Trial, train: Any, val: Any) -> Iterator[CheckRow]:
    """Read some batches, in this process, and look at images and captions."""
    trial.source, val_source = prepare_sources(trial.trainer, train, val)
    began = time.perf_counter()
    for batch in islice(trial.source.epoch(0), _READ):
        trial.read.append(batch)
        began = time.perf_counter() if len(trial.read) == 1 and len(trial.source) > 1 else began
    if not trial.read:
        raise DataError("No usable training image. Give a data set with at least one.")
    timed = max(len(trial.read) - 1, 1)
    trial.load_seconds = (time.perf_counter() - began) / timed
    trial.batch = trial.read[0]
    images = sum(batch.num_images for batch in trial.read)
    yield CheckRow("data", "ok", f"{len(trial.source)} batches an epoch; {images} images read")
    yield from _check_unreadable(trial.source, train)
    yield from _check_image_sizes(trial, train)
    yield from _check_captions(trial, "train", train, trial.read)
    if val_source is not None:
        yield from _check_validation(trial, val, val_source)


def _check_unreadable(source: Source, data: Any) -> Iterator[CheckRow]:
    files = [Path(example.path) for example in getattr(data, "examples", ())]
    missing = [path for path in files if not path.exists()]
    fix = "Mend or remove them; with errors='skip' they are left out, errors='raise' stops."
    if missing:
        finding = f"{len(missing)} of {len(files)} image files are missing, first {missing[0]}"
        yield CheckRow("images", "note", finding, fix)
    elif len(source.skipped):
        finding = f"{len(source.skipped)} of the images read can not be used: "
        yield CheckRow("images", "note", finding + str(next(iter(source.skipped))), fix)


def _check_image_sizes(trial: _Trial, data: Any) -> Iterator[CheckRow]:
    """Images smaller than what the models work at are blown up: time spent on no detail."""
    sides = _sides(trial, data)
    wanted = image_size(trial.trainer.models)
    small = [side for side in sides if side < wanted]
    if small:
        finding = (
            f"{len(small)} of {len(sides)} images looked at are smaller than the {wanted} pixels "
            f"that the models work at (smallest side {min(small)}): they are upscaled"
        )
        fix = f"Give larger images, or choose encoders with image_size={min(small)} or less."
        yield CheckRow("images", "note", finding, fix)
    elif sides:
        yield CheckRow("images", "ok", f"none of {len(sides)} looked at is upscaled to {wanted}")


def _sides(trial: _Trial, data: Any) -> list[int]:
    """The smaller side of some images as the data set holds them."""
    if isinstance(trial.source, FixedBatches):
        return [side for side in (min(b.images.shape[-2:]) for b in trial.read) if side]
    from capdistill.data import read_image

    sides = []
    for number in range(0, len(data), max(len(data) // _LOOKED_AT, 1))[:_LOOKED_AT]:
        try:
            sides.append(min(read_image(data[number][0]).shape[1:]))
        except DataError:
            continue
    return sides


def _check_captions(
    trial: _Trial, name: str, data: Any, batches: Iterable[Batch]
) -> Iterator[CheckRow]:
    """Captions that are cut, and words that the vocabulary lacks."""
    captions = getattr(data, "captions", None)
    if captions is None:
        captions = [caption for batch in batches for caption in batch.captions]
    captions = captions[:: len(captions) // _CAPTIONS + 1]
    tokenizer: Any = trial.trainer.captioner.tokenizer
    cut = _count_truncated(tokenizer, captions)
    unknown, words = getattr(tokenizer, "count_unknown", lambda captions: (0, 0))(captions)
    finding = f"{name}: {cut} of {len(captions)} captions are cut"
    finding += f", {unknown / words:.1%} of the words are unknown" if words else ""
    fixes = ["Train the tokenizer with a larger max_length."] * (cut > _TRUNCATED * len(captions))
    fixes += ["Train the tokenizer on more captions, or with a smaller min_count."] * (
        unknown > _UNKNOWN * words
    )
    yield CheckRow("captions", "note" if fixes else "ok", finding, " ".join(fixes))


def _count_truncated(tokenizer: Any, captions: list[str]) -> int:
    if hasattr(tokenizer, "count_truncated"):
        return int(tokenizer.count_truncated(captions))
    return sum(tokenizer.encode(caption)[-1] != tokenizer.end_id for caption in captions)


def _check_validation(trial: _Trial, data: Any, source: Source) -> Iterator[CheckRow]:
    batches = list(islice(source.epoch(0), 1))
    if not batches:
        raise DataError("No usable validation image. Give a data set with at least one.")
    require_references(batches[0])
    yield from _check_captions(trial, "val", data, batches)


def _made_up_batch(trainer: Trainer) -> Batch:
    """Noise and random words, of the configured size; the caller's chance is not touched."""
    probe = probe_batch(trainer.captioner, trainer.models)
    images, tokenizer = trainer.config.batch_size, trainer.captioner.tokenizer
    rows = images * trainer.config.captions_per_image
    ids = torch.randint(len(tokenizer.vocabulary), (rows, _WORDS))
    ids[:, 0], ids[:, -1] = tokenizer.start_id, tokenizer.end_id
    shape = (images, *probe.images.shape[1:])
    return replace(
        probe,
        images=torch.randint(256, shape, dtype=torch.uint8),
        input_ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        captions=("",) * rows,
        image_ids=tuple(str(number) for number in range(images)),
    )


# -- the models -----------------------------------------------------------------------------


def _check_sizes(trial: _Trial) -> Iterator[CheckRow]:
    totals = {role: _numel(model.parameters()) for role, model in trial.roles.items()}
    for role, model in trial.roles.items():
        finding = f"{role} '{_name(model)}': {_short(totals[role])} parameters"
        if role != "teacher":
            trained = _numel(p for p in model.parameters() if p.requires_grad)
            finding += f", {_short(trained)} of them trained"
        yield CheckRow("models", "ok", finding)
    if "teacher" not in totals:
        return
    share = totals["student"] / max(totals["teacher"], 1)
    finding = f"the student has {share:.0%} of the teacher's parameters"
    fix = "" if share < 1 else "To get a smaller model, choose another preset (capdistill models)."
    yield CheckRow("models", "note" if fix else "ok", finding, fix)


def _check_shapes(trial: _Trial) -> Iterator[CheckRow]:
    """Compare what each model gives with what it promises; a foreign one may need a real batch."""
    tiny = probe_batch(trial.trainer.captioner, trial.trainer.models)
    for role, model in trial.roles.items():
        batch = tiny if isinstance(model, Captioner) else trial.batch
        ask(model, batch, trial.need)
        yield CheckRow("shapes", "ok", f"{role}: {_describe(model.spec())}")


def _describe(spec: ModelSpec) -> str:
    grid = f", grid {spec.grid[0]} x {spec.grid[1]}" if spec.grid else ""
    prefix = f", {spec.prefix_tokens} before the grid" if spec.prefix_tokens else ""
    hidden = " ".join(map(str, spec.hidden_dims)) or "not shown"
    return (
        f"{spec.tokens} tokens x {spec.feature_dim}{grid}{prefix}; hidden {hidden}; "
        f"attention {'shown' if spec.has_attention else 'not shown'}; "
        f"vocabulary {len(spec.vocabulary)}"
    )


def _check_vocabularies(trial: _Trial) -> Iterator[CheckRow]:
    """Entry by entry: the teacher reads the student's ids."""
    student, *teachers = [model.tokenizer.vocabulary for model in trial.roles.values()]
    place = first_difference(student, teachers[0]) if teachers else None
    if place is None:
        same = ", the same for both models" if teachers else ""
        yield CheckRow("vocabulary", "ok", f"{len(student)} entries{same}")
        return
    finding = (
        f"student and teacher differ at entry {place} ({len(student)} and {len(teachers[0])} "
        "entries), so that the teacher reads other words than were written"
    )
    if trial.need - {"features"}:  # ids that the teacher lacks would break even a CUDA context
        raise IncompatibleModels(f"{finding}. Build both models with one tokenizer.")
    fix = "Compare features alone, as here, or build both models with one tokenizer."
    yield CheckRow("vocabulary", "note", finding, fix)


def _check_weights(trial: _Trial) -> Iterator[CheckRow]:
    """Weights that no training has touched."""
    for role, model in trial.roles.items():
        encoder = getattr(model, "encoder", None)
        if not isinstance(encoder, Encoder):
            continue
        if not _looks_random(encoder):
            yield CheckRow("weights", "ok", f"{role}: the encoder's weights look trained")
            continue
        stuck = role != "teacher" and encoder.trunk_frozen
        finding = f"{role}: encoder has random weights"
        finding += " and is frozen, so that it never learns to see" if stuck else ""
        fix = "Create it with weights=True (from the hub) or weights='a local file'."
        yield CheckRow("weights", "note", finding, fix)
    if "teacher" in trial.roles and trial.source is not None:
        yield from _check_teacher_knows(trial)


def _looks_random(encoder: Encoder) -> bool:
    """Whether the trunk's norms are as they were made; without norms, what the registry knows."""
    trunk = {id(p) for p in encoder.trunk_parameters()}
    biases = [
        getattr(part, name)
        for part in encoder.modules()
        if "Norm" in type(part).__name__ and id(getattr(part, "bias", None)) in trunk
        for name in ("bias", "running_mean")
        if isinstance(getattr(part, name, None), Tensor)
    ]
    if biases:
        return not any(bool(bias.any()) for bias in biases)
    stamp = stamp_of(encoder)
    return stamp is not None and stamp.kwargs.get("weights") is False


def _check_teacher_knows(trial: _Trial) -> Iterator[CheckRow]:
    """A teacher no better than chance on real captions teaches noise."""
    trainer, batch = trial.trainer, trial.batch.to(trial.trainer.device)
    teacher = trial.roles["teacher"]
    with asking(teacher), autocast(trainer.device, trainer.precision):
        output = teacher(batch, need=trial.need)
    surprise = float(cross_entropy(output.logits, batch.targets, batch.target_mask))
    surprise /= max(int(batch.target_mask.sum()), 1)
    chance = math.log(output.logits.shape[-1])
    finding = f"teacher: cross-entropy {surprise:.2f} on a batch, chance is {chance:.2f}"
    if surprise < _UNTAUGHT * chance:
        yield CheckRow("weights", "ok", finding)
        return
    fix = "Train it first, or load trained weights (Captioner.load)."
    yield CheckRow("weights", "note", f"{finding}: the teacher looks untrained", fix)


# -- the losses and one step ----------------------------------------------------------------


def _check_projectors(trial: _Trial) -> Iterator[CheckRow]:
    """Let the losses create their projectors where they have not yet."""
    trial.trainer._prepare(trial.batch.to(trial.trainer.device))
    losses = trial.trainer.objective.losses
    made = [
        f"{name} {part.in_features} x {part.out_features}"
        for name, part in losses.named_modules()
        if isinstance(part, nn.Linear)
    ]
    if len(losses):
        finding = f"{', '.join(losses)}; projectors: {', '.join(made) or 'none'}"
        yield CheckRow("losses", "ok", f"{finding}; {_short(_numel(losses.parameters()))} in them")


def _check_trained(trial: _Trial) -> Iterator[CheckRow]:
    """The optimizer's groups."""
    parts: dict[str, int] = {}
    for group in trial.trainer._optimizer().param_groups:
        key = f"{group.get('name', 'model')} at {group['lr']:.0e}"
        parts[key] = parts.get(key, 0) + _numel(group["params"])
    yield CheckRow("trained", "ok", "; ".join(f"{_short(n)} {key}" for key, n in parts.items()))


def _check_terms(trial: _Trial) -> Iterator[CheckRow]:
    """One forward; then one backward for each term, to see what it moves and how strongly."""
    trainer = trial.trainer
    trainer.objective.train()
    terms = trainer.terms(trial.batch)
    bad = [name for name, term in terms.items() if not bool(torch.isfinite(term.sum))]
    if bad:
        yield from (_not_finite(name, f"is {float(terms[name].mean.detach())}") for name in bad)
        return
    peaks = {name: _peak_weight(trainer, name) for name in terms}
    norms, reached = {}, set[int]()
    for name, term in terms.items():
        raw, touched = _backward(trainer, term)
        norms[name], reached = raw * peaks[name], reached | touched
    for name, term in terms.items():
        yield _term_row(name, term, peaks[name], norms, trainer.precision)
    yield from _check_reached(trainer.objective, reached)


def _not_finite(name: str, what: str) -> CheckRow:
    fix = (
        f"Look for log(0), 0/0 or a root of 0 in the loss '{name}' and for NaN in the weights; "
        "try precision='fp32'."
    )
    return CheckRow("terms", "fail", f"{name}: the term {what} on the first batch", fix)


def _peak_weight(trainer: Trainer, name: str) -> float:
    """The largest weight a term gets, so that one that starts at 0 is not called useless."""
    return max(trainer.objective.weight(name, progress) for progress in (0.0, 0.5, 1.0))


def _backward(trainer: Trainer, term: LossTerm) -> tuple[float, set[int]]:
    """The norm of a term's unweighted gradient on the captioner, and all parameters it reaches."""
    trainer.objective.zero_grad(set_to_none=True)
    if not term.sum.requires_grad:
        return 0.0, set()
    loss: Tensor = trainer.scaler.scale(term.mean)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    grads = [p.grad for p in trainer.captioner.parameters() if p.grad is not None]
    norm = torch.stack([g.float().norm() for g in grads]).norm() if grads else torch.zeros(())
    reached = {id(p) for p in trainer.objective.parameters() if p.grad is not None}
    return float(norm) / trainer.scaler.get_scale(), reached


def _term_row(
    name: str, term: LossTerm, peak: float, norms: dict[str, float], precision: str
) -> CheckRow:
    if not math.isfinite(norms[name]) and precision != "fp16":  # fp16 may overflow and recover
        return _not_finite(name, "is finite but its gradient is not")
    share = norms[name] / (sum(norms.values()) or 1.0)
    finding = (
        f"{name}: {float(term.mean.detach()):.4g} x weight {peak:g}; {share:.1%} of the gradient"
    )
    if share >= _FAINT or math.isnan(share):
        return CheckRow("terms", "ok", finding)
    reason = "it gives the model no gradient" if norms[name] == 0 else "too little to matter"
    fix = f"Raise weights['{name}'], or leave the term out: it costs time and teaches nothing."
    return CheckRow("terms", "note", f"{finding}: {reason}", fix)


def _check_reached(objective: nn.Module, reached: set[int]) -> Iterator[CheckRow]:
    """Every parameter that requires grad must get one (law 4)."""
    trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    left = [name for name, parameter in trained.items() if id(parameter) not in reached]
    if not left:
        finding = f"all {len(trained)} trainable tensors get a gradient"
        yield CheckRow("gradients", "ok", finding)
        return
    finding = f"{len(left)} of {len(trained)} trainable tensors get none: {_listed(left)}"
    fix = "Use them in forward, remove them, or freeze them with requires_grad_(False)."
    yield CheckRow("gradients", "fail", finding, fix)


# -- what a step costs ----------------------------------------------------------------------


def _check_memory(trial: _Trial) -> Iterator[CheckRow]:
    """What a step keeps: counted, and on CUDA also the allocator's peak."""
    trainer, device = trial.trainer, trial.trainer.device
    weights = _bytes(trainer.objective)
    trained = [p for p in trainer.objective.parameters() if p.requires_grad]
    per_step = 3 * sum(p.numel() * p.element_size() for p in trained)  # gradients, two moments
    kept = _bytes_kept_for_backward(trainer, trial.batch)
    yield CheckRow(
        "memory",
        "ok",
        f"{next(iter(trial.roles))}: weights {_size(weights)}, gradients and AdamW "
        f"{_size(per_step)}, activations kept for backward {_size(kept)}",
    )
    total = weights + per_step + kept
    if "teacher" in trial.roles:
        theirs = _bytes(trial.roles["teacher"])
        total += theirs
        yield CheckRow("memory", "ok", f"teacher: weights {_size(theirs)}, no gradients")
    how = "an estimate: the above added up"
    if device.type == "cuda":
        total, how = max(total, _cuda_peak(trial)), "the allocator's peak, or the above added up"
    yield from _against_memory(trial, total, how)


def _against_memory(trial: _Trial, total: int, how: str) -> Iterator[CheckRow]:
    there = _memory_of(trial.trainer.device)
    finding = f"a step needs about {_size(total)} ({how})"
    finding += f" of {_size(there)}" if there else ""
    full = there is not None and total > _FULL * there
    fix = _less_memory(trial.config) if full else ""
    yield CheckRow("memory", "fail" if full else "ok", finding, fix)


def _bytes_kept_for_backward(trainer: Trainer, batch: Batch) -> int:
    """Bytes of distinct tensors that autograd saves in one forward, weights apart."""
    own = {p.untyped_storage().data_ptr() for p in trainer.objective.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = trainer.terms(batch)
    del terms
    return sum(kept.values())


def _cuda_peak(trial: _Trial) -> int:
    """The allocator's peak over a forward and backward, with AdamW's moments added."""
    trainer = trial.trainer
    torch.cuda.reset_peak_memory_stats(trainer.device)
    _forward_backward(trial)
    trained = (p for p in trainer.objective.parameters() if p.requires_grad)
    moments = 2 * sum(p.numel() * p.element_size() for p in trained)
    return torch.cuda.max_memory_allocated(trainer.device) + moments


def _memory_of(device: torch.device) -> int | None:
    """Bytes of the device's memory, or None where that can not be asked."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _check_time(trial: _Trial) -> Iterator[CheckRow]:
    """Seconds of a step, of the teacher's part in it, and of reading its batch."""
    trainer, batch = trial.trainer, trial.batch
    trial.step_seconds = _seconds(trainer.device, lambda: _forward_backward(trial))
    rate = f"{batch.num_images / trial.step_seconds:.0f} images/s"
    finding = f"forward and backward {_milliseconds(trial.step_seconds)} a batch of "
    yield CheckRow("time", "ok", f"{finding}{batch.num_images} images, {rate}")
    if "teacher" in trial.roles and len(trainer.objective.losses):
        moved = batch.to(trainer.device)
        teaching = _seconds(trainer.device, lambda: _teach(trainer, moved))
        share = teaching / trial.step_seconds
        finding = f"of it the teacher's forward {_milliseconds(teaching)} ({share:.0%})"
        yield CheckRow("time", "ok", finding)
    if trial.source is not None:
        yield from _check_loading(trial)


def _check_loading(trial: _Trial) -> Iterator[CheckRow]:
    """Time that a step waits for its batch: all of the reading without workers."""
    config, load, step = trial.config, trial.load_seconds, trial.step_seconds
    wait = load if config.workers == 0 else max(load / config.workers - step, 0.0)
    finding = (
        f"reading a batch takes {_milliseconds(load)} in one process (workers={config.workers}), "
        f"so that a step of {_milliseconds(step)} waits {_milliseconds(wait)}"
    )
    if config.cache_images or config.cache_features:
        yield CheckRow("loading", "ok", f"{finding}, in the first epoch only (cached)")
    elif wait <= _WAIT * step:
        yield CheckRow("loading", "ok", finding)
    else:
        yield CheckRow("loading", "note", finding, _faster_loading(trial, load / step))


def _faster_loading(trial: _Trial, needed: float) -> str:
    workers = max(1, min(math.ceil(needed), os.cpu_count() or 1))
    ways = [f"workers={workers}"] if workers > trial.config.workers else []
    ways += ["cache_images=True", "smaller image files"]
    if any(_frozen(model) for model in trial.trainer.models):
        ways.insert(-1, "cache_features=True (the trunk is frozen)")
    return f"Try {', '.join(ways[:-1])} or {ways[-1]}."


def _less_memory(config: Any) -> str:
    half = max(config.batch_size // 2, 1)
    return (
        f"Set batch_size={half} (now {config.batch_size}) and accumulate={2 * config.accumulate}, "
        "which train the same; or precision='bf16', a smaller encoder, or a frozen trunk with "
        "cache_features=True."
    )


def _forward_backward(trial: _Trial) -> None:
    trainer = trial.trainer
    trainer.objective.zero_grad(set_to_none=True)
    trainer.scaler.scale(total(trainer.terms(trial.batch))).backward()  # type: ignore[no-untyped-call]


def _teach(trainer: Trainer, batch: Batch) -> None:
    with autocast(trainer.device, trainer.precision):
        trainer.teach(batch)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    """The shorter of two runs; what came before has warmed up."""
    times = []
    for _ in range(2):
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- leaving no trace -----------------------------------------------------------------------


@contextmanager
def _undisturbed(trainer: Trainer) -> Iterator[None]:
    """Afterwards weights, buffers, gradients, flags, chance, devices and trainer are as before."""
    about, losses = dict(vars(trainer)), trainer.objective.losses
    numbers, python = np.random.get_state(), random.getstate()
    modules = [trainer.objective, *trainer.models]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        restore = [_remember(module) for module in modules]
        if not getattr(trainer, "_built", True):  # what a real run builds starts from its seed
            trainer.objective.losses = copy.deepcopy(losses)
        seed_everything(trainer.config.seed)
        try:
            yield
        finally:
            trainer.objective.losses = losses
            for undo in reversed(restore):
                undo()
            vars(trainer).clear()
            vars(trainer).update(about)
            np.random.set_state(numbers)
            random.setstate(python)


def _remember(module: nn.Module) -> Callable[[], None]:
    """What puts a module back: its device, each part's attributes, buffers and gradients."""
    device = next((p.device for p in module.parameters()), None)
    parts = [(part, part.training, dict(vars(part))) for part in module.modules()]
    buffers = [
        (part._buffers, key, buffer, buffer.clone())
        for part in module.modules()
        for key, buffer in part._buffers.items()
        if buffer is not None
    ]
    grads = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in grads:
        parameter.grad = None

    def undo() -> None:
        if any(p.device != device for p, _ in grads):
            for parameter, _ in grads:
                parameter.grad = None
            module.to(device)
        for part, training, attributes in parts:
            vars(part).clear()
            vars(part).update(attributes)
            part.training = training
        for table, key, buffer, value in buffers:
            table[key] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad

    return undo


_CHECKS: dict[str, Callable[[_Trial], Iterable[CheckRow]]] = {
    "models": _check_sizes,
    "vocabulary": _check_vocabularies,
    "shapes": _check_shapes,
    "weights": _check_weights,
    "losses": _check_projectors,
    "trained": _check_trained,
    "terms": _check_terms,
    "memory": _check_memory,
    "time": _check_time,
}


# -- words for numbers ----------------------------------------------------------------------


def _name(model: Any) -> str:
    return getattr(model, "name", type(model).__name__)


def _frozen(model: Any) -> bool:
    return isinstance(model, Captioner) and model.encoder.trunk_frozen


def _numel(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e4 else str(count)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
