"""A timm CNN whose last stages are trained while the output of the frozen ones is cached.

An encoder's trunk is what can be frozen and cached, its head is always trained: with the last
stages in the head, fine-tuning reads cached maps and never runs the frozen stages again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import capdistill as cd


@cd.encoders.register("timm_tail")
class TailEncoder(cd.Encoder):
    """An EfficientNet of timm: stem and first stages are the trunk, the others the head.

    Args:
        name: A timm EfficientNet.
        dim: D, width of the output.
        weights: File of weights, True for timm's hub, False for random ones.
        stages: How many of its seven stages are trained, with the final convolution.
        dropout: On the projected tokens.
    """

    def __init__(
        self,
        name: str,
        *,
        dim: int,
        weights: bool | str = True,
        stages: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole = cd.encoders.create("timm", name=name, weights=weights)
        model = whole.backbone
        self.name = name
        self.image_size, self.mean, self.std = whole.image_size, whole.mean, whole.std
        self.first = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:-stages])
        self.last = nn.Sequential(*model.blocks[-stages:], model.conv_head, model.bn2)
        self.first.requires_grad_(False)
        self.last.requires_grad_(True)
        self.grid, self.tokens, self.dim = whole.grid, whole.tokens, dim
        self.token_dim = model.blocks[-stages - 1][-1].bn3.num_features
        self.project = nn.Sequential(
            nn.LayerNorm(whole.dim), nn.Linear(whole.dim, dim), nn.Dropout(dropout)
        )
        self.train()

    def trunk(self, images: Tensor) -> Tensor:
        """(I, 3, H, W) to the frozen stages' map, a row a place (I, h * w, C)."""
        with torch.no_grad():
            pixels = self.normalise(images).contiguous(memory_format=torch.channels_last)
            return self.first(pixels).flatten(2).transpose(1, 2)

    def head(self, tokens: Tensor) -> Tensor:
        """(I, h * w, C) through the trained stages to (I, N, D)."""
        side = round(tokens.shape[1] ** 0.5)
        maps = tokens.transpose(1, 2).unflatten(2, (side, side))  # channels last in memory already
        features: Tensor = self.project(self.last(maps).flatten(2).transpose(1, 2))
        return features

    def train(self, mode: bool = True) -> TailEncoder:
        """Batch norms keep the statistics of their pretraining."""
        super().train(mode)
        self.first.eval()
        self.last.eval()
        return self

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """What was pretrained: the encoder's share of the learning rate."""
        yield from self.first.parameters()
        yield from self.last.parameters()

    @property
    def trunk_frozen(self) -> bool:
        """The first stages are never trained."""
        return True

    def fingerprint(self) -> str:
        """Of the frozen stages alone."""
        if not hasattr(self, "_hash"):
            digest = hashlib.sha256(f"{self.image_size} {self.mean} {self.std}".encode())
            for key, value in sorted(self.first.state_dict().items()):
                digest.update(f"{key} {tuple(value.shape)}".encode())
                digest.update(value.cpu().numpy().tobytes())
            self._hash = digest.hexdigest()
        return self._hash


def as_timm(captioner: cd.Captioner) -> cd.Captioner:
    """The same captioner with a plain `timm` encoder, which loads anywhere."""
    tail = captioner.encoder
    assert isinstance(tail, TailEncoder)
    encoder = cd.encoders.create(
        "timm", name=tail.name, dim=tail.dim, weights=False, dropout=tail.project[2].p
    )
    stem, norm, *stages = tail.first
    *last, head, head_norm = tail.last
    parts = {"conv_stem": stem, "bn1": norm, "conv_head": head, "bn2": head_norm}
    parts |= {f"blocks.{i}": stage for i, stage in enumerate([*stages, *last])}
    for name, part in parts.items():
        encoder.backbone.get_submodule(name).load_state_dict(part.state_dict())
    encoder.project.load_state_dict(tail.project.state_dict())
    return cd.Captioner(encoder, captioner.decoder, captioner.tokenizer, name=captioner.name)
