"""Pictures of a comparison as `data:` addresses: where models looked, and how they learnt."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capdistill import plots
from capdistill.evaluation import Evaluation
from capdistill.runtime import autocast, moved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 60  # a report is read, not printed


def pictures(
    models: Mapping[str, Any],
    found: Mapping[str, Evaluation],
    histories: Mapping[str, str | Path],
    images: int,
) -> dict[str, str]:
    """Title -> picture: the curves of each run, then the first images through each model's eyes.

    Models without attention or a map of visual tokens are left out.

    Raises:
        MissingExtra: matplotlib is not installed.
        DataError: a history that is not there.
    """
    drawn = {f"{role}: training": _address(plots.history(run)) for role, run in histories.items()}
    for role, model in models.items():
        if hasattr(model, "caption") and model.decoder.has_attention and model.encoder.grid:
            drawn.update(_looks(role, model, found[role], images))
    return drawn


def _looks(role: str, model: Any, found: Evaluation, images: int) -> Iterator[tuple[str, str]]:
    device = torch.device(found.device)
    with moved([model], device), autocast(device, found.precision):
        for batch in found.timed[:images]:
            for result in model.caption(batch.images, details=True, generation=found.generation):
                title = f"{role}: where it looked in {batch.image_ids[0]}"
                yield title, _address(plots.attention(result))


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
