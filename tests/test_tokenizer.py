"""Captions to ids and back: what the vocabulary keeps, what a padded batch says of itself."""

import json
import random
import string
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capdistill.errors import CheckpointError, ConfigError, DataError
from capdistill.tokenizer import SPECIAL, Tokenizer, WordTokenizer, pad_batch, split_words

COCO_PUNCTUATION = ["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
BRACKETS = ["(", ")", "[", "]", "{", "}"]  # -LRB- and the like in the COCO tool
captions = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("aAeé '’-.,\u0301<>\n")),
    max_size=60,
)


@pytest.mark.parametrize("mark", [*COCO_PUNCTUATION, *BRACKETS, "“", "”", "…", "—", '"', "\u3002"])
def test_punctuation_is_no_word_wherever_it_stands(mark):
    for text in (f"{mark} a dog {mark} runs {mark}", f"{mark}a dog{mark} runs{mark}"):
        assert split_words(text) == ["a", "dog", "runs"]


@pytest.mark.parametrize("space", ["\n", "\r\n", "\t", "\x0b", "\x85", "\u2028", "\u3000", "\xa0"])
def test_any_white_space_parts_words(space):
    assert split_words(f"a{space}dog") == ["a", "dog"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's hat", ["a", "man's", "hat"]),
        ("A man’s hat", ["a", "man's", "hat"]),
        ("a man 's hat", ["a", "man", "'s", "hat"]),
        ("dogs' toys", ["dogs", "toys"]),
        ("‘cool’ and 'cold'", ["cool", "and", "cold"]),
        ("don’t / don't / donʼt", ["don't", "don't", "don't"]),
        ("rock 'n' roll", ["rock", "n", "roll"]),
    ],
)
def test_apostrophes_curly_or_straight_stay_inside_words_alone(caption, words):
    assert split_words(caption) == words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("T-shirt -- black-and-white", ["t-shirt", "black-and-white"]),
        ("a T\u2011shirt - a t\u2010shirt", ["a", "t-shirt", "a", "t-shirt"]),
        ("dog--brown", ["dog", "brown"]),
        ("-dog-", ["dog"]),
        ("4 dogs , size 42", ["4", "dogs", "size", "42"]),
    ],
)
def test_hyphens_and_digits_stay_inside_words(caption, words):
    assert split_words(caption) == words


def test_composed_and_decomposed_letters_are_one_word():
    assert split_words("Cafe\u0301") == split_words("CAFÉ") == ["café"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a dog 🐕 👨‍👩‍👧 runs", ["a", "dog", "🐕", "👨‍👩‍👧", "runs"]),
        ("एक कुत्ता दौड़ता है।", ["एक", "कुत्ता", unicodedata.normalize("NFC", "दौड़ता"), "है"]),
        ("สุนัขวิ่ง", ["สุนัขวิ่ง"]),
        ("一只狗在奔跑。", ["一只狗在奔跑"]),
        ("ΜΙΑ ΓΆΤΑ", ["μια", "γάτα"]),
    ],
)
def test_other_scripts_marks_and_emoji_stay_whole(caption, words):
    assert split_words(caption) == words


@pytest.mark.parametrize("token", SPECIAL)
def test_a_caption_that_spells_a_special_token_gets_an_ordinary_word(token):
    tokenizer = WordTokenizer.train([f"a {token} sign"] * 5)
    ids = tokenizer.encode(f"A {token} sign")
    assert not set(ids[1:-1]) & {0, 1, 2, 3}
    assert tokenizer.decode(ids) == f"a {token.strip('<>')} sign"


@settings(deadline=None)
@given(captions)
def test_normalising_twice_is_normalising_once(caption):
    words = split_words(caption)
    assert split_words(" ".join(words)) == words
    assert all(word and word == "".join(word.split()) for word in words)


@settings(deadline=None)
@given(captions)
def test_decode_after_encode_is_the_normalised_caption_when_all_words_are_known(caption):
    words = split_words(caption)
    tokenizer = WordTokenizer(sorted(set(words)), max_length=len(words) + 1)
    assert tokenizer.decode(tokenizer.encode(caption)) == " ".join(words)


def test_the_special_tokens_come_first_and_are_distinct():
    tokenizer = WordTokenizer(["a"])
    ids = (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id, tokenizer.unk_id)
    assert [tokenizer.vocabulary[i] for i in ids] == list(SPECIAL)
    assert len(set(ids)) == 4
    assert isinstance(tokenizer, Tokenizer)


def test_the_vocabulary_depends_on_counts_then_letters_and_not_on_the_order_of_captions():
    given_captions = ["b a", "a b c", "a c d", "zebra"]
    expected = (*SPECIAL, "a", "b", "c", "d", "zebra")
    for seed in range(5):
        random.Random(seed).shuffle(given_captions)
        assert WordTokenizer.train(given_captions, min_count=1).vocabulary == expected


def test_min_count_is_the_least_count_that_is_kept_and_five_unless_given():
    texts = ["often rare"] * 4 + ["often"]
    assert WordTokenizer.train(texts).vocabulary == (*SPECIAL, "often")
    assert WordTokenizer.train(texts, min_count=4).vocabulary == (*SPECIAL, "often", "rare")


def test_max_size_counts_the_special_tokens_and_drops_the_rarest():
    texts = ["a", "a a b b c"]
    assert WordTokenizer.train(texts, min_count=1, max_size=6).vocabulary == (*SPECIAL, "a", "b")
    assert len(WordTokenizer.train(texts, min_count=1, max_size=100)) == 7


@pytest.mark.parametrize("max_size", [4, 0, -1, 5.5, True])
def test_a_max_size_without_room_for_a_word_is_refused(max_size):
    with pytest.raises(ConfigError, match="max_size must be a whole number of at least 5"):
        WordTokenizer.train(["a"], min_count=1, max_size=max_size)


def test_no_frequent_word_is_an_error_that_counts_the_words():
    with pytest.raises(DataError, match="none of the 3 distinct words occurs 5 times"):
        WordTokenizer.train(["a dog runs"])
    with pytest.raises(DataError, match="none of the 0 distinct"):
        WordTokenizer.train([])


def test_unknown_words_get_one_id_and_are_counted():
    tokenizer = WordTokenizer(["a", "dog"])
    assert tokenizer.encode("A cat, a dog") == [1, 4, 3, 4, 5, 2]
    assert tokenizer.count_unknown(["a cat", "dog"]) == (1, 3)


def test_a_caption_that_is_cut_has_no_end_token_and_is_counted():
    tokenizer = WordTokenizer(["a", "b", "c"], max_length=3)
    assert tokenizer.encode("a b c") == [1, 4, 5, 6, 2]
    assert tokenizer.encode("a b c a") == [1, 4, 5, 6]
    assert tokenizer.count_truncated(["a b c", "a b c a", "a , b . c !"]) == 1


def test_forty_words_are_kept_unless_said_otherwise():
    assert len(WordTokenizer(["a"]).encode("a " * 99)) == 41


@pytest.mark.parametrize("caption", ["", "...", " \n", "“—”"])
def test_a_caption_without_words_is_start_and_end(caption):
    assert WordTokenizer(["a"]).encode(caption) == [1, 2]


def test_decode_stops_at_the_first_end_and_says_no_padding_or_start():
    tokenizer = WordTokenizer(["a", "dog"])
    assert tokenizer.decode([1, 4, 0, 1, 5, 2, 4, 4]) == "a dog"
    assert tokenizer.decode(torch.tensor([1, 4, 5, 2, 0])) == "a dog"
    assert tokenizer.decode([2, 4]) == tokenizer.decode([]) == ""


@settings(deadline=None, max_examples=20)
@given(st.lists(captions.filter(lambda t: split_words(t)), min_size=1, max_size=5))
def test_a_vocabulary_read_from_its_file_is_the_same(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    tokenizer = WordTokenizer.train(texts, min_count=1, max_length=7)
    tokenizer.save(path)
    again = WordTokenizer.load(path)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_the_file_is_utf8_json_that_a_person_can_read(tmp_path):
    WordTokenizer(["狗", "café"]).save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_bytes().decode("utf-8")
    assert "狗" in text
    assert json.loads(text)["words"] == ["狗", "café"]


def test_tokenizers_differ_by_words_order_and_length():
    tokenizer = WordTokenizer(["a", "b"])
    assert tokenizer == WordTokenizer(["a", "b"])
    assert tokenizer != WordTokenizer(["b", "a"])
    assert tokenizer != WordTokenizer(["a", "b"], max_length=9)
    assert tokenizer != ("a", "b")
    assert repr(tokenizer) == "WordTokenizer(6 words, max_length=40)"


GOOD = {"format": "capdistill.word_tokenizer/1", "max_length": 5, "words": ["a"]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        *(
            json.dumps({**GOOD, **change}).encode()
            for change in (
                {"format": "another/1"},
                {"words": ["a", "a"]},
                {"words": ["<end>"]},
                {"words": "abc"},
                {"words": [1, 2]},
                {"words": None},
                {"max_length": "5"},
                {"max_length": 0},
                {"max_length": 2.5},
                {"max_length": None},
            )
        ),
        json.dumps({"format": GOOD["format"]}).encode(),
    ],
)
def test_a_file_that_is_no_vocabulary_is_refused_by_name(tmp_path, content):
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"foreign\.json is not a vocabulary.*Expected a JSON"
    ):
        WordTokenizer.load(path)


def test_a_missing_file_or_a_directory_is_refused_by_name(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name} is not a vocabulary"):
            WordTokenizer.load(path)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["a", "b", "a"], {}, r"given twice: \['a'\]"),
        (["<unk>"], {}, r"given twice: \['<unk>'\]"),
        (["a"], {"max_length": 0}, "max_length must be a whole number of at least 1, got 0"),
        (["a"], {"max_length": 2.0}, r"got 2\.0"),
        ("a dog", {}, r"words are 'a dog', one string; give a list"),
        ([None], {}, "None is not a word"),
    ],
)
def test_words_that_make_no_vocabulary_are_refused(words, options, message):
    with pytest.raises(ConfigError, match=message):
        WordTokenizer(words, **options)


def test_a_batch_is_padded_by_position_where_padding_equals_the_end():
    """Case 7: GPT-2 users set start = end = padding."""
    ids, mask = pad_batch([[0, 1, 2, 3, 0], [0, 1, 4, 0]], pad_id=0)
    assert ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 4, 0, 0]]
    assert mask[:, 1:].sum(1).tolist() == [4, 3]  # 7 targets, both ends among them
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_mask_says_exactly_what_was_given(rows):
    ids, mask = pad_batch(rows, pad_id=3)
    assert [line[keep].tolist() for line, keep in zip(ids, mask, strict=True)] == rows
    assert (ids[~mask] == 3).all()
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))


def test_ascii_punctuation_that_is_no_separator_is_known():
    """A change here changes every vocabulary."""
    joined = [c for c in string.punctuation if split_words(f"a{c}b") != ["a", "b"]]
    assert joined == ["$", "%", "&", "'", "-", "@"]


NO_TEXT = [None, float("nan"), 3, ["a dog"], {"raw": "a dog"}, b"a dog", "['a dog', 'a cat']"]


@pytest.mark.parametrize("caption", NO_TEXT)
def test_a_caption_that_is_not_text_is_refused_at_every_entrance(caption):
    tokenizer = WordTokenizer(["a", "dog"])
    for call in (
        lambda: WordTokenizer.train(["a dog", caption], min_count=1),
        lambda: tokenizer.encode(caption),
        lambda: tokenizer.count_truncated([caption]),
        lambda: tokenizer.count_unknown([caption]),
    ):
        with pytest.raises(DataError, match=r"WordTokenizer: .*caption.* is .*expected a string"):
            call()


def test_one_string_in_place_of_captions_is_refused():
    with pytest.raises(DataError, match="one string; give a list of captions"):
        WordTokenizer.train("a dog runs", min_count=1)


ACCENTED = "aB'-é.  e\u0301\u0302İΣᄀ\u1161\u11a8ſ\u0327\u212b—’日"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(ACCENTED), max_size=12))
def test_spans_of_words_are_where_the_words_are_written(caption):
    tokenizer = WordTokenizer(["a", "dog"], max_length=3)
    ids, spans = tokenizer.encode_spans(caption)
    assert ids == tokenizer.encode(caption)
    assert len(ids) == len(spans)
    assert spans[0] == (0, 0)
    if ids[-1] == tokenizer.end_id:
        assert spans[-1] == (len(caption), len(caption))
    words = split_words(caption)
    for (begin, end), word in zip(spans[1:], words, strict=False):
        written = unicodedata.normalize("NFC", caption[begin:end]).lower()
        straight = written.replace("’", "'").replace("ς", "σ")
        assert straight == word.replace("ς", "σ")
