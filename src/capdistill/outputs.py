"""Data passed between components: batches, model outputs, specifications, loss terms.

Letters in shapes: I images, k captions per image, B = I * k captions, T tokens, V vocabulary,
N visual tokens, D and H widths. Token ids are int64; masks are bool, True = real.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from capdistill.errors import PRINTED_ENDS, ConfigError, DataError, require_text, shortened


@dataclass(frozen=True)
class Batch:
    """I images with k captions each; the k captions of an image are adjacent.

    Example:
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 5, 2], [1, 2, 0]]),
        ...     mask=torch.tensor([[True, True, True], [True, True, False]]),
        ...     captions=("dog", ""), image_ids=("a.jpg",),
        ... )
        >>> batch.captions_per_image, batch.targets.tolist(), int(batch.target_mask.sum())
        (2, [[5, 2], [2, 0]], 3)

    Args:
        images: (I, 3, H, W) uint8. Encoders scale and normalise on the device. May be (I, 3, 0, 0)
            if every model that reads the batch finds its tokens in `cached`.
        input_ids: (B, T) token ids, from the start token to the end token, then padding.
        mask: (B, T) True where a token is real. Padding is known by position, never by value.
        captions: B raw strings.
        image_ids: I strings.
        references: I tuples of raw strings, or None in training.
        cached: encoder fingerprint -> (I, N, D0) trunk tokens computed earlier.
        sampled: (B,) bool, True for captions that were sampled from the student. They are no
            targets of the cross-entropy. None if there are none.
        caption_weights: (B,) >= 0, weights of the captions in the cross-entropy, in its sum and its
            count alike; None weighs all alike.
        advantages: (B,) rewards of sampled captions relative to a baseline, or None; see
            `SelfCritical`.
        views: I numbers, the view of each image that is shown: 0 is its centre, the others are
            fixed random crops. None if it is none of these, such as a new crop in every epoch.

    Raises:
        DataError: the numbers of images, captions, ids and references do not fit; a caption or
            reference that is not text; a value per caption that is not one number per caption.
    """

    images: Tensor
    input_ids: Tensor
    mask: Tensor
    captions: tuple[str, ...]
    image_ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...] | None = None
    cached: Mapping[str, Tensor] = field(default_factory=dict)
    sampled: Tensor | None = None
    caption_weights: Tensor | None = None
    advantages: Tensor | None = None
    views: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise DataError(f"Batch: {name} is {shortened(value)}, not a {kind.__name__}.")
        images, captions = self.num_images, self.input_ids.shape[0]
        if images != len(self.images):
            raise DataError(f"Batch: {len(self.images)} images but {images} image ids.")
        if self.input_ids.shape != self.mask.shape:
            raise DataError(
                f"Batch: input_ids are {tuple(self.input_ids.shape)} but mask is "
                f"{tuple(self.mask.shape)}; they must have one shape (B, T)."
            )
        if images == 0 or captions % images or len(self.captions) != captions:
            raise DataError(
                f"Batch: {captions} rows of ids and {len(self.captions)} captions for {images} "
                "images. Every image needs the same number k >= 1 of captions, side by side."
            )
        if isinstance(self.image_ids, str) or not all(isinstance(i, str) for i in self.image_ids):
            raise DataError(f"Batch: image_ids are {shortened(self.image_ids)}; expected strings.")
        if self.views is not None and len(self.views) != images:
            raise DataError(f"Batch: views has {len(self.views)} numbers for {images} images.")
        k = captions // images
        for row, caption in enumerate(self.captions):
            if type(caption) is not str or caption.rstrip().endswith(PRINTED_ENDS):
                require_text(caption, f"Batch: a caption of image '{self.image_ids[row // k]}'")
        if self.references is not None:
            self._check_references(self.references)
        for name in _PER_CAPTION:
            self._check_per_caption(name, getattr(self, name))

    def __repr__(self) -> str:
        return (
            f"<Batch {self.num_images} images of {tuple(self.images.shape[1:])}, "
            f"{len(self.captions)} captions of up to {self.input_ids.shape[1]} tokens>"
        )

    def _check_references(self, references: Sequence[Sequence[str]]) -> None:
        if len(references) != self.num_images:
            raise DataError(
                f"Batch: references of {len(references)} images for {self.num_images} images; "
                "expected one tuple of texts per image."
            )
        for image_id, texts in zip(self.image_ids, references, strict=True):
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise DataError(
                    f"Batch: the references of image '{image_id}' are {shortened(texts)}; expected "
                    "a tuple of texts."
                )
            for text in texts:
                if type(text) is not str or text.rstrip().endswith(PRINTED_ENDS):
                    require_text(text, f"Batch: a reference of image '{image_id}'")

    def _check_per_caption(self, name: str, values: Tensor | None) -> None:
        if values is None:
            return
        if values.shape != (len(self.captions),):
            raise DataError(
                f"Batch: {name} has shape {tuple(values.shape)} for {len(self.captions)} captions; "
                f"expected ({len(self.captions)},), one value per caption."
            )
        if (values.dtype == torch.bool) != (name == "sampled"):
            kind = "bool" if name == "sampled" else "numbers"
            raise DataError(f"Batch: {name} is {values.dtype}; expected {kind}.")
        if name == "caption_weights" and not ((values >= 0) & values.isfinite()).all():
            raise DataError(
                f"Batch: caption_weights are {shortened(values.tolist())}; expected >= 0."
            )

    @property
    def num_images(self) -> int:
        """I."""
        return len(self.image_ids)

    @property
    def captions_per_image(self) -> int:
        """k = B / I."""
        return self.input_ids.shape[0] // self.num_images

    @property
    def inputs(self) -> Tensor:
        """(B, T - 1) the input tokens of the decoder."""
        return self.input_ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(B, T - 1) the tokens that the decoder should predict."""
        return self.input_ids[:, 1:]

    @property
    def target_mask(self) -> Tensor:
        """(B, T - 1) True where a target is real, including the end token."""
        mask = self.mask[:, 1:]
        if "targets" in vars(self.mask):
            vars(mask)["places"] = vars(self.mask)["targets"]
        return mask

    @property
    def reference_mask(self) -> Tensor:
        """(B, T - 1) as `target_mask`, without the captions that were sampled from the student."""
        if self.sampled is None:
            return self.target_mask
        return self.target_mask & ~self.sampled[:, None]

    @property
    def sampled_mask(self) -> Tensor:
        """(B, T - 1) as `target_mask`, of the captions that were sampled from the student alone."""
        if self.sampled is None:
            return torch.zeros_like(self.target_mask)
        return self.target_mask & self.sampled[:, None]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = copy.copy(self)  # it was checked when it was made
        for name in (*_TENSORS, *_PER_CAPTION):
            tensor = getattr(self, name)
            if tensor is not None:
                object.__setattr__(moved, name, tensor.to(device, non_blocking=True))
        cached = {key: value.to(device, non_blocking=True) for key, value in self.cached.items()}
        object.__setattr__(moved, "cached", cached)
        if self.mask.is_cpu and not (moved.mask.is_cpu or moved.mask.is_inference()):
            found = places(self.target_mask).to(device, non_blocking=True)
            vars(moved.mask)["targets"] = (moved.mask._version, found)
        return moved


_TENSORS = ("images", "input_ids", "mask")
_PER_CAPTION = ("sampled", "caption_weights", "advantages")
_KINDS: dict[str, Any] = dict.fromkeys(("captions", "image_ids"), Collection)
_KINDS |= dict.fromkeys(_TENSORS, Tensor)


def places(mask: Tensor) -> Tensor:
    """Where a mask is True, as numbers of its entries in their order, (n,).

    If it lies on a device, the host waits for them. Those of a target mask are known there, because
    `Batch.to` finds them before it moves; they hold until the mask is changed.

    Example:
        >>> places(torch.tensor([[True, False], [False, True]]))
        tensor([0, 3])
    """
    version, found = vars(mask).get("places", (None, None))
    if found is None or version != mask._version:
        found = mask.flatten().nonzero().squeeze(1)
    known: Tensor = found
    return known


@dataclass(frozen=True)
class DecoderOutput:
    """The output of a decoder for teacher-forced input.

    Args:
        logits: (B, T, V).
        hidden: One (B, T, H) per layer, then the input of the vocabulary projection (after the
            final norm, before dropout); None unless needed. Widths may differ.
        attention: (B, T, N) over visual tokens, of the last layer, mean over heads, sums to 1;
            None unless needed.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class TopWords:
    """A teacher's most probable words at each position, and how probable all others are.

    Args:
        ids: (B, T - 1, k) the words, the most probable first.
        logits: (B, T - 1, k) their logits, less the largest.
        rest: Temperature -> (B, T - 1) the log-sum-exp over all other words of their logits, less
            the largest, divided by the temperature.
    """

    ids: Tensor
    logits: Tensor
    rest: Mapping[float, Tensor]

    def log_probs(self, temperature: float, k: int | None = None, bucket: bool = True) -> Tensor:
        """(B, T - 1, k + 1) log-probabilities of the first k words, then of all others together.

        Example:
            >>> logits = torch.tensor([[[0.0, -1.0]]])
            >>> words = TopWords(torch.tensor([[[7, 3]]]), logits, {1.0: torch.zeros(1, 1)})
            >>> words.log_probs(1.0).exp()
            tensor([[[0.4223, 0.1554, 0.4223]]])

        Args:
            temperature: One of those of `rest`; any without `bucket`.
            k: All that there are by default.
            bucket: False leaves out the others; (B, T - 1, k).
        """
        scaled = self.logits.float() / temperature
        chosen, others = scaled[..., :k], scaled[..., scaled.shape[-1] if k is None else k :]
        if bucket:
            rest = torch.cat([others, self.rest[temperature][..., None]], -1)
            chosen = torch.cat([chosen, rest.logsumexp(-1, keepdim=True)], -1)
        return chosen.log_softmax(-1)


@dataclass(frozen=True)
class CaptionerOutput:
    """The output of a captioner for a batch, aligned with `batch.targets`.

    Args:
        logits: (B, T - 1, V); None if only features were needed.
        hidden: As in `DecoderOutput`, or None.
        features: (I, N, D), the encoder's output, or None.
        attention: (B, T - 1, N), or None.
        mask: (B, T - 1), `batch.target_mask`; losses read it from the batch.
        members: Of an ensemble, the outputs of members by name, as far as they were needed.
        words: Of a cached teacher that keeps the most probable words, those, instead of logits.
    """

    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None
    features: Tensor | None = None
    attention: Tensor | None = None
    mask: Tensor | None = None
    members: Mapping[str, CaptionerOutput] | None = None
    words: TopWords | None = None

    def gives(self, what: str) -> bool:
        """Whether it has an output that a loss needs."""
        return getattr(self, what) is not None or (what == "logits" and self.words is not None)

    def of(self, member: str | None) -> CaptionerOutput:
        """The output of a member by name; the output as a whole without a name or members."""
        return self if member is None or self.members is None else self.members[member]

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        shown = ", ".join(f"{k} {_shape(v)}" for k, v in values.items() if v is not None)
        return f"<CaptionerOutput {shown}>"


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return f"[{', '.join(map(_shape, value))}]" if isinstance(value, (tuple, list)) else repr(value)


OUTPUTS = frozenset({"logits", "features", "hidden", "attention"})
FEATURES_ONLY = frozenset({"features"})
LOGITS = frozenset({"logits"})


@dataclass(frozen=True)
class ModelSpec:
    """The specification of a model, which losses and checks need before it runs.

    Args:
        feature_dim: D of the encoder's output, or None if a wrapped teacher returns none.
        tokens: N, visual tokens per image.
        prefix_tokens: Number of leading tokens (CLS, registers) outside the grid.
        grid: (h, w) with N = prefix_tokens + h * w, or None.
        hidden_dims: Width of each entry of `hidden`; empty if there is none.
        vocabulary: The entries in the order of their ids.
        has_attention: Whether the model can return attention over visual tokens.
        name: Name of the model in messages.
        tokenizer: Encodes the captions that the model reads, if a loss may ask for it.
        retokenizes: Whether it reads the captions of a batch, not its ids.
    """

    feature_dim: int | None
    tokens: int | None
    prefix_tokens: int
    grid: tuple[int, int] | None
    hidden_dims: tuple[int, ...]
    vocabulary: Sequence[str]
    has_attention: bool
    name: str = "model"
    tokenizer: Any = None
    retokenizes: bool = False


@dataclass(frozen=True)
class LossTerm:
    """One term of the objective: a sum, the count it is divided by, its weight.

    Example:
        >>> term = LossTerm(sum=torch.tensor(6.0), count=3.0, weight=0.5)
        >>> float(term.mean), float(term.weighted)
        (2.0, 1.0)
    """

    sum: Tensor
    count: float
    weight: float

    @property
    def mean(self) -> Tensor:
        """sum / count; 0 where nothing was counted."""
        return self.sum / (self.count or 1.0)

    @property
    def weighted(self) -> Tensor:
        """weight * mean."""
        return self.weight * self.mean


def part(batch: Batch, first: int, last: int) -> Batch:
    """Images `first` to `last` (not included) of a batch.

    Example:
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> batch = Batch(torch.zeros(2, 3, 1, 1), ids, ids > 0, ("a", "b"), ("1", "2"))
        >>> part(batch, 1, 2).captions
        ('b',)
    """
    return select_images(batch, range(first, min(last, batch.num_images)))


def select_images(batch: Batch, images: Sequence[int]) -> Batch:
    """The given images of a batch, with their captions.

    Example:
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> batch = Batch(torch.zeros(2, 3, 1, 1), ids, ids > 0, ("a", "b"), ("1", "2"))
        >>> select_images(batch, [1, 0]).captions
        ('b', 'a')
    """
    k, chosen = batch.captions_per_image, list(images)
    rows = [image * k + caption for image in chosen for caption in range(k)]
    values = {name: getattr(batch, name) for name in _PER_CAPTION}
    references = batch.references
    return Batch(
        images=batch.images[chosen],
        input_ids=batch.input_ids[rows],
        mask=batch.mask[rows],
        captions=tuple(batch.captions[row] for row in rows),
        image_ids=tuple(batch.image_ids[image] for image in chosen),
        references=references and tuple(references[image] for image in chosen),
        cached={key: tokens[chosen] for key, tokens in batch.cached.items()},
        views=batch.views and tuple(batch.views[image] for image in chosen),
        **{name: None if value is None else value[rows] for name, value in values.items()},
    )


def require_batches(method: str, batches: Sequence[Any]) -> None:
    """Refuse anything but one or more `Batch`."""
    if not batches:
        raise ConfigError(f"{method}() was given no batch. Give at least one.")
    wrong = [type(batch).__name__ for batch in batches if not isinstance(batch, Batch)]
    if wrong:
        raise ConfigError(
            f"{method}() was given {', '.join(wrong)}; expected capdistill.Batch, as a "
            "capdistill.data.Loader yields it."
        )
