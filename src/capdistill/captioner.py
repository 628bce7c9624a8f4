"""Encoder + decoder + tokenizer: what is trained, distilled, saved and asked for captions."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capdistill import decoders, encoders
from capdistill.decoders.base import Decoder
from capdistill.encoders.base import Encoder
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels
from capdistill.files import write_atomically, write_text
from capdistill.generation import Hypothesis, greedy
from capdistill.outputs import Batch, CaptionerOutput, ModelSpec
from capdistill.registry import stamp_of
from capdistill.tokenizer import Tokenizer, WordTokenizer
from capdistill.weights import load_exactly, read_state_dict

if TYPE_CHECKING:
    from collections.abc import Mapping

_FORMAT = "capdistill.captioner/1"
_HUB_SWITCHES = ("weights", "pretrained")  # arguments that would fetch what the file holds


class Captioner(nn.Module):
    """An image captioner made of three parts.

    Example:
        >>> import capdistill as cd
        >>> tokenizer = cd.WordTokenizer(["a", "dog", "runs"])
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        >>> isinstance(captioner.caption(image), str)
        True

    Args:
        encoder: Images to (I, N, D) tokens.
        decoder: Words given tokens of width D; it is built for the tokenizer's vocabulary here.
        tokenizer: Captions to ids and back.
        name: How messages call the model.

    Raises:
        IncompatibleModels: the encoder's width is not the one the decoder reads.
        ConfigError: the decoder already belongs to another vocabulary.
    """

    def __init__(
        self, encoder: Encoder, decoder: Decoder, tokenizer: Tokenizer, *, name: str = "captioner"
    ) -> None:
        super().__init__()
        if encoder.dim != decoder.dim:
            raise IncompatibleModels(
                f"The encoder gives tokens of width {encoder.dim} but the decoder reads width "
                f"{decoder.dim}. Create both with the same dim=, for instance dim={decoder.dim}."
            )
        decoder.build(len(tokenizer.vocabulary))
        self.encoder, self.decoder = encoder, decoder
        self.tokenizer, self.name = tokenizer, name

    @classmethod
    def create(
        cls, preset: str, *, tokenizer: Tokenizer, weights: bool | str | Path = True
    ) -> Captioner:
        """A preset by name; `capdistill models` lists them.

        Args:
            preset: For instance "vit_transformer" or "lite0_lstm".
            tokenizer: Its vocabulary sizes the decoder.
            weights: Of the encoder: True (from the hub), False (random), or a local file.

        Raises:
            UnknownName: no such preset; the message lists them.
        """
        from capdistill import presets

        return presets.create(preset, tokenizer, weights=weights)

    def forward(self, batch: Batch, need: frozenset[str] = frozenset()) -> CaptionerOutput:
        """Teacher-forced logits for a batch, aligned with `batch.targets`."""
        features = self.encode(batch)
        out = self.decoder(batch.inputs, features, need)
        return CaptionerOutput(out.logits, out.hidden, features, out.attention, batch.target_mask)

    def encode(self, batch: Batch) -> Tensor:
        """(I, N, D) features of a batch, from cached trunk tokens where it carries ours."""
        if batch.cached and self.encoder.trunk_frozen:
            tokens = batch.cached.get(self.encoder.fingerprint())
            if tokens is not None:
                return self.encoder.head(tokens.to(next(self.decoder.parameters()).dtype))
        features: Tensor = self.encoder(batch.images)
        return features

    def generate(self, batch: Batch | Tensor, max_length: int | None = None) -> list[Hypothesis]:
        """One caption an image, greedily, in evaluation mode; training flags are restored.

        Args:
            batch: A batch, or (I, 3, H, W) uint8 images.
            max_length: Tokens at most; the tokenizer's limit and the end token unless given.
        """
        with evaluating(self), torch.no_grad():
            features = self.encode(batch) if isinstance(batch, Batch) else self.encoder(batch)
            hypotheses = greedy(
                self.decoder,
                features,
                start_id=self.tokenizer.start_id,
                end_id=self.tokenizer.end_id,
                max_length=max_length or getattr(self.tokenizer, "max_length", 40) + 1,
                banned=self._never_said(),
            )
        return [replace(h, text=self.tokenizer.decode(h.tokens)) for h in hypotheses]

    def _never_said(self) -> list[int]:
        """Unknown, padding and start tokens are no words; the end token must stay possible."""
        ids = {getattr(self.tokenizer, key, None) for key in ("unk_id", "pad_id", "start_id")}
        return sorted(i for i in ids if i is not None and i != self.tokenizer.end_id)

    def caption(
        self, images: Any, *, max_length: int | None = None, batch_size: int = 32
    ) -> str | list[str]:
        """Caption a path, bytes, PIL image, array or tensor, or each of an iterable of them.

        Example:
            `student.caption("dog.jpg")` gives "a brown dog runs through the grass".

        Raises:
            DataError: an image that can not be read, by name.
        """
        many = _is_many(images)
        texts: list[str] = []
        for chunk in _chunks(images if many else [images], batch_size):
            pixels = torch.stack([self._pixels(image) for image in chunk])
            texts += [h.text for h in self.generate(pixels.to(self.device), max_length)]
        return texts if many else texts[0]

    def _pixels(self, image: Any) -> Tensor:
        from capdistill.data.images import read_image
        from capdistill.data.transforms import centre_square

        return centre_square(read_image(image), self.encoder.image_size)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def num_parameters(self, trainable: bool = False) -> int:
        """Number of parameters, shared ones once; only those that are trained on request."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable)

    def spec(self, batch: Batch | None = None) -> ModelSpec:
        """What losses and checks must know of this model."""
        return ModelSpec(
            feature_dim=self.encoder.dim,
            tokens=self.encoder.tokens,
            prefix_tokens=self.encoder.prefix_tokens,
            grid=self.encoder.grid,
            hidden_dims=self.decoder.hidden_dims,
            vocabulary=self.tokenizer.vocabulary,
            has_attention=self.decoder.has_attention,
            name=self.name,
        )

    def save(self, directory: str | Path) -> None:
        """Write model.safetensors, captioner.json and the tokenizer; the directory loads alone.

        Raises:
            ConfigError: a part was not made by a registry, or the directory can not be written.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        content = {
            "format": _FORMAT,
            "name": self.name,
            "encoder": _describe(self.encoder, "encoder"),
            "decoder": _describe(self.decoder, "decoder"),
        }
        state = {
            key: value.detach().cpu().contiguous().clone()
            for key, value in self.state_dict().items()
        }
        write_atomically(directory / "model.safetensors", lambda path: save_file(state, path))
        save = getattr(self.tokenizer, "save", None)
        if save is not None:
            save(directory / "tokenizer.json")
        write_text(directory / "captioner.json", json.dumps(content, indent=2))

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        encoder: Encoder | None = None,
        decoder: Decoder | None = None,
        tokenizer: Tokenizer | None = None,
        device: str | torch.device = "cpu",
    ) -> Captioner:
        """Read what `save` wrote. Touches no hub, no teacher and no pickle.

        Args:
            directory: As given to `save`.
            encoder, decoder, tokenizer: Parts that no registry could make again.
            device: Where the model goes.

        Raises:
            CheckpointError: a file is missing, truncated, or does not fit the parts.
        """
        directory = Path(directory)
        content = _read_description(directory / "captioner.json")
        captioner = cls(
            encoder or _recreate(encoders, content["encoder"]),
            decoder or _recreate(decoders, content["decoder"]),
            tokenizer or WordTokenizer.load(directory / "tokenizer.json"),
            name=content["name"],
        )
        path = directory / "model.safetensors"
        load_exactly(captioner, read_state_dict(path), str(path))
        return captioner.to(device).eval()


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's own flag comes back after it."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in flags:
            part.training = training


def _describe(part: nn.Module, kind: str) -> dict[str, Any]:
    stamp = stamp_of(part)
    if stamp is None:
        raise ConfigError(
            f"Captioner.save: the {kind} {type(part).__name__} was not made by a registry, so a "
            f"file could not make it again. Register its class (capdistill.{kind}s.register) and "
            f"create it by name, or save its state dict yourself and give the part to "
            f"Captioner.load(directory, {kind}=...)."
        )
    return {"name": stamp.name, "kwargs": _as_json(stamp.kwargs, kind)}


def _as_json(kwargs: Mapping[str, Any], kind: str) -> dict[str, Any]:
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in kwargs.items()}
    try:
        return dict(json.loads(json.dumps(plain)))
    except TypeError as error:
        raise ConfigError(
            f"Captioner.save: the arguments of the {kind} do not fit in JSON ({error}). Use "
            "numbers, strings, lists and dicts as arguments of registered parts."
        ) from error


def _recreate(registry: Any, description: Mapping[str, Any]) -> Any:
    """Make a part again with random weights: a file lies ready for all of them."""
    kwargs = dict(description["kwargs"])
    parameters = inspect.signature(registry.get(description["name"])).parameters
    kwargs.update({key: False for key in _HUB_SWITCHES if key in parameters})
    return registry.create(description["name"], **kwargs)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("format") != _FORMAT:
            raise ValueError(f"format {content.get('format')!r}")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not describe a captioner ({error}). Expected a directory written by "
            f"Captioner.save, with format '{_FORMAT}'."
        ) from error
    return content


def _is_many(images: Any) -> bool:
    """Whether this is an iterable of images rather than one image."""
    if isinstance(images, Tensor):
        return images.ndim == 4
    if hasattr(images, "__array__"):
        return getattr(images, "ndim", 3) == 4
    single = isinstance(images, (str, bytes, bytearray, Path)) or hasattr(images, "read")
    return not single and isinstance(images, Iterable)


def _chunks(items: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
