from __future__ import annotations

import pytest

from capdistill import Distiller
from capdistill.errors import UnknownName
from capdistill.training import recipe
from tests.training import tiny_models as tiny


def test_the_published_recipe_is_a_distiller_as_it_was_written():
    distiller = Distiller(tiny.make_teacher(), tiny.make_student(), **recipe("kd_2024"))
    losses = distiller.objective.losses
    assert losses["token"].temperature == 4.0
    assert distiller.objective.weights == {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
    assert (distiller.config.epochs, distiller.config.batch_size) == (30, 16)
    assert (distiller.config.learning_rate, distiller.config.captions_per_image) == (2e-4, 1)


def test_a_recipe_is_given_anew_each_time():
    recipe("kd_2024")["losses"]["token"]["temperature"] = 1.0
    assert recipe("kd_2024")["losses"]["token"]["temperature"] == 4.0


def test_an_unknown_recipe_is_named_with_those_there_are():
    with pytest.raises(UnknownName, match=r"no recipe 'kd_2042'. Did you mean 'kd_2024'"):
        recipe("kd_2042")
