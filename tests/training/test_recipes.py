from __future__ import annotations

import pytest

from capdistill import Distiller
from capdistill.errors import UnknownName
from capdistill.training import recipe
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
