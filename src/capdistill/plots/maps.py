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

_TILE, _HEAD, _GAP = 1.8, 0.45, 0.08  # inches: a tile, the title above it, between tiles
_COLUMNS = 6
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
    figure.set_layout_engine("none")  # every place is known, and measuring forty takes seconds
    photo = result.image.permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    titles = ["photo", *map(_titled, result.tokens, result.token_log_probs)]
    columns = min(_COLUMNS, len(titles))
    text = textwrap.wrap(result.text, 18 * columns) or ["(empty caption)"]
    tiles = _tiles(figure, len(titles), len(text))
    for place, (axes, title) in enumerate(zip(tiles, titles, strict=True)):
        size = 10 * min(1.0, _WIDE / max(map(len, title.split("\n"))))
        axes.set_title(title, y=1.0, fontsize=max(size, 5), parse_math=False)
        axes.imshow(photo if place == 0 else _grey(photo), cmap="gray", vmin=0, vmax=255)
        if place:
            _overlay(axes, maps[place - 1], photo.shape)
    above = 1 - _GAP / figure.get_figheight()
    figure.suptitle("\n".join(text), y=above, va="top", fontsize=11, parse_math=False)
    return finished(figure, path)


def _tiles(figure: Figure, count: int, lines: int) -> list[Axes]:
    """Square axes row by row, each with room for its title, below `lines` lines of text."""
    columns = min(_COLUMNS, count)
    rows, top = math.ceil(count / columns), 0.2 * lines + 2 * _GAP
    wide = columns * (_TILE + _GAP) + _GAP
    high = top + rows * (_HEAD + _TILE) + _GAP
    figure.set_size_inches(wide, high)
    corners = [
        (_GAP + column * (_TILE + _GAP), high - top - (row + 1) * (_HEAD + _TILE))
        for row in range(rows)
        for column in range(columns)
    ]
    tiles = [
        figure.add_axes((x / wide, y / high, _TILE / wide, _TILE / high))
        for x, y in corners[:count]
    ]
    for axes in tiles:
        axes.set_axis_off()
    return tiles


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
