"""Any timm model as an encoder: ViT tokens with CLS and registers, CNN maps with their grid."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import group_parameters
from torch import Tensor, nn

from capdistill.encoders.backbone import (
    BackboneEncoder,
    Form,
    Layout,
    Pixels,
    Refine,
    map_layout,
    token_layout,
)
from capdistill.encoders.stages import Trainable, child_stages
from capdistill.errors import CheckpointError, ConfigError, UnknownName, require_number
from capdistill.weights import load_backbone, reachable, require_cache, unavailable

_REST = {"rest": [(r".*", (99999,))]}  # marks a module that belongs to the previous group


class TimmEncoder(BackboneEncoder):
    """Visual tokens of a timm model.

    Example:
        >>> encoder = TimmEncoder("test_efficientnet", dim=32, weights=False)
        >>> encoder(torch.zeros(2, 3, 160, 160, dtype=torch.uint8)).shape, encoder.grid
        (torch.Size([2, 25, 32]), (5, 5))

    Args:
        name: A name that `timm.list_models()` has, with or without a tag.
        dim: D, width of the output; None keeps the model's width and adds no projection.
        weights: True fetches the pretrained ones from timm's hub, False leaves them random, a
            path reads a safetensors file or a state dict: wrapper prefixes and the classifier are
            dropped, position embeddings are resampled, half precision is converted; the rest must
            fit exactly. To rebuild an encoder whose weights are loaded afterwards, pass the same
            arguments with weights=False: nothing is fetched or read.
        trainable: "none", the number of last stages (CNN) or blocks (ViT) that are trained with
            what follows them, or "all". The output of the last frozen stage can be cached.
        refine: Self-attention before ("pre") or after ("post") the projection, or "none".
        image_size: Side in pixels; None takes the pretrained one.
        dropout: Dropout in the refinement and on the projected tokens.
        drop_path: Stochastic depth in the trained part of the model.

    Raises:
        UnknownName: timm has no such model.
        CheckpointError: the weights cannot be fetched or read, or do not fit.
        ConfigError: an option is invalid.
    """

    hub_arguments: ClassVar[tuple[str, ...]] = ("weights",)

    def __init__(
        self,
        name: str,
        *,
        dim: int | None = None,
        weights: bool | str | os.PathLike[str] = True,
        trainable: Trainable = "none",
        refine: Refine = "none",
        image_size: int | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        model = _make(name, weights, image_size, drop_path)
        super().__init__(
            name,
            model,
            _pixels(name, image_size),
            dim=dim,
            trainable=trainable,
            refine=refine,
            dropout=dropout,
        )

    def run_backbone(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        """The model up to its pooling."""
        forward: Callable[[Tensor], Tensor] = getattr(backbone, "forward_features")  # noqa: B009
        return forward(pixels)

    def lay_out(self, output: Tensor) -> Layout:
        """From the model's own attributes: its prefix tokens, patches and width."""
        model, shape = self.backbone, tuple(output.shape)
        if output.ndim == 4:
            return map_layout(shape, _form(model, shape))
        prefix = getattr(model, "num_prefix_tokens", None)
        if prefix is None:
            prefix = int(getattr(model, "cls_token", None) is not None)
        patches = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        return token_layout(shape, prefix, tuple(patches) if patches else None)

    def stages(self) -> list[list[str]]:
        """timm's own coarse groups; modules after the last one belong to it."""
        matcher = getattr(self.backbone, "group_matcher", lambda coarse: None)(coarse=True)
        if not isinstance(matcher, dict):
            return child_stages(self.backbone)
        groups = group_parameters(self.backbone, {**matcher, **_REST})
        return [groups[key] for key in sorted(groups)]


def _form(model: nn.Module, shape: tuple[int, ...]) -> Form:
    """Channels second, unless the model's attributes or its width show that they are last."""
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return "NHWC"
    width = getattr(model, "num_features", None)
    return "NHWC" if shape[1] != width and shape[3] == width else "NCHW"


def _make(
    name: str, weights: bool | str | os.PathLike[str], image_size: int | None, drop_path: float
) -> nn.Module:
    config = _config(name)
    require_number("timm: drop_path", drop_path, minimum=0, below=1)
    options: dict[str, Any] = {"num_classes": 0}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if image_size is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if weights is True:
        return _pretrained(name, config, options)
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    if weights is not False:
        filters = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        convert = (lambda state: filters(state, model)) if filters else None
        load_backbone(model, weights, name, _classifiers(config), convert)
    return model


def _config(name: str) -> Any:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"timm: name={name!r} was given; expected the name of a model of timm.")
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # no such model, or no such tag
        known = [*timm.list_models(), *timm.list_pretrained()]
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UnknownName(
            f"timm has no model '{name}'. {hint}timm.list_models() lists all."
        ) from error


def _classifiers(config: Any) -> list[str]:
    named = config.classifier or ()
    return [named] if isinstance(named, str) else list(named)


def _pixels(name: str, image_size: int | None) -> Pixels:
    config = _config(name)
    side = max(config.input_size[1:]) if image_size is None else image_size
    return Pixels(side, tuple(config.mean), tuple(config.std))


def _pretrained(name: str, config: Any, options: dict[str, Any]) -> nn.Module:
    """From the cache without a connection, else from the hub if it answers within seconds."""
    if not config.has_weights:
        raise CheckpointError(
            f"timm has no pretrained weights for '{name}'. Give weights=False for random ones, "
            "a path, or a name with a tag that timm.list_pretrained() lists."
        )
    source, cache, cached = _source(config)
    if cached is not None:
        options["pretrained_cfg_overlay"] = {"file": cached}
    elif constants.HF_HUB_OFFLINE or not reachable(source):
        raise unavailable(name, source, cache, "there is no connection to it")
    else:
        require_cache(name, source, cache, "HF_HOME" if config.hf_hub_id else "TORCH_HOME")
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise unavailable(name, source, cache, reason) from error
    return model


def _source(config: Any) -> tuple[str, str, str | None]:
    """Where the weights come from, the directory that caches them, and the file if cached."""
    if not config.hf_hub_id:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        file = os.path.join(folder, os.path.basename(config.url))
        return config.url, folder, file if os.path.isfile(file) else None
    found = None
    for file in ("model.safetensors", "pytorch_model.bin"):
        if not config.hf_hub_filename and not config.custom_load:
            found = found or try_to_load_from_cache(config.hf_hub_id, file)
    cached = found if isinstance(found, str) else None
    return f"{constants.ENDPOINT}/{config.hf_hub_id}", constants.HF_HUB_CACHE, cached
