"""Pictures hold what they are of; without matplotlib they say what to install."""

from __future__ import annotations

import subprocess
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


def test_every_word_has_a_tile_of_the_photo_under_its_own_map() -> None:
    given = result()
    figure = plots.attention(given)
    *tiles, bar = figure.axes
    titles = [axes.get_title() for axes in tiles]
    assert titles == ["photo", "a\n50%", "dog\n50%", "$runs$\n50%"]
    photo = given.image.permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(tiles[0].get_images()[0].get_array(), photo)
    even = 1 / 7  # the class token counts, though it is no part of the map
    for place, axes in enumerate(tiles[1:]):
        weights = np.full((2, 3), 0.02 / even)
        weights.flat[place] = 0.88 / even
        expected = plots.highlight(photo, weights, scale=0.88 / even)
        shown = axes.get_images()[0].get_array()
        assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1  # float32 weights
    assert bar.get_xlim() == pytest.approx((0, 0.88 / even), abs=1e-5)


def test_the_photo_is_in_colour_where_attention_is_at_the_end_of_the_scale() -> None:
    photo = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8)
    whole = plots.highlight(photo, np.full((2, 3), 5.0), scale=5.0)
    np.testing.assert_array_equal(whole, photo)
    np.testing.assert_array_equal(plots.highlight(photo, np.full((1, 1), 9.0), 5.0), photo)


def test_the_photo_is_grey_and_dim_without_attention() -> None:
    photo = np.full((2, 2, 3), (200, 100, 0), np.uint8)
    dark = plots.highlight(photo, np.zeros((1, 1)), scale=5.0)
    assert (dark == dark[..., :1]).all()
    assert dark.max() < 0.5 * (0.299 * 200 + 0.587 * 100)


def test_a_map_is_enlarged_linearly_between_the_centres_of_its_cells() -> None:
    photo = np.full((2, 8, 3), 200, np.uint8)
    shown = plots.highlight(photo, np.array([[0.0, 4.0]]), scale=4.0)[0, :, 0]
    steps = np.array([0, 0, 1, 3, 5, 7, 8, 8]) / 8  # centres at 1.5 and 5.5
    np.testing.assert_allclose(shown, 70 + steps * 130, atol=0.51)


def test_all_tiles_share_one_scale() -> None:
    weights = torch.full((2, 7), 0.02)
    weights[0, 1], weights[1, 2] = 0.88, 0.08
    weights[1, 0] = 0.82  # the second word looks at the class token
    strong, weak = (
        axes.get_images()[0].get_array()
        for axes in plots.attention(result(("a", "dog"), attention=weights)).axes[1:3]
    )
    saturation = [np.ptp(shown.astype(int), axis=-1).max() for shown in (strong, weak)]
    assert saturation[1] < 0.25 * saturation[0]


@pytest.mark.parametrize(("most", "noted"), [(1.7, True), (1.99, True), (2.5, False)])
def test_nearly_even_attention_looks_and_is_called_so(most: float, noted: bool) -> None:
    weights = torch.full((1, 7), (1 - most / 7) / 6)
    weights[0, 3] = most / 7
    figure = plots.attention(result(("a",), attention=weights))
    texts = " ".join(text.get_text() for text in figure.texts)
    assert ("attention is nearly even" in texts) is noted
    assert figure.axes[-1].get_xlim()[1] == 4.0  # the scale is not stretched


@pytest.mark.parametrize("words", [1, 5, 6, 40])
def test_captions_of_any_length_fit(words: int, tmp_path: Path) -> None:
    long = tuple(["incomprehensibilities", "a"] * words)[:words]
    figure = plots.attention(result(long), tmp_path / "looked.png")
    assert len(figure.axes) == words + 2  # the photo, the words, the scale
    assert (tmp_path / "looked.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_caption_and_another_script_are_drawn(tmp_path: Path) -> None:
    plots.attention(result(()), tmp_path / "empty.svg")
    plots.attention(result(("狗",)), tmp_path / "dog.pdf")
    assert (tmp_path / "dog.pdf").read_bytes().startswith(b"%PDF")


def test_pieces_are_shown_without_the_space_before_them() -> None:
    figure = plots.attention(result((" dog", "gy", "")))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1:4] == ["dog\n50%", "gy\n50%", "...\n50%"]


def test_a_word_in_another_script_touches_no_state_of_other_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("warnings.catch_warnings", None)  # it changes the filters of all threads
        plots.attention(result(("狗", "dog")), tmp_path / "dog.png")
    titles = [axes.get_title() for axes in plots.attention(result(("狗", "dog"))).axes]
    assert titles[2] == "dog\n50%"
    if titles[1] != "狗\n50%":  # no font here has it
        assert titles[1] == "\u25a1\n50%"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"attention": None}, "holds no attention"), ({"grid": None}, "7 visual tokens form no map")],
)
def test_what_has_no_map_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plots.attention(result(**changed))
    with pytest.raises(ConfigError, match=r"str was given; give caption\(image, details=True\)"):
        plots.attention("a dog")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["looked", "looked.xyz"])
def test_an_unknown_kind_of_picture_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not an image format.*\.png"):
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
    with pytest.raises(DataError, match=r"no history in .*history\.jsonl"):
        plots.history(tmp_path)
    with pytest.raises(DataError, match="no row yet"):
        plots.history(History())


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (lambda: plots.attention(result()), lambda: plots.history(history())):
        with pytest.raises(MissingExtra, match=r'pip install "capdistill\[ui\]"'):
            draw()
    assert issubclass(MissingExtra, ImportError)


def test_pictures_are_drawn_without_a_home_directory(tmp_path: Path) -> None:
    program = """
import os, pwd
def nobody(uid): raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
    os.environ.pop(name, None)
from capdistill import plots
from capdistill.training.history import History
history = History()
history.append({"kind": "epoch", "epoch": 0, "step": 3, "train": {"loss": 1.0}, "val": {}})
plots.history(history, "curves.png")
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
