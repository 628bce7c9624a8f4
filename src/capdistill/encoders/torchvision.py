"""torchvision's ResNets and other CNNs as encoders, with torchvision's own weights."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any, ClassVar
from urllib.parse import urlsplit

import torch
import torchvision
from torch import Tensor, nn

from capdistill.encoders.backbone import (
    BackboneEncoder,
    Layout,
    Pixels,
    Refine,
    map_layout,
)
from capdistill.encoders.stages import Trainable, child_stages
from capdistill.errors import ConfigError, UnknownName, suggest
from capdistill.weights import load_backbone, reachable, require_cache, unavailable

_CLASSIFIERS = ("avgpool", "flatten", "dropout", "fc", "classifier", "head")  # not copied
_CONTAINERS = ("features", "trunk_output", "layers")  # hold stages
_NO_MAP = ("vit_", "maxvit", "inception", "googlenet")


class TorchvisionEncoder(BackboneEncoder):
    """Visual tokens of a torchvision classifier: its last map, flattened, with its grid.

    Example:
        >>> encoder = TorchvisionEncoder("resnet18", dim=32, weights=False, image_size=64)
        >>> encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape, encoder.grid
        (torch.Size([1, 4, 32]), (2, 2))

    Args:
        name: A classifier that `torchvision.models.list_models()` has: ResNet, ResNeXt,
            MobileNet, EfficientNet, RegNet, ConvNeXt, Swin, ... For a ViT use the timm encoder.
        dim: D, width of the output; None keeps the model's width and adds no projection.
        weights: True fetches torchvision's default weights, False leaves them random, a path
            reads a safetensors file or a state dict; as for `TimmEncoder`.
        trainable: "none", the number of last stages that are trained, or "all".
        refine: Self-attention before ("pre") or after ("post") the projection, or "none".
        image_size: Side in pixels; None takes the pretrained one.
        dropout: Dropout in the refinement and on the projected tokens.

    Raises:
        UnknownName: torchvision has no such classifier.
        CheckpointError: the weights cannot be fetched or read, or do not fit.
        ConfigError: an option is invalid, or the model has no map.
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
    ) -> None:
        _check_name(name)
        default = torchvision.models.get_model_weights(name).DEFAULT
        super().__init__(
            name,
            _make(name, weights, default),
            _pixels(default, image_size),
            dim=dim,
            trainable=trainable,
            refine=refine,
            dropout=dropout,
        )

    def run_backbone(self, backbone: nn.Module, pixels: Tensor) -> Tensor:
        """The model up to its pooling."""
        output: Tensor = backbone(pixels)
        return output

    def lay_out(self, output: Tensor) -> Layout:
        """Always a map with its channels second."""
        return map_layout(tuple(output.shape), "NCHW")

    def stages(self) -> list[list[str]]:
        """Children such as `layer4`, and the members of `features`; a final norm is not a stage."""
        *stages, last = child_stages(self.backbone, _CONTAINERS)
        owners = {key.rpartition(".")[0] for key in last}
        norms = [self.backbone.get_submodule(owner) for owner in owners]
        if stages and all("Norm" in type(norm).__name__ for norm in norms):
            return [*stages[:-1], stages[-1] + last]
        return [*stages, last]


def _check_name(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UnknownName(f"torchvision has no classifier '{name}'. {suggest(name, known)}")
    if name.startswith(_NO_MAP):
        raise ConfigError(
            f"'{name}' of torchvision has no map that could be cut into tokens. Use the timm "
            "encoder, which has this family: encoders.create('timm', name=...)."
        )


def _make(name: str, weights: bool | str | os.PathLike[str], default: Any) -> nn.Module:
    model = torchvision.models.get_model(name, weights=None)
    children = [(key, part) for key, part in model.named_children() if key not in _CLASSIFIERS]
    backbone = nn.Sequential(OrderedDict(children))  # keeps the names of torchvision's files
    if weights is not False:
        file = _fetched(name, default) if weights is True else weights
        names = [key for key, _ in model.named_modules() if key.split(".")[0] in _CLASSIFIERS]
        load_backbone(backbone, file, name, names)
    return backbone


def _fetched(name: str, default: Any) -> str:
    """The file of the default weights in torch's cache, fetched if necessary."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    file = os.path.join(folder, os.path.basename(urlsplit(default.url).path))
    if os.path.isfile(file):
        return file
    if not reachable(default.url):
        raise unavailable(name, default.url, folder, "there is no connection to it")
    require_cache(name, default.url, folder, "TORCH_HOME")
    try:
        default.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise unavailable(name, default.url, folder, reason) from error
    return file


def _pixels(default: Any, image_size: int | None) -> Pixels:
    wanted = default.transforms()
    side = wanted.crop_size[0] if image_size is None else image_size
    return Pixels(side, tuple(wanted.mean), tuple(wanted.std))
