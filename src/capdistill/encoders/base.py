"""The contract of an encoder: uint8 images in, visual tokens out.

Authors of encoders subclass `Encoder`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capdistill.encoders.stages import eval_where_frozen
from capdistill.errors import (
    ConfigError,
    DataError,
    Requirement,
    are_counts,
    is_count,
    require_attributes,
)
from capdistill.runtime import evaluating


class Encoder(nn.Module):
    """Images to visual tokens: `forward(images) = head(trunk(images))`.

    A subclass sets the attributes below in `__init__`, implements `trunk`, and may replace `head`
    (the identity here). Freeze parts with `requires_grad_(False)`: whatever is frozen stays in
    evaluation mode when `train()` is called, so dropout and batch statistics are off there.

    The trunk may be split further, so that the output of its frozen stages can be cached while
    the others are trained: `trunk(images) = remaining_stages(frozen_stages(images))`.

    Attributes:
        dim: D, width of the output tokens.
        token_dim: D0, width of the trunk's tokens.
        tokens: N, number of tokens per image.
        prefix_tokens: CLS and register tokens, which come first.
        grid: (h, w) with N = prefix_tokens + h * w, or None.
        image_size: Side in pixels of the images that the trunk works on.
        mean, std: Normalisation of pixels in [0, 1], one value per channel.
        hub_arguments: Names of the arguments of `__init__` that select pretrained weights. They
            are set to False when a saved captioner is loaded, which brings its own weights.
    """

    dim: int
    token_dim: int
    tokens: int
    prefix_tokens: int = 0
    grid: tuple[int, int] | None = None
    image_size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    hub_arguments: ClassVar[tuple[str, ...]] = ()
    variant: str = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(cls.hub_arguments, str):
            raise ConfigError(
                f"{cls.__name__}.hub_arguments is {cls.hub_arguments!r}; it must be a tuple of "
                f"names: ({cls.hub_arguments!r},)."
            )
        for name in ("trunk", "frozen_stages"):
            if name in vars(cls):
                setattr(cls, name, _frozen_in_eval(vars(cls)[name]))

    @abstractmethod
    def trunk(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 images to (I, N, D0) tokens of the backbone."""

    def head(self, tokens: Tensor) -> Tensor:
        """(I, N, D0) to (I, N, D): refinement and projection, always trainable."""
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 to (I, N, D)."""
        return self.head(self.trunk(images))

    def frozen_stages(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) uint8 to the output (I, ...) of the last frozen stage.

        Without an override the trunk is one stage.
        """
        return self.trunk(images)

    def remaining_stages(self, cached: Tensor) -> Tensor:
        """The output of `frozen_stages`, (I, ...), to the trunk's tokens (I, N, D0)."""
        return cached

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone (not of the head): they get the encoder's learning rate."""
        return iter(())

    @property
    def trunk_frozen(self) -> bool:
        """Whether no trained parameter affects the trunk's tokens."""
        if type(self).trunk_parameters is not Encoder.trunk_parameters:
            return not any(p.requires_grad for p in self.trunk_parameters())
        trained = tuple(id(p) for p in self.parameters() if p.requires_grad)
        if trained and self.__dict__.get("_tried", ())[:1] != (trained,):
            self.__dict__["_tried"] = trained, self._trunk_builds_a_graph()
        return not trained or not self.__dict__["_tried"][1]

    def _trunk_builds_a_graph(self) -> bool:
        """Whether the tokens of a black image require a gradient: from an undeclared parameter."""
        device = next(self.parameters()).device
        side = self.image_size
        black = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
        with evaluating(self), torch.enable_grad():
            return self.trunk(black).requires_grad

    def train(self, mode: bool = True) -> Encoder:
        """As `nn.Module.train`, except that frozen parts stay in evaluation mode."""
        super().train(mode)
        if mode:
            for child in self.children():
                if next(child.parameters(), None) is not None:
                    eval_where_frozen(child)
        return self

    def fingerprint(self) -> str | None:
        """Hash of everything that the output of `frozen_stages` depends on, except the image.

        None, as here, if it cannot be cached. The values are hashed at every call; a training run
        calls it when it begins (`cache_key`). `hash_values` helps with an implementation.
        """
        return None

    def trunk_fingerprint(self) -> str | None:
        """As `fingerprint`, of the trunk's tokens, for a model that is not trained (a teacher)."""
        return self.fingerprint()

    def cache_key(self, trained: bool = True) -> str | None:
        """Key under which batches carry the output of the frozen stages; None without any.

        Values are hashed now (about a second per gigabyte), and the key is remembered: batches
        that carry it in `cached` are encoded from there until a weight visibly changes.

        Args:
            trained: False to cache the tokens of the whole trunk, whichever of its parameters
                require a gradient: for a model that is not trained.
        """
        if trained:
            split = type(self).frozen_stages is not Encoder.frozen_stages
            key = self.fingerprint() if split or self.trunk_frozen else None
        else:
            key = self.trunk_fingerprint()
        keys: dict[str, _Key] = self.__dict__.setdefault("_keys", {})
        keys.pop(key or "", None)
        for old in [old for old, each in keys.items() if each.trained == trained]:
            del keys[old]
        if key is not None:
            key = (
                hashlib.sha256(f"{key} {self.variant}".encode()).hexdigest()
                if self.variant
                else key
            )
            keys[key] = _Key.of(self, trained)
        return key

    def vary(self, variant: str) -> None:
        """Keep cached values apart from those of the encoder as it is, of which "" is the name.

        For what changes its outputs without being one of its values or settings.
        """
        self.__dict__["variant"] = variant
        self.__dict__.pop("_keys", None)

    def current_key(self) -> str | None:
        """As `cache_key`, but not hashed again as long as no weight visibly changed."""
        keys: dict[str, _Key] = self.__dict__.get("_keys", {})
        held = (key for key, each in keys.items() if each.trained and each.holds())
        return next(held, None) or self.cache_key()

    @property
    def live_key(self) -> str:
        """Key for the trunk's tokens of one batch, for several readers within `torch.no_grad()`."""
        return f"live {id(self)}"

    def to_cache(self, images: Tensor, trained: bool = True) -> Tensor:
        """(I, 3, H, W) uint8 to the values cached under `cache_key(trained)`, (I, ...)."""
        return self.frozen_stages(images) if trained else self.trunk(images)

    def tokens_from(
        self, cached: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        """(I, N, D0) tokens from the cached values of a batch; None if it has none of this encoder.

        Args:
            cached: Cache key -> (I, ...).
            dtype: The type to which the values are converted.
        """
        if self.live_key in cached and not torch.is_grad_enabled():
            return cached[self.live_key].to(dtype)
        keys: dict[str, _Key] = self.__dict__.setdefault("_keys", {})
        for key in [key for key, each in keys.items() if not each.holds()]:
            del keys[key]
        if not keys:
            self.cache_key()
        for key, each in keys.items():
            if key in cached and (each.trained or not torch.is_grad_enabled()):
                value = cached[key].to(dtype)
                return self.remaining_stages(value) if each.trained else value
        return None

    def normalise(self, images: Tensor) -> Tensor:
        """Resize (antialiased) to `image_size` if needed, scale to [0, 1], normalise.

        The result has the precision of the trunk, so `encoder.double()` works in float64.

        Raises:
            DataError: the images are not (I, 3, H, W) uint8, or empty.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise DataError(
                f"{type(self).__name__}: images are {images.dtype} {tuple(images.shape)}, but "
                f"uint8 of (I, {len(self.mean)}, H, W) is expected: pixels 0 to 255, not yet "
                "normalised. Use (images * 255).to(torch.uint8) for pixels in [0, 1]."
            )
        dtype = next((p.dtype for p in self.trunk_parameters()), torch.float32)
        pixels = images.to(torch.promote_types(dtype, torch.float32))
        if images.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp_(0, 255)
        return standardised(pixels, self.mean, self.std).to(dtype)  # (I, 3, S, S)


def standardised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels from 0 to 255 with a mean and a deviation of pixels in [0, 1], one per channel.

    The numbers go to the device without waiting for it.

    Example:
        >>> standardised(torch.full((1, 1, 1, 1), 255.0), [0.5], [0.25]).item()
        2.0
    """
    both = torch.tensor([mean, std], dtype=pixels.dtype, device="cpu").view(2, 1, -1, 1, 1) * 255
    middle, deviation = both.to(pixels.device, non_blocking=True)
    found: Tensor = (pixels - middle) / deviation
    return found


def require_encoder(encoder: Encoder) -> None:
    """Check that an encoder has the attributes of its contract.

    Raises:
        ConfigError: one is missing or has another kind of value, or the tokens do not add up.
    """
    require_attributes("encoder", encoder, "Encoder", _ATTRIBUTES)
    if encoder.grid is not None:
        h, w = encoder.grid
        total = encoder.prefix_tokens + h * w
        if encoder.tokens != total:
            raise ConfigError(
                f"{type(encoder).__name__} has {encoder.tokens} tokens, but "
                f"prefix_tokens={encoder.prefix_tokens} and a grid of {h} x {w} make {total}. "
                "Correct one of them, or set grid=None."
            )


def _are_numbers(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(each, Real) for each in values)


_ATTRIBUTES: dict[str, Requirement] = {
    "dim": (is_count, "D, the width of its output tokens, a positive whole number"),
    "tokens": (is_count, "N, the number of tokens per image, a positive whole number"),
    "prefix_tokens": (lambda n: is_count(n, 0), "the number of tokens before the grid"),
    "grid": (lambda grid: grid is None or are_counts(grid, 2), "(h, w), or None"),
    "image_size": (is_count, "the side in pixels of the images that it reads"),
    "mean": (_are_numbers, "one number per channel"),
    "std": (_are_numbers, "one number per channel"),
    "trunk": (callable, "a method from images to tokens"),
    "head": (callable, "a method from tokens to features"),
}


def hash_values(
    module: nn.Module, about: object = None, include: Callable[[str], bool] | None = None
) -> str:
    """SHA-256 of the values, classes and plain settings of a module; equal in every process.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = hash_values(layer)
        >>> _ = layer.weight.data.mul_(2)
        >>> before == hash_values(layer)
        False

    Args:
        module: Its parameters, buffers and those of its parts are hashed.
        about: Other values to include, such as the image size; any JSON value.
        include: Selects parameters, buffers and submodules by name; all by default.
    """
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, part in module.named_modules():
        if include is None or include(name):
            digest.update(f"{name} {type(part).__qualname__} {_settings(part)}\n".encode())
    for name, tensor in sorted(
        {**dict(module.named_parameters()), **dict(module.named_buffers())}.items()
    ):
        if include is None or include(name):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """Numbers, strings and flags of a module, such as `eps`."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, (bool, int, float, str))
    )


@dataclass(frozen=True)
class _Key:
    """The state behind a cache key, as far as it can be compared without hashing again."""

    trained: bool
    tensors: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]
    state: object

    @classmethod
    def of(cls, encoder: Encoder, trained: bool) -> _Key:
        tensors = tuple(_unchanging(encoder, trained))
        parameters = tuple(encoder.parameters()) if trained else ()
        return cls(trained, tensors, parameters, _state(tensors, parameters))

    def holds(self) -> bool:
        return self.state == _state(self.tensors, self.parameters)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the encoder hashes its own weights
        return _Key, (self.trained, (), (), None)


def _unchanging(encoder: Encoder, trained: bool) -> Iterator[Tensor]:
    """Tensors that no training step changes: those of modules without a trained parameter."""
    for module in encoder.modules():
        own = list(module.parameters(recurse=False))
        if not trained or not any(parameter.requires_grad for parameter in own):
            yield from own
            yield from module.buffers(recurse=False)


def _state(tensors: tuple[Tensor, ...], parameters: tuple[nn.Parameter, ...]) -> object:
    versions = [(0 if each.is_inference() else each._version, each.dtype) for each in tensors]
    return versions, [parameter.requires_grad for parameter in parameters]


def _frozen_in_eval(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Wrap `trunk` or `frozen_stages` of a subclass: frozen parts run in evaluation mode there.

    `train()` detects frozen modules by their parameters. Dropout that is a direct child of the
    encoder, or a function that reads `self.training`, has none and is handled here.
    """

    @functools.wraps(method)
    def run(self: Encoder, images: Tensor) -> Tensor:
        if not self.training or not (method.__name__ == "frozen_stages" or self.trunk_frozen):
            return method(self, images)
        training = [part for part in self.modules() if part.training]
        try:
            for part in training:
                part.training = False
            tokens = method(self, images)
        finally:
            for part in training:
                part.training = True
        if tokens.requires_grad and not images.requires_grad:
            raise ConfigError(
                f"{type(self).__name__}.{method.__name__} depends on trained parameters that "
                "trunk_parameters() leaves out. Yield all parameters of the trunk there, or freeze "
                "them with requires_grad_(False)."
            )
        return tokens

    return run
