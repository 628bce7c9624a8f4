"""How a run went: its history as curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from capdistill.errors import DataError
from capdistill.plots.figures import finished, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from capdistill.training.history import History, Row

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
    figure, found = new_figure(path), _history(run)
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
