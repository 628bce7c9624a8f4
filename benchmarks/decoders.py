"""Training steps of the decoders side by side: folding, the two LSTM forms, and its backward pass.

    python benchmarks/decoders.py --images 16 --captions 5 --tokens 81

Each pair is timed in turn in one process, A B A B ..., forward and backward; the ratio is the
median of the pairs, so that a machine that changes speed does not change it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from capdistill.decoders import lstm
from capdistill.decoders.base import Decoder
from capdistill.decoders.lstm import LSTMDecoder
from capdistill.decoders.transformer import TransformerDecoder
from capdistill.runtime import autocast, pick_device, pick_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"images": 16, "captions": 5, "words": 18, "tokens": 81}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    device = pick_device()
    precision = pick_precision(device, options.precision)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, {vars(options)}")

    transformer = TransformerDecoder(512, layers=2, ffn=1024)
    recurrent = LSTMDecoder(512, layers=1, attention="recurrent")
    parallel = LSTMDecoder(512, layers=1, attention="parallel")
    two_layers = LSTMDecoder(256, layers=2, attention="parallel")
    for decoder in (transformer, recurrent, parallel, two_layers):
        decoder.build(options.vocabulary)
        decoder.to(device)
    folded = step(transformer, options, precision, repeat=False)
    repeated = step(transformer, options, precision, repeat=True)
    compare("transformer: features repeated a caption", repeated, "folded", folded, options.rounds)
    slow = step(recurrent, options, precision, repeat=False)
    fast = step(parallel, options, precision, repeat=False)
    compare("LSTM: recurrent attention", slow, "parallel attention", fast, options.rounds)
    if device.type == "cpu" and precision == "bf16":
        ours = step(two_layers, options, precision, repeat=False)
        compare("LSTM: by nn.LSTM", by_torch(ours), "by recurrence.py", ours, options.rounds)


def step(
    decoder: Decoder, options: argparse.Namespace, precision: str, repeat: bool
) -> Callable[[], None]:
    """Forward and backward over one batch; `repeat` copies the features once a caption."""
    device = next(decoder.parameters()).device
    rows = options.images * options.captions
    ids = torch.randint(options.vocabulary, (rows, options.words), device=device)
    features = torch.randn(options.images, options.tokens, decoder.dim, device=device)

    def run() -> None:
        seen = features.repeat_interleave(options.captions, 0) if repeat else features
        with autocast(device, precision):
            logits = decoder(ids, seen).logits
        logits.float().logsumexp(-1).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def by_torch(run: Callable[[], None]) -> Callable[[], None]:
    """The same step with the forward and backward pass of `nn.LSTM`."""

    def patched() -> None:
        with mock.patch.object(lstm, "suits", return_value=False):
            run()

    return patched


def compare(
    name_a: str, a: Callable[[], None], name_b: str, b: Callable[[], None], rounds: int
) -> None:
    """Time both in turn; print medians and the median of the pairwise ratios."""
    a(), b()
    pairs = [(seconds(a), seconds(b)) for _ in range(rounds)]
    slow, fast = (statistics.median(each) * 1000 for each in zip(*pairs, strict=True))
    ratio = statistics.median(x / y for x, y in pairs)
    print(f"{name_a} {slow:.0f} ms, {name_b} {fast:.0f} ms a step: {ratio:.2f} times faster")


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
