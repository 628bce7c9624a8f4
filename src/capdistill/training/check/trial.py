"""State and helpers shared by the checks: the trainer, a batch, and number formatting."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.compatibility import probe_batch, teachers_of
from capdistill.data.source import Source
from capdistill.outputs import Batch
from capdistill.runtime import isolated, seed_everything
from capdistill.teachers.ensemble import leaves
from capdistill.tokenizer import pad_batch

if TYPE_CHECKING:
    from capdistill.training.step import Stepper


_CAPTIONS = 5  # captions per image of a made-up batch, unless configured
_WORDS = 12  # length of a made-up caption: the median of Flickr8k with start and end


@dataclass
class Trial:
    """The state that the checks share.

    Args:
        trainer: The trainer under test; its configuration is changed to read in this process.
        config: The configuration of the run.
        batch: A real batch, or a made-up one without data.
        source: The source of a real batch.
        load_seconds, step_seconds: Times of one batch; NaN until measured.
    """

    trainer: Stepper
    config: Any
    batch: Batch
    source: Source | None = None
    load_seconds: float = math.nan
    step_seconds: float = math.nan
    read: list[Batch] = field(default_factory=list)

    @property
    def roles(self) -> dict[str, Any]:
        """The models by role."""
        names = ("student", "teacher") if len(self.trainer.models) == 2 else ("model",)
        return dict(zip(names, self.trainer.models, strict=True))

    @property
    def captioners(self) -> dict[str, Any]:
        """As `roles`, with several teachers one by one."""
        several = teachers_of(self.roles["teacher"]) if "teacher" in self.roles else {}
        if len(several) < 2:
            return self.roles
        named = {f"teacher '{name}'": teacher for name, teacher in several.items()}
        return {"student": self.roles["student"], **named}

    @property
    def need(self) -> frozenset[str]:
        """The model outputs that the losses need."""
        return self.trainer.objective.needed_outputs


def made_up_batch(trainer: Stepper) -> Batch:
    """Noise and random words, of the configured size, without using the caller's random state."""
    probe = probe_batch(trainer.captioner, trainer.models)
    images, tokenizer = trainer.config.batch_size, trainer.captioner.tokenizer
    rows = images * (trainer.config.captions_per_image or _CAPTIONS)
    ids = torch.randint(len(tokenizer.vocabulary), (rows, _WORDS))
    ids[:, 0], ids[:, -1] = tokenizer.start_id, tokenizer.end_id
    mask, captions = torch.ones_like(ids, dtype=torch.bool), ("",) * rows
    if any(loss.across_vocabularies for loss in trainer.objective.losses.children()):
        captions = tuple(tokenizer.decode(row) for row in ids.tolist())
        ids, mask = pad_batch([tokenizer.encode(text) for text in captions], tokenizer.pad_id)
    shape = (images, *probe.images.shape[1:])
    return replace(
        probe,
        images=torch.randint(256, shape, dtype=torch.uint8),
        input_ids=ids,
        mask=mask,
        captions=captions,
        image_ids=tuple(str(number) for number in range(images)),
    )


def name_of(model: Any) -> str:
    """The name of a model in messages."""
    return getattr(model, "name", type(model).__name__)


def has_frozen_stages(model: Any, trained: bool) -> bool:
    """Whether the output of frozen stages could be cached; a teacher's are all frozen."""
    return any(
        isinstance(leaf, Captioner) and leaf.encoder.cache_key(trained) is not None
        for leaf in leaves(model)
    )


def numel(parameters: Iterable[Tensor]) -> int:
    """Total number of elements."""
    return sum(parameter.numel() for parameter in parameters)


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


_NAMED = 20  # most names in a message


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def millions(count: int) -> str:
    """A count as text, in millions if it is large."""
    return f"{count / 1e6:.2f} M" if count >= 1e4 else str(count)


def megabytes(count: int) -> str:
    """Bytes as MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def milliseconds(seconds: float) -> str:
    """Seconds as whole milliseconds."""
    return f"{seconds * 1e3:.0f} ms"


def less_memory(config: Any) -> str:
    """Advice on how to use less memory."""
    half = max(config.batch_size // 2, 1)
    return (
        f"Set batch_size={half} (now {config.batch_size}) and "
        f"accumulation_steps={2 * config.accumulation_steps}, "
        "which gives the same training; or use precision='bf16', a smaller encoder, "
        "or a frozen trunk with cache_features=True."
    )


@contextmanager
def restoring_state(trainer: Stepper) -> Iterator[None]:
    """Restore weights, buffers, gradients, flags, random state, devices and trainer afterwards."""
    about, losses = dict(vars(trainer)), trainer.objective.losses
    modules = [trainer.objective, *trainer.models]
    with isolated():
        restore = [_remember(module) for module in modules]
        if not getattr(trainer, "_built", True):  # a real run builds its projectors from its seed
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


def _remember(module: nn.Module) -> Callable[[], None]:
    """A function that restores a module's device, attributes, buffers and gradients."""
    devices = [p.device for p in module.parameters()]
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
        if [p.device for p, _ in grads] != devices:
            for parameter, _ in grads:
                parameter.grad = None
            module.to(devices[0])
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


@dataclass(frozen=True)
class CheckRow:
    """One finding.

    Args:
        topic: What was checked.
        status: "ok", "note" (works, but look at it) or "fail".
        finding: The observation.
        fix: What to do about it; empty if nothing is needed.
    """

    topic: str
    status: Literal["ok", "note", "fail"]
    finding: str
    fix: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The result of a check; `print` it.

    Example:
        >>> row = CheckRow("memory", "fail", "20.0 GB of 8.0 GB", "Lower batch_size (now 16).")
        >>> print(CheckReport((row,)))
        fail  memory  20.0 GB of 8.0 GB
                      -> Lower batch_size (now 16).
        not ready: 1 failure, 0 notes

    Args:
        rows: The findings, in the order of the checks.
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

    def __repr__(self) -> str:
        return f"<CheckReport {self._verdict()}>"

    def __str__(self) -> str:
        width = max((len(row.topic) for row in self.rows), default=0)
        lines = [line for row in self.rows for line in _lines(row, width)]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        failures, notes = len(self.select("fail")), len(self.select("note"))
        verdict = "ready" if self.ok else "not ready"
        many = (f"{failures} failure{'s' * (failures != 1)}", f"{notes} note{'s' * (notes != 1)}")
        return f"{verdict}: {', '.join(many)}"


def _lines(row: CheckRow, width: int) -> list[str]:
    text = textwrap.wrap(row.finding, 100 - width - 8) or [""]
    text += textwrap.wrap(row.fix, 100 - width - 8, initial_indent="-> ", subsequent_indent="   ")
    heads = [f"{row.status:<4}  {row.topic:<{width}}", *[" " * (width + 6)] * (len(text) - 1)]
    return [f"{head}  {line}".rstrip() for head, line in zip(heads, text, strict=True)]
