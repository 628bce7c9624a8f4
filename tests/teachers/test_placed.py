"""Teachers whose weights `device_map` has put elsewhere: loaded part by part, while a part runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import capdistill as cd
from capdistill.errors import ConfigError
from capdistill.outputs import Batch, CaptionerOutput
from tests.training import tiny_models as tiny

QUIET = {**tiny.QUIET, "augment": False, "batch_size": 2, "num_workers": 0}


class Large(nn.Module):
    """A captioner as in other libraries: every weight is read by the forward pass of its part."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        words = len(tiny.TOKENIZER.vocabulary)
        self.vision = nn.Linear(3 * tiny.SIDE**2, 6)
        self.text, self.head = nn.Embedding(words, 6), nn.Linear(6, words)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        seen = self.vision(images.flatten(1) / 255)
        shown = seen.repeat_interleave(len(ids) // len(images), 0)[:, None]
        return self.head(torch.tanh(self.text(ids) + shown))  # type: ignore[no-any-return]


def adapt(module: Any, batch: Batch) -> CaptionerOutput:
    return CaptionerOutput(logits=module(batch.images, batch.inputs), mask=batch.target_mask)


class Offload:
    """What accelerate attaches to a part: its weights are elsewhere unless it runs."""

    def __init__(self, part: nn.Module) -> None:
        self.weights_map = {name: value.detach() for name, value in part.named_parameters()}
        part._hf_hook = self  # type: ignore[assignment]
        part.register_forward_pre_hook(lambda part, _: self.put(part, None))
        part.register_forward_hook(lambda part, *_: self.put(part, "meta"))
        self.put(part, "meta")

    def put(self, part: nn.Module, device: str | None) -> None:
        for name, value in self.weights_map.items():
            setattr(part, name, nn.Parameter(value.to(device), requires_grad=False))


def stand_in(model: nn.Module, folder: Path) -> None:
    for part in model.modules():
        if next(part.parameters(recurse=False), None) is not None:
            Offload(part)


def accelerate(model: nn.Module, folder: Path) -> None:
    library = pytest.importorskip("accelerate")
    library.disk_offload(model, folder / "offload", execution_device=torch.device("cpu"))


@pytest.fixture(params=[stand_in, accelerate])
def offload(request: pytest.FixtureRequest) -> Any:
    return request.param


def large(seed: int = 1) -> Any:
    return cd.teachers.wrap(Large(seed), adapt, tiny.TOKENIZER, image_size=tiny.SIDE)


def distil(teacher: Any, folder: Path, data: Any) -> tuple[list[float], str]:
    """The losses of a run, and what its state says of the teacher."""
    trainer = cd.Distiller(teacher, tiny.make_student(), {"token": "token"}, **QUIET)
    assert trainer.check(data).ok
    losses = [row["loss"] for row in trainer.fit(data, epochs=2).steps]
    return losses, trainer.state_dict()["identity"]["teacher 1"]


def targets(teacher: Any, folder: Path, data: Any) -> tuple[Any, str]:
    how: dict[str, Any] = {**tiny.QUIET, "top_k": 7, "min_mass": 0.1, "image_size": tiny.SIDE}
    cached = cd.teachers.cache(teacher, data, folder, **how)
    return cached.store.array("logits").tolist(), cached.store.content["about"][
        "weights of the teacher"
    ]


@pytest.mark.parametrize("use", [distil, targets])
def test_an_offloaded_teacher_is_used_as_one_in_memory(
    offload: Any, use: Any, tmp_path: Path
) -> None:
    data = cd.data.sample().train.subset(4)
    found = []
    for number, (seed, away) in enumerate([(1, False), (1, True), (2, True)]):
        teacher, folder = large(seed), tmp_path / str(number)
        folder.mkdir()
        if away:
            offload(teacher.module, folder)
        found.append(use(teacher, folder / "out", data))
        assert all(value.is_meta == away for value in teacher.parameters())
    assert found[0] == found[1]  # values, and the key that tells one teacher from another
    assert found[1][1] != found[2][1]


def test_a_captioner_of_ours_is_refused_if_its_weights_are_elsewhere(
    offload: Any, tmp_path: Path
) -> None:
    teacher = tiny.make_teacher()
    offload(teacher.decoder, tmp_path)
    image = torch.zeros(3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
    data = cd.data.sample().train.subset(2)
    for use in (
        lambda: cd.Distiller(teacher, tiny.make_student(), {"token": "token"}, **QUIET),
        lambda: cd.Distiller({"a": teacher}, tiny.make_student(), {"token": "token"}, **QUIET),
        lambda: teacher.caption(image),
        lambda: teacher.save(tmp_path / "saved", allow_unregistered=True),
        lambda: cd.teachers.cache(teacher, data, tmp_path / "targets", **tiny.QUIET),
    ):
        with pytest.raises(ConfigError, match=r"'teacher': weights such as decoder\S+ lie on"):
            use()
