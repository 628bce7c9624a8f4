"""Which terms are built and with which weight; which parameters learn how fast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import capdistill as cd
from capdistill import Distiller, Trainer
from capdistill.errors import ConfigError, UnknownName
from capdistill.training.config import TrainConfig
from capdistill.training.optim import make_schedule, parameter_groups, share_of_rate
from tests.training import tiny_models as tiny


def pair() -> tuple[Any, Any]:
    return tiny.make_teacher(), tiny.make_student()


def test_the_references_losses_and_weights_are_the_defaults() -> None:
    distiller = Distiller(*pair())
    assert list(distiller.objective.losses) == ["token", "feature", "hidden"]
    expected = {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
    assert distiller.objective.weights == expected


def test_a_term_of_constant_weight_0_is_not_built() -> None:
    weights = {"ce": 0, "feature": 0.0, "hidden": (0.0, 0.0)}
    distiller = Distiller(*pair(), weights=weights, **tiny.QUIET, schedule="constant")
    assert list(distiller.objective.losses) == ["token"]
    assert list(distiller.objective.losses.parameters()) == []
    assert distiller.objective.needed_outputs == {"logits"}
    assert set(distiller.step(tiny.make_batch([2]))["terms"]) == {"token"}


def test_a_scheduled_weight_of_0_stays_in_the_graph() -> None:
    losses, weights = {"hidden": "hidden"}, {"hidden": (0.0, 1.0)}
    distiller = Distiller(*pair(), losses=losses, weights=weights, **tiny.QUIET)
    terms = distiller.terms(tiny.make_batch([2]))
    assert terms["hidden"].weight == 0.0
    assert terms["hidden"].sum.requires_grad


def test_weights_follow_the_runs_progress() -> None:
    weights = {"ce": (1.0, 0.0), "token": lambda progress: progress**2, "hidden": [0.2, 0.4]}
    losses = {name: name for name in ("token", "hidden")}
    objective = Distiller(*pair(), losses=losses, weights=weights).objective
    found = [[objective.weight(n, p) for n in ("ce", "token", "hidden")] for p in (0, 0.25, 1)]
    expected = [[1.0, 0.0, 0.2], [0.75, 0.0625, 0.25], [0.0, 1.0, 0.4]]
    assert found == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"tokn": 1.0}, "no term 'tokn'.*Did you mean 'token'"),
        ({"token": -0.1}, "'token' is -0.1"),
        ({"token": math.nan}, "'token' is nan"),
        ({"token": (0.1, -1.0)}, "pair"),
        ({"token": (0.1, 0.2, 0.3)}, "pair"),
        ({"token": "much"}, "'token' is 'much'"),
        ({"token": None}, "'token' is None"),
        (dict.fromkeys(("ce", "token", "feature", "hidden"), 0.0), "nothing to train"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(*pair(), weights=weights)


def test_a_function_that_gives_no_weight_is_refused_when_it_does() -> None:
    weights = {"token": lambda progress: -1.0}
    options = {**tiny.QUIET, "schedule": "constant"}
    distiller = Distiller(*pair(), losses={"token": "token"}, weights=weights, **options)
    with pytest.raises(ConfigError, match=r"'token' gave -1\.0 at 0% of the run"):
        distiller.step(tiny.make_batch([2]))


def test_losses_are_objects_names_or_dicts() -> None:
    loss = cd.HiddenKD(layers="uniform")
    given = {"token": {"name": "token", "temperature": 2.0}, "look": "feature", "mine": loss}
    distiller = Distiller(*pair(), losses=given)
    built = dict(distiller.objective.losses.items())
    assert built["token"].temperature == 2.0
    assert isinstance(built["look"], cd.FeatureKD)
    assert built["mine"] is loss
    assert distiller.objective.weights["look"] == 1.0


@pytest.mark.parametrize(
    ("losses", "error", "said"),
    [
        ({"token": "tokne"}, UnknownName, "Did you mean 'token'"),
        ({"token": {"temperature": 2.0}}, ConfigError, "a dict with 'name'"),
        ({"token": 3}, ConfigError, "'token' was given 3"),
        ({"ce": "token"}, ConfigError, "'ce' cannot name a term"),
        ({"a.b": "token"}, ConfigError, "cannot name a term"),
        ({"keys": "token"}, ConfigError, "cannot name a term"),
    ],
)
def test_losses_that_cannot_be_are_refused(losses: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        Distiller(*pair(), losses=losses)


# -- parameter groups -----------------------------------------------------------------------


class WithPositions(nn.Module):
    """What timm's transformers say of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 5))

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


def test_norms_biases_and_embeddings_do_not_decay_and_the_trunk_learns_a_tenth() -> None:
    student = tiny.make_student(norm=True)
    student.encoder.positions = WithPositions()
    distiller = Distiller(tiny.make_teacher(), student, learning_rate=0.5, weight_decay=0.01)
    groups = parameter_groups(distiller.objective, student, distiller.config)
    names = {id(p): name for name, p in distiller.objective.named_parameters()}
    decay = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]  # type: ignore[attr-defined]
    }
    assert decay.keys() == set(names.values())
    assert decay["student.encoder.conv.weight"] == (0.05, 0.01)
    assert decay["student.encoder.conv.bias"] == (0.05, 0.0)
    assert decay["student.encoder.norm.weight"] == (0.05, 0.0)
    assert decay["student.encoder.project.weight"] == (0.5, 0.01)
    assert decay["student.encoder.positions.pos_embed"] == (0.5, 0.0)
    assert decay["student.decoder.embedding.weight"] == (0.5, 0.0)
    assert decay["student.decoder.cells.0.weight_hh_l0"] == (0.5, 0.01)
    assert decay["student.decoder.cells.0.bias_hh_l0"] == (0.5, 0.0)
    assert decay["losses.hidden.projectors.0.weight"] == (0.5, 0.01)


def test_frozen_parameters_are_in_no_group_and_all_frozen_is_refused() -> None:
    student = tiny.make_student(trainable=False)
    trainer = Trainer(student)
    groups = parameter_groups(trainer.objective, student, trainer.config)
    assert {group["name"] for group in groups} == {"model"}
    student.requires_grad_(False)
    with pytest.raises(ConfigError, match="Nothing to train"):
        trainer.fit([tiny.make_batch([2])])


# -- schedules ------------------------------------------------------------------------------


def optimizer(rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def rates(schedule: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_cosine_restarts_are_those_of_torch(epochs: int, factor: int, steps: int) -> None:
    config = TrainConfig(schedule="cosine_restarts", restart_epochs=epochs, restart_factor=factor)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer(0.3), epochs * steps, factor
    )
    mine = make_schedule(optimizer(0.3), config, steps)
    assert rates(mine, 40) == pytest.approx(rates(theirs, 40), abs=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 375])
def test_thirty_epochs_of_cosine_restarts_end_at_a_minimum(steps: int) -> None:
    share = share_of_rate(TrainConfig(epochs=30, schedule="cosine_restarts"), steps)
    run = [share(step) for step in range(30 * steps)]
    assert run[0] == run[10 * steps] == 1.0
    assert run[-1] == min(run[10 * steps :])
    assert run[-1] == pytest.approx(0.0, abs=1.1 * (math.pi / 2 / (20 * steps)) ** 2)
    assert run[10 * steps - 1] == min(run[: 10 * steps])


def test_warm_up_climbs_evenly_then_falls_to_nothing_and_stays_there() -> None:
    config = TrainConfig(schedule="warmup_cosine", epochs=10, warmup=0.2)
    found = [share_of_rate(config, 10)(step) for step in range(105)]
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert found[20] == pytest.approx(1.0)
    assert found[60] == pytest.approx(0.5)
    assert found[100:] == pytest.approx([0.0] * 5)


@pytest.mark.parametrize("schedule", ["cosine_restarts", "warmup_cosine", "constant"])
def test_a_schedule_goes_on_where_it_was(schedule: Any) -> None:
    config = TrainConfig(schedule=schedule, epochs=3, restart_epochs=1)
    whole = rates(make_schedule(optimizer(), config, 4), 12)
    assert rates(make_schedule(optimizer(), config, 4, done=5), 7) == pytest.approx(whole[5:])
