"""Losses between vocabularies, by brute force: words by spans, and sorted probabilities."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses import TokenKD, UniversalKD, WordKD
from capdistill.losses.alignment import WordAlignment, split_tokens
from capdistill.outputs import CaptionerOutput, ModelSpec
from capdistill.testing import check_loss
from capdistill.tokenizer import WordTokenizer
from tests.losses.tiny_tokenizers import Pieces, batch_of, logits_of
from tests.tokenizers import subword_cases as subwords

WORDS = Pieces(["a", "dog", "dogs", "run", "running", "cat"], "words")
BYTES = Pieces(["Ġdog", "dog", "Ġrun", "ning", "Ġa", "Ġcat", "ca", "t's"], "byte_level")
SENTENCE = Pieces(["▁a", "▁dog", "▁r", "unning", "▁ca", "ts"], "sentencepiece")
PIECES = Pieces(["dog", "##s", "run", "##ning", "cat", "##at"], "wordpiece")
TOKENIZERS = {"words": WORDS, "bytes": BYTES, "sentence": SENTENCE, "pieces": PIECES}
PAIRS = [(one, other) for one in TOKENIZERS for other in TOKENIZERS if one != other]
CAPTIONS = ("a dog running", "dogs run", "a cat", "Dog a cats", "")
each_pair = pytest.mark.parametrize(("mine", "theirs"), PAIRS)


def spec(tokenizer, name="model"):
    about = (tokenizer.vocabulary, False, name, tokenizer, True)
    return ModelSpec(None, None, 0, None, (), *about)


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


# -- laws across vocabularies ---------------------------------------------------------------------

LOSSES = {
    "word": lambda: WordKD(2.0),
    "universal": lambda: UniversalKD(),
    "position": lambda: UniversalKD(align="position", temperature=2.0),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
some_pair = pytest.mark.parametrize("pair", [("words", "bytes"), ("sentence", "pieces")])
captions_of = st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=4)


def case(name, pair, captions=CAPTIONS, scale=2.0, seed=1):
    mine, theirs = (TOKENIZERS[each] for each in pair)
    loss, batch = built(LOSSES[name](), mine, theirs), batch_of(captions, mine)
    logits = [logits_of(captions, each, seed + i, scale) for i, each in enumerate((mine, theirs))]
    return loss, batch, logits[0].requires_grad_(), logits[1]


def value_and_gradient(loss, batch, student, teacher):
    total = loss(output(student), output(teacher), batch)
    return total.detach(), torch.autograd.grad(total, student)[0]


@each_loss
def test_the_laws_of_a_loss_hold_with_one_vocabulary(name):
    check_loss(LOSSES[name]())


@each_loss
@some_pair
@settings(deadline=None, max_examples=8)
@given(captions=captions_of, columns=st.integers(1, 3))
def test_padding_of_either_model_changes_nothing(name, pair, captions, columns):
    loss, batch, student, teacher = case(name, pair, captions)
    total, slope = value_and_gradient(loss, batch, student, teacher)
    ids, mask = (F.pad(each, (0, columns)) for each in (batch.input_ids, batch.mask))
    longer = replace(batch, input_ids=ids, mask=mask)
    pad = (0, 0, 0, columns)
    wide, further = F.pad(student.detach(), pad, value=torch.nan), F.pad(teacher, pad, value=9.0)
    found, theirs = value_and_gradient(loss, longer, wide.requires_grad_(), further)
    assert_close(found, total)
    assert_close(theirs[:, : slope.shape[1]], slope)
    assert not theirs[:, slope.shape[1] :].any()
    assert loss.count(longer) == loss.count(batch)


@each_loss
@some_pair
def test_the_parts_of_a_batch_add_up(name, pair):
    captions = ("a dog running", "dogs run", "a cat", "Dog a cats")
    whole, batch, student, teacher = case(name, pair, captions)
    parts = [case(name, pair, captions[:1]), case(name, pair, captions[1:])]
    sums = [loss(output(s), output(t), b).item() for loss, b, s, t in parts]
    assert_close(sum(sums), whole(output(student), output(teacher), batch).item())
    assert sum(loss.count(b) for loss, b, _, _ in parts) == whole.count(batch) > 8


@each_loss
@some_pair
def test_the_gradient_is_that_of_finite_differences_and_of_the_student_alone(name, pair):
    loss, batch, student, teacher = case(name, pair, ("a dog running", "dogs"))
    teacher.requires_grad_()
    _, slope = value_and_gradient(loss, batch, student, teacher)
    torch.manual_seed(0)
    direction = torch.randn_like(student)
    step = 1e-6 * direction
    with torch.no_grad():
        above, below = (
            loss(output(student + s), output(teacher), batch).item() for s in (step, -step)
        )
    assert_close((slope * direction).sum().item(), (above - below) / 2e-6, rtol=1e-5, atol=1e-6)
    total = loss(output(student), output(teacher), batch)
    assert torch.autograd.grad(total, teacher, allow_unused=True)[0] is None


@each_loss
@some_pair
def test_half_precision_and_extreme_logits_stay_finite(name, pair):
    loss, batch, student, teacher = case(name, pair)
    for mine, theirs in (
        (student.detach().half(), teacher.half()),
        (1e4 * student.detach().float(), 1e4 * teacher.float()),
    ):
        total, slope = value_and_gradient(loss, batch, mine.requires_grad_(), theirs)
        assert total.dtype == torch.float32
        assert total.isfinite()
        assert slope.isfinite().all()


@each_loss
def test_a_batch_without_a_word_gives_zero(name):
    loss, batch, student, teacher = case(name, ("words", "bytes"), ("", ""))
    nothing = replace(batch, mask=torch.zeros_like(batch.mask))
    total, slope = value_and_gradient(loss, nothing, student, teacher)
    assert total == loss.count(nothing) == 0
    assert not slope.any()


def test_words_of_one_vocabulary_in_another_order_are_token_distillation():
    """Where all entries are words, the loss is `TokenKD`; the special ones have no probability."""
    words = ["a", "dog", "run", "cat"]
    mine, theirs = WordTokenizer(words), WordTokenizer(words[::-1])
    captions = ("a dog", "run a cat")
    batch = batch_of(captions, mine)
    order = torch.tensor([0, 1, 2, 3, *(theirs.vocabulary.index(word) for word in words)])
    torch.manual_seed(3)
    student, teacher = torch.randn(2, *batch.targets.shape, 8, dtype=torch.float64)
    for each in (student, teacher):
        each[..., [0, 1, 3]] = -1e9
    shuffled = torch.empty_like(teacher)
    shuffled[..., order] = teacher
    for temperature in (1.0, 4.0):
        loss = built(WordKD(temperature), mine, theirs)
        expected = TokenKD(temperature)(output(student), output(teacher), batch)
        assert_close(loss(output(student), output(shuffled), batch), expected)
        assert loss.count(batch) == batch.target_mask.sum()
    equal = torch.empty_like(student)
    equal[..., order] = student
    assert loss(output(student), output(equal), batch).abs() < 1e-12


def test_sorted_probabilities_are_compared_as_published():
    """Boizard et al.: the L1 distance of sorted probabilities, filled up with zeros."""
    for align in ("word", "position"):
        loss = built(UniversalKD(align=align), WORDS, SENTENCE)
        batch = batch_of(CAPTIONS, WORDS)
        student, teacher = logits_of(CAPTIONS, WORDS, 1), logits_of(CAPTIONS, SENTENCE, 2)
        total, count = 0.0, 0
        for row, caption in enumerate(CAPTIONS):
            mine, theirs = (each.encode(caption)[1:] for each in (WORDS, SENTENCE))
            pairs = [(i, i) for i in range(min(len(mine), len(theirs)))]
            if align == "word":
                words = caption.split()
                pieces = [len(SENTENCE.encode(word)) - 2 for word in words]
                pairs = [(n, sum(pieces[:n])) for n in range(len(words) + 1)]
            for i, j in pairs:
                p = sorted(student[row, i].softmax(-1).tolist(), reverse=True)
                q = sorted(teacher[row, j].softmax(-1).tolist(), reverse=True)
                width = max(len(p), len(q))
                p, q = (x + [0.0] * (width - len(x)) for x in (p, q))
                total += sum(abs(a - b) for a, b in zip(p, q, strict=True))
                count += 1
        assert_close(loss(output(student), output(teacher), batch).item(), total)
        assert loss.count(batch) == count


def test_a_caption_whose_ids_are_others_is_compared_as_far_as_they_agree():
    """A sample that was cut, or cut into other pieces, is read by the teacher as text."""
    loss, batch = built(WordKD(), WORDS, BYTES), batch_of(("a dog run",), WORDS)
    assert loss.count(batch) == 4
    cut = replace(batch, mask=batch.mask & (torch.arange(5) < 4))
    assert loss.count(cut) == 3
    other = batch.input_ids.clone()
    other[0, 2] = WORDS.ids["cat"]
    assert loss.count(replace(batch, input_ids=other)) == 1


def test_punctuation_that_the_student_does_not_write_is_not_compared():
    loss = built(WordKD(), WORDS, BYTES)
    captions = ("a dog", "a dog.", "A dog, run", "a dog-run")
    assert [loss.count(batch_of((each,), WORDS)) for each in captions] == [3, 3, 4, 3]


def test_an_unknown_word_of_the_student_is_part_of_the_rest():
    alignment = WordAlignment(WORDS, BYTES)
    words = alignment.of(batch_of(("a zebra dog",), WORDS))
    assert not words.student.moves[1]
    assert not words.teacher.moves[1]
    known = alignment.of(batch_of(("a dogs",), WORDS))  # one token here, two there
    assert known.classes[1] == alignment.contexts[1].size + 1
    assert known.student.moves[1]
    assert known.teacher.moves[1]
    assert known.teacher.chain[0].tolist()[:2] == [1, 0]


def test_a_piece_that_no_caption_may_be_is_no_word():
    printed = Pieces(["array([])", "dog"], "sentencepiece")
    alignment = WordAlignment(WordTokenizer(["dog"]), printed)
    assert [len(context.teacher.ids) for context in alignment.contexts] == [1, 1]  # the end
    marked = Pieces(["▁array([])", "▁dog"], "sentencepiece")
    found = WordAlignment(WordTokenizer(["dog"]), marked).contexts[0].teacher.ids.tolist()
    assert found == [marked.end_id, marked.ids["▁dog"]]


def test_a_tokenizer_without_spans_and_a_teacher_that_reads_other_ids_are_refused():
    class Bare:
        pad_id, start_id, end_id, vocabulary = 0, 1, 2, ("a", "b", "c")

    with pytest.raises(ConfigError, match=r"tokenizer of the teacher, Bare, has no encode_spans"):
        built(WordKD(), WORDS, Bare())
    plain = replace(spec(BYTES, "theirs"), retokenizes=False)
    with pytest.raises(IncompatibleModels, match=r"RetokenizingTeacher\(teacher\)"):
        WordKD().build(spec(WORDS), plain)
    with pytest.raises(ConfigError, match=r"align='words' is unknown. Did you mean 'word'"):
        UniversalKD(align="words")


def test_a_copy_of_the_loss_shares_what_was_aligned():
    loss, batch, student, teacher = case("word", ("words", "bytes"))
    again = copy.deepcopy(loss)
    assert again.alignment is loss.alignment
    outputs = output(student), output(teacher)
    assert again(*outputs, batch) == loss(*outputs, batch)


# -- the tokenizers of real models ----------------------------------------------------------------


@pytest.mark.parametrize("kind", subwords.KINDS)
def test_words_of_real_tokenizers_end_where_words_of_captions_do(kind):
    tokenizer = subwords.untrimmed(kind)
    words = WordTokenizer.train(subwords.captions(), min_count=1)
    alignment = WordAlignment(words, tokenizer)
    found = alignment.coverage(subwords.captions())
    assert found.aligned == found.words > 1000
    assert found.single > 0.5 * found.words
    for caption in subwords.captions():
        table = alignment._caption(caption).words
        ids, spans = tokenizer.encode_spans(caption)
        mine = words.encode_spans(caption)[1]
        for row in table:
            first, end = row[6], row[7]
            covered = caption[spans[1 + first][0] : spans[end][1]]
            wanted = caption[mine[1 + row[2]][0] : mine[row[3]][1]]
            assert covered.strip(" .,!") == wanted  # SentencePiece may keep "mirror."
        assert [int(t) for t in table[:, 8]] == [ids[1 + first] for first in table[:, 6]]


@pytest.mark.parametrize("kind", subwords.KINDS)
def test_common_words_of_real_tokenizers_are_whole_words(kind):
    tokenizer = subwords.untrimmed(kind)
    words = WordTokenizer.train(subwords.captions(), min_count=1)
    for context in WordAlignment(words, tokenizer).contexts:
        numbers, ids = (each.tolist() for each in (context.student.classes, context.student.ids))
        names = dict(zip(numbers, ids, strict=True))
        pairs = zip(context.teacher.ids.tolist(), context.teacher.classes.tolist(), strict=True)
        for token, number in pairs:
            text = tokenizer.decode([token])
            assert words.encode(text)[1:-1] in ([names[number]], [])
            assert text.lower().strip("().,!") in (words.vocabulary[names[number]], "")


def test_random_words_begin_where_a_brute_force_search_says():
    caption = "A dog's t-shirt, 'cool'!  São"
    spans = [(0, 0), *((i, i + 1) for i, c in enumerate(caption) if c != " "), (29, 29)]
    starts = [word.start for word in split_tokens(caption, spans)]
    assert [caption[s:].split(" ")[0] for s in starts[:-1]] == [
        *("A", "dog's", "t-shirt,", ",", "'cool'!", "cool'!", "'!", "!", "São")
    ]
    assert starts[-1] == 29
