"""Pictures of what a model looked at and of how it learnt. They need the extra `ui`.

>>> from capdistill import plots
>>> sorted(name for name in vars(plots) if name in plots.__all__)
['attention', 'history', 'require_matplotlib']
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from capdistill.errors import ConfigError, DataError, MissingExtra
from capdistill.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capdistill.caption_result import CaptionResult
    from capdistill.training.history import History, Row

__all__ = ["attention", "history", "require_matplotlib"]

_TRAIN, _VAL, _BEST = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito: for every kind of eye
_OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 3}
_TILE, _COLUMNS = 1.9, 6  # inches, tiles a row
_WIDE = 12  # letters of a word that fit above a tile at full size


def require_matplotlib() -> None:
    """Say at once, rather than after the work, that pictures can not be drawn.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra(
            "Pictures need matplotlib, which is not installed. Install the extra: "
            'pip install "capdistill[ui]"'
        )


def attention(result: CaptionResult, path: str | Path | None = None) -> Figure:
    """Draw, word by word, where the model looked over the photo.

    Each tile shows the attention of one token over the visual tokens that form the map, bright
    where it is highest for this token, with the token's probability. What a token gave to tokens
    outside the map (CLS, registers) is not drawn.

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
    figure = _new_figure()
    maps = _maps(result)
    tiles = len(maps) + 1
    columns = min(_COLUMNS, tiles)
    rows = math.ceil(tiles / columns)
    figure.set_size_inches(_TILE * columns, (_TILE + 0.35) * rows + 0.4)
    photo = result.image.permute(1, 2, 0).cpu().numpy()  # (S, S, 3)
    titles = ["photo", *map(_titled, result.tokens, result.token_log_probs)]
    for place, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(photo)
        axes.set_axis_off()
        size = 10 * min(1.0, _WIDE / max(map(len, title.split("\n"))))
        axes.set_title(title, fontsize=max(size, 5), parse_math=False)
        if place:
            _overlay(axes, maps[place - 1], photo.shape[0])
    figure.suptitle(_wrapped(result.text, 11 * columns), fontsize=11, parse_math=False)
    return _finished(figure, path)


def history(run: str | Path | History, path: str | Path | None = None) -> Figure:
    """Draw the curves of a run: the loss, every term, the scores, the learning rates.

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
    figure = _new_figure()
    found = _history(run)
    panels = _panels(found)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure.set_size_inches(4.2 * columns, 2.9 * rows)
    best = found.best
    for place, (title, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw(axes)
        if best is not None:
            axes.axvline(best["step"], color=_BEST, linestyle=":", label="best epoch")
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return _finished(figure, path)


def _new_figure() -> Figure:
    """Without pyplot: no window, no state, any thread."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(layout="constrained")


def _finished(figure: Figure, path: str | Path | None) -> Figure:
    if path is None:
        return figure
    kind = Path(path).suffix.removeprefix(".").lower()
    kinds = figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ConfigError(
            f"plots: '{path}' does not say what kind of picture to write. End it with one of "
            f"{', '.join('.' + each for each in sorted(kinds))}."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a word in another script
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))
    return figure


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


def _overlay(axes: Axes, weights: Any, size: int) -> None:
    """A (h, w) map over a photo of `size` pixels, each relative to its own maximum."""
    shown = weights / max(float(weights.max()), 1e-12)
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    axes.imshow(
        shown, cmap="inferno", alpha=0.6, vmin=0, vmax=1, extent=extent, interpolation="bilinear"
    )


def _titled(token: str, log_prob: float) -> str:
    return f"{token}\n{math.exp(log_prob):.0%}"


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, max(width, 20))) or "(empty caption)"


def _history(run: str | Path | History) -> History:
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


_Draw: TypeAlias = "Callable[[Axes], None]"
_Value: TypeAlias = "Callable[[dict[str, Any]], float | None]"


def _panels(found: History) -> list[tuple[str, _Draw]]:
    """Title and drawing of each panel."""
    terms = dict.fromkeys(name for row in found.rows for name in _terms(row))
    panels = [("loss", _loss_panel(found, lambda part: part.get("loss")))]
    if len(terms) > 1:
        panels += [(f"{name} (raw)", _loss_panel(found, _raw(name))) for name in terms]
    if any(row.get("scores") for row in found.epochs):
        panels.append(("validation scores", _named_panel(found.epochs, "scores", **_MARKED)))
    if found.steps:
        panels.append(("learning rate", _named_panel(found.steps, "learning_rates")))
    return panels


def _terms(row: Row) -> Iterable[str]:
    return (row.get("terms") or (row.get("train") or {}).get("terms") or {}).keys()


def _raw(term: str) -> _Value:
    return lambda part: (part.get("terms") or {}).get(term, {}).get("raw")


def _loss_panel(found: History, value: _Value) -> _Draw:
    """Steps faintly, epochs of training and validation in full."""

    def draw(axes: Axes) -> None:
        steps = [(row["step"], value(row)) for row in found.steps]
        _line(axes, steps, color=_TRAIN, alpha=0.25, linewidth=0.8)
        for part, label, color in (("train", "training", _TRAIN), ("val", "validation", _VAL)):
            points = [(row["step"], value(row.get(part) or {})) for row in found.epochs]
            _line(axes, points, color=color, label=label, **_MARKED)

    return draw


def _named_panel(rows: Sequence[Row], key: str, **style: Any) -> _Draw:
    """A curve for every name under `key`."""

    def draw(axes: Axes) -> None:
        names = dict.fromkeys(name for row in rows for name in row.get(key) or {})
        for name, color in zip(names, _OTHERS * len(names), strict=False):
            points = [(row["step"], (row.get(key) or {}).get(name)) for row in rows]
            _line(axes, points, color=color, label=name, **style)

    return draw


def _line(axes: Axes, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    """What there is of a figure over the steps; a gap where it is NaN."""
    if any(y is not None for _, y in points):
        x, y = zip(*points, strict=True)
        axes.plot(x, [math.nan if each is None else each for each in y], **style)
