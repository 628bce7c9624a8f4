"""What a trainer refuses in our words, and what its objects print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from capdistill import (
    Captioner,
    Distiller,
    GenerationConfig,
    SelfCritical,
    Trainer,
    WordTokenizer,
)
from capdistill.data import CaptionData, Loader
from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.losses.base import DistillationLoss
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.runtime import pick_device
from capdistill.training import (
    Callback,
    GradNorm,
    LossRatio,
    TrainConfig,
    Uncertainty,
    model_difficulty,
)
from tests.training import tiny_models as tiny

OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 1}
Make = Callable[..., Captioner]


@pytest.mark.parametrize("config", [{"epochs": 3}, "kd_2024", 3])
def test_a_config_of_another_kind_is_refused(saveable: Make, config: Any) -> None:
    with pytest.raises(ConfigError, match="config="):
        Trainer(saveable(), config)


def test_a_device_may_be_that_of_torch() -> None:
    assert TrainConfig(device=torch.device("cpu")).device == "cpu"  # type: ignore[arg-type]


def test_names_may_be_a_list_or_text_with_commas() -> None:
    given: Any = {"metrics": "bleu,cider_d"}
    assert TrainConfig(**given).metrics == TrainConfig(metrics=("bleu", "cider_d")).metrics


def test_an_option_of_a_weighting_is_suggested_among_the_terms() -> None:
    models, weights = (tiny.make_teacher(), tiny.make_student()), {"learning_rat": 0.1}
    with pytest.raises(ConfigError, match=r"no term 'learning_rat'\. Did you mean 'learning_rate'"):
        Distiller(*models, weights=Uncertainty(weights), **OPTIONS)


def test_decoding_options_beside_an_unusable_generation_are_refused(saveable: Make) -> None:
    wrong: Any = "beam"
    with pytest.raises(ConfigError, match="generation"):
        Trainer(saveable(), generation=wrong, beam_size=2)


@pytest.mark.parametrize("name", ["captions_per_image", "num_workers", "cache_views", "beam_size"])
def test_numbers_that_nothing_could_hold_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        TrainConfig.resolve(None, {name: 10**30}, "fit")
    if name in GenerationConfig.types():
        with pytest.raises(ConfigError, match=name):
            GenerationConfig(**{name: 10**30})


@pytest.mark.parametrize("name", ["captions_per_image", "image_size", "num_workers", "views"])
def test_a_loader_refuses_numbers_that_nothing_could_hold(name: str, colours: CaptionData) -> None:
    options: Any = {"image_size": 8, name: 10**18}
    with pytest.raises(ConfigError, match=name):
        Loader(colours, tiny.TOKENIZER, **options)


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), float("inf"), 1.5, 0])
def test_caption_refuses_a_batch_size_that_is_no_count(saveable: Make, value: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        saveable().caption(np.zeros((8, 8, 3), np.uint8), batch_size=value)


@pytest.mark.parametrize("value", [["x"], "x", None, True, 1.5, -1])
def test_the_tokenizer_refuses_a_min_count_that_is_no_count(value: Any) -> None:
    with pytest.raises(ConfigError, match="min_count"):
        WordTokenizer.train(["a dog"], min_count=value)


def test_the_tokenizer_takes_a_numpy_count() -> None:
    count: Any = np.int64(1)
    tokenizer = WordTokenizer.train(["a dog"], min_count=count, max_length=count)
    assert (len(tokenizer), type(tokenizer.max_length)) == (6, int)


def test_the_tokenizer_refuses_what_is_no_list() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match="NoneType"):
        WordTokenizer(nothing)
    with pytest.raises(DataError, match="NoneType"):
        WordTokenizer.train(nothing)


@pytest.mark.parametrize("ids", [[10**6], [-1], [1.5], [[1, 2]], ["dog"]])
def test_decode_refuses_what_is_no_id(ids: Any) -> None:
    with pytest.raises(DataError, match="id"):
        tiny.TOKENIZER.decode(ids)


@pytest.mark.parametrize("given", [None, [], "x"])
def test_methods_for_loops_of_your_own_name_what_they_expect(saveable: Make, given: Any) -> None:
    trainer = Trainer(saveable(), **OPTIONS)
    for method in (trainer.step, trainer.terms):
        with pytest.raises(ConfigError, match="Batch"):
            method(given)
    with pytest.raises(ConfigError, match="epoch"):
        trainer.validate(given)


@pytest.mark.parametrize("weight", [lambda share: "x", lambda share: None, lambda share: [1]])
def test_a_weight_function_that_gives_no_number_is_named(saveable: Make, weight: Any) -> None:
    options: Any = {**OPTIONS, "losses": {"token": "token"}, "weights": {"token": weight}}
    distiller = Distiller(tiny.make_teacher(), saveable(), **options)
    with pytest.raises(ConfigError, match="'token' gave"):
        distiller.fit([tiny.make_batch([1])])


def test_a_callback_whose_event_is_no_function_is_refused(saveable: Make) -> None:
    class Wrong:
        on_epoch = 3

    with pytest.raises(ConfigError, match="callbacks"):
        Trainer(saveable(), **OPTIONS).fit([], callbacks=[Wrong()])


def test_a_callback_with_a_method_that_no_event_calls_is_refused(saveable: Make) -> None:
    class Elsewhere(Callback):
        def on_epoch_end(self, trainer: Any, row: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"'on_epoch_end' of Elsewhere .*Did you mean 'on_epoch'"):
        Trainer(saveable(), **OPTIONS).fit([], callbacks=[Elsewhere()])


def test_another_objective_is_named_before_what_the_optimizer_holds(
    saveable: Make, colours: CaptionData, tmp_path: Path
) -> None:
    Trainer(saveable(), **OPTIONS).fit(colours, out=tmp_path)
    distiller = Distiller(tiny.make_teacher(), saveable(), losses={"hidden": "hidden"}, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"losses\.hidden: absent -> "):
        distiller.fit(colours, out=tmp_path, resume=True)


def test_a_source_without_start_is_refused_before_the_run(
    saveable: Make, colours: CaptionData
) -> None:
    class Whole:
        def epoch(self, n: int) -> Iterator[Batch]:
            yield from Loader(colours, tiny.TOKENIZER, image_size=8).epoch(n)

    with pytest.raises(ConfigError, match=r"epoch\(n, start\)"):
        Trainer(saveable(), **OPTIONS).fit(Whole())


def test_a_source_may_have_nothing_skipped(saveable: Make, colours: CaptionData) -> None:
    class Bare:
        skipped = None

        def epoch(self, n: int, start: int = 0) -> Iterator[Batch]:
            yield from Loader(colours, tiny.TOKENIZER, image_size=8).epoch(n, start)

    history = Trainer(saveable(), **OPTIONS).fit(Bare())
    assert history.epochs[0]["skipped"] == 0


def test_decode_takes_tensors_and_arrays() -> None:
    texts = {tiny.TOKENIZER.decode(kind([1, 4, 2])) for kind in (list, torch.tensor, np.array)}  # type: ignore[operator]
    assert texts == {"red"}


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: torch.Tensor) -> torch.Tensor:
        return values.sum() * 0

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        return torch.full((1,), float("nan"))


class BadLoss(DistillationLoss):
    needs = frozenset({"logits"})

    def forward(self, student: Any, teacher: Any, batch: Batch) -> Any:
        return NaNGradient.apply(student.logits.flatten()[:1])


def test_an_assigned_scaler_stays_and_endless_skipped_steps_end_the_run(saveable: Make) -> None:
    loss = {"mine": BadLoss()}
    distiller = Distiller(tiny.make_teacher(), saveable(), losses=loss, **OPTIONS)
    distiller.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pytest.raises(ArithmeticError, match="in a row"):
        distiller.fit([tiny.make_batch([1])], epochs=50)
    assert distiller.scaler is scaler
    assert scaler.get_scale() < 1024


def test_objects_print_as_one_line(saveable: Make) -> None:
    batch = tiny.make_batch([1, 2])
    student = saveable()
    distiller = Distiller(tiny.make_teacher(), student, losses={"token": "token"}, **OPTIONS)
    shown = [repr(distiller), repr(batch), repr(student(batch)), repr(Trainer(student, **OPTIONS))]
    assert all("\n" not in text and len(text) < 160 and " at 0x" not in text for text in shown)
    assert "ce, token" in shown[0]
    assert "2 images of (3, 8, 8)" in shown[1]
    assert isinstance(student(batch), CaptionerOutput)
    assert "logits (2, " in shown[2]
    assert repr(distiller.check([batch])).startswith("<CheckReport ready:")


def test_one_of_a_thing_is_in_the_singular(saveable: Make, colours: CaptionData) -> None:
    how: dict[str, Any] = {"captions_per_image": 1, "num_workers": 1, "patience": 1}
    trainer = Trainer(saveable(), **OPTIONS, **how)
    assert ", 1 epoch, cpu" in repr(trainer)
    one = colours.examples[:1]
    trainer.fit(CaptionData(one), CaptionData(one))
    shown = "\n".join(trainer.describe())
    assert "1 image x 1 caption, 1 worker process" in shown
    assert "1 step per epoch" in shown
    assert "patience 1 epoch" in shown


@pytest.mark.parametrize("weights", [["ce"], "ce", 0.5])
def test_weights_of_another_kind_are_refused_everywhere(saveable: Make, weights: Any) -> None:
    with pytest.raises(ConfigError, match=r"weights: .* was given"):
        SelfCritical(saveable(), weights=weights)
    for adaptive in (Uncertainty, GradNorm, LossRatio):
        with pytest.raises(ConfigError, match=f"{adaptive.__name__}: weights="):
            adaptive(weights)


@pytest.mark.parametrize("model", [None, "runs/teacher", {"one": None}])
def test_difficulty_is_measured_by_captioners_alone(colours: CaptionData, model: Any) -> None:
    with pytest.raises(ConfigError, match="model_difficulty: the model is"):
        model_difficulty(model, colours)


@pytest.mark.parametrize("device", [None, 1.5, ["cpu"], "gpu"])
def test_what_is_no_device_is_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        pick_device(device)
