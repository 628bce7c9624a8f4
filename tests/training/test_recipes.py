from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capdistill import Captioner, Distiller, Trainer
from capdistill.data import CaptionData
from capdistill.errors import UnknownName
from capdistill.training import History, recipe, run_stages
from tests.training import tiny_models as tiny


def test_the_published_recipe_makes_a_distiller_as_described():
    distiller = Distiller(tiny.make_teacher(), tiny.make_student(), **recipe("kd_2024"))
    losses = distiller.objective.losses
    assert losses["token"].temperature == 4.0
    assert distiller.objective.weights == {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
    assert (distiller.config.epochs, distiller.config.batch_size) == (30, 16)
    assert (distiller.config.learning_rate, distiller.config.captions_per_image) == (2e-4, 1)


def test_each_call_returns_a_copy_of_the_recipe():
    recipe("kd_2024")["losses"]["token"]["temperature"] = 1.0
    assert recipe("kd_2024")["losses"]["token"]["temperature"] == 4.0


def test_an_unknown_recipe_is_refused_with_a_suggestion():
    with pytest.raises(UnknownName, match=r"no recipe 'kd_2023'. Did you mean 'kd_2024'"):
        recipe("kd_2023")


@pytest.mark.parametrize("name", [None, 3, ("kd_2024",)])
def test_what_is_no_name_of_a_recipe_is_refused(name: Any) -> None:
    with pytest.raises(UnknownName, match="Available: best_small"):
        recipe(name)


def test_every_stage_of_the_best_recipe_makes_its_trainer(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    colours: CaptionData,
    saveable: Callable[..., Captioner],
) -> None:
    made: list[Any] = []

    def fit(trainer: Any, *data: Any, **how: Any) -> History:
        made.append(trainer)
        return trainer.history

    monkeypatch.setattr(Trainer, "fit", fit)
    monkeypatch.setattr("capdistill.training.stages.caption", lambda teacher, data, *_, **__: data)
    how = {"teacher": tiny.make_teacher(), "out": tmp_path, **recipe("best_small")}
    run_stages(saveable(), colours, **how)
    assert [type(trainer) for trainer in made] == [Trainer, Distiller]
    assert [trainer.config.learning_rate for trainer in made] == [1.5e-3, 1e-3]
    assert all(trainer.config.cache_views == 4 for trainer in made)
    assert made[1].objective.losses["feature"].teacher == "teacher"
    assert made[1].objective.weights == {"ce": 0.3, "token": 0.7, "feature": 0.2}
