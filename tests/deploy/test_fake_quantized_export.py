"""Training with `quantize="int8"` computes what the 8-bit export computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

import capdistill as cd
from capdistill import Captioner
from capdistill.encoders.base import Encoder
from capdistill.fake_quantization import FakeQuantizer

SIDE, WIDTH = 32, 64


class Mobile(Encoder):
    """A stem and an inverted residual block: batch norms with and without a ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = self.token_dim = WIDTH
        self.tokens, self.grid, self.image_size = 16, (4, 4), SIDE
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 8, 8), nn.BatchNorm2d(24), nn.ReLU6())
        self.block = nn.Sequential(
            *(nn.Conv2d(24, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU6()),
            *(nn.Conv2d(96, 96, 3, padding=1, groups=96), nn.BatchNorm2d(96), nn.ReLU6()),
            *(nn.Conv2d(96, 24, 1, bias=False), nn.BatchNorm2d(24)),
        )
        self.last = nn.Sequential(nn.Conv2d(24, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU6())
        self.project = nn.Linear(WIDTH, WIDTH)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.2, 3.0)
            nn.init.normal_(norm.bias)
            norm.running_var.uniform_(0.05, 2.0)

    def trunk(self, images: Tensor) -> Tensor:
        maps = self.stem(self.normalise(images))
        return self.last(maps + self.block(maps)).flatten(2).transpose(1, 2)

    def head(self, tokens: Tensor) -> Tensor:
        return self.project(tokens)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        for part in (self.stem, self.block, self.last):
            yield from part.parameters()


def test_a_fake_quantized_captioner_computes_what_its_export_to_int8_computes(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"dim": WIDTH, "embed": WIDTH, "hidden": WIDTH, "layers": 1, "heads": 2}
    decoder = cd.decoders.create("lstm", **sizes)
    tokenizer = cd.WordTokenizer([f"word{n}" for n in range(80)])
    captioner = Captioner(Mobile(), decoder, tokenizer).eval()
    images = torch.randint(256, (8, 3, SIDE, SIDE), dtype=torch.uint8)
    quantizer = FakeQuantizer(captioner)
    quantizer.attach()
    with quantizer.calibrating():
        captioner.encode(images)
    quantizer.detach()
    assert captioner.activation_ranges  # so that export corrects no bias: training would have
    cd.deploy.export(captioner, tmp_path, quantize="int8", calibration=list(images), progress=False)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    encoder, step = (
        onnxruntime.InferenceSession(tmp_path / name, options)
        for name in ("encoder.onnx", "step.onnx")
    )
    feeds = dict(
        zip(
            [o.name for o in encoder.get_outputs()],
            encoder.run(None, {"images": images.numpy()}),
            strict=True,
        )
    )
    exported = {"mean": torch.from_numpy(feeds["image_mean"])}
    tokens = torch.full((8, 1), tokenizer.start_id)
    rows = {n: v[:, None] if n.startswith("state_") else v for n, v in feeds.items()}
    wanted = {each.name for each in step.get_inputs()}
    rows |= {"tokens": tokens.numpy(), "position": torch.tensor(0).numpy()}
    given = {n: v for n, v in rows.items() if n in wanted}
    exported["logits"] = torch.from_numpy(step.run(["logits"], given)[0])[:, 0]

    def computed() -> dict[str, Tensor]:
        with torch.no_grad():
            state = captioner.decoder.start(captioner.encode(images))
            logits, _ = captioner.decoder.step(tokens[:, 0], state)
        return {"mean": state.image["mean"], "logits": logits}

    exact = computed()
    quantizer.attach()
    fake = computed()
    for name, values in exported.items():
        lost = (exact[name] - values).square().mean().sqrt()
        differs = (fake[name] - values).square().mean().sqrt()
        assert differs < (0.5 if name == "mean" else 0.9) * lost  # logits: a recurrent layer
