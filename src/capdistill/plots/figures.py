"""Figures without windows, and their files; matplotlib is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from capdistill.errors import ConfigError, MissingExtra
from capdistill.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def new_figure(path: str | Path | None) -> Figure:
    """Without pyplot: no window, no state, any thread.

    Args:
        path: Where it will be written; a kind that can not be is refused before anything is drawn.

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
