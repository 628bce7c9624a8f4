"""Where a model looked, word by word."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capdistill.errors import ConfigError
from capdistill.plots.figures import finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capdistill.caption_result import CaptionResult

_TILE, _COLUMNS = 1.9, 6  # inches, tiles a row
_WIDE = 18  # letters of a word that fit above a tile at full size
_STRONGEST = 0.85  # of the colour over the photo, where attention is highest


def attention(result: CaptionResult, path: str | Path | None = None) -> Figure:
    """Draw, word by word, where the model looked over the photo.

    Each tile is the photo in grey under the attention of one token over the visual tokens that
    form the map: the brighter the colour, the higher, relative to the token's own maximum. Above
    it stand the token and its probability. What a token gave to visual tokens outside the map
    (CLS, registers) is not drawn.

    Example:
        `plots.attention(student.caption("dog.jpg", details=True), "looked.png")`

    Args:
        result: Of `Captioner.caption(..., details=True)`.
        path: Also write it: .png, .svg, .pdf, ...

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigError: the decoder shows no attention, its tokens form no map, or the file's kind
            is unknown.
    """
    figure, maps = new_figure(path), _maps(result)
    photo = result.image.permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    titles = ["photo", *map(_titled, result.tokens, result.token_log_probs)]
    columns = min(_COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    text = textwrap.wrap(result.text, max(14 * columns, 24)) or ["(empty caption)"]
    figure.set_size_inches(_TILE * columns, (_TILE + 0.4) * rows + 0.2 * len(text) + 0.1)
    for place, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.set_axis_off()
        size = 10 * min(1.0, _WIDE / max(map(len, title.split("\n"))))
        axes.set_title(title, fontsize=max(size, 5), parse_math=False)
        axes.imshow(photo if place == 0 else _grey(photo), cmap="gray", vmin=0, vmax=255)
        if place:
            _overlay(axes, maps[place - 1], photo.shape)
    figure.suptitle("\n".join(text), fontsize=11, parse_math=False)
    return finished(figure, path)


def _maps(result: CaptionResult) -> Any:
    """(T, h, w) attention over the map."""
    if result.attention is None:
        raise ConfigError(
            "plots.attention: the result holds no attention. Its decoder can not show it "
            "(has_attention is False); use one that can, such as 'lstm' or 'transformer'."
        )
    if result.grid is None:
        raise ConfigError(
            f"plots.attention: the {result.attention.shape[1]} visual tokens form no map "
            "(the encoder's grid is None). Use an encoder with a grid."
        )
    words = result.attention[:, result.prefix_tokens :]  # (T, h * w)
    return words.reshape(len(words), *result.grid).float().cpu().numpy()


def _grey(photo: Any) -> Any:
    """(S, S) luma of ITU-R BT.601, a little darkened so that colour stands out."""
    return photo @ [0.299, 0.587, 0.114] * 0.8


def _overlay(axes: Axes, weights: Any, shape: tuple[int, ...]) -> None:
    """A (h, w) map over a photo of shape (H, W, 3), enlarged smoothly, relative to its maximum."""
    shown = weights / max(float(weights.max()), 1e-12)
    height, width = shape[:2]
    axes.imshow(
        shown,
        cmap="inferno",
        alpha=_STRONGEST * shown,
        vmin=0,
        vmax=1,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bilinear",
    )


def _titled(token: str, log_prob: float) -> str:
    return f"{token}\n{math.exp(log_prob):.0%}"
