"""Plots: training curves and attention maps."""

from __future__ import annotations

import atexit
import importlib.util
import math
import os
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from capdistill.errors import ConfigError, DataError, MissingExtra
from capdistill.files import user_path, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capdistill.generation.hypotheses import CaptionResult
    from capdistill.training.history import History, Row

__all__ = ["attention", "highlight", "history"]


def __dir__() -> list[str]:
    return sorted(__all__)


_TRAIN, _VAL = "#0072B2", "#D55E00"  # Okabe and Ito: distinct for colour-blind readers too
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BEST: dict[str, Any] = {"color": "black", "linestyle": ":", "linewidth": 1.2}
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 3}


class _Panel(NamedTuple):
    title: str
    unit: str
    draw: Callable[[Axes], None]


_Value: TypeAlias = "Callable[[dict[str, Any]], float | None]"


def history(run: str | Path | History, path: str | Path | None = None) -> Figure:
    """Draw the curves of a run: the loss, every term, the scores, the learning rates.

    Step values are faint, epoch values solid. First steps far above all others are cut off.

    Example:
        `plots.history("runs/student", "curves.png")`

    Args:
        run: A run's directory, its history.jsonl, or the `History` that `fit` returned.
        path: Also write it: .png, .svg, .pdf, ...

    Raises:
        MissingExtra: matplotlib is not installed.
        DataError: there is no history, or it has no row yet.
        ConfigError: the file's suffix is unknown.
    """
    figure, found = new_figure(path), read_history(run)
    panels = _panels(found)
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    figure.set_size_inches(4.2 * columns, 3.2 * rows)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        panel.draw(axes)
        if found.best is not None:
            axes.axvline(found.best["step"], label="best epoch", **_BEST)
        _dress(axes, panel)
    return finished(figure, path)


def _columns(panels: int) -> int:
    """Three or four panels per row, whichever leaves fewer places empty."""
    return min((3, 4), key=lambda n: -panels % n) if panels > 3 else panels


def _dress(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(_drawable(panel.title), fontsize=10, parse_math=False)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:  # below, where it hides no curve
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7, frameon=False
        )


def read_history(run: str | Path | History) -> History:
    """The history of a run.

    Raises:
        DataError: there is none, or it has no row yet.
    """
    from capdistill.training.history import History

    if isinstance(run, History):
        found, name = run, "the history"
    else:
        found, name = History.load(run), str(run)
    if not found.rows:
        raise DataError(f"plots.history: {name} has no row yet.")
    return found


def _panels(found: History) -> list[_Panel]:
    terms = dict.fromkeys(name for row in found.rows for name in _terms(row))
    weighted = _loss_panel(found, lambda part: part.get("loss"))
    panels = [_Panel("loss", "weighted sum of the terms", weighted)]
    if len(terms) > 1:
        panels += [_Panel(name, "unweighted", _loss_panel(found, _raw(name))) for name in terms]
    if any(row.get("scores") for row in found.epochs):
        drawn = _named_panel(found.epochs, "scores", **_MARKED)
        panels.append(_Panel("validation scores", "score", drawn))
    if found.steps:
        drawn = _named_panel(found.steps, "learning_rates")
        panels.append(_Panel("learning rate", "rate", drawn))
    return panels


def _terms(row: Row) -> Iterable[str]:
    return (row.get("terms") or (row.get("train") or {}).get("terms") or {}).keys()


def _raw(term: str) -> _Value:
    return lambda part: (part.get("terms") or {}).get(term, {}).get("raw")


def _loss_panel(found: History, value: _Value) -> Callable[[Axes], None]:
    """Draw step values faintly, epoch values of training and validation solid."""

    def draw(axes: Axes) -> None:
        steps = [(row["step"], value(row)) for row in found.steps]
        _line(axes, steps, color=_TRAIN, alpha=0.25, linewidth=0.8)
        full: list[float | None] = []
        for part, label, color in (("train", "training", _TRAIN), ("val", "validation", _VAL)):
            points = [(row["step"], value(row.get(part) or {})) for row in found.epochs]
            _line(axes, points, color=color, label=label, **_MARKED)
            full += [y for _, y in points]
        _leave_out_the_start(axes, _finite(y for _, y in steps), _finite(full))

    return draw


def _leave_out_the_start(axes: Axes, steps: Sequence[float], full: Sequence[float]) -> None:
    """Cut off the first steps at the top if they would flatten the curves."""
    if not steps or not full:
        return
    usual = sorted(steps)[int(0.95 * (len(steps) - 1))]
    low, high = min(*steps, *full), max(*full, usual)
    if max(steps) - high > 0.5 * (high - low) > 0:
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + 4 * margin)


def _named_panel(rows: Sequence[Row], key: str, **style: Any) -> Callable[[Axes], None]:
    """A curve for every name under `key`."""

    def draw(axes: Axes) -> None:
        names = dict.fromkeys(name for row in rows for name in row.get(key) or {})
        for name, color in zip(names, _COLORS * len(names), strict=False):
            points = [(row["step"], (row.get(key) or {}).get(name)) for row in rows]
            _line(axes, points, color=color, label=_drawable(name), **style)

    return draw


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    """A figure over the steps, with a gap where it is NaN."""
    if any(y is not None for _, y in points):
        x, y = zip(*points, strict=True)
        axes.plot(x, [math.nan if each is None else each for each in y], **style)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


_TILE, _HEAD, _GAP = 1.8, 0.45, 0.08  # inches: a tile, the title above it, between tiles
_FOOT = 0.85  # inches: the colour bar and the note
_COLUMNS = 6  # tiles
_WIDE = 18  # letters of a word that fit above a tile at full size

NEARLY_EVEN = 2.0
"""Below this multiple of uniform attention everywhere, attention is called nearly even."""

_LEAST_SCALE = 4.0  # the scale's end, in multiples of even attention, is never below it
_DIM = 0.35  # brightness of the grey photo where no attention is


def attention(result: CaptionResult, path: str | Path | None = None) -> Figure:
    """Draw the attention map of each word over the photo.

    Each tile is the photo in full colour where one token's attention is high, and grey and dim
    where it is low. All tiles share one scale, in multiples of even attention 1/N over the N
    visual tokens; the bar below shows it. If attention is nowhere twice even, a note says that it
    is nearly even. Above each tile stand the token and its probability. Attention to visual tokens
    outside the map (CLS, registers) is not drawn.

    Example:
        `plots.attention(student.caption("dog.jpg", details=True), "looked.png")`

    Args:
        result: The result of `Captioner.caption(..., details=True)`.
        path: Also write it: .png, .svg, .pdf, ...

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigError: the decoder returns no attention, its tokens form no map, or the file's suffix
            is unknown.
    """
    figure, maps = new_figure(path), _maps(result)
    figure.set_layout_engine("none")  # all positions are known, and measuring forty takes seconds
    photo = result.image.permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    most = float(maps.max()) if maps.size else 0.0
    scale = max(most, _LEAST_SCALE)
    titles = ["photo", *map(_drawable, map(_title, result.tokens, result.token_log_probs))]
    pictures = [photo, *(highlight(photo, each, scale) for each in maps)]
    text = textwrap.wrap(_drawable(result.text), 18 * min(_COLUMNS, len(titles))) or [
        "(empty caption)"
    ]
    tiles = _tiles(figure, len(titles), len(text))
    for axes, title, picture in zip(tiles, titles, pictures, strict=True):
        size = 10 * min(1.0, _WIDE / max(map(len, title.split("\n"))))
        axes.set_title(title, y=1.0, fontsize=max(size, 5), parse_math=False)
        axes.imshow(picture)
    if maps.size:
        _draw_scale(figure, scale, most)
    above = 1 - _GAP / figure.get_figheight()
    figure.suptitle("\n".join(text), y=above, va="top", fontsize=11, parse_math=False)
    return finished(figure, path)


def highlight(
    photo: NDArray[np.uint8], weights: NDArray[np.floating[Any]], scale: float
) -> NDArray[np.uint8]:
    """The photo in colour where the weights are high, grey and dim where they are low.

    Example:
        >>> photo = np.full((2, 2, 3), (200, 100, 0), np.uint8)
        >>> highlight(photo, np.array([[0.0, 4.0]]), scale=4.0)[0].tolist()
        [[41, 41, 41], [200, 100, 0]]

    Args:
        photo: (H, W, 3) uint8.
        weights: (h, w) attention of a map over the whole photo, in multiples of even attention;
            it is enlarged linearly.
        scale: The weight at and above which the photo is shown as it is; 0 is dimmed most.
    """
    height, width = photo.shape[:2]
    rows = _enlarge(np.asarray(weights, np.float64), height)  # (H, w)
    share = np.clip(_enlarge(rows.T, width).T / scale, 0.0, 1.0)[..., None]  # (H, W, 1)
    grey = (photo @ np.array([0.299, 0.587, 0.114]))[..., None] * _DIM  # luma of ITU-R BT.601
    mixed: NDArray[np.uint8] = np.rint(share * photo + (1.0 - share) * grey).astype(np.uint8)
    return mixed


def _enlarge(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(h, w) to (size, w), linearly between the centres of the cells."""
    centres = (np.arange(size) + 0.5) * len(values) / size - 0.5
    return np.stack([np.interp(centres, np.arange(len(values)), v) for v in values.T], 1)


def _draw_scale(figure: Figure, scale: float, most: float) -> None:
    """The colour bar in multiples of even attention, and a note if attention is nearly even."""
    from matplotlib.ticker import FixedLocator

    wide, high = figure.get_size_inches()
    axes = figure.add_axes((0.3 / wide, 0.5 / high, min(2.4, wide - 0.6) / wide, 0.12 / high))
    swatch = np.full((1, 256, 3), (230, 159, 0), np.uint8)
    ramp = np.linspace(0.0, scale, 256)[None]
    axes.imshow(highlight(swatch, ramp, scale), aspect="auto", extent=(0.0, scale, 0.0, 1.0))
    axes.set_yticks([])
    axes.xaxis.set_major_locator(FixedLocator([0.0, 1.0, scale]))
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.tick_params(labelsize=7)
    label = "attention, in multiples of even attention"
    if most < NEARLY_EVEN:
        label += f"\nattention is nearly even: at most {most:.1f} times"
    figure.text(0.3 / wide, 0.02 / high, label, fontsize=7, va="bottom")


def _tiles(figure: Figure, count: int, lines: int) -> list[Axes]:
    """Square axes row by row, each with room for its title, between the text and the scale."""
    columns = min(_COLUMNS, count)
    rows, top = math.ceil(count / columns), 0.2 * lines + 2 * _GAP
    wide = columns * (_TILE + _GAP) + _GAP
    high = top + rows * (_HEAD + _TILE) + _GAP + _FOOT
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


def _maps(result: CaptionResult) -> NDArray[np.float64]:
    """(T, h, w) attention over the map, in multiples of even attention over all visual tokens."""
    if not hasattr(result, "attention"):
        kind = type(result).__name__
        raise ConfigError(f"plots.attention: {kind} was given; give caption(image, details=True).")
    if result.attention is None:
        raise ConfigError(
            "plots.attention: the result holds no attention. Its decoder cannot return it "
            "(has_attention is False); use one that can, such as 'lstm' or 'transformer'."
        )
    if result.grid is None:
        raise ConfigError(
            f"plots.attention: the {result.attention.shape[1]} visual tokens form no map "
            "(the encoder's grid is None). Use an encoder with a grid."
        )
    maps = result.attention[:, result.prefix_tokens :]  # (T, h * w)
    multiples: NDArray[np.float64] = maps.double().cpu().numpy() * result.attention.shape[1]
    return multiples.reshape(len(multiples), *result.grid)


def _title(token: str, log_prob: float) -> str:
    return f"{token.strip() or '...'}\n{math.exp(log_prob):.0%}"


def require_matplotlib() -> None:
    """Raise before any work if plots cannot be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "Plots need matplotlib, which is not installed. Install the extra: "
            'pip install "capdistill[ui]"'
        )


def new_figure(path: str | Path | None) -> Figure:
    """A figure without pyplot: no window, no global state, any thread.

    Args:
        path: The file to write; an unknown suffix is rejected before anything is drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigError: the suffix of the file is not an image format.
    """
    require_matplotlib()
    _give_matplotlib_a_folder()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path is not None and _kind(path) not in kinds:
        raise ConfigError(
            f"plots: the suffix of '{path}' is not an image format. End the name with one of "
            f"{', '.join('.' + each for each in sorted(kinds))}."
        )
    return figure


def _give_matplotlib_a_folder() -> None:
    """Without a home directory matplotlib cannot be imported, unless a cache directory is set."""
    if "MPLCONFIGDIR" in os.environ:
        return
    try:
        Path.home()
    except RuntimeError:
        folder = tempfile.mkdtemp(prefix="matplotlib-")  # as it does where the home is read-only
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = folder


def finished(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to `path` if there is one."""
    if path is None:
        return figure
    write_atomically(path, lambda file: figure.savefig(file, format=_kind(path), dpi=120))
    return figure


def _drawable(text: str) -> str:
    """The text with a box for each character that no configured font has, which would warn."""
    from matplotlib import rcParams

    known = _characters(tuple(rcParams["font.sans-serif"]))
    return "".join(c if c == "\n" or ord(c) in known else "\u25a1" for c in text)


@cache
def _characters(families: tuple[str, ...]) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = set(get_font(findfont(FontProperties())).get_charmap())
    for family in families:
        with suppress(ValueError):  # a family that is not installed
            known |= set(get_font(findfont(family, fallback_to_default=False)).get_charmap())
    return frozenset(known)


def _kind(path: str | Path) -> str:
    return user_path(path).suffix.removeprefix(".").lower()
