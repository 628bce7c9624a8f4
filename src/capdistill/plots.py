"""How a run went: its history as curves."""

from __future__ import annotations

import importlib.util
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from capdistill.errors import ConfigError, DataError, MissingExtra
from capdistill.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capdistill.generation.hypotheses import CaptionResult
    from capdistill.training.history import History, Row

__all__ = ["attention", "history"]


def __dir__() -> list[str]:
    return sorted(__all__)


_TRAIN, _VAL = "#0072B2", "#D55E00"  # Okabe and Ito: for every kind of eye
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

    Steps are faint, epochs full. Where the first steps are far above all else they leave the panel
    at its top.

    Example:
        `plots.history("runs/student", "curves.png")`

    Args:
        run: A run's directory, its history.jsonl, or the `History` that `fit` returned.
        path: Also write it: .png, .svg, .pdf, ...

    Raises:
        MissingExtra: matplotlib is not installed.
        DataError: there is no history, or it has no row yet.
        ConfigError: the file's kind is unknown.
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
    """Three or four a row, whichever leaves fewer places empty."""
    return min((3, 4), key=lambda n: -panels % n) if panels > 3 else panels


def _dress(axes: Axes, panel: _Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, fontsize=10, parse_math=False)
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
        file = Path(run, "history.jsonl") if Path(run).is_dir() else Path(run)
        if not file.exists():
            raise DataError(f"plots.history: {file} does not exist. Give a run's directory.")
        found, name = History.load(file), str(file)
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
    """Steps faintly, epochs of training and validation in full."""

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
    """Let the first steps leave at the top where they would flatten the epochs' curves."""
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
            _line(axes, points, color=color, label=name, **style)

    return draw


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    """What there is of a figure over the steps; a gap where it is NaN."""
    if any(y is not None for _, y in points):
        x, y = zip(*points, strict=True)
        axes.plot(x, [math.nan if each is None else each for each in y], **style)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


__all__ = ["attention", "history", "require_matplotlib"]

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
            "plots.attention: the result holds no attention. Its decoder cannot show it "
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


def require_matplotlib() -> None:
    """Say at once, rather than after the work, that pictures cannot be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "Pictures need matplotlib, which is not installed. Install the extra: "
            'pip install "capdistill[ui]"'
        )


def new_figure(path: str | Path | None) -> Figure:
    """Without pyplot: no window, no state, any thread.

    Args:
        path: Where it will be written; a kind that cannot be is refused before anything is drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
        ConfigError: the file's suffix names no kind of picture.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path is not None and _kind(path) not in kinds:
        raise ConfigError(
            f"plots: '{path}' does not say what kind of picture to write. End it with one of "
            f"{', '.join('.' + each for each in sorted(kinds))}."
        )
    return figure


def finished(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written where there is a path."""
    if path is None:
        return figure
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a word in another script
        write_atomically(path, lambda file: figure.savefig(file, format=_kind(path), dpi=120))
    return figure


def _kind(path: str | Path) -> str:
    return Path(path).suffix.removeprefix(".").lower()
