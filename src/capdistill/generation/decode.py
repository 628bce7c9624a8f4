"""From features to hypotheses: the entry to greedy decoding, beam search and sampling."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from capdistill.data.pixels import OneImage, SeveralImages, is_many, read_batches
from capdistill.decoders.base import Decoder
from capdistill.errors import ConfigError, DataError
from capdistill.generation.choice import image_keys
from capdistill.generation.config import (
    CaptionOptions,
    DecodingOptions,
    GenerationConfig,
    GenerationOptions,
    GenerationSpec,
    resolve,
)
from capdistill.generation.hypotheses import (
    CaptionResult,
    Hypothesis,
    require_numbers,
    with_text,
)
from capdistill.generation.options import GreedyOptions, IdOptions
from capdistill.generation.search import BeamSearch, Sampling, Search
from capdistill.generation.words import token_texts
from capdistill.outputs import Batch, ModelSpec
from capdistill.runtime import inference
from capdistill.tokenizer import Tokenizer, pad_batch


@torch.no_grad()
def generate(
    decoder: Decoder, features: Tensor, spec: GenerationSpec, keys: Tensor | None = None
) -> list[Hypothesis]:
    """The best hypothesis of each image, without its text.

    Images that are done leave the batch; the other images do not affect the result. Ties go to the
    smaller id, the earlier beam, the hypothesis kept first.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> spec = GenerationSpec.from_ids(1, 2, 5, beam_size=3, num_return=2)
        >>> hypotheses = generate(decoder, torch.randn(4, 9, 8), spec)
        >>> len(hypotheses), [len(hypothesis.n_best) for hypothesis in hypotheses]
        (4, [2, 2, 2, 2])

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D).
        spec: The options, in token ids.
        keys: (I,) int64 that identify the images, for sampling; their positions by default.

    Raises:
        ConfigError: every id is banned, or no decoder was given.
    """
    if not isinstance(getattr(decoder, "_orig_mod", decoder), Decoder):  # it may be compiled
        raise ConfigError(f"{type(decoder).__name__} was given; expected a Decoder and features.")
    spec.require_a_word(decoder.vocabulary or 0)
    if not len(features):
        return []
    search: Search
    if spec.config.beam_size > 1:
        search = BeamSearch(decoder, features, spec)
    else:
        keys = torch.arange(len(features)) if keys is None else keys
        search = Sampling(decoder, features, spec, keys.to(features.device))
    return search.run().hypotheses(spec.config.num_return)


_GREEDY = GreedyOptions.__annotations__.keys()


def greedy(
    decoder: Decoder,
    features: Tensor,
    *,
    start_id: int,
    end_id: int,
    max_length: int,
    banned: Sequence[int] = (),
    **options: Unpack[GreedyOptions],
) -> list[Hypothesis]:
    """The most probable next token, until the end token or the limit.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> ids = {"start_id": 1, "end_id": 2, "banned": [0, 1, 2]}
        >>> found = greedy(decoder, torch.randn(2, 9, 8), max_length=5, **ids)
        >>> [len(hypothesis.tokens) for hypothesis in found]
        [5, 5]

    Args:
        decoder, features: As for `generate`; the ids and `max_length` as for `GenerationSpec`.
        options: Fields of `GenerationConfig` that greedy decoding reads.

    Raises:
        ConfigError: invalid options, or every id is banned.
    """
    for name in sorted(options.keys() & GenerationConfig.types().keys() - _GREEDY):
        raise ConfigError(
            f"greedy: '{name}' is no option of greedy decoding. Use beam_search(...), or "
            "generate(decoder, features, GenerationSpec.from_ids(...)), which also samples."
        )
    spec = GenerationSpec.from_ids(start_id, end_id, max_length, banned=banned, **options)
    return generate(decoder, features, spec)


def beam_search(
    decoder: Decoder,
    features: Tensor,
    *,
    beam_size: int,
    start_id: int,
    end_id: int,
    max_length: int,
    banned: Sequence[int] = (),
    num_return: int = 1,
    **options: Unpack[IdOptions],
) -> list[Hypothesis]:
    """The best of `beam_size` hypotheses per image.

    Example:
        >>> from capdistill.decoders.lstm import LSTMDecoder
        >>> decoder = LSTMDecoder(dim=8, embed=6, hidden=12, heads=2).eval()
        >>> decoder.build(vocabulary=11)
        >>> ids = {"start_id": 1, "end_id": 2, "banned": [0, 1]}
        >>> found = beam_search(decoder, torch.randn(2, 9, 8), max_length=5, beam_size=3, **ids)
        >>> len(found)
        2

    Args:
        decoder, features: As for `generate`; the ids and `max_length` as for `GenerationSpec`.
        beam_size: Hypotheses kept per image.
        num_return, options: Fields of `GenerationConfig`, except those that take words.

    Raises:
        ConfigError: invalid options, or every id is banned.
    """
    sizes = {"beam_size": beam_size, "num_return": num_return}
    spec = GenerationSpec.from_ids(start_id, end_id, max_length, banned=banned, **sizes, **options)
    return generate(decoder, features, spec)


def generate_text(
    decoder: Decoder,
    features: Tensor,
    tokenizer: Tokenizer,
    spec: GenerationSpec,
    images: Batch | Tensor,
) -> list[Hypothesis]:
    """One hypothesis per image, with its text.

    Args:
        decoder: A built decoder, in evaluation mode.
        features: (I, N, D), or another input of `start`.
        tokenizer: Words to ids and back.
        spec: The options, in the tokenizer's ids.
        images: The images behind the features: sampling depends on the image, not its position.

    Raises:
        ConfigError: every id is banned.
        NotFiniteLogits: the decoder's logits are NaN or infinite.
    """
    keys = image_keys(_identities(images)) if spec.config.sample else None
    hypotheses = generate(decoder, features, spec, keys)
    require_numbers(hypotheses, _names(images, len(hypotheses)))
    return [with_text(each, tokenizer) for each in hypotheses]


def _names(images: Batch | Tensor, count: int) -> Iterable[str]:
    """The images for a message: by id, or by their place in the batch."""
    if isinstance(images, Batch):
        return (f"Image '{image}'" for image in images.image_ids)
    return (f"Image {number} of {count}" for number in range(1, count + 1))


def _identities(images: Batch | Tensor) -> Iterable[str | bytes]:
    """What identifies images in any order: their ids, or their pixels."""
    if isinstance(images, Batch):
        return images.image_ids
    return (image.cpu().numpy().tobytes() for image in images)


USUAL_SIZE = 224  # pixels, of a model that reads images of any size


class CaptionGenerator(nn.Module):
    """A model that captions images: what captioners, wrapped teachers and ensembles share.

    Attributes:
        tokenizer: Captions to ids and back.
        name: Name of the model in messages.
        rereads_prefix: Whether the whole model runs again for every word, so that its time cannot
            be compared.
    """

    tokenizer: Tokenizer
    name: str
    rereads_prefix: bool = False

    @abstractmethod
    def decoding(self, images: Batch | Tensor) -> tuple[Decoder, Any]:
        """A decoder, and what its `start` reads for a batch or (I, 3, H, W) uint8 images."""

    @abstractmethod
    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """The specification of the model, for losses and checks."""

    @property
    @abstractmethod
    def image_size(self) -> int | None:
        """Side in pixels of the images that it reads; None if it reads any."""

    def as_read(self, batch: Batch) -> Batch:
        """The batch with the ids that the model reads; most read those that it has."""
        return batch

    def generate(
        self,
        batch: Batch | Tensor,
        generation: GenerationConfig | Mapping[str, Any] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Hypothesis]:
        """One caption per image, greedily by default; training flags are restored.

        Example:
            `captioner.generate(batch, beam_size=3, no_repeat_ngram=3)`

        Args:
            batch: A batch, or (I, 3, H, W) uint8 images.
            generation: A whole configuration.
            options: Fields of `GenerationConfig`; they override those of `generation`.

        Raises:
            ConfigError: invalid options.
            DataError: neither a batch nor a tensor.
            NotFiniteLogits: the logits of an image are NaN or infinite.
        """
        spec = self._generation_spec(generation, **options)
        if not isinstance(batch, (Batch, Tensor)):
            raise DataError(
                f"{self.name}: generate was given {type(batch).__name__}; expected a Batch or a "
                "tensor (I, 3, H, W) of uint8. `caption` reads files, arrays and other images."
            )
        with inference(self, fork_rng=self.rereads_prefix):
            decoder, features = self.decoding(batch)
            return generate_text(decoder, features, self.tokenizer, spec, batch)

    @overload
    def caption(
        self, images: OneImage, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> str: ...
    @overload
    def caption(
        self, images: OneImage, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> CaptionResult: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[False] = ..., **how: Unpack[CaptionOptions]
    ) -> list[str]: ...
    @overload
    def caption(
        self, images: SeveralImages, *, details: Literal[True], **how: Unpack[CaptionOptions]
    ) -> list[CaptionResult]: ...
    @overload
    def caption(
        self,
        images: Any,
        *,
        details: bool = ...,
        errors: Literal["raise", "skip"] = ...,
        **how: Unpack[CaptionOptions],
    ) -> Any: ...

    def caption(
        self,
        images: Any,
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        progress: bool = False,
        **generation: Any,
    ) -> Any:
        """Caption a path, bytes, PIL image, array or tensor, or each of an iterable of them.

        Example:
            `student.caption("dog.jpg")` gives "a brown dog runs through the grass", and
            `student.caption(paths, beam_size=3, errors="skip")` a list of such.

        Args:
            images: One image gives a text; an iterable of any length, or a (I, 3, H, W) array or
                tensor, gives a list of texts in the same order.
            batch_size: Images in memory, and in the model, at once.
            errors: For an image that cannot be read: "raise", or "skip", which names it in a
                warning and puts None in its place.
            details: Return a `CaptionResult` (log-probabilities, n-best, attention) per image.
            progress: Show a bar.
            generation: As for `generate`: `beam_size=3`, `max_length=20`, `generation=config`, ...

        Raises:
            DataError: an image that cannot be read, by name.
            NotFiniteLogits: the logits of an image are NaN or infinite.
            ConfigError: batch_size < 1, or invalid options of `generate`.
        """
        many = is_many(images)
        wanted: dict[str, Any] = {"batch_size": batch_size, "errors": errors, "details": details}
        stream = self.caption_stream(images if many else [images], **wanted, **generation)
        if not many:
            return next(stream)
        return list(_bar(stream, images) if progress else stream)

    def caption_stream(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        errors: Literal["raise", "skip"] = "raise",
        details: bool = False,
        **generation: Unpack[DecodingOptions],
    ) -> Iterator[Any]:
        """As `caption` for an iterable; each caption comes as soon as its batch is done.

        Nothing is kept: the iterable may be endless (a camera, a queue).

        Example:
            `for text in student.caption_stream(frames, batch_size=1): print(text)`
        """
        spec = self._generation_spec(**generation)
        size = self.image_size or USUAL_SIZE
        for squares in read_batches(images, size, batch_size, errors):
            readable = [square for square in squares if square is not None]
            pixels = torch.from_numpy(np.stack(readable)) if readable else None
            made = iter(() if pixels is None else _caption(self, pixels, spec, details))
            yield from (None if square is None else next(made) for square in squares)

    def _generation_spec(
        self, generation: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> GenerationSpec:
        return GenerationSpec.of(resolve(generation, options), self.tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of parameters, shared ones once; only those that are trained on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)


def _bar(stream: Iterator[Any], images: Any) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(stream, total=length_hint(images) or None, desc="captioning", unit="image")


def _caption(
    model: CaptionGenerator, pixels: Tensor, spec: GenerationSpec, details: bool
) -> Sequence[str | CaptionResult]:
    """(I, 3, S, S) uint8 images to texts, or to detailed results."""
    pixels = pixels.to(model.device)
    with inference(model, fork_rng=model.rereads_prefix):
        decoder, features = model.decoding(pixels)
        hypotheses = generate_text(decoder, features, model.tokenizer, spec, pixels)
        if not details:
            return [hypothesis.text for hypothesis in hypotheses]
        attention = _attention(decoder, features, model.tokenizer, hypotheses)
    return [
        _result(model, hypothesis, weights, square)
        for hypothesis, weights, square in zip(hypotheses, attention, pixels.cpu(), strict=True)
    ]


def _result(
    model: CaptionGenerator, hypothesis: Hypothesis, attention: Tensor | None, pixels: Tensor
) -> CaptionResult:
    spec = None if attention is None else model.spec()
    return CaptionResult(
        text=hypothesis.text,
        tokens=token_texts(model.tokenizer, hypothesis.tokens),
        log_prob=hypothesis.log_prob,
        token_log_probs=hypothesis.token_log_probs,
        finished=hypothesis.finished,
        n_best=hypothesis.n_best or (hypothesis,),
        attention=attention,
        grid=spec.grid if spec else None,
        prefix_tokens=spec.prefix_tokens if spec else 0,
        image=pixels,
    )


def _attention(
    decoder: Decoder, features: Any, tokenizer: Tokenizer, hypotheses: Sequence[Hypothesis]
) -> list[Tensor | None]:
    """(T, N) attention of each caption's tokens, from the decoder's `forward`; None without any."""
    if not decoder.has_attention:
        return [None] * len(hypotheses)
    rows = [[tokenizer.start_id, *hypothesis.tokens] for hypothesis in hypotheses]
    ids = pad_batch(rows, tokenizer.pad_id)[0].to(features.device)  # (I, T + 1)
    weights = decoder(ids, features, frozenset({"attention"})).attention
    if weights is None:
        return [None] * len(hypotheses)
    pairs = zip(weights.float().cpu(), hypotheses, strict=True)
    return [each[: len(hypothesis.tokens)] for each, hypothesis in pairs]  # (T, N)
