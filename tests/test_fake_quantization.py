"""Fake quantization against its formulas, and against a captioner whose weights are rounded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import capdistill as cd
from capdistill import Captioner, int8
from capdistill.errors import CheckpointError, ConfigError
from capdistill.fake_quantization import MOMENTUM, FakeQuantizer, release
from capdistill.int8 import round_activation, round_rows, round_weight, scale_and_zero
from tests.training import tiny_models as tiny


@pytest.fixture(autouse=True)
def small_matrices_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "LEAST", 1)


SHAPES = st.sampled_from([(1, 1), (4, 3), (3, 2, 3, 3), (5, 1, 3)])


def random(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=chance, dtype=torch.float64) * scale


def rounded_by_formula(weight: Tensor) -> Tensor:
    """q = round(w / s), s = max|w| / 127 of each row, in float64; s is stored as float32."""
    rows = []
    for row in weight.unbind():
        scale = (row.abs().max() / 127).float().double()
        rows.append(row if not scale else (row / scale).round().clamp(-127, 127) * scale)
    return torch.stack(rows)


@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e5]))
def test_weights_are_rounded_by_the_formula(shape, seed, scale):
    weight = random(shape, seed, scale)
    weight[0] = 0.0  # a dead channel
    assert_close(round_weight(weight), rounded_by_formula(weight), rtol=1e-6, atol=0)


def test_the_gradient_of_a_rounded_weight_passes_straight_through():
    weight = random((4, 3), 0).float().requires_grad_()
    upstream = random((4, 3), 1).float()
    round_weight(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(-5, 3), width=st.floats(0.01, 9), seed=st.integers(0, 99))
def test_activations_are_rounded_by_the_formula_and_clipped_without_gradient(low, width, seed):
    ranges = torch.tensor([[low, low + width]])
    x = random((50,), seed, 4.0).float().requires_grad_()
    scale, zero = (each[0] for each in scale_and_zero(ranges))
    out = round_activation(x, scale, zero)
    out.sum().backward()
    step, first = scale.double(), int(zero)
    lowest, highest = min(low, 0.0), max(low + width, 0.0)
    assert float(step) == pytest.approx((highest - lowest) / 255, rel=1e-6)
    assert first == pytest.approx(-lowest / float(step), abs=0.51)
    number = (x.detach() * (1 / scale)).double().round() + first
    expected = (number.clamp(0, 255) - first) * step
    assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x.grad != 0, (number >= 0) & (number <= 255))
    assert round_activation(torch.zeros(1), scale, zero) == 0  # padding stays exact


def test_values_in_bfloat16_are_rounded_as_in_float32():
    scale, zero = (each[0] for each in scale_and_zero(torch.tensor([[-1.0, 3.0]])))
    x = random((200,), 0).bfloat16()
    wide = round_activation(x.float(), scale, zero).bfloat16()
    assert torch.equal(round_activation(x, scale, zero), wide)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rows=st.integers(1, 4))
def test_a_row_is_rounded_by_itself(seed, rows):
    x = random((2, rows, 5), seed).float()
    alone = torch.stack([torch.cat([round_rows(row[None]) for row in each]) for each in x])
    assert torch.equal(round_rows(x), alone)
    assert_close(round_rows(x).view(-1, 5), rounded_by_formula(x.double().view(-1, 5)).float())


def test_rounding_before_a_batch_norm_is_folded_equals_rounding_after():
    """What an export folds, it rounds afterwards; a channel's factor changes only its scale."""
    conv = nn.Conv2d(3, 6, 3, bias=False).double()
    norm = nn.BatchNorm2d(6).double().eval()
    for name, seed in (("weight", 1), ("bias", 2), ("running_mean", 3)):
        getattr(norm, name).data.copy_(random((6,), seed))
    norm.running_var.copy_(random((6,), 4).square() + 0.1)
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    x = random((2, 3, 8, 8), 5)
    trained = norm(F.conv2d(x, round_weight(conv.weight)))
    shift = norm.bias - norm.running_mean * factor.flatten()
    assert_close(
        trained, F.conv2d(x, round_weight(conv.weight * factor), shift), rtol=1e-5, atol=1e-7
    )


# -- a captioner -------------------------------------------------------------------------------


def lstm(**options: Any) -> Captioner:
    torch.manual_seed(3)
    sizes = {"dim": 6, "embed": 6, "hidden": 8, "heads": 2, "dropout": 0.0}
    decoder = cd.decoders.create("lstm", **{**sizes, **options})
    return Captioner(tiny.Patches(mix=True), decoder, tiny.TOKENIZER)


CAPTIONERS: dict[str, Callable[[], Captioner]] = {
    "parallel": lambda: lstm(layers=2),
    "recurrent": lambda: lstm(layers=1, attention="recurrent"),
    "untied": lambda: lstm(layers=1, tied=False),
    "transformer": tiny.make_teacher,
}


def with_rounded_weights(captioner: Captioner) -> Captioner:
    """A copy whose matrices are rounded: biases and norms have one axis."""
    again = copy.deepcopy(captioner)
    for name, parameter in again.named_parameters():
        if parameter.ndim > 1 and name != "encoder.conv.weight":  # which reads pixels
            parameter.data.copy_(round_weight(parameter.data))
    return again


def attached(captioner: Captioner) -> FakeQuantizer:
    quantizer = FakeQuantizer(captioner)
    quantizer.attach()
    return quantizer


def rows_by_hand(x: Tensor) -> Tensor:
    """The gradient passes straight through."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return x + ((x / scale).round() * scale - x).detach()


class Rows(nn.Module):
    """A linear layer whose input is rounded by hand."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(rows_by_hand(x))


class RowsLSTM(nn.LSTM):
    """One whose input is rounded by hand; the state before, too, where it reads one word."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        h, c = state
        return super().forward(rows_by_hand(x), (rows_by_hand(h) if x.shape[1] == 1 else h, c))


def rounding_by_hand(captioner: Captioner) -> Captioner:
    again = with_rounded_weights(captioner)
    decoder: Any = again.decoder
    for name, part in list(again.named_modules()):
        if isinstance(part, nn.Linear):
            again.set_submodule(name, Rows(part))
        elif isinstance(part, nn.LSTM):
            part.__class__ = RowsLSTM
    decoder.score = lambda x: F.linear(rows_by_hand(decoder.drop(x)), *decoder.output_layer())
    return again


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_a_captioner_computes_with_rounded_values_and_learns_as_if_they_were_its_own(kind):
    captioner = CAPTIONERS[kind]()
    rounded, batch = rounding_by_hand(captioner), tiny.make_batch([3, 4])
    attached(captioner)
    outputs = [each(batch).logits for each in (captioner, rounded)]
    assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for logits in outputs:
        logits.square().sum().backward()
    for (name, mine), theirs in zip(
        captioner.named_parameters(), rounded.parameters(), strict=True
    ):
        assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    found = [each.eval().generate(batch, beam_size=2) for each in (captioner, rounded)]
    for mine, theirs in zip(*found, strict=True):  # the decoder word by word
        assert mine.tokens == theirs.tokens
        assert mine.log_prob == pytest.approx(theirs.log_prob, rel=1e-3)


def test_activations_are_rounded_to_the_ranges_of_the_calibration():
    captioner = tiny.make_student(mix=True).eval()
    encoder, images = captioner.encoder, tiny.make_batch([2, 2]).images
    quantizer = attached(captioner)
    with quantizer.calibrating():
        captioner.encode(images)

    def rounded(x: Tensor, ranges: tuple[float, float]) -> Tensor:
        scale, zero = scale_and_zero(torch.tensor([ranges]))
        return round_activation(x, scale[0], zero[0])

    with torch.no_grad():
        weight, bias = round_weight(encoder.mix.weight), encoder.mix.bias
        maps = F.conv2d(encoder.normalise(images), encoder.conv.weight, encoder.conv.bias, 4)
        mixed = F.conv2d(maps, weight, bias)
        ranges = {
            name: (x.min().item(), x.max().item())
            for name, x in (("encoder.mix", maps), ("encoder.mix.output", mixed))
        }
        assert {n: pytest.approx(r) for n, r in ranges.items()} == captioner.activation_ranges
        inputs, outputs = captioner.activation_ranges.values()
        mixed = rounded(F.conv2d(rounded(maps, inputs), weight, bias), outputs)
        tokens = round_rows(mixed.flatten(2).transpose(1, 2))
        expected = F.linear(tokens, round_weight(encoder.project.weight), encoder.project.bias)
        assert_close(captioner.encode(images), expected)


def test_outputs_are_rounded_where_no_convolution_reads_them():
    student = cd.Captioner.create("debug_student", tokenizer=tiny.TOKENIZER, weights=False)
    quantizer = FakeQuantizer(student)
    outputs = {name for name in quantizer.names if name.endswith(".output")}
    inputs = set(quantizer.names) - outputs
    assert "encoder.backbone.conv_stem" not in inputs
    assert outputs
    assert len(inputs) == sum(isinstance(m, nn.Conv2d) for m in student.encoder.modules()) - 1


@pytest.mark.parametrize("trained", [True, False])
def test_an_update_moves_the_range_of_a_trained_layer_and_sets_that_of_a_frozen_one_once(trained):
    quantizer, found = FakeQuantizer(tiny.make_student(trainable=trained, mix=True)), []
    for low, high in [(-1.0, 2.0), (-3.0, 1.0), (torch.nan, torch.inf)]:  # the last went wrong
        quantizer.seen = {0: torch.tensor([-low, high])}
        quantizer.update()
        found.append(quantizer.as_data()["encoder.mix"])
    moved = tuple(MOMENTUM * a + (1 - MOMENTUM) * b for a, b in ((-1.0, -3.0), (2.0, 1.0)))
    assert found[0] == (-1.0, 2.0)
    assert found[1] == pytest.approx(moved if trained else (-1.0, 2.0))
    assert found[2] == found[1]


def test_detached_nothing_is_left_even_after_an_error():
    captioner = lstm(layers=1).eval()
    parts = [(part, {**vars(part)}) for part in captioner.modules()]
    batch, keys = tiny.make_batch([3, 4]), list(captioner.state_dict())
    expected, quantizer = captioner(batch).logits, attached(captioner)
    assert not torch.equal(captioner(batch).logits, expected)
    assert list(captioner.state_dict()) == keys
    with pytest.raises(RuntimeError):
        captioner.decoder(batch.inputs, torch.zeros(2, 4, 7))
    with pytest.raises(RuntimeError):
        captioner.encoder.project(torch.zeros(2, 4))
    quantizer.detach()
    assert torch.equal(captioner(batch).logits, expected)
    for part, attributes in parts:
        ignored = {"_keys", "variant"}
        assert {**vars(part)}.keys() - ignored == attributes.keys() - ignored, part
    assert captioner.encoder.variant == ""


def test_a_copy_rounds_by_itself_and_a_second_quantizer_takes_over():
    captioner = lstm(layers=1).eval()
    exact, batch = copy.deepcopy(captioner), tiny.make_batch([3, 4])
    attached(captioner)
    again = copy.deepcopy(captioner)
    assert torch.equal(again(batch).logits, captioner(batch).logits)
    with torch.no_grad():
        captioner.decoder.embedding.weight.zero_()
    assert again(batch).logits.abs().sum() > 0
    second = attached(again)
    release(captioner)
    expected = rounding_by_hand(exact)(batch).logits
    assert_close(again(batch).logits, expected, rtol=1e-4, atol=1e-4)
    second.detach()
    assert torch.equal(again(batch).logits, exact(batch).logits)


def test_ranges_are_saved_with_the_captioner_and_damage_is_named(tmp_path):
    student = cd.Captioner.create("debug_student", tokenizer=tiny.TOKENIZER, weights=False)
    student.activation_ranges = {"encoder.backbone.conv_stem": (-2.1, 2.6)}
    attached(student)
    student.save(tmp_path)
    loaded = Captioner.load(tmp_path)
    assert loaded.activation_ranges == student.activation_ranges
    assert tiny.same_bits(loaded.state_dict(), student.state_dict())
    path = tmp_path / "captioner.json"
    content = json.loads(path.read_text())
    for wrong in ([1, 2], {"a": [2.0, 1.0]}, {"a": ["1", "2"]}, {"a": [1.0]}, {"a": 1}):
        path.write_text(json.dumps({**content, "activation_ranges": wrong}))
        with pytest.raises(CheckpointError, match="activation_ranges"):
            Captioner.load(tmp_path)


def test_a_layer_that_cannot_be_rounded_is_refused_with_the_reason():
    captioner = tiny.make_student()
    nn.utils.parametrizations.weight_norm(captioner.encoder.project)
    with pytest.raises(ConfigError, match=r"encoder\.project\.weight .*parametrized"):
        FakeQuantizer(captioner)


def test_matrices_that_an_export_leaves_in_float32_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captioner = lstm(layers=1)
    matrices = {n: p.numel() for n, p in captioner.decoder.named_parameters() if p.ndim > 1}
    monkeypatch.setattr(int8, "LEAST", max(matrices.values()))
    rounded = {
        f"{layer.name}.{name}"
        for layer in FakeQuantizer(captioner)._layers
        for name in layer.weights
    }
    largest = {f"decoder.{n}" for n, count in matrices.items() if count == int8.LEAST}
    assert {name for name in rounded if name.startswith("decoder.")} == largest
    assert "encoder.mix.weight" in rounded  # a convolution of any size


class Block(nn.Module):
    """Convolutions with all that an output can be read by."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.mean = 8, (0.5, 0.5, 0.5)
        self.first, self.alone, self.summed = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.changed, self.twice, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.norm, self.clip = nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.shared = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        x = self.alone(self.first(images.float()))
        x = self.clip(self.norm(self.summed(x)))
        y = F.silu(self.changed(x), inplace=True) + x
        return self.last(self.shared(self.twice(self.shared(y))))


def test_outputs_are_rounded_that_something_else_than_a_convolution_reads():
    block = Block()
    names = {module: name for name, module in block.named_modules()}
    first, ends, sources = int8.find_ends(block)
    assert names[first] == "first"
    found = {names[conv]: names[end.module] for conv, end in ends.items() if conv is not first}
    assert found == {"summed": "clip", "changed": "changed", "last": "last"}
    assert {names[a]: names[b] for a, b in sources.items()} == {"changed": "summed"}
