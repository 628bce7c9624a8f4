"""Pictures hold what they are of; without matplotlib they say what to install."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdistill import plots
from capdistill.errors import ConfigError, DataError, MissingExtra
from capdistill.generation import Hypothesis
from capdistill.generation.hypotheses import CaptionResult
from capdistill.training.history import History

pytest.importorskip("matplotlib", reason="pictures need the extra ui")


def result(tokens: tuple[str, ...] = ("a", "dog", "$runs$"), **changed: Any) -> CaptionResult:
    """Attention over a class token and a map of 2 x 3, a place further with every token."""
    weights = torch.full((len(tokens), 7), 0.02)
    for t in range(len(tokens)):
        weights[t, 1 + t % 6] = 0.88
    text = " ".join(tokens)
    values: dict[str, Any] = {
        "text": text,
        "tokens": tokens,
        "log_prob": -1.0,
        "token_log_probs": (*np.log([0.5] * len(tokens)), -0.1),
        "finished": True,
        "n_best": (Hypothesis((4, 5), -1.0, finished=True, text=text),),
        "attention": weights,
        "grid": (2, 3),
        "prefix_tokens": 1,
        "image": torch.randint(256, (3, 24, 24), dtype=torch.uint8),
    }
    return CaptionResult(**{**values, **changed})


def test_every_word_has_a_tile_with_its_own_map_over_the_photo() -> None:
    figure = plots.attention(result())
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["photo", "a\n50%", "dog\n50%", "$runs$\n50%"]
    for place, axes in enumerate(figure.axes[1:]):
        photo, shown = (image.get_array() for image in axes.get_images())
        assert photo.shape == (24, 24)  # in grey, so that colour is attention
        assert shown.shape == (2, 3)  # the class token is no part of it
        assert int(np.argmax(shown)) == place
        assert float(shown.max()) == pytest.approx(1.0)
        assert axes.get_images()[1].get_extent() == [-0.5, 23.5, 23.5, -0.5]


@pytest.mark.parametrize("words", [1, 5, 6, 40])
def test_captions_of_any_length_fit(words: int, tmp_path: Path) -> None:
    long = tuple(["incomprehensibilities", "a"] * words)[:words]
    figure = plots.attention(result(long), tmp_path / "looked.png")
    assert len(figure.axes) == words + 1
    assert (tmp_path / "looked.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_caption_and_another_script_are_drawn(tmp_path: Path) -> None:
    plots.attention(result(()), tmp_path / "empty.svg")
    plots.attention(result(("狗",)), tmp_path / "dog.pdf")
    assert (tmp_path / "dog.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"attention": None}, "holds no attention"), ({"grid": None}, "7 visual tokens form no map")],
)
def test_what_has_no_map_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plots.attention(result(**changed))


@pytest.mark.parametrize("name", ["looked", "looked.xyz"])
def test_an_unknown_kind_of_picture_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say what kind .*\.png"):
        plots.attention(result(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def rows() -> list[dict[str, Any]]:
    def terms(value: float) -> dict[str, Any]:
        return {"ce": {"raw": value, "weighted": value}, "token": {"raw": 2 * value, "weighted": 0}}

    def part(value: float) -> dict[str, Any]:
        return {"loss": value, "terms": terms(value)}

    step = {"kind": "step", "epoch": 0, "loss": 4.0, "terms": terms(4.0)}
    found = [{**step, "step": n, "learning_rates": {"model": n / 10}} for n in (1, 2)]
    for n, (loss, cider) in enumerate([(3.0, 0.1), (2.0, 0.3), (float("nan"), 0.2)]):
        row: dict[str, Any] = {"kind": "epoch", "epoch": n, "step": 2 * (n + 1)}
        row |= {"train": part(loss), "val": part(loss + 0.5), "scores": {"cider_d": cider}}
        found.append({**row, "improved": n < 2})
    return found


def history(folder: Path | None = None) -> History:
    found = History(folder / "history.jsonl" if folder else None)
    for row in rows():
        found.append(row)
    return found


def test_curves_are_the_rows_of_the_history() -> None:
    figure = plots.history(history())
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["loss", "ce", "token", "validation scores", "learning rate"]
    units = [axes.get_ylabel() for axes in figure.axes]
    assert units == ["weighted sum of the terms", "unweighted", "unweighted", "score", "rate"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer step"}
    lines = {line.get_label(): line for line in panels["token"].get_lines()}
    np.testing.assert_array_equal(lines["training"].get_xdata(), [2, 4, 6])
    np.testing.assert_array_equal(lines["training"].get_ydata(), [6.0, 4.0, np.nan])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), [7.0, 5.0, np.nan])
    scores = {line.get_label(): line for line in panels["validation scores"].get_lines()}
    np.testing.assert_array_equal(scores["cider_d"].get_ydata(), [0.1, 0.3, 0.2])
    assert set(scores["best epoch"].get_xdata()) == {4}


def test_a_run_is_drawn_from_its_directory_or_its_file(tmp_path: Path) -> None:
    history(tmp_path)
    for run in (tmp_path, str(tmp_path / "history.jsonl")):
        plots.history(run, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_steps_do_not_flatten_the_curves_of_the_epochs() -> None:
    found = History()
    for n, loss in enumerate([90.0, 9.0, *[3.0] * 60]):
        found.append({"kind": "step", "step": n + 1, "epoch": 0, "loss": loss, "terms": {}})
    found.append({"kind": "epoch", "step": 62, "epoch": 0, "train": {"loss": 4.0}, "val": {}})
    axes = plots.history(found).axes[0]
    low, high = axes.get_ylim()
    assert 2.5 < low < 3
    assert 4 < high < 5
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata()[:2], [90.0, 9.0])


def test_a_figure_belongs_to_no_window() -> None:
    assert type(plots.history(history()).canvas).__name__ == "FigureCanvasBase"


def test_a_run_without_validation_or_steps_is_drawn() -> None:
    found = History()
    found.append({"kind": "epoch", "epoch": 0, "step": 3, "train": {"loss": 1.0}, "val": {}})
    assert [axes.get_title() for axes in plots.history(found).axes] == ["loss"]


def test_no_history_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"history\.jsonl does not exist"):
        plots.history(tmp_path)
    with pytest.raises(DataError, match="no row yet"):
        plots.history(History())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: plots.attention(result()), lambda: plots.history(history())):
        with pytest.raises(MissingExtra, match=r'pip install "capdistill\[ui\]"'):
            draw()
    assert issubclass(MissingExtra, ImportError)
