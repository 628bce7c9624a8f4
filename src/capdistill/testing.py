"""Tests for your own losses, encoders and decoders: the laws that the trainer relies on.

Call them in your own test-suite, under pytest or without. They need no data and no GPU, take well
under a second on tiny parts, and leave flags, buffers and random state as they were.

>>> from capdistill import TokenKD
>>> check_loss(TokenKD(temperature=2.0))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.decoders.base import Decoder
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError, DataError, shortened
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import OUTPUTS, Batch, CaptionerOutput, ModelSpec
from capdistill.runtime import evaluating, seeded

__all__ = ["check_decoder", "check_encoder", "check_loss"]

WORDS = tuple("abcdefghijk")
STUDENT = ModelSpec(6, 5, 1, (2, 2), (7, 8), WORDS, has_attention=True, name="student")
TEACHER = ModelSpec(9, 9, 0, (3, 3), (5, 4, 10), WORDS, has_attention=True, name="teacher")
P = TypeVar("P")
TOKENWISE = ("logits", "hidden", "attention")


def check_loss(
    loss: DistillationLoss | type[DistillationLoss],
    *,
    student: ModelSpec = STUDENT,
    teacher: ModelSpec = TEACHER,
    teacher_module: nn.Module | None = None,
) -> None:
    """Check that a loss keeps the laws of `DistillationLoss`.

    It returns one finite number: a sum, which doubles with the batch (unless `couples_batch`) and
    which padding does not change. Masked tokens get no gradient, the teacher gets none, the student
    and every projector get one. `count` agrees with `per`. It reads only what it `needs`, works
    in half precision and at extreme logits, and gives 0 where no token is valid (`per="token"`).

    Example:
        >>> from capdistill import HiddenKD
        >>> check_loss(HiddenKD(layers="uniform"))

    Args:
        loss: A loss that is not built yet, or a class that takes no arguments.
        student, teacher: Specifications to build it with; their widths differ by default.
        teacher_module: The model whose parameters the loss must not hold as trainable ones.

    Raises:
        AssertionError: a law is broken; the message names it.
    """
    given = _made(loss, DistillationLoss)
    law, theirs = _Law(given), set(teacher_module.parameters() if teacher_module else ())
    law(
        theirs.isdisjoint(given.parameters()),
        "the loss holds parameters of the teacher, which would be trained.",
    )
    loss = copy.deepcopy(given)
    with seeded(0), torch.enable_grad():
        loss.build(student, teacher)
        batch = _batch([3, 1, 2, 3, 2, 2, 1, 3])  # 4 images: fewer have no angles
        mine, their = _output(batch, student, 1), _output(batch, teacher, 2)
        needed = [
            CaptionerOutput(**{what: getattr(each, what) for what in loss.needs})
            for each in (mine, their)
        ]
        total = loss(*needed, batch)
        law(
            isinstance(total, Tensor) and total.ndim == 0 and total.is_floating_point(),
            "forward must return one floating-point number, a tensor of shape ().",
        )
        law(bool(total.isfinite()), f"the value is {float(total.detach())}.")
        _check_count(loss, batch)
        _check_gradients(loss, total, mine, their, batch)
        value = float(total.detach())
        if not loss.couples_batch:
            twice = _value(loss, map(double_output, needed), double_batch(batch))
            law(
                _near(twice, 2 * value),
                f"forward returns {value:.6g} for a batch and {twice:.6g} for the same "
                "batch twice. It must return the sum over tokens (or images), which the trainer "
                "divides once by count(batch). Set couples_batch = True if it looks across images.",
            )
        padded = _value(loss, map(_padded, needed), _padded_batch(batch))
        law(
            _near(padded, value),
            f"padding changes the value from {value:.6g} to {padded:.6g}. Select the "
            "valid tokens with batch.target_mask first (losses.divergence.valid_rows).",
        )
        _check_extremes(loss, needed, batch)


def _check_count(loss: DistillationLoss, batch: Batch) -> None:
    law, count = _Law(loss), float(loss.count(batch))
    law(math.isfinite(count) and count > 0, f"count(batch) is {count}; it must be positive.")
    for what, changed, expected in (
        ("padding", _padded_batch(batch), count),
        ("doubling the batch", double_batch(batch), 2 * count),
    ):
        found = float(loss.count(changed))
        law(
            _near(found, expected),
            f"{what} changes count(batch) from {count:g} to {found:g}, not {expected:g}.",
        )


def _check_gradients(
    loss: DistillationLoss,
    total: Tensor,
    student: CaptionerOutput,
    teacher: CaptionerOutput,
    batch: Batch,
) -> None:
    law, trainable = _Law(loss), [p for p in loss.parameters() if p.requires_grad]
    leaves, theirs = _leaves(student), _leaves(teacher)
    law(total.requires_grad, "no gradient reaches the student.")
    inputs = [*leaves.values(), *theirs.values(), *trainable]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    mine = dict(zip(leaves, found, strict=False))
    reached = [key for key, grad in mine.items() if grad is not None and bool(grad.any())]
    law(bool(reached), "no gradient reaches the student.")
    for key, grad in zip(theirs, found[len(leaves) :], strict=False):
        law(
            grad is None or not bool(grad.any()),
            f"the teacher's {key} gets a gradient. Detach the teacher's outputs.",
        )
    for key, grad in mine.items():
        if grad is None:
            continue
        law(bool(grad.isfinite().all()), f"the gradient of {key} is not finite.")
        hidden = grad[~batch.target_mask] if key != "features" else grad[:0]
        law(
            not bool(hidden.any()),
            f"masked tokens of {key} get a gradient. Mask with batch.target_mask.",
        )
    for number, grad in enumerate(found[len(leaves) + len(theirs) :]):
        law(
            grad is not None,
            f"parameter {number} of the loss requires a gradient and gets none. "
            "Create in build only what forward uses.",
        )


def _check_extremes(loss: DistillationLoss, needed: list[CaptionerOutput], batch: Batch) -> None:
    law = _Law(loss)
    steep = [_map(each, lambda x: 1e4 * x, ["logits"]) for each in needed]
    half = [_map(each, lambda x: x.detach().half(), OUTPUTS) for each in needed]
    for what, outputs in (("logits of size 1e4", steep), ("outputs in half precision", half)):
        law(math.isfinite(_value(loss, outputs, batch)), f"not finite for {what}.")
    if loss.per == "token" and type(loss).count is DistillationLoss.count:
        nothing = replace(batch, mask=torch.zeros_like(batch.mask))
        empty = _value(loss, needed, nothing)
        law(empty == 0, f"a batch without a valid token gives {empty}, not 0.")


def check_decoder(
    decoder: Decoder | type[Decoder], *, vocabulary: int = 11, tolerance: float = 1e-4
) -> None:
    """Check that a decoder keeps the laws of `Decoder`, in evaluation mode.

    `forward` and repeated `step` give the same logits; a later word, padding, another caption
    and another image change nothing; `expand`, `reorder` and `keep` of the state carry the past;
    `hidden` and `attention` are as announced, and None unless needed.

    Example:
        >>> from capdistill.decoders import LSTMDecoder
        >>> check_decoder(LSTMDecoder(dim=8, embed=6, hidden=12, heads=2))

    Args:
        decoder: Built or not (it is then built for `vocabulary` words), or a class that takes no
            arguments.
        vocabulary: V, if it is not built yet.
        tolerance: Largest difference of logits, relative to the largest logit.

    Raises:
        AssertionError: a law is broken; the message names it.
    """
    decoder = copy.deepcopy(_made(decoder, Decoder))
    law = _Law(decoder, tolerance)
    with seeded(0), torch.no_grad(), evaluating(decoder):
        if decoder.vocabulary is None:
            decoder.build(vocabulary)
            decoder.eval()
        words, k, length = int(decoder.vocabulary or vocabulary), 3, 5
        like = next(decoder.parameters(), torch.zeros(()))
        features = torch.randn(2, 6, decoder.dim, dtype=like.dtype, device=like.device)
        ids = torch.randint(words, (2 * k, length), device=like.device)
        bare, out = decoder(ids, features), decoder(ids, features, OUTPUTS - {"logits", "features"})
        logits, shape = out.logits, (2 * k, length, words)
        law(logits.shape == shape, f"logits are {tuple(logits.shape)}, not (B, T, V) = {shape}.")
        widths, announced = tuple(h.shape[-1] for h in out.hidden or ()), (*decoder.hidden_dims,)
        law(widths == announced, f"hidden has widths {widths}, but hidden_dims is {announced}.")
        given = out.attention is not None
        law(given == decoder.has_attention, f"has_attention must be {given}.")
        sums = out.attention.float().sum(-1) if given else torch.ones(())
        law(bool(((sums - 1).abs() < 1e-3).all()), "rows of attention, (B, T, N), must sum to 1.")
        unasked = bare.hidden is None and bare.attention is None
        law(unasked, "hidden and attention must be None unless they are in need.")
        law.equal("forward and repeated step disagree", *step_logits(decoder, ids, features))
        later = ids.clone()
        later[:, -1] = (later[:, -1] + 1) % words
        found = decoder(later, features).logits[:, :-1]
        law.equal("a later word changes earlier ones", found, logits[:, :-1])
        found = decoder(F.pad(ids, (0, 3)), features).logits[:, :length]
        law.equal("padding changes the words before it", found, logits)
        found = decoder(ids[k:], features[1:]).logits
        law.equal("an image depends on the others", found, logits[k:])
        found = decoder(ids[[0, k]], features).logits
        law.equal("a caption depends on the others of its image", found, logits[[0, k]])
        _check_state(decoder, ids, features, law)


def step_logits(decoder: Decoder, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (B, T, V) of repeated `step` and of `forward`, which must be equal.

    The decoder is built; ids are (B, T), rows grouped by image, and features (I, N, D).
    """
    state = decoder.start(features).expand(len(ids) // len(features))
    steps = []
    for position in range(ids.shape[1]):
        logits, state = decoder.step(ids[:, position], state)
        steps.append(logits)
    return torch.stack(steps, 1), decoder(ids, features).logits


def _check_state(decoder: Decoder, ids: Tensor, features: Tensor, law: _Law) -> None:
    """The state after one word: expanded, reordered within its images, and without an image."""
    ids = ids.clone()
    ids[:, 0] = ids[::3, 0].repeat_interleave(3)
    _, state = decoder.step(ids[::3, 0], decoder.start(features))
    logits, state = decoder.step(ids[:, 1], state.expand(3))
    law.equal("State.expand loses the past", logits, decoder(ids, features).logits[:, 1])
    order = torch.tensor([2, 0, 0, 4, 3, 5], device=ids.device)
    logits, state = decoder.step(ids[:, 2], state.reorder(order))
    ids = torch.cat([ids[order, :2], ids[:, 2:]], 1)
    law.equal("State.reorder loses the past", logits, decoder(ids, features).logits[:, 2])
    logits, _ = decoder.step(ids[3:, 3], state.keep(torch.tensor([1], device=ids.device)))
    law.equal("State.keep loses the past", logits, decoder(ids, features).logits[3:, 3])


def check_encoder(encoder: Encoder | type[Encoder], *, tolerance: float = 1e-4) -> None:
    """Check that an encoder keeps the laws of `Encoder`.

    uint8 images of any size become (I, N, D) tokens with N = prefix_tokens + h * w; floats are
    refused. In evaluation mode the same image gives the same tokens, alone or in a batch. A frozen
    trunk stays so in training mode: nothing random, no statistics that move.

    Example:
        >>> from capdistill.encoders import TimmEncoder
        >>> check_encoder(TimmEncoder("test_efficientnet", dim=8, weights=False))

    Args:
        encoder: An encoder, or a class that takes no arguments.
        tolerance: Largest difference of tokens, relative to the largest token.

    Raises:
        AssertionError: a law is broken; the message names it.
    """
    encoder = copy.deepcopy(_made(encoder, Encoder))
    law = _Law(encoder, tolerance)
    for name in ("dim", "token_dim", "tokens"):
        value = getattr(encoder, name, None)
        law(isinstance(value, int) and value > 0, f"{name} is {value!r}; set it in __init__.")
    with seeded(0), torch.no_grad(), evaluating(encoder):
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        size, count = encoder.image_size, encoder.tokens
        images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8, device=device)
        tokens, features = encoder.trunk(images), encoder(images)
        for what, given, wanted in (
            ("trunk", tuple(tokens.shape), (2, count, encoder.token_dim)),
            ("forward", tuple(features.shape), (2, count, encoder.dim)),
        ):
            law(given == wanted, f"{what} gives {given}, expected (I, N, width) = {wanted}.")
        height, width = encoder.grid or (1, count - encoder.prefix_tokens)
        places = encoder.prefix_tokens + height * width
        law(places == count, f"prefix_tokens and grid make {places} tokens, but tokens is {count}.")
        law.equal("forward is not head(trunk(images))", features, encoder.head(tokens))
        law.equal("two calls in evaluation mode differ", encoder(images), features)
        law.equal("an image depends on the batch", encoder(images[:1]), features[:1])
        other = F.interpolate(images.float(), (size + 8, size + 4)).to(torch.uint8)
        law(encoder(other).shape == features.shape, "images of another size give other shapes.")
        try:
            encoder(images.float())
            law(False, "float images are not refused; call self.normalise(images) in trunk.")
        except DataError:
            pass
        for parameter in encoder.trunk_parameters():
            parameter.requires_grad_(False)
        buffers = {name: value.clone() for name, value in encoder.named_buffers()}
        found = encoder.train().trunk(images)
        law.equal("a frozen trunk is not in evaluation mode", found, tokens)
        moved = [n for n, value in encoder.named_buffers() if not torch.equal(value, buffers[n])]
        law(not moved, f"statistics of a frozen trunk move: {', '.join(moved[:3])}.")


def _made(part: P | type[P], kind: type[P]) -> P:
    """The component, or a new one of its class."""
    part = part() if isinstance(part, type) and issubclass(part, kind) else part
    if not isinstance(part, kind):
        kinds = f"an object of {kind.__name__}, or its class"
        raise ConfigError(f"{shortened(part)} was given; expected {kinds}.")
    return part


class _Law:
    """The laws of a component; a broken law is an AssertionError that begins with its name."""

    def __init__(self, part: nn.Module, tolerance: float = 1e-4) -> None:
        self.name, self.tolerance = type(part).__name__, tolerance

    def __call__(self, holds: bool, message: str) -> None:
        if not holds:
            raise AssertionError(f"{self.name}: {message}")

    def equal(self, broken: str, found: Tensor, expected: Tensor) -> None:
        gap, largest = (float(x.abs().max()) for x in (found - expected, expected))
        self(gap <= self.tolerance * max(1.0, largest), f"{broken} (by up to {gap:.3g}).")


def double_batch(batch: Batch) -> Batch:
    """The batch twice, one after the other."""
    named = {name: getattr(batch, name) for name in ("images", "input_ids", "mask")}
    return replace(
        batch,
        views=batch.views and batch.views * 2,
        **{name: torch.cat([tensor] * 2) for name, tensor in named.items()},
        captions=batch.captions * 2,
        image_ids=batch.image_ids * 2,
        references=batch.references and batch.references * 2,
        cached={key: torch.cat([tokens] * 2) for key, tokens in batch.cached.items()},
    )


def double_output(output: CaptionerOutput) -> CaptionerOutput:
    """The output for the batch twice, one after the other."""
    return _map(output, lambda x: torch.cat([x] * 2), fields(output))


def _map(
    output: CaptionerOutput, function: Callable[[Tensor], Tensor], names: Iterable[Any]
) -> CaptionerOutput:
    def apply(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(function(each) for each in value)
        return None if value is None else function(value)

    names = [getattr(name, "name", name) for name in names]
    return replace(output, **{name: apply(getattr(output, name)) for name in names})


def _batch(lengths: list[int], k: int = 2) -> Batch:
    """`lengths[b]` valid targets in row b."""
    steps, limits = torch.arange(max(lengths) + 1), torch.tensor(lengths)
    mask = steps[None] <= limits[:, None]
    images = len(lengths) // k
    return Batch(
        images=torch.zeros(images, 3, 4, 4, dtype=torch.uint8),
        input_ids=torch.randint(len(WORDS), mask.shape),
        mask=mask,
        captions=("",) * len(lengths),
        image_ids=tuple(map(str, range(images))),
    )


def _output(batch: Batch, spec: ModelSpec, seed: int) -> CaptionerOutput:
    """Random leaf tensors with the shapes of the specification."""
    rng = torch.Generator().manual_seed(seed)
    rows, length = batch.targets.shape

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).requires_grad_()

    tokens, width = spec.tokens or 1, spec.feature_dim
    attention = torch.randn(rows, length, tokens, generator=rng).softmax(-1).requires_grad_()
    return CaptionerOutput(
        logits=leaf(rows, length, len(spec.vocabulary)),
        hidden=tuple(leaf(rows, length, each) for each in spec.hidden_dims),
        features=None if width is None else leaf(batch.num_images, tokens, width),
        attention=attention if spec.has_attention else None,
        mask=batch.target_mask,
    )


def _leaves(output: CaptionerOutput) -> dict[str, Tensor]:
    named = {name: getattr(output, name) for name in ("logits", "features", "attention")}
    named |= {f"hidden[{i}]": layer for i, layer in enumerate(output.hidden or ())}
    return {name: leaf for name, leaf in named.items() if leaf is not None}


def _padded_batch(batch: Batch) -> Batch:
    ids, mask = (F.pad(each, (0, 3)) for each in (batch.input_ids, batch.mask))
    return replace(batch, input_ids=ids, mask=mask)


def _padded(output: CaptionerOutput) -> CaptionerOutput:
    """Large values at padding positions, which no loss may read."""
    longer = _map(output, lambda x: F.pad(x, (0, 0, 0, 3), value=77.0), TOKENWISE)
    return replace(longer, mask=None)


def _value(loss: DistillationLoss, outputs: Iterable[CaptionerOutput], batch: Batch) -> float:
    with torch.no_grad():
        return float(loss(*outputs, batch))


def _near(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6)
