"""The same weights under `generate` of Hugging Face transformers: equal words, equal scores.

Its beam search, length penalty, early stopping, n-gram rule and sampling filters are the oracle.
Group beam search left that library; `test_beam.py` holds the paper's, written in loops.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.generation import GenerationConfig, GenerationSpec, generate
from capdistill.generation.choice import warp
from tests.generation.decoding_cases import (
    END,
    FORMS,
    LIMIT,
    PAD,
    START,
    VOCABULARY,
    pictures,
    real,
)

transformers = pytest.importorskip("transformers", reason="transformers (extra 'test') is absent")

IDS = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}


class Config(transformers.PretrainedConfig):
    model_type = "capdistill-test"

    def __init__(self, **options):
        super().__init__(**options)
        self.vocab_size, self.num_hidden_layers = VOCABULARY, 1


class Theirs(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A decoder of ours as a causal model of theirs, the whole caption at every word."""

    config_class = Config
    main_input_name = "input_ids"

    def __init__(self, decoder):
        super().__init__(Config(**IDS))
        self.decoder = decoder
        self.generation_config = transformers.GenerationConfig(**IDS, use_cache=False)

    def prepare_inputs_for_generation(self, input_ids, features=None, **_):
        return {"input_ids": input_ids, "features": features}

    def forward(self, input_ids, features, **_):
        return transformers.modeling_outputs.CausalLMOutput(
            logits=self.decoder(input_ids, features).logits
        )

    def captions(self, features, **options):
        """(words, ended, score) of each hypothesis of each image."""
        start = torch.full((len(features), 1), START)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.generate(
                start,
                features=features,
                max_new_tokens=LIMIT,
                suppress_tokens=[PAD, START],
                return_dict_in_generate=True,
                output_scores=True,
                do_sample=False,
                **options,
            )
        scores = out.sequences_scores.tolist() if "sequences_scores" in out else None
        rows = [read(row) for row in out.sequences[:, 1:].tolist()]
        each = options.get("num_return_sequences", 1)
        groups = [rows[i : i + each] for i in range(0, len(rows), each)]
        return groups, scores and [scores[i : i + each] for i in range(0, len(rows), each)]


def read(ids: list[int]) -> tuple[tuple[int, ...], bool]:
    if END in ids:
        return tuple(ids[: ids.index(END)]), True
    return tuple(ids), False


def ours(decoder, features, **options):
    spec = GenerationSpec(START, END, LIMIT, GenerationConfig(**options), banned=(PAD, START))
    return generate(decoder, features, spec)


@settings(deadline=None, max_examples=8)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 999),
    ngram=st.sampled_from([0, 1, 2, 3]),
)
def test_greedy_words_are_theirs(form, seed, ngram):
    decoder, features = real(form, seed), pictures(4, seed)
    groups, _ = Theirs(decoder).captions(features, no_repeat_ngram_size=ngram)
    found = ours(decoder, features, no_repeat_ngram=ngram)
    assert [[(h.tokens, h.finished)] for h in found] == groups


@settings(deadline=None, max_examples=25)
@given(
    form=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 999),
    beams=st.integers(2, 5),
    alpha=st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    stop=st.sampled_from([False, True, "never"]),
    ngram=st.sampled_from([0, 2, 3]),
    least=st.sampled_from([0, 3]),
)
def test_beams_their_order_and_their_scores_are_theirs(
    form, seed, beams, alpha, stop, ngram, least
):
    decoder, features = real(form, seed), pictures(4, seed)
    groups, scores = Theirs(decoder).captions(
        features,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=alpha,
        early_stopping=stop,
        no_repeat_ngram_size=ngram,
        min_new_tokens=least,
    )
    found = ours(
        decoder,
        features,
        beam_size=beams,
        num_return=beams,
        length_penalty=alpha,
        early_stopping=stop,
        no_repeat_ngram=ngram,
        min_length=least,
    )
    assert [[(h.tokens, h.finished) for h in each.n_best] for each in found] == groups
    for each, expected in zip(found, scores, strict=True):
        assert [h.score for h in each.n_best] == pytest.approx(expected, abs=1e-5)  # float32 there


@settings(deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_what_may_be_drawn_is_what_their_warpers_leave(seed, temperature, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(5, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_probs[:, 3] = -torch.inf
    expected = transformers.TemperatureLogitsWarper(temperature)(None, log_probs.clone())
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    config = GenerationConfig(sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(
        warp(log_probs, config).softmax(-1), expected.softmax(-1), rtol=0, atol=1e-12
    )
