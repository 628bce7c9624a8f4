"""Captions a second, ours beside Hugging Face `generate` on a decoder of the same size.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/decoding.py --batches 1 8 32 --beams 1 3 5

The teacher's decoder is a Transformer (width 512, 3 layers), theirs a BART decoder of the same
width, layers, heads, inner width and vocabulary; the student's is an LSTM, theirs a BART decoder
with about as many parameters. Both are given visual tokens. Weights are random, and captions are
made to end, in both alike, at lengths drawn as those of real captions are (10 words, give or take
2.5); `--equal` lets all of them end at 10. Both run in turn, A B A B ..., in one process; the ratio
is the median of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import BartConfig, BartForConditionalGeneration, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from capdistill.decoders.base import Decoder, DecoderState
from capdistill.decoders.lstm import LSTMDecoder
from capdistill.decoders.transformer import TransformerDecoder
from capdistill.generation import GenerationConfig, GenerationSpec, generate
from capdistill.runtime import pick_device

PAD, START, END = range(3)
DIM = {"teacher": 512, "student": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in {"tokens": 50, "limit": 20, "vocabulary": 3000, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--equal", action="store_true", help="all captions have 10 words")
    parser.add_argument("--compile", action="store_true", help="torch.compile our step")
    options = parser.parse_args()
    device = pick_device()
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {vars(options)}"
    )
    print("decoder  batch  beams     ours captions/s   theirs   ratio")
    for role in DIM:
        ours, theirs = pair(role, options.vocabulary, device)
        if options.compile:
            ours.step = torch.compile(ours.step, dynamic=True)
        for images in options.batches:
            features = torch.randn(images, options.tokens, DIM[role], device=device)
            for beams in options.beams:
                report(role, images, beams, race(ours, theirs, features, beams, options))


def pair(
    role: str, vocabulary: int, device: torch.device
) -> tuple[Decoder, BartForConditionalGeneration]:
    """Our decoder and a BART decoder of the same size, in evaluation mode."""
    torch.manual_seed(0)
    if role == "teacher":
        ours: Decoder = TransformerDecoder(DIM[role], width=512, layers=3, heads=8, ffn=2048)
        shape = {"d_model": 512, "decoder_layers": 3, "decoder_ffn_dim": 2048}
    else:
        ours = LSTMDecoder(DIM[role], embed=256, hidden=512, layers=1)
        shape = {"d_model": 256, "decoder_layers": 3, "decoder_ffn_dim": 1024}
    ours.build(vocabulary)
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    ids |= {"decoder_start_token_id": START, "forced_eos_token_id": None}
    heads = {"decoder_attention_heads": 8, "encoder_layers": 1, "encoder_attention_heads": 8}
    theirs = BartForConditionalGeneration(
        BartConfig(vocab_size=vocabulary, **shape, **heads, **ids)
    )
    sizes = (sum(p.numel() for p in part.parameters()) for part in (ours, theirs.model.decoder))
    print("{}: {:,} parameters, theirs {:,}".format(role, *sizes))
    return ours.to(device).eval(), theirs.to(device).eval()


def race(
    ours: Decoder,
    theirs: BartForConditionalGeneration,
    features: torch.Tensor,
    beams: int,
    options: argparse.Namespace,
) -> list[tuple[float, float]]:
    """Seconds of ours and theirs, pair after pair."""
    lengths = real_lengths(len(features), options.equal, features.device)
    spec = GenerationSpec(
        START, END, options.limit, GenerationConfig(beam_size=beams), banned=(PAD, START)
    )
    ending = Ending(ours, lengths)

    def we() -> None:
        found = generate(ending, features, spec)
        assert [len(hypothesis.tokens) for hypothesis in found] == lengths.tolist()

    def they() -> None:
        with torch.no_grad():
            theirs.generate(
                encoder_outputs=BaseModelOutput(features),
                num_beams=beams,
                max_new_tokens=options.limit,
                do_sample=False,
                suppress_tokens=[PAD, START],
                logits_processor=[TheirEnding(lengths, beams)],
            )

    we(), they()
    return [(seconds(we), seconds(they)) for _ in range(options.rounds)]


def real_lengths(images: int, equal: bool, device: torch.device) -> torch.Tensor:
    drawn = 10 + 2.5 * torch.randn(images, generator=torch.Generator().manual_seed(1))
    return (torch.full((images,), 10) if equal else drawn.round().long().clamp(4, 18)).to(device)


class Ending(Decoder):
    """A decoder of ours whose captions end at the image's length; it goes with the image."""

    def __init__(self, decoder: Decoder, lengths: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.lengths, self.vocabulary = decoder, lengths, decoder.vocabulary

    def build_vocabulary(self, vocabulary: int) -> None:
        raise NotImplementedError

    def forward(self, *_: object) -> None:
        raise NotImplementedError

    def start(self, features: torch.Tensor) -> DecoderState:
        state = self.inner.start(features)
        return replace(state, image={**state.image, "length": self.lengths})

    def step(self, tokens: torch.Tensor, state: DecoderState) -> tuple[torch.Tensor, DecoderState]:
        due = state.image["length"].repeat_interleave(state.beams) == state.position
        logits, after = self.inner.step(tokens, state)
        logits[:, END] = torch.where(due, 50.0, -50.0)
        return logits, after


class TheirEnding(LogitsProcessor):
    def __init__(self, lengths: torch.Tensor, beams: int) -> None:
        self.lengths = lengths.repeat_interleave(beams)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        due = self.lengths == input_ids.shape[1] - 1
        scores[:, END] = torch.where(due, 0.0, -1e4)
        scores[:, END + 1 :] -= 1e4 * due[:, None]
        return scores


def seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def report(role: str, images: int, beams: int, times: list[tuple[float, float]]) -> None:
    ours, theirs = (images / statistics.median(each) for each in zip(*times, strict=True))
    ratio = statistics.median(they / we for we, they in times)
    print(f"{role:8} {images:5} {beams:6} {ours:19.1f} {theirs:8.1f} {ratio:7.2f}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
