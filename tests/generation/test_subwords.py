"""Options that speak of words hold for words of several pieces: brute force over all captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import capdistill as cd
from capdistill.generation import GenerationConfig, GenerationSpec, Hypothesis, generate
from capdistill.generation.words import FUNCTION_WORDS
from tests.generation.decoding_cases import FORMS, all_same, every_hypothesis, pictures, real
from tests.tokenizers.subword_cases import KINDS, captions, trimmed, untrimmed

PIECES = ("<pad>", "<s>", "</s>", "a", "Ġa", "Ġb", "b", "Ġ")
SPACE, LIMIT = PIECES.index("Ġ"), 4


def _two_letters() -> cd.tokenizers.HuggingFace:
    """As GPT-2's: a word at the beginning of a caption has no space, so it has other pieces."""
    ids = {piece: index for index, piece in enumerate(PIECES)}
    made = Tokenizer(models.BPE(ids, [("Ġ", "a"), ("Ġ", "b")]))
    made.add_special_tokens(list(PIECES[:3]))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return cd.tokenizers.HuggingFace(made)


TWO = _two_letters()


def spec_of(**options) -> GenerationSpec:
    """The space alone is banned: a word then has one spelling within a caption."""
    config = GenerationConfig(beam_size=4**LIMIT, num_return=30, max_length=LIMIT, **options)
    spec = GenerationSpec.of(config, TWO)
    return replace(spec, banned=(*spec.banned, SPACE))


Allowed = Callable[[list[str], str, Hypothesis], bool]
OPTIONS: dict[str, tuple[dict[str, object], Allowed]] = {
    "a banned word": (
        {"banned_words": ["ab"]},
        lambda words, text, _: not any(word.startswith("ab") for word in words),
    ),
    "a banned word of one letter": (
        {"banned_words": ["B"]},
        lambda words, text, _: not any(word.startswith("b") for word in words),
    ),
    "a banned phrase": (
        {"banned_words": ["b a"]},
        lambda words, text, _: not f" {' '.join(words)}".count(" b a"),
    ),
    "not last": (
        {"not_last": ["b", "ab"]},
        lambda words, text, _: words[-1:] not in (["b"], ["ab"]),
    ),
    "function words": (
        {"not_last": "function_words"},
        lambda words, text, _: words[-1:] != ["a"],
    ),
    "a prefix": (
        {"prefix": "ab"},
        lambda words, text, _: words[:1] == ["ab"],
    ),
    "words": (
        {"min_length": 2},
        lambda words, text, found: len(words) >= 2 or not found.finished,
    ),
    "all of them": (
        {"prefix": "a", "not_last": ["b"], "banned_words": ["ba"], "min_length": 2},
        lambda words, text, found: (
            (words[:1] == ["a"] and words[-1] != "b")
            and not any(word.startswith("ba") for word in words)
            and (len(words) >= 2 or not found.finished)
        ),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
@settings(deadline=None, max_examples=3)
@given(form=st.sampled_from(sorted(FORMS)), seed=st.integers(0, 999))
def test_beams_find_the_best_captions_that_the_words_allow(case, form, seed):
    options, allowed = OPTIONS[case]
    decoder, (picture,) = real(form, seed, vocabulary=len(PIECES)), pictures(1, seed)
    spec = spec_of(**options)
    (found,) = generate(decoder, picture[None], spec)
    plain = replace(spec_of(), prefix=())
    every = [
        each
        for each in every_hypothesis(decoder, picture, plain, len(PIECES))
        if allowed(TWO.decode(each.tokens).split(), TWO.decode(each.tokens), each)
        and (not each.tokens or not spec.prefix or PIECES[each.tokens[0]][0] != "Ġ")
    ]
    best = sorted(every, key=lambda h: -h.score)[:30]
    assert all_same(found.n_best[: len(best)], best)
    assert len(found.n_best) >= len(best)


MODES = {
    "greedy": {},
    "beam": {"beam_size": 3, "num_return": 3},
    "sample": {"sample": True, "num_return": 4, "temperature": 2.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_words_of_real_captions_are_banned_begin_and_end_captions(kind, mode):
    tokenizer = trimmed(kind, 12)
    torch.manual_seed(0)
    decoder = real("parallel", 1, vocabulary=len(tokenizer))
    words = ["dog", "A man", "skateboard", "in"]
    config = GenerationConfig(
        **MODES[mode], banned_words=words, prefix="a photo of", not_last="function_words"
    )
    spec = replace(
        GenerationSpec.of(config, tokenizer),
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
    )
    for best in generate(decoder, pictures(3), spec):
        for found in best.n_best or (best,):
            text = tokenizer.decode(found.tokens)
            assert text == "a photo of" or not text.removeprefix("a photo of")[0].isalnum()
            if tokenizer.encode(text)[1:-1] == [*found.tokens]:  # spelled as it is written
                said = [word.strip(".,;:!?").lower() for word in text.split()]
                assert not {"dog", "skateboard", "in"} & {*said}
                assert said[-1] not in FUNCTION_WORDS


@pytest.mark.parametrize("kind", KINDS)
def test_borders_of_words_count_the_words_of_captions(kind):
    tokenizer = trimmed(kind)
    borders = tokenizer.word_borders
    for caption in captions()[:60]:
        if not caption.replace(" ", "").isalnum():
            continue
        first, *others = tokenizer.encode(caption)[1:-1]
        count = (first in borders.first) + sum(index in borders.added for index in others)
        assert count == len(caption.split())
        starts = [index for index in others if index not in borders.run_on]
        if kind != "BPE with ends of words":
            assert len(starts) == len(caption.split()) - 1


def test_every_case_of_a_word_is_banned_at_the_beginning_and_within():
    tokenizer = trimmed("byte-level BPE")
    spec = GenerationSpec.of(GenerationConfig(banned_words=["dog"]), tokenizer)
    sequences = {*spec.phrases, *((index,) for index in spec.banned)}
    for case in ("dog", "Dog", "DOG"):
        assert tuple(tokenizer.encode(f"a {case}")[2:-1]) in sequences
        assert tuple(tokenizer.encode(case)[1:-1]) in spec.subwords.banned_first


def test_special_tokens_are_never_generated():
    tokenizer = untrimmed("WordPiece")
    special = {tokenizer.vocabulary.index(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[MASK]")}
    assert set(GenerationSpec.of(GenerationConfig(), tokenizer).banned) == special
    allowed = GenerationSpec.of(GenerationConfig(allow_unknown=True), tokenizer)
    assert set(allowed.banned) == special - {tokenizer.unk_id}


def test_words_without_pieces_are_refused():
    with pytest.raises(cd.errors.ConfigError, match="not_last has ' ', which holds no word"):
        GenerationSpec.of(GenerationConfig(not_last=[" "]), TWO)
