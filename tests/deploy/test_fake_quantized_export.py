"""Training with `quantize="int8"` computes what the 8-bit export computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import capdistill as cd
from capdistill import Captioner
from capdistill.deploy.convolutions import quantize_convolutions
from capdistill.deploy.quantize import Calibration
from capdistill.encoders.base import Encoder
from capdistill.errors import ConfigError
from capdistill.fake_quantization import FakeQuantizer
from capdistill.int8 import scale_and_zero

SIDE, WIDTH = 32, 64
TOKENIZER = cd.WordTokenizer([f"word{n}" for n in range(80)])


class NormSwish(nn.BatchNorm2d):
    """A batch norm with an activation inside, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Mobile(Encoder):
    """A stem and two residual blocks: batch norms with and without an activation.

    The input of the first block is read by its sum, and that of the second by its sum as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim = self.token_dim = WIDTH
        self.tokens, self.grid, self.image_size = 16, (4, 4), SIDE
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.ReLU6())
        self.narrow = nn.Sequential(nn.Conv2d(24, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.blocks = nn.ModuleList(self.block(act) for act in (True, False))
        self.last = nn.Sequential(nn.Conv2d(24, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU6())
        self.project = nn.Linear(WIDTH, WIDTH)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.2, 3.0)
            nn.init.normal_(norm.bias)
            norm.running_var.uniform_(0.05, 2.0)

    def block(self, clips: bool) -> nn.Module:
        swish = [NormSwish(96)]
        return nn.Sequential(
            *(nn.Conv2d(24, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
            nn.Conv2d(96, 96, 3, padding=1, groups=96),
            *([nn.BatchNorm2d(96), nn.ReLU6(inplace=True)] if clips else swish),
            *(nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24)),
        )

    def trunk(self, images: Tensor) -> Tensor:
        maps = self.narrow(self.stem(self.normalise(images)))
        for block in self.blocks:
            maps = maps + block(maps)
        return self.last(maps).flatten(2).transpose(1, 2)

    def head(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        yield from (p for name, p in self.named_parameters() if not name.startswith("project"))


def mobile() -> Captioner:
    torch.manual_seed(0)
    sizes = {"dim": WIDTH, "embed": WIDTH, "hidden": WIDTH, "layers": 2, "heads": 2}
    return Captioner(Mobile(), cd.decoders.create("lstm", **sizes), TOKENIZER).eval()


def calibrated(captioner: Captioner) -> tuple[FakeQuantizer, Tensor]:
    """A quantizer with the ranges of some images, and these images."""
    images = torch.randint(256, (8, 3, captioner.image_size, captioner.image_size))
    quantizer = FakeQuantizer(captioner)
    quantizer.attach()
    with quantizer.calibrating():
        captioner.encode(images.byte())
    return quantizer, images.byte()


Values = dict[str, Tensor]


@torch.no_grad()
def first_state(captioner: Captioner, images: Tensor) -> Values:
    """What torch computes of images."""
    state = captioner.decoder.start(captioner.encode(images))
    rows = {f"state_{name}": value for name, value in state.row.items()}
    return {f"image_{name}": value for name, value in state.image.items()} | rows


@torch.no_grad()
def first_word(captioner: Captioner, images: Tensor) -> Values:
    """What torch computes then."""
    state = captioner.decoder.start(captioner.encode(images))
    tokens = torch.full((len(images),), TOKENIZER.start_id)
    logits, after = captioner.decoder.step(tokens, state)
    rows = {f"next_state_{n}": value for n, value in after.row.items() if n in state.row}
    return rows | {"logits": logits}


def run(path: Path, feeds: Values) -> Values:
    session = onnxruntime.InferenceSession(path)
    wanted = {each.name for each in session.get_inputs()}
    made = session.run(None, {k: v.numpy() for k, v in feeds.items() if k in wanted})
    names = [each.name for each in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, made, strict=True)}


def exported_word(directory: Path, state: Values) -> Values:
    """What step.onnx computes after a state."""
    count = len(next(iter(state.values())))
    feeds = {k: v[:, None] if k.startswith("state_") else v for k, v in state.items()}
    feeds |= {"tokens": torch.full((count, 1), TOKENIZER.start_id), "position": torch.tensor(0)}
    made = run(directory / "step.onnx", feeds)
    return {name: value[:, 0] for name, value in made.items() if "cache" not in name}


def preset(name: str) -> Captioner:
    torch.manual_seed(0)
    return cd.Captioner.create(name, tokenizer=TOKENIZER, weights=False).eval()


def require_same_rounding(exported: Values, fake: Values, exact: Values, share: float) -> None:
    """Most of the rounding error is the same one."""
    for key, values in exact.items():
        lost, differs = (
            (each[key] - exported[key]).square().mean().sqrt() for each in (exact, fake)
        )
        assert lost > 0.001 * values.square().mean().sqrt(), key
        assert differs < share * lost, key


SLOW = [pytest.param(f"debug_{name}", marks=pytest.mark.slow) for name in ("student", "teacher")]


@pytest.mark.parametrize("name", ["mobile", *SLOW])
def test_a_fake_quantized_captioner_computes_what_its_export_to_int8_computes(
    name: str, tmp_path: Path
) -> None:
    """Values between two steps may be rounded either way, and one changes many in the next layer.

    Of one layer more than 99 % are the same.
    """
    captioner = mobile() if name == "mobile" else preset(name)
    quantizer, images = calibrated(captioner)
    state, word = first_state(captioner, images), first_word(captioner, images)
    quantizer.detach()
    cd.deploy.export(captioner, tmp_path, quantize="int8", progress=False)
    exact = first_state(captioner, images)
    exported = run(tmp_path / "encoder.onnx", {"images": images})
    require_same_rounding(exported, state, exact, 0.5)
    exported = exported_word(tmp_path, exported | state)  # with what the first step makes
    require_same_rounding(exported, word, first_word(captioner, images), 0.05)


def test_an_export_takes_the_ranges_of_training_or_those_of_given_images(tmp_path: Path) -> None:
    captioner = mobile()
    quantizer, images = calibrated(captioner)
    quantizer.detach()
    ranges = captioner.activation_ranges or {}
    ranges["encoder.last.0.output"] = (0.0, 4.5)
    cd.deploy.export(captioner, tmp_path, progress=False)

    def output_step(calibration: list[Tensor] | None = None) -> tuple[float, int]:
        found, made = Calibration.of(captioner, calibration), tmp_path / "made.onnx"
        how = found.images, found.correct_biases, found.ranges
        quantize_convolutions(tmp_path / "encoder.onnx", made, *how)
        graph = onnx.load(made).graph
        kept = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        conv = next(n for n in graph.node if n.op_type == "Conv" and "last.0" in n.input[1])
        scale, zero = (kept[f"{conv.output[0]}_{name}"] for name in ("scale", "zero_point"))
        return scale.item(), zero.item()

    scale, zero = scale_and_zero(torch.tensor([[0.0, 4.5]]))
    assert output_step() == (scale.item(), zero.item())
    assert output_step([*images])[0] == pytest.approx(6 / 255, rel=0.02)  # ReLU6 is reached
    del ranges["encoder.last.0.output"]
    with pytest.raises(ConfigError, match=r"no range for encoder\.last\.0\.output.*calibration="):
        output_step()
    captioner.activation_ranges = None
    with pytest.raises(ConfigError, match="needs images"):
        Calibration.of(captioner, None)


def test_a_captioner_is_exported_in_the_middle_of_its_training(tmp_path: Path) -> None:
    captioner = mobile()
    quantizer, images = calibrated(captioner)
    cd.deploy.export(captioner, tmp_path, progress=False)
    rounded = first_state(captioner, images)["image_mean"]
    quantizer.detach()
    exported = run(tmp_path / "encoder.onnx", {"images": images})["image_mean"]
    exact = first_state(captioner, images)["image_mean"]
    torch.testing.assert_close(exported, exact, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rounded, exact, rtol=1e-3, atol=1e-3)
