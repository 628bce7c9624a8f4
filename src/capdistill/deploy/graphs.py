"""The modules that are exported, with example inputs, and the check of what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from capdistill.captioner import Captioner
from capdistill.decoders.base import Cache, Decoder, DecoderState
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError
from capdistill.runtime import generator

Kind = Literal["image", "cache", "row"]
Tensors: TypeAlias = "dict[tuple[Kind, str], Tensor]"
KINDS: tuple[Kind, ...] = ("image", "cache", "row")
TOLERANCE = 1e-3  # of the largest value of an output, between torch and a runtime


@dataclass(frozen=True)
class Entry:
    """A tensor of a decoder's state.

    Example:
        >>> cache = Entry("cache", "0", (4, 6, 32), torch.float32, growing=(1,))
        >>> cache.input, (*cache.leading, *cache.axes("slots"))
        ('image_cache0', ('images', 4, 'slots', 32))

    Args:
        kind: "image", one row per image, which a step reads; "cache", one row per image, which a
            step extends; "row", one row per hypothesis.
        name: Its name in the state, or its number in the cache.
        shape: Sizes after two words, without those of images and beams.
        dtype: Type of its values.
        growing: The axes of `shape` that grow with every word.
        late: Whether the first step makes it, so that it has length 0 before.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    growing: tuple[int, ...] = ()
    late: bool = False

    @property
    def input(self) -> str:
        """Its name as an input of the step graph."""
        return {"image": "image_", "cache": "image_cache", "row": "state_"}[self.kind] + self.name

    @property
    def leading(self) -> tuple[str, ...]:
        """Names of the axes before `shape`."""
        return ("images", "beams") if self.kind == "row" else ("images",)

    def axes(self, length: int | str) -> tuple[int | str, ...]:
        """`shape` with a size or a name for what grows."""
        return tuple(length if i in self.growing else size for i, size in enumerate(self.shape))


class FirstState(nn.Module):
    """(I, 3, S, S) uint8 images to the tensors of the decoder's first state, (I, ...)."""

    def __init__(self, encoder: Encoder, decoder: Decoder, entries: tuple[Entry, ...]) -> None:
        super().__init__()
        self.encoder, self.decoder, self.entries = encoder, decoder, entries

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `entries`."""
        values = tensors_of(self.decoder.start(self.encoder(images)))
        return tuple(
            _empty(entry, images.shape[0]) if entry.late else values[entry.kind, entry.name]
            for entry in self.entries
        )


def _empty(entry: Entry, images: int) -> Tensor:
    sizes = [int(size) for size in entry.axes(0)]
    return torch.zeros(images, *sizes, dtype=entry.dtype)


class Step(nn.Module):
    """One word of every hypothesis: (I, k) tokens and a state to logits and the next state."""

    def __init__(self, decoder: Decoder, entries: tuple[Entry, ...]) -> None:
        super().__init__()
        self.decoder, self.entries = decoder, entries

    def forward(self, tokens: Tensor, position: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits (I, k, V), then the next tensors of those entries that change.

        Args:
            tokens: (I, k).
            position: () int64, words read so far.
            state: Tensors of `entries`: (I, ...), and (I, k, ...) for those of a hypothesis.
        """
        read = cast("int", position.item())  # a symbol, which `int` would make a constant
        torch._check(read >= 0)
        before = self._state(state, tokens.shape[1], read)
        logits, after = self.decoder.step(tokens.flatten(), before)
        values = tensors_of(after)
        changed = [
            (entry, values[entry.kind, entry.name])
            for entry in self.entries
            if entry.kind != "image"
        ]
        by_image = (
            value.view(*tokens.shape, *value.shape[1:]) if entry.kind == "row" else value
            for entry, value in changed
        )
        return (logits.view(*tokens.shape, -1), *by_image)

    def _state(self, tensors: list[Tensor], beams: int, position: int) -> DecoderState:
        kinds: dict[Kind, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for entry, tensor in zip(self.entries, tensors, strict=True):
            kinds[entry.kind][entry.name] = tensor.flatten(0, 1) if entry.kind == "row" else tensor
        rooms = [*kinds["cache"].values()]
        cache = Cache(rooms, rooms[0].shape[2]) if rooms else None
        return DecoderState(kinds["image"], kinds["row"], beams, position, cache)


def tensors_of(state: DecoderState) -> Tensors:
    """The tensors of a state, by kind and name."""
    rooms = [] if state.cache is None else state.cache.rooms
    groups: dict[Kind, dict[str, Tensor]] = {
        "image": state.image,
        "cache": {str(i): room for i, room in enumerate(rooms)},
        "row": state.row,
    }
    return {(kind, name): value for kind in KINDS for name, value in groups[kind].items()}


@dataclass(frozen=True)
class Traced:
    """The graphs of a captioner, with example inputs.

    Args:
        encoder, step: The modules.
        entries: The decoder's state, in the order of the graphs.
        images: (I, 3, S, S) uint8, for the encoder.
        tokens: (I, k) for the step.
        state: Also for the step: the state after two words.
        vocabulary: V.
    """

    encoder: FirstState
    step: Step
    entries: tuple[Entry, ...]
    images: Tensor
    tokens: Tensor
    state: list[Tensor]
    vocabulary: int


def trace(captioner: Captioner, images: int = 2, beams: int = 3) -> Traced:
    """Read two words for random images, to learn what the decoder keeps and what grows.

    Args:
        captioner: On the CPU, in float32 and in evaluation mode.
        images, beams: Of the example inputs. Unlike each other, and neither 0 nor 1, where the
            graphs are to take any number of them.

    Raises:
        ConfigError: the decoder keeps something that the graphs cannot carry.
    """
    encoder, decoder, random = captioner.encoder, captioner.decoder, generator(0, "export")
    pixels = random_images(captioner, images, random)
    words = len(captioner.tokenizer.vocabulary)
    tokens = torch.randint(0, words, (images, beams), generator=random)
    with torch.enable_grad():  # a cache is then extended by new tensors
        first = decoder.start(encoder(pixels))
        one = decoder.step(tokens.flatten(), first.expand(beams))[1]
        two = decoder.step(tokens.flatten(), one)[1]
    entries = _entries(decoder, tensors_of(first), tensors_of(one), tensors_of(two))
    values = tensors_of(two)
    state = [
        value.view(images, beams, *value.shape[1:]) if entry.kind == "row" else value
        for entry in entries
        for value in [values[entry.kind, entry.name].detach()]
    ]
    first_state, step = FirstState(encoder, decoder, entries), Step(decoder, entries)
    return Traced(first_state, step, entries, pixels, tokens, state, words)


def random_images(captioner: Captioner, count: int, random: torch.Generator) -> Tensor:
    """(count, 3, S, S) uint8."""
    side = captioner.image_size
    shape = (count, len(captioner.encoder.mean), side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)


def require_close(part: nn.Module, file: str, name: str, expected: Tensor, given: Tensor) -> None:
    """Refuse a file that computes something else than torch.

    Args:
        part: The encoder or decoder in the file, for the message.
        file: Name of the file.
        name: The output that is compared.
        expected: As torch computes it.
        given: As the file's runtime does.

    Raises:
        ConfigError: they differ, or what torch computes is NaN.
    """
    same_shape = expected.shape == given.shape
    if same_shape and not expected.numel():
        return
    expected, given = expected.double(), given.double()  # bools cannot be subtracted
    if expected.isnan().any():
        raise ConfigError(
            f"export: '{name}' of the {type(part).__name__} is NaN for a random image. Its weights "
            "are damaged: load the captioner again, or train it with a lower learning rate."
        )
    difference = _largest_difference(expected, given) if same_shape else float("inf")
    largest = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0.0
    if not difference <= TOLERANCE * max(1.0, largest):
        tool = "ExecuTorch" if file.endswith(".pte") else "torch.onnx"
        raise ConfigError(
            f"export: '{name}' of {file} is not what torch computes: it differs by up to "
            f"{difference:.2g} ({tuple(given.shape)}, torch {tuple(expected.shape)}). {tool} "
            f"misreads an operator of the {type(part).__name__}."
        )


def _largest_difference(expected: Tensor, given: Tensor) -> float:
    """Infinite numbers that are equal do not differ: logits of words that never come are -inf."""
    return (expected - given).where(expected != given, 0.0).abs().max().item()


def _entries(decoder: Decoder, first: Tensors, one: Tensors, two: Tensors) -> tuple[Entry, ...]:
    differing = (set(first) - set(two)) | (set(one) ^ set(two))
    if differing:
        raise ConfigError(
            f"export: {type(decoder).__name__} keeps '{min(differing)[1]}' after some words and "
            "not after others. A state must have the same tensors after every word."
        )
    entries = []
    for (kind, name), value in two.items():
        shape, before = tuple(value.shape[1:]), tuple(one[kind, name].shape[1:])
        growing = tuple(
            axis for axis, sizes in enumerate(zip(before, shape, strict=False)) if len({*sizes}) > 1
        )
        late = (kind, name) not in first
        if len(shape) != len(before) or (growing and kind == "image") or (late and not growing):
            raise ConfigError(
                f"export: {type(decoder).__name__} keeps '{name}' in {kind}, of shape {before} "
                f"after one word and {shape} after two. Only rows and caches may grow, and what "
                "`start` does not return must grow from length 0."
            )
        entries.append(Entry(kind, name, shape, value.dtype, growing, late))
    return tuple(entries)
