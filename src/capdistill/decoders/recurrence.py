"""An LSTM layer for training in bfloat16 on a CPU: `nn.LSTM` with a faster backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SOURCES = (torch.bfloat16, torch.float32)
_MIN_HIDDEN = 512  # `nn.LSTM` is as fast at 384, and twice as fast at 128


def suits(cell: nn.LSTM, x: Tensor) -> bool:
    """Whether `lstm_layer(x, h, c, cell)` does the same as the module's own call, and faster.

    It is faster for wide layers where gradients are computed in bfloat16 on a CPU. The module must
    be a plain `nn.LSTM` of one layer in one direction, without hooks. Neither B nor T decides: a
    batch that is cut or padded is computed in the same way.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if type(cell) is not nn.LSTM or "forward" in vars(cell):
        return False
    if any(getattr(cell, hooks) for hooks in _HOOKS) or not (cell.bias and cell.batch_first):
        return False
    if cell.hidden_size < _MIN_HIDDEN or cell.num_layers > 1:
        return False
    if cell.bidirectional or cell.proj_size:
        return False
    tensors = (x, *cell.all_weights[0])
    return compute_dtype(x) == torch.bfloat16 and all(
        tensor.device.type == "cpu" and tensor.dtype in _SOURCES for tensor in tensors
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of autocast on the CPU where it is on, else that of x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def lstm_layer(x: Tensor, h: Tensor, c: Tensor, cell: nn.LSTM) -> tuple[Tensor, Tensor, Tensor]:
    """All words through one layer, as `cell(x, (h[None], c[None]))`.

    One matrix product projects the inputs of all words, and the gradient of each weight matrix is
    one product over all words. Under autocast the products are in its dtype; the gates and the
    cell's state are float32.

    Example:
        >>> cell, x = nn.LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3)
        >>> out, h, c = lstm_layer(x, torch.zeros(2, 4), torch.zeros(2, 4), cell)
        >>> torch.allclose(out, cell(x)[0], atol=1e-6)
        True

    Args:
        x: (B, T, D) inputs.
        h: (B, H) output before the first word.
        c: (B, H) state of the cell before the first word.
        cell: One layer in one direction, with biases.

    Returns:
        The outputs (B, T, H), and h and c (B, H) after the last word.

    Raises:
        RuntimeError: the gradients are differentiated again, which is not supported.

    Source:
        Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000); the equations
        and the order of the gates are those of `nn.LSTM`.
    """
    dtype = compute_dtype(x)
    with torch.autocast("cpu", enabled=False):
        out, end = _Layer.apply(x, h, c, *cell.all_weights[0], dtype)
    return out, out[:, -1], end


class _Layer(torch.autograd.Function):
    """Inside, time is the first dimension, and the gates i, f, g, o stand side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        c: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = [each.dtype for each in (x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)]
        wide = torch.promote_types(dtype, torch.float32)  # of everything but matrix products
        (rows, length, _), size = x.shape, h.shape[1]
        weight_ih, weight_hh = weight_ih.to(dtype), weight_hh.to(dtype)
        bias = (bias_ih.to(wide) + bias_hh).to(dtype)
        x = x.transpose(0, 1).to(dtype).contiguous()  # (T, B, D)
        sums = torch.addmm(bias, x.flatten(0, 1), weight_ih.t()).view(length, rows, 4 * size)
        gates = torch.empty_like(sums, dtype=wide)  # (T, B, 4H)
        hs = x.new_empty(length + 1, rows, size)  # (T + 1, B, H)
        cs, squashed = torch.empty_like(hs, dtype=wide), torch.empty_like(hs[1:], dtype=wide)
        hs[0], cs[0] = h, c
        for t, gate in enumerate(gates):
            gate.copy_(sums[t].addmm_(hs[t], weight_hh.t()))
            i, f, g, o = gate.chunk(4, 1)
            g.mul_(2)  # tanh(a) = 2 sigmoid(2a) - 1: torch's tanh takes four times as long
            gate.sigmoid_()
            g.mul_(2).sub_(1)
            torch.mul(f, cs[t], out=cs[t + 1]).addcmul_(i, g)
            torch.mul(cs[t + 1], 2, out=squashed[t]).sigmoid_().mul_(2).sub_(1)
            torch.mul(o, squashed[t], out=hs[t + 1])
        ctx.save_for_backward(x, hs, cs, squashed, gates, weight_ih, weight_hh)
        return hs[1:].transpose(0, 1), cs[-1].to(dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_end: Tensor) -> tuple[Tensor | None, ...]:
        x, hs, cs, squashed, gates, weight_ih, weight_hh = ctx.saved_tensors
        need = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            d_sums, dh, dc, d_bias = _through_time(
                d_out.transpose(0, 1), d_end, weight_hh, (cs, squashed, gates)
            )
            d_sums = d_sums.flatten(0, 1)  # (T * B, 4H)
            d_x = (d_sums @ weight_ih).view_as(x).transpose(0, 1) if need[0] else None
            d_weight_ih = d_sums.t() @ x.flatten(0, 1) if need[3] else None
            d_weight_hh = d_sums.t() @ hs[:-1].flatten(0, 1) if need[4] else None
        grads = (d_x, dh, dc, d_weight_ih, d_weight_hh, d_bias, d_bias)
        cast = [None if d is None else d.to(to) for d, to in zip(grads, ctx.dtypes, strict=True)]
        return *cast, None  # none for the dtype


def _through_time(
    d_out: Tensor, d_end: Tensor, weight: Tensor, saved: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sums in the gates (T, B, 4H), of h and c (B, H), and of a bias (4H)."""
    cs, squashed, gates = saved
    through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input
    through_tanh = torch.ops.aten.tanh_backward.grad_input
    d_sums = torch.empty_like(gates, dtype=weight.dtype)
    d_gate, buffer = torch.empty_like(gates[0]), torch.empty_like(cs[0])
    di, df, dg, do = d_gate.chunk(4, 1)
    d_bias = d_gate.new_zeros(d_gate.shape[1])
    dh, dc = torch.zeros_like(buffer), d_end.to(cs.dtype, copy=True)
    for t in reversed(range(len(gates))):
        i, f, g, o = gates[t].chunk(4, 1)
        dh = dh.to(cs.dtype).add_(d_out[t])
        through_sigmoid(torch.mul(dh, squashed[t], out=buffer), o, grad_input=do)
        dc += through_tanh(dh.mul_(o), squashed[t], grad_input=buffer)
        through_sigmoid(torch.mul(dc, g, out=buffer), i, grad_input=di)
        through_sigmoid(torch.mul(dc, cs[t], out=buffer), f, grad_input=df)
        through_tanh(torch.mul(dc, i, out=buffer), g, grad_input=dg)
        dc *= f
        d_bias += d_gate.sum(0)
        dh = d_sums[t].copy_(d_gate) @ weight
    return d_sums, dh, dc, d_bias
