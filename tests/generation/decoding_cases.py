"""Toy decoders, tiny real ones, and decoding written out in loops, as oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from capdistill.decoders import Decoder
from capdistill.decoders.base import DecoderState
from capdistill.decoders.lstm import LSTMDecoder
from capdistill.decoders.transformer import TransformerDecoder
from capdistill.generation import GenerationConfig, GenerationSpec, Hypothesis, generate
from capdistill.outputs import DecoderOutput

PAD, START, END, A, B = range(5)
VOCABULARY, LIMIT = 9, 8


class Toy(Decoder):
    """Says what a table says; an image is a number that the table may look at.

    `rows_seen` holds how many rows each step was given.
    """

    dim, hidden_dims, has_attention = 1, (), False

    def __init__(self, table: Callable[[int, float], Sequence[float]]) -> None:
        super().__init__()
        self.table, self.rows_seen = table, []
        self.build(5)

    def build_vocabulary(self, vocabulary: int) -> None:
        self.unused = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, input_ids, features, need=frozenset()) -> DecoderOutput:
        raise NotImplementedError

    def start(self, features: Tensor) -> DecoderState:
        return DecoderState({"number": features[:, 0, 0]}, {})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        self.rows_seen.append(len(tokens))
        said = [self.table(state.position, float(n)) for n in state.image["number"]]
        after = DecoderState(state.image, {}, state.beams, state.position + 1)
        logits = torch.tensor(said, dtype=torch.float64).log()
        return logits.repeat_interleave(state.beams, 0), after


def decoder_a(position: int, _: float) -> Sequence[float]:
    """A of case 12: nothing ever ends."""
    return (0, 0, 0, 0.6, 0.4)


def decoder_b(position: int, _: float) -> Sequence[float]:
    """B of case 12: the empty caption has the largest probability."""
    if position == 0:
        return (0, 0, 0.4, 0.6, 0)
    return (0, 0, 0, 0.8, 0.2) if position < 4 else (0, 0, 0.95, 0, 0.05)


def ends_after(position: int, number: float) -> Sequence[float]:
    """As many words as the number says, then the end."""
    return (0, 0, 0.9, 0.1, 0) if position >= number else (0, 0, 0, 0.7, 0.3)


def run_toy(table, max_length: int, numbers: Sequence[float] = (0.0,), **options):
    toy = table if isinstance(table, Toy) else Toy(table)
    features = torch.tensor(numbers, dtype=torch.float64).view(-1, 1, 1)
    return generate(
        toy, features, GenerationSpec(START, END, max_length, GenerationConfig(**options))
    )


FORMS = {
    "parallel": (LSTMDecoder, {"embed": 6, "hidden": 8, "layers": 2, "heads": 2}),
    "recurrent": (
        LSTMDecoder,
        {"embed": 6, "hidden": 8, "layers": 1, "heads": 2, "attention": "recurrent"},
    ),
    "transformer": (TransformerDecoder, {"width": 12, "layers": 2, "heads": 2, "ffn": 16}),
}


def real(form: str, seed: int, vocabulary: int = VOCABULARY) -> Decoder:
    """A decoder whose captions end after some words, or not at all."""
    torch.manual_seed(seed)
    cls, options = FORMS[form]
    decoder = cls(4, **options)
    decoder.build(vocabulary)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2.0)  # so that what is said depends on the picture
    return decoder.double().eval()


def pictures(images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(images, 3, 4, dtype=torch.float64, generator=generator)


@lru_cache(maxsize=2000)
@torch.no_grad()
def next_log_probs(decoder: Decoder, picture: Tensor, said: tuple[int, ...]) -> list[float]:
    """V of them, after a start and some words, by a full forward."""
    ids = torch.tensor([[START, *said]])
    return decoder(ids, picture[None]).logits[0, -1].log_softmax(-1).tolist()


def divisor(config: GenerationConfig, length: int) -> float:
    forms = {
        "none": lambda: 1.0,
        "average": lambda: length**config.length_penalty,
        "gnmt": lambda: ((5 + length) / 6) ** config.length_penalty,
    }
    return forms[config.length_normalisation]()


def every_hypothesis(
    decoder: Decoder, picture: Tensor, spec: GenerationSpec, vocabulary: int
) -> Iterator[Hypothesis]:
    """All captions there are, shorter ones first: the oracle of oracles."""
    words = [i for i in range(vocabulary) if i != spec.end_id and i not in spec.banned]
    for length in range(spec.max_length + 1):
        for said in itertools.product(words, repeat=length):
            ids = [*said, spec.end_id] if length < spec.max_length else [*said]
            each = [
                next_log_probs(decoder, picture, tuple(ids[:i]))[token]
                for i, token in enumerate(ids)
            ]
            total = sum(each)
            score = total / divisor(spec.config, len(ids))
            ended = length < spec.max_length
            yield Hypothesis(tuple(said), total, ended, "", score, tuple(each))


def plain_beams(decoder: Decoder, picture: Tensor, spec: GenerationSpec) -> list[Hypothesis]:
    """Beam search, one image, one beam and one word at a time (Vijayakumar et al. 2018, 3.1).

    Group after group; a word costs `diversity_penalty` for each beam of an earlier group that
    says it at the same place, and that stays in the beam's sum.
    """
    config = spec.config
    size = config.beam_size // config.beam_groups
    groups = [{"open": [(0.0, (), ())], "kept": [], "done": False}] * config.beam_groups
    groups = [dict(group, kept=[]) for group in groups]
    for position in range(spec.max_length):
        said = [0] * (decoder.vocabulary or 0)
        for group in groups:
            candidates = []
            for beam, (total, ids, each) in enumerate(group["open"]):
                log_probs = next_log_probs(decoder, picture, ids)
                for word, p in enumerate(log_probs):
                    if word not in spec.banned:
                        score = total + (p - config.diversity_penalty * said[word])
                        candidates.append((score, -beam, -word, ids, each, p))
            candidates = sorted(candidates, reverse=True)[: 2 * size]
            last = position + 1 == spec.max_length
            for score, _, word, ids, each, p in candidates[:size]:
                if not group["done"] and (last or -word == spec.end_id):
                    words = ids if -word == spec.end_id else (*ids, -word)
                    ranked = score / divisor(config, position + 1)
                    found = (*each, p)
                    group["kept"].append(
                        Hypothesis(words, sum(found), -word == spec.end_id, "", ranked, found)
                    )
            group["kept"] = sorted(group["kept"], key=lambda h: -h.score)[:size]
            group["open"] = [
                (score, (*ids, -word), (*each, p))
                for score, _, word, ids, each, p in candidates
                if -word != spec.end_id
            ][:size]
            if not group["done"]:
                for _, ids, _ in group["open"]:
                    said[ids[-1]] += 1
            group["done"] |= nothing_better(group, config, position + 1, spec.max_length, size)
        if all(group["done"] for group in groups):
            break
    found = [hypothesis for group in groups for hypothesis in group["kept"]]
    return sorted(found, key=lambda h: -h.score)


def nothing_better(
    group: dict, config: GenerationConfig, length: int, longest: int, size: int
) -> bool:
    """Whether a group stops after `length` tokens."""
    if len(group["kept"]) < size or length == longest:
        return False
    later = [divisor(config, n) for n in range(length + 1, longest + 1)]
    reach = max(later) if config.early_stopping == "never" else divisor(config, length)
    hopeless = group["open"][0][0] / reach <= group["kept"][-1].score
    return config.early_stopping is True or hopeless


def same(found: Hypothesis, expected: Hypothesis) -> bool:
    """Equal words and ends; equal numbers to rounding."""
    words = (found.tokens, found.finished) == (expected.tokens, expected.finished)
    numbers = zip(
        (found.log_prob, found.score, *found.token_log_probs),
        (expected.log_prob, expected.score, *expected.token_log_probs),
        strict=True,
    )
    return words and all(math.isclose(x, y, rel_tol=0, abs_tol=1e-9) for x, y in numbers)


def all_same(found: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> bool:
    """As many, each the same."""
    return all(same(*pair) for pair in zip(found, expected, strict=True))
