"""Compiled models and gradient checkpointing change no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import capdistill as cd
from capdistill.errors import ConfigError
from capdistill.outputs import Batch
from capdistill.training.check.costs import bytes_kept_for_backward
from capdistill.training.execution import repeated_blocks
from tests.training import tiny_models as tiny

QUIET: dict[str, Any] = {**tiny.QUIET, "schedule": "constant", "captions_per_image": 2}


def batches() -> list[Batch]:
    data = cd.data.sample().train.subset(4)
    how: dict[str, Any] = {"image_size": 64, "batch_size": 2, "train": True}
    return list(cd.data.Loader(data, tiny.TOKENIZER, captions_per_image=2, **how))


def steps(preset: str, **options: Any) -> tuple[list[float], dict[str, Tensor], cd.Distiller]:
    torch.manual_seed(0)
    teacher = cd.Captioner.create("debug_teacher", tokenizer=tiny.TOKENIZER, weights=False)
    encoder = {"trainable": "all", "image_size": 64}
    decoder = {"dropout": 0.3}
    student = cd.Captioner.create(
        preset, tokenizer=tiny.TOKENIZER, weights=False, encoder=encoder, decoder=decoder
    )
    trainer = cd.Distiller(teacher, student, {"token": "token"}, **QUIET, **options)
    torch.manual_seed(1)
    losses = [trainer.step(batch)["loss"] for batch in batches()]
    return losses, tiny.weights_of(trainer.objective), trainer


@pytest.mark.parametrize("preset", ["debug_teacher", "debug_student"])  # ViT; CNN with batch norms
def test_checkpointing_keeps_every_bit(preset: str) -> None:
    plain_losses, plain, _ = steps(preset)
    losses, weights, trainer = steps(preset, gradient_checkpointing=True)
    assert losses == plain_losses
    assert tiny.same_bits(weights, plain)
    assert len(list(repeated_blocks([trainer.captioner]))) >= 2


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    _, _, plain = steps("debug_teacher")
    _, _, saving = steps("debug_teacher", gradient_checkpointing=True)
    [batch, *_] = batches()
    assert bytes_kept_for_backward(saving, batch) < 0.7 * bytes_kept_for_backward(plain, batch)


@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_options_of_a_fit_end_with_it() -> None:
    trainer = cd.Trainer(tiny.make_teacher(), **QUIET)
    data = [tiny.make_batch([2, 3])]
    seen: list[bool] = []

    class Look:
        def on_step(self, trainer: cd.Trainer, row: Any) -> None:
            seen.append(trainer.captioner.decoder._compiled_call_impl is not None)

    trainer.fit(data, epochs=1, compile="eager", callbacks=[Look()])
    trainer.fit(data, epochs=1, callbacks=[Look()])
    assert seen == [True, False]
    assert trainer.captioner.decoder._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_traced_models_train_the_same(checkpointed: bool) -> None:
    plain_losses, plain, _ = steps("debug_teacher")
    how = {"compile": "aot_eager", "gradient_checkpointing": checkpointed}
    losses, weights, trainer = steps("debug_teacher", **how)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=0, msg=name)
    assert trainer.captioner.decoder._compiled_call_impl is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_train_the_same() -> None:
    def losses(compiled: bool) -> list[float]:
        student = tiny.make_student(1)
        trainer = cd.Distiller(tiny.make_teacher(), student, **QUIET, compile=compiled)
        given = [tiny.make_batch([2, 3]), tiny.make_batch([4, 1], first=2)]
        return [trainer.step(batch)["loss"] for batch in given]

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


def test_an_unknown_backend_is_named_with_those_that_exist() -> None:
    student = cd.Captioner.create("debug_student", tokenizer=tiny.TOKENIZER, weights=False)
    with pytest.raises(ConfigError, match=r"compile='eagre': .*Did you mean 'eager'"):
        cd.Trainer(student, **QUIET, compile="eagre")
    assert student.encoder._compiled_call_impl is None
