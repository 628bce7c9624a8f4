"""Losses between vocabularies, by brute force: words by spans, and sorted probabilities."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch.testing import assert_close

from capdistill.losses import WordKD
from capdistill.outputs import CaptionerOutput, ModelSpec
from tests.losses.tiny_tokenizers import Pieces, batch_of, logits_of

WORDS = Pieces(["a", "dog", "dogs", "run", "running", "cat"], "words")
BYTES = Pieces(["Ġdog", "dog", "Ġrun", "ning", "Ġa", "Ġcat", "ca", "t's"], "byte_level")
SENTENCE = Pieces(["▁a", "▁dog", "▁r", "unning", "▁ca", "ts"], "sentencepiece")
PIECES = Pieces(["dog", "##s", "run", "##ning", "cat", "##at"], "wordpiece")
TOKENIZERS = {"words": WORDS, "bytes": BYTES, "sentence": SENTENCE, "pieces": PIECES}
PAIRS = [(one, other) for one in TOKENIZERS for other in TOKENIZERS if one != other]
CAPTIONS = ("a dog running", "dogs run", "a cat", "Dog a cats", "")
each_pair = pytest.mark.parametrize(("mine", "theirs"), PAIRS)


def spec(tokenizer, name="model"):
    return ModelSpec(None, None, 0, None, (), tokenizer.vocabulary, False, name, tokenizer)


def built(loss, mine, theirs):
    loss.build(spec(mine, "student"), spec(theirs, "teacher"))
    return loss


def output(logits):
    return CaptionerOutput(logits=logits)


# -- the oracle: everything written out, word by word ---------------------------------------------


def single_token(tokenizer, word, at_start):
    """The token that a word is, in a caption of its own or behind another word; or None."""
    ids = tokenizer.encode(word if at_start else "a " + word)[1:-1]
    ids = ids if at_start else ids[len(tokenizer.encode("a")) - 2 :]
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_id else None


def class_of(token, tokenizer, at_start, other):
    """The name of the class of a token: "end", a word that both know as one token, or "rest"."""
    if token == tokenizer.end_id:
        return "end"
    if token < 4:
        return "rest"
    text = tokenizer.decode([token])
    pair = single_token(tokenizer, text, at_start), single_token(other, text, at_start)
    folded = text.lower() if "words" in (tokenizer.style, other.style) else text
    return folded if pair[0] == token and pair[1] is not None else "rest"


def tokens_of(tokenizer, word, at_start):
    ids = tokenizer.encode(word if at_start else "a " + word)[1:-1]
    return ids if at_start else ids[len(tokenizer.encode("a")) - 2 :]


def word_distributions(caption, tokenizer, other, logits):
    """A distribution by class for each word of a caption of words and blanks, and for its end."""
    found, place = [], 0
    for number, word in enumerate([*caption.split(), None]):
        at_start = number == 0
        probability = logits[place].softmax(-1)
        classes = defaultdict(float)
        names = [class_of(t, tokenizer, at_start, other) for t in range(len(probability))]
        for token, name in enumerate(names):
            classes[name] += float(probability[token])
        tokens = [tokenizer.end_id] if word is None else tokens_of(tokenizer, word, at_start)
        theirs = [other.end_id] if word is None else tokens_of(other, word, at_start)
        product = math.prod(
            float(logits[place + i].softmax(-1)[token]) for i, token in enumerate(tokens)
        )
        before = names[tokens[0]]
        own = None  # where both sides put the probability of the word itself
        if word is None:
            own = "end"
        elif len(tokens) == 1 and before != "rest":
            own = before
        elif len(theirs) == 1 and class_of(theirs[0], other, at_start, tokenizer) != "rest":
            own = class_of(theirs[0], other, at_start, tokenizer)
        elif tokenizer.unk_id not in tokens and other.unk_id not in theirs:
            own = "the word itself"
        if own is not None and own != before:
            classes[before] -= product
            classes[own] += product
        assert math.isclose(sum(classes.values()), 1)
        found.append(classes)
        place += len(tokens)
    return found


def oracle(captions, mine, theirs, student, teacher, temperature):
    total, count = 0.0, 0
    for row, caption in enumerate(captions):
        ours = word_distributions(caption, mine, theirs, student[row])
        others = word_distributions(caption, theirs, mine, teacher[row])
        for one, other in zip(ours, others, strict=True):
            names = sorted({*one, *other})
            p = torch.tensor([other[n] for n in names], dtype=torch.float64).clamp(min=0).log()
            q = torch.tensor([one[n] for n in names], dtype=torch.float64).clamp(min=0).log()
            p, q = ((x / temperature).log_softmax(-1) for x in (p, q))
            total += float((p.exp() * (p - q)).nan_to_num(0).sum())
            count += 1
    return temperature**2 * total, count


@each_pair
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_words_are_compared_as_by_brute_force(mine, theirs, temperature):
    mine, theirs = TOKENIZERS[mine], TOKENIZERS[theirs]
    loss, batch = built(WordKD(temperature), mine, theirs), batch_of(CAPTIONS, mine)
    student, teacher = logits_of(CAPTIONS, mine, 1), logits_of(CAPTIONS, theirs, 2)
    expected, count = oracle(CAPTIONS, mine, theirs, student, teacher, temperature)
    assert loss.count(batch) == count == sum(len(c.split()) + 1 for c in CAPTIONS)
    assert_close(float(loss(output(student), output(teacher), batch)), expected)
