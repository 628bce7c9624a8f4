"""Any existing captioner as a teacher: a module, and a function that returns its outputs.

The outputs are checked against the batch each time: a wrong layout is an error that names the
shapes, never a silently wrong target.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.compatibility import require_output
from capdistill.decoders.base import Decoder, DecoderState
from capdistill.encoders.base import standardised
from capdistill.errors import ConfigError, DataError, IncompatibleModels, shortened
from capdistill.generation.decode import CaptionGenerator
from capdistill.outputs import (
    FEATURES_ONLY,
    LOGITS,
    Batch,
    CaptionerOutput,
    DecoderOutput,
    ModelSpec,
)
from capdistill.runtime import inference
from capdistill.tokenizer import Tokenizer, require_tokenizer

Adapt = Callable[[Any, Batch], CaptionerOutput]


class ForeignTeacher(CaptionGenerator):
    """Another captioner with the interface of `Captioner`; made by `wrap`, see there.

    Attributes:
        module: The model as it was given.
        tokenizer: Its tokenizer.
        name: Name of the model in messages.
        rereads_prefix: `generate` runs the whole module again for every word, so its time does not
            reflect the module's own decoding.
    """

    rereads_prefix = True

    def __init__(
        self,
        module: nn.Module,
        adapt: Adapt,
        tokenizer: Tokenizer,
        *,
        name: str = "teacher",
        spec: ModelSpec | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module) or not callable(adapt):
            raise ConfigError(
                f"wrap: {type(module).__name__} and {shortened(adapt)} were given; expected a "
                "torch.nn.Module and a function adapt(module, batch)."
            )
        require_tokenizer(tokenizer)
        if spec is not None and list(spec.vocabulary) != list(tokenizer.vocabulary):
            raise IncompatibleModels(
                f"{name}: the declared spec lists {len(spec.vocabulary)} vocabulary entries that "
                f"are not the tokenizer's {len(tokenizer.vocabulary)}. Give ModelSpec "
                "tokenizer.vocabulary."
            )
        self.module = module
        self.adapt = adapt
        self.tokenizer = tokenizer
        self.name = name
        self._image_size = image_size
        self._spec = spec

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """What `adapt` returns for the batch, once its shapes are checked.

        Args:
            batch: B = I * k captions, on the module's device.
            need: What the caller will use, of "logits", "features", "hidden" and "attention". For
                {"features"} the words do not matter: those that the teacher does not know are
                replaced, and the output holds features alone.

        Raises:
            IncompatibleModels: `adapt` returned other shapes, or None for something needed.
        """
        if need == FEATURES_ONLY:
            output = self._run(self._with_known_words(batch), need)
            return CaptionerOutput(features=output.features)
        return self._run(batch, need or LOGITS)

    def _run(self, batch: Batch, needed: frozenset[str]) -> CaptionerOutput:
        output = self.adapt(self.module, batch)
        vocabulary = len(self.tokenizer.vocabulary)
        source = f"{self.name}: adapt returned"
        require_output(source, output, batch, needed, vocabulary, self._spec)
        return output

    def _with_known_words(self, batch: Batch) -> Batch:
        unknown = batch.input_ids >= len(self.tokenizer.vocabulary)
        return replace(
            batch, input_ids=batch.input_ids.masked_fill(unknown, self.tokenizer.start_id)
        )

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification that losses need: declared, or probed on the first given batch.

        A probe runs the module once in eval mode without gradients, restores each submodule's mode
        and the random state, and is remembered.

        Args:
            batch: A real batch on the module's device; not used once the spec is known.

        Raises:
            ConfigError: the spec is neither declared nor probed yet and there is no batch.
            IncompatibleModels: what `adapt` returns for the batch does not fit it.
        """
        if self._spec is None:
            if batch is None:
                raise ConfigError(
                    f"{self.name}: its spec is not known yet.\n"
                    "Call spec(batch) with a real batch, or declare it in wrap(..., spec=...)."
                )
            self._spec = self._probe(batch)
        return self._spec

    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Tensor]:
        """A decoder that reads the whole caption again for every word, and the images."""
        return PrefixDecoder(self), images.images if isinstance(images, Batch) else images

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the images it reads, or None."""
        return self._image_size

    def _probe(self, batch: Batch) -> ModelSpec:
        with inference(self, fork_rng=True):
            output = self._run(self._with_known_words(batch), frozenset())
        features = output.features
        return ModelSpec(
            feature_dim=None if features is None else features.shape[2],
            tokens=None if features is None else features.shape[1],
            prefix_tokens=0,
            grid=None,
            hidden_dims=tuple(layer.shape[2] for layer in output.hidden or ()),
            vocabulary=self.tokenizer.vocabulary,
            has_attention=output.attention is not None,
            name=self.name,
        )


def wrap(
    module: nn.Module,
    adapt: Adapt,
    tokenizer: Tokenizer,
    *,
    name: str = "teacher",
    spec: ModelSpec | None = None,
    image_size: int | None = None,
) -> ForeignTeacher:
    """Any existing captioner as a teacher.

    Example:
        >>> class Theirs(nn.Module):  # words first: logits (T, B, V)
        ...     def forward(self, pixels, words):
        ...         return F.one_hot(words, 9).float() + pixels.mean()
        >>> def adapt(module, batch):
        ...     pixels = normalised(batch, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), size=8)
        ...     logits = module(pixels, batch.inputs.T).transpose(0, 1)
        ...     return CaptionerOutput(logits, None, None, None, batch.target_mask)
        >>> from capdistill.tokenizer import WordTokenizer
        >>> tokenizer = WordTokenizer(["a", "dog", "cat", "runs", "sits"])
        >>> teacher = wrap(Theirs(), adapt, tokenizer, name="theirs")
        >>> batch = Batch(
        ...     images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 4, 5, 2]]), mask=torch.ones(1, 4, dtype=torch.bool),
        ...     captions=("a dog",), image_ids=("a.jpg",),
        ... )
        >>> teacher(batch).logits.shape, len(teacher.spec(batch).vocabulary)
        (torch.Size([1, 3, 9]), 9)

    Args:
        module: The model. It becomes a submodule, so moving, freezing and `train()` affect it.
        adapt: `adapt(module, batch)` runs it on `batch.inputs` (B, T - 1) and returns a
            `CaptionerOutput` aligned with `batch.targets`; an output that it lacks is None. The k
            captions of an image are adjacent: row b belongs to image b // k.
        tokenizer: The model's tokenizer; batches hold its ids and logits follow its vocabulary.
        name: Name of the model in messages.
        spec: The specification that losses need, including the grid and the prefix tokens, which
            probing cannot determine. By default it is probed on the first real batch.
        image_size: Side in pixels of the images it reads: loaders give the larger of the teacher's
            and the student's. By default the student's, or 224 without a student.

    Raises:
        IncompatibleModels: the declared spec and the tokenizer have different vocabularies, or
            (when called) `adapt` returns other shapes than the batch needs.
    """
    return ForeignTeacher(module, adapt, tokenizer, name=name, spec=spec, image_size=image_size)


def normalised(
    batch: Batch, mean: Sequence[float], std: Sequence[float], size: int | None = None
) -> Tensor:
    """The images of a batch as the other model expects them: resized, scaled, normalised.

    Example:
        >>> batch = Batch(
        ...     images=torch.full((1, 3, 4, 4), 255, dtype=torch.uint8),
        ...     input_ids=torch.tensor([[1, 2]]), mask=torch.ones(1, 2, dtype=torch.bool),
        ...     captions=("",), image_ids=("a.jpg",),
        ... )
        >>> normalised(batch, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0), size=2)[0, :, 0, 0]
        tensor([2.0000, 1.0000, 0.5000])

    Args:
        batch: Images (I, 3, H, W) uint8.
        mean: One value per channel, for pixels in [0, 1].
        std: One value per channel.
        size: Side in pixels that the model reads; None keeps the loader's.

    Returns:
        (I, 3, size, size) float32.

    Raises:
        ConfigError: mean or std do not have one value per channel, or std is not positive.

    Source:
        Bicubic with antialiasing, as `Encoder.normalise`.
    """
    if not isinstance(batch, Batch):
        raise DataError(f"normalised: {type(batch).__name__} was given; expected a Batch.")
    channels = batch.images.shape[1]
    if not (isinstance(mean, Collection) and isinstance(std, Collection)):
        raise ConfigError(f"normalised: mean {mean!r} and std {std!r}; expected a list each.")
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise ConfigError(
            f"normalised: mean {tuple(mean)} and std {tuple(std)} for images of {channels} "
            "channels. Give one value per channel for pixels in [0, 1], with std > 0."
        )
    pixels = batch.images.float()
    if size is not None and batch.images.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
    return standardised(pixels, mean, std)  # (I, 3, S, S)


class PrefixDecoder(Decoder):
    """Read the whole caption so far again for every word: slow, but only `adapt` is needed.

    The features are the images themselves, (I, 3, H, W) uint8.

    Args:
        teacher: A `ForeignTeacher`; it is not moved, and its mode is not changed.
    """

    has_attention = False

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher_forward = teacher.forward
        self.vocabulary = len(teacher.tokenizer.vocabulary)

    def build_vocabulary(self, vocabulary: int) -> None:
        """Do nothing: the vocabulary is the teacher's."""

    def forward(
        self, input_ids: Tensor, features: Tensor, need: frozenset[str] = frozenset()
    ) -> DecoderOutput:
        """(B, T) ids and (I, 3, H, W) images to logits (B, T, V)."""
        ids = torch.cat(
            [input_ids, input_ids[:, -1:]], 1
        )  # a target for the last word, which is not read
        batch = Batch(
            images=features,
            input_ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            captions=("",) * len(ids),
            image_ids=tuple(map(str, range(len(features)))),
        )
        return DecoderOutput(self.teacher_forward(batch).logits)

    def start(self, features: Tensor) -> DecoderState:
        """The state before the first word."""
        words = torch.zeros(len(features), 0, dtype=torch.int64, device=features.device)
        return DecoderState(image={"images": features}, row={"words": words})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """(R,) words to logits (R, V)."""
        words = torch.cat([state.row["words"], tokens[:, None]], 1)  # (R, t)
        logits = self(words, state.image["images"]).logits[:, -1]
        return logits, DecoderState(state.image, {"words": words}, state.beams, state.position + 1)
