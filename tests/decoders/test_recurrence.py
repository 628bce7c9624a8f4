"""The LSTM layer for training in bfloat16 against `nn.LSTM` and finite differences."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from capdistill.decoders import lstm
from capdistill.decoders.lstm import LSTMDecoder
from capdistill.decoders.recurrence import lstm_layer, suits

Call = Callable[..., tuple[Tensor, ...]]


def ours(cell: nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return lstm_layer(x, h, c, cell)


def torchs(cell: nn.LSTM, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    out, (h, c) = cell(x, (h[None], c[None]))
    return out, h[0], c[0]


def make(dim: int = 5, hidden: int = 6, rows: int = 3, length: int = 4) -> tuple[nn.LSTM, Any]:
    """A layer, and x, h and c that need gradients."""
    torch.manual_seed(0)
    shapes = (rows, length, dim), (rows, hidden), (rows, hidden)
    cell = nn.LSTM(dim, hidden, batch_first=True)
    return cell, [torch.randn(shape).requires_grad_() for shape in shapes]


def results(call: Call, cell: nn.LSTM, inputs: list[Tensor], bf16: bool = False) -> list[Tensor]:
    """out, h and c, and the gradients of all that needs one, of a random sum over the three."""
    generator = torch.Generator().manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs = call(cell, *inputs)
    factors = [torch.randn(each.shape, generator=generator).to(inputs[0]) for each in outputs]
    total = torch.stack([(o * f).sum() for o, f in zip(outputs, factors, strict=True)]).sum()
    needing = [each for each in (*inputs, *cell.parameters()) if each.requires_grad]
    return [*outputs, *torch.autograd.grad(total, needing)]


def doubled(cell: nn.LSTM, inputs: list[Tensor]) -> tuple[nn.LSTM, list[Tensor]]:
    twin = copy.deepcopy(cell).double()
    return twin, [each.detach().double().requires_grad_(each.requires_grad) for each in inputs]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_gradients_are_those_of_finite_differences(length: int) -> None:
    cell, inputs = doubled(*make(dim=3, hidden=4, rows=2, length=length))

    def call(*inputs_and_weights: Tensor) -> tuple[Tensor, ...]:
        return ours(cell, *inputs_and_weights[:3])  # gradcheck changes the weights in place

    assert torch.autograd.gradcheck(call, (*inputs, *cell.parameters()))


@pytest.mark.parametrize("length", [1, 7])
def test_it_is_torchs_layer_in_single_precision(length: int) -> None:
    cell, inputs = make(dim=24, hidden=32, rows=6, length=length)
    assert_close(results(ours, cell, inputs), results(torchs, cell, inputs), rtol=1e-4, atol=2e-6)


def test_inputs_may_lie_in_any_order() -> None:
    cell, (x, h, c) = make()
    turned = x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    state = torch.stack([h.detach(), c.detach()], 2).requires_grad_().unbind(2)
    assert not any(each.is_contiguous() for each in (turned, *state))
    assert_close(results(ours, cell, [turned, *state]), results(ours, cell, [x, h, c]))


def test_half_precision_is_as_exact_as_torchs() -> None:
    cell, inputs = make(dim=40, hidden=64, rows=16, length=9)
    exact = results(torchs, *doubled(cell, inputs))

    def errors(call: Call) -> list[float]:
        pairs = zip(results(call, cell, inputs, bf16=True), exact, strict=True)
        return [float((each.double() - wanted).norm().detach()) for each, wanted in pairs]

    for mine, other in zip(errors(ours), errors(torchs), strict=True):
        assert 0 < mine < 1.15 * other


def test_dtypes_are_those_of_torchs_layer() -> None:
    cell, inputs = make()
    got, wanted = (results(call, cell, inputs, bf16=True) for call in (ours, torchs))
    assert [each.dtype for each in got] == [each.dtype for each in wanted]
    assert got[0].dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_needs_no_gradient_changes_no_other(frozen: str) -> None:
    cell, inputs = make()
    (inputs[0] if frozen == "x" else cell).requires_grad_(False)
    assert_close(results(ours, cell, inputs), results(torchs, cell, inputs))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_output_has_its_gradient(which: int) -> None:
    cell, inputs = make()

    def gradients(call: Call) -> tuple[Tensor, ...]:
        total = call(cell, *inputs)[which].square().sum()
        return torch.autograd.grad(total, [*inputs, *cell.parameters()])

    assert_close(gradients(ours), gradients(torchs))


def test_second_derivatives_are_refused() -> None:
    cell, inputs = make()
    out = ours(cell, *inputs)[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    cell, inputs = make()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> int:
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.__getitem__):
        got = results(ours, cell, inputs, bf16=True)
    assert len(kept) >= 7
    assert_close(got, results(ours, cell, inputs, bf16=True), rtol=0, atol=0)


def test_backward_may_run_twice_and_under_autocast() -> None:
    cell, inputs = make()
    total = ours(cell, *inputs)[0].square().sum()
    wanted = [*inputs, *cell.parameters()]
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(total, wanted)
    assert_close(again, first, rtol=0, atol=0)


# -- where it is used -----------------------------------------------------------------------------


def suitable(cell: nn.LSTM, **changes: Any) -> bool:
    x = torch.zeros(2, 3, cell.input_size, dtype=changes.get("dtype", torch.float32))
    grad, bf16 = changes.get("grad", True), changes.get("bf16", True)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return suits(cell, x)


def layer(**options: Any) -> nn.LSTM:
    return nn.LSTM(2, 512, **{"batch_first": True, **options})


def test_it_is_used_for_wide_layers_trained_in_half_precision() -> None:
    assert suitable(layer())
    assert suitable(layer().bfloat16(), dtype=torch.bfloat16, bf16=False)
    for changes in ({"grad": False}, {"bf16": False}, {"dtype": torch.float64}):
        assert not suitable(layer(), **changes)
    assert not suitable(nn.LSTM(2, 256, batch_first=True))
    assert not suitable(layer().double())


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"bidirectional": True},
        {"proj_size": 3},
        {"bias": False},
        {"batch_first": False},
        {"device": "meta"},
    ],
)
def test_other_layers_keep_their_own_call(options: dict[str, Any]) -> None:
    assert not suitable(layer(**options))


def test_hooks_and_subclasses_keep_their_own_call() -> None:
    class Mine(nn.LSTM):
        pass

    assert not suitable(Mine(2, 512, batch_first=True))
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        cell = layer()
        handle = getattr(cell, register)(lambda *_: None)
        assert not suitable(cell)
        handle.remove()
        assert suitable(cell)


# -- in the decoder -------------------------------------------------------------------------------


def make_decoder(**options: Any) -> LSTMDecoder:
    torch.manual_seed(0)
    decoder = LSTMDecoder(8, embed=6, hidden=512, layers=2, heads=2, **options)
    decoder.build(11)
    return decoder.eval()


def read(decoder: LSTMDecoder, ids: Tensor, features: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(ids, features).logits
    return logits.float()


@pytest.fixture
def words() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (4, 5), generator=generator)
    return ids, torch.randn(2, 3, 8, generator=generator)


def test_the_decoder_trains_as_with_torchs_layers(
    words: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, calls = make_decoder(), []

    def counted(*given: Any) -> tuple[Tensor, ...]:
        calls.append(given)
        return lstm_layer(*given)

    def gradients() -> list[Tensor]:
        logits = read(decoder, *words)
        total = logits.logsumexp(-1).sum()
        return [logits.detach(), *torch.autograd.grad(total, decoder.parameters())]

    monkeypatch.setattr(lstm, "lstm_layer", counted)
    got = gradients()
    assert len(calls) == 2
    monkeypatch.setattr(lstm, "suits", lambda cell, x: False)
    for mine, other in zip(got, gradients(), strict=True):
        assert float((mine - other).norm()) <= 0.03 * float(other.norm()) + 1e-6
    assert len(calls) == 2


def test_the_recurrent_form_and_generation_do_not_use_it(
    words: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lstm, "lstm_layer", None)
    read(make_decoder(attention="recurrent"), *words)
    with torch.no_grad():
        read(make_decoder(), *words)


def test_padding_changes_no_word_before_it(words: tuple[Tensor, Tensor]) -> None:
    decoder, (ids, features) = make_decoder(), words
    longer = torch.cat([ids, torch.zeros_like(ids)], 1)
    assert_close(
        read(decoder, longer, features)[:, :5], read(decoder, ids, features), atol=2e-2, rtol=0
    )


def test_a_caption_does_not_depend_on_its_batch(words: tuple[Tensor, Tensor]) -> None:
    decoder, (ids, features) = make_decoder(), words
    alone = read(decoder, ids[2:], features[1:])
    assert_close(read(decoder, ids, features)[2:], alone, atol=2e-2, rtol=0)


def test_words_one_by_one_give_the_logits_of_training(words: tuple[Tensor, Tensor]) -> None:
    decoder, (ids, features) = make_decoder(), words
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        state, seen = decoder.start(features).expand(2), []
        for word in ids.unbind(1):
            logits, state = decoder.step(word, state)
            seen.append(logits.float())
    assert_close(torch.stack(seen, 1), read(decoder, ids, features), atol=2e-2, rtol=0)


def test_a_decoder_that_was_trained_can_be_copied_and_pickled(words: tuple[Tensor, Tensor]) -> None:
    decoder = make_decoder()
    read(decoder, *words).sum().backward()
    wanted = read(decoder, *words)
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert_close(read(twin, *words), wanted, rtol=0, atol=0)
    assert {"cells.0.weight_ih_l0", "cells.1.bias_hh_l0"} <= decoder.state_dict().keys()
