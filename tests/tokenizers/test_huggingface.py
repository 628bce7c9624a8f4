"""Subwords of any Hugging Face tokenizer: nothing is lost, captions are split as before."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

import capdistill as cd
from tests.tokenizers.subword_cases import KINDS, captions, full, trimmed, untrimmed

LOWER = ("WordPiece", "BPE with ends of words")
every_kind = pytest.mark.parametrize("kind", KINDS)
texts = st.one_of(
    st.text(max_size=30),
    st.text(st.sampled_from("aeiou dgstnr.,'-É日🐕▁Ġ#<>/s0x41[]\u0301 \t"), max_size=30),
    st.lists(st.sampled_from(captions()), min_size=1, max_size=2).map(" ".join),
)


def _by_theirs(kind: str, text: str) -> list[int]:
    theirs = full(kind)
    theirs.encode_special_tokens = True
    return theirs.encode(" ".join(text.split()), add_special_tokens=False).ids


@every_kind
def test_captions_that_were_kept_are_split_as_by_the_full_tokenizer(kind: str) -> None:
    tokenizer = trimmed(kind)
    assert len(tokenizer) < len(untrimmed(kind))
    for caption in captions()[::3]:
        start, *ids, end = (tokenizer.full_ids[i] for i in tokenizer.encode(caption))
        assert ids == _by_theirs(kind, caption)
        assert (start, end) == (untrimmed(kind).start_id, untrimmed(kind).end_id)


@every_kind
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_what_the_full_tokenizer_reads_back_is_read_back(kind: str, text: str) -> None:
    theirs, whole = full(kind), untrimmed(kind)
    by_theirs = _by_theirs(kind, text)
    assume(not {whole.start_id, whole.end_id, whole.pad_id} - {whole.unk_id} & {*by_theirs})
    expected = theirs.decode(by_theirs).strip()
    for tokenizer in (trimmed(kind), whole):
        assert tokenizer.decode(tokenizer.encode(text)) == expected


@every_kind
@settings(max_examples=50, deadline=None)
@given(text=st.one_of(texts, st.sampled_from(["a </s> dog", "<s>", "[SEP]", "<|endoftext|>"])))
def test_the_text_of_a_special_token_is_not_read_as_that_token(kind: str, text: str) -> None:
    for tokenizer in (trimmed(kind), untrimmed(kind)):
        ids = tokenizer.encode(text)
        inner = [i for i in ids[1:-1] if i != tokenizer.unk_id]
        assert not {tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id} & {*inner}
        if kind == "Unigram with bytes" and text == "a </s> dog":  # theirs reads an end token
            assert tokenizer.decode(ids) == text


@every_kind
def test_ids_lead_to_the_same_entries_of_the_full_vocabulary(kind: str) -> None:
    tokenizer, theirs = trimmed(kind), full(kind)
    vocabulary = [theirs.id_to_token(index) for index in range(theirs.get_vocab_size())]
    assert list(tokenizer.full_vocabulary) == vocabulary == list(untrimmed(kind).vocabulary)
    assert [vocabulary[i] for i in tokenizer.full_ids] == list(tokenizer.vocabulary)
    assert untrimmed(kind).full_ids == tuple(range(len(vocabulary)))


@every_kind
def test_entries_that_were_added_to_a_tokenizer_are_kept_or_spelled(kind: str) -> None:
    theirs = Tokenizer.from_str(full(kind).to_str())
    added = {"new york", "zebu", "Ж"}
    theirs.add_tokens([AddedToken(text, normalized=text < "o") for text in sorted(added)])
    text = "a dog in new york and a zebu Ж"
    whole = cd.tokenizers.HuggingFace(theirs)
    small = cd.tokenizers.HuggingFace(theirs, keep=[text])
    without = cd.tokenizers.HuggingFace(theirs, keep=["a dog in and"])
    for tokenizer in (whole, small):
        assert added == {tokenizer.vocabulary[i] for i in tokenizer.encode(text)} & added
    assert [small.full_ids[i] for i in small.encode(text)] == whole.encode(text)
    assert not {"new york", "zebu"} & {*without.vocabulary}
    assert without.decode(without.encode(text)) == text


@every_kind
def test_the_texts_of_tokens_are_those_that_they_add(kind: str) -> None:
    tokenizer = trimmed(kind)
    for text in (*captions()[:3], "A dog's São Paulo 日本🐕!", "", "🐕"):
        ids = tokenizer.encode(text)
        parts = tokenizer.token_texts(ids)
        assert len(parts) == len(ids)
        assert (parts[0], parts[-1]) == ("", "")
        assert "".join(parts) == tokenizer.decode(ids)
    shown = tokenizer.token_texts(tokenizer.encode("a dog")[1:-1])
    assert shown[0] == "a"
    assert shown[1].startswith(" d")


def test_half_a_character_is_the_text_of_its_last_byte() -> None:
    tokenizer = trimmed("byte-level BPE")
    ids = tokenizer.encode("日é")[1:-1]
    assert tokenizer.token_texts(ids) == ["", "", "日", "", "é"]
    assert tokenizer.token_texts(ids[:2]) == ["", "\ufffd"]


def test_a_tokenizer_without_an_end_token_names_what_it_has() -> None:
    bare = Tokenizer(models.WordPiece({"a": 0, "stop": 1, "[UNK]": 2}))
    with pytest.raises(cd.errors.ConfigError, match=r"Give end=.*special tokens: none"):
        cd.tokenizers.HuggingFace(bare)
    assert cd.tokenizers.HuggingFace(bare, end="stop").end_id == 1


def _words_of(text: str, spans: list[tuple[int, int]]) -> list[str]:
    return [text[begin:end] for begin, end in spans]


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_spans_are_in_order_within_the_caption_and_cover_every_word(kind: str, text: str) -> None:
    tokenizer = trimmed(kind)
    ids, spans = tokenizer.encode_spans(text)
    assert ids == tokenizer.encode(text)
    assert spans[0] == (0, 0)
    assert spans[-1] == (len(text), len(text))
    inner = spans[1:-1]
    assert len(inner) == len(ids) - 2
    assert all(0 <= begin <= end <= len(text) for begin, end in inner)
    assert inner == sorted(inner, key=lambda span: span[0])
    for piece in _words_of(text, inner):
        assert piece == piece.strip()
    if text.isascii():  # every character is normalised to itself, or to lower case
        covered = {n for begin, end in inner for n in range(begin, end)}
        assert covered >= {n for n, c in enumerate(text) if c.isalnum()}


@every_kind
def test_pieces_of_a_caption_are_the_characters_of_their_spans(kind: str) -> None:
    caption = "A  dog, skateboarding:\tdogs"
    ids, spans = trimmed(kind).encode_spans(caption)
    lower = kind in LOWER
    for index, (begin, end) in [*zip(ids, spans, strict=True)][1:-1]:
        piece = trimmed(kind).vocabulary[index].strip("Ġ▁#").removesuffix("</w>")
        written = caption[begin:end]
        assert piece in ((written.lower() if lower else written), "<unk>")


def test_bytes_of_one_character_all_cover_it() -> None:
    ids, spans = trimmed("byte-level BPE").encode_spans("日 é")
    assert spans[1:-1] == [(0, 1)] * 3 + [(2, 2)] * (len(ids) - 7) + [(2, 3)] * 2


@every_kind
def test_half_an_emoji_is_read_as_a_replacement_character(kind: str) -> None:
    for tokenizer in (trimmed(kind), untrimmed(kind)):
        broken, replaced = "a \ud83d dog", "a \ufffd dog"
        assert tokenizer.encode_spans(broken) == tokenizer.encode_spans(replaced)


@every_kind
def test_a_caption_that_is_cut_has_no_end_token_and_is_counted(kind: str) -> None:
    tokenizer = trimmed(kind, 5)
    short, long = "a dog", " ".join(captions()[:2])
    assert tokenizer.encode(short)[-1] == tokenizer.end_id
    assert tokenizer.encode(long) == trimmed(kind).encode(long)[:6]
    assert len(tokenizer.encode_spans(long)[1]) == 6
    assert tokenizer.count_truncated([short, long, ""]) == 1
    assert tokenizer.encode("") == [tokenizer.start_id, tokenizer.end_id]


@every_kind
def test_what_is_saved_is_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    for tokenizer in (trimmed(kind, 9), untrimmed(kind)):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = cd.tokenizers.load(tmp_path / "tokenizer.json")
        assert again == tokenizer == pickle.loads(pickle.dumps(tokenizer))
        assert hash(again) == hash(tokenizer)
        assert repr(again) == repr(tokenizer)
        assert again.full_ids == tokenizer.full_ids
        caption = f"{captions()[1]} Zebra 日"
        assert again.encode_spans(caption) == tokenizer.encode_spans(caption)
    assert trimmed(kind, 9) != trimmed(kind)
    assert trimmed(kind, 9) != untrimmed(kind)


@every_kind
def test_decoding_needs_no_library(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, caption = trimmed(kind), captions()[3]
    ids, text = tokenizer.encode(caption), tokenizer.decode(tokenizer.encode(caption))
    tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = cd.tokenizers.load(tmp_path / "tokenizer.json")
    assert again.decode(ids) == text
    with pytest.raises(cd.errors.MissingExtra, match=r'pip install "capdistill\[hf\]"'):
        again.encode(caption)


def test_a_captioner_of_subwords_is_saved_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = trimmed("byte-level BPE", 20)
    student = cd.Captioner.create("debug_student", tokenizer=tokenizer, weights=False)
    student.save(tmp_path)
    again = cd.Captioner.load(tmp_path)
    assert again.tokenizer == tokenizer == cd.tokenizers.load(tmp_path)
    image = cd.data.sample().train.examples[0].path
    assert again.caption(image) == student.eval().caption(image)
    with pytest.raises(cd.errors.CheckpointError, match="vocabulary of the HuggingFace"):
        cd.Captioner.load(tmp_path, tokenizer=untrimmed("byte-level BPE"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    again = cd.Captioner.load(tmp_path)
    assert again.caption(image) == student.caption(image)
    with pytest.raises(cd.errors.MissingExtra, match="capdistill\\[hf\\]"):
        again.caption(image, prefix="a photo")


def test_fast_tokenizers_of_transformers_declare_their_special_tokens(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=full("SentencePiece BPE"), **special)
    theirs.save_pretrained(tmp_path)
    for each in (theirs, tmp_path, str(tmp_path)):
        tokenizer = cd.tokenizers.HuggingFace(each, keep=captions()[:9])
        names = [tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, tokenizer.unk_id]
        assert [tokenizer.vocabulary[i] for i in names] == ["<s>", "</s>", "<unk>", "<unk>"]
    caption = captions()[0]
    ids = [tokenizer.full_ids[i] for i in tokenizer.encode(caption)[1:-1]]
    assert ids == theirs(caption, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(caption)) == theirs.decode(ids)


def test_a_model_wider_than_its_tokenizer_has_unused_entries() -> None:
    theirs, size = full("WordPiece"), full("WordPiece").get_vocab_size()
    tokenizer = cd.tokenizers.HuggingFace(theirs, size=size + 2, start=size)
    assert tokenizer.vocabulary[size:] == (f"<unused {size}>", f"<unused {size + 1}>")
    assert tokenizer.decode([size, *tokenizer.encode("a dog")[1:-1], size + 1]) == "a dog"
    small = cd.tokenizers.HuggingFace(theirs, captions(), size=size + 2, start=size)
    assert small.full_ids[small.start_id] == size
    assert len(small.full_vocabulary) == size + 2


@every_kind
def test_a_teachers_tokenizer_is_trimmed_as_the_one_it_was_made_from(kind: str) -> None:
    keep, theirs = captions()[::3], full(kind)
    teachers = cd.tokenizers.HuggingFace(theirs, start="</s>" if "Uni" in kind else None)
    direct = cd.tokenizers.HuggingFace(theirs, keep, start=teachers.start_id)
    ours = cd.tokenizers.HuggingFace(teachers, keep)
    assert ours == direct
    again = cd.tokenizers.HuggingFace(ours, keep[:9], 7)
    small = cd.tokenizers.HuggingFace(theirs, keep[:9], 7)
    assert (again.full_vocabulary, again.max_length) == (small.full_vocabulary, 7)
    assert [small.full_vocabulary[i] for i in again.full_ids] == [*again.vocabulary]
    assert len(again) < len(ours)
    for caption in keep[:9]:
        ids = [again.full_ids[i] for i in again.encode(caption)]
        assert ids == [small.full_ids[i] for i in small.encode(caption)]
    with pytest.raises(cd.errors.ConfigError, match="Leave it out"):
        cd.tokenizers.HuggingFace(teachers, keep, size=10_000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 3}, r"the tokenizer is 3 \(int\); expected a fast tokenizer"),
        (
            {"tokenizer": "gpt2-not-here"},
            "gpt2-not-here cannot be read.*name on the Hub is no path",
        ),
        ({"keep": "a dog"}, "the captions are 'a dog', str; give a list"),
        ({"keep": [3]}, r"caption 0 is 3 \(int\)"),
        ({"max_length": 0}, "max_length=0 was given"),
        (
            {"end": "</s>"},
            r"end='</s>' is not in the vocabulary of 600 entries. Its special tokens",
        ),
        ({"start": 600}, "start=600 is not in the vocabulary"),
        ({"size": 10}, "size=10 was given; the tokenizer has 600 ids"),
    ],
)
def test_what_cannot_be_used_is_refused(arguments: dict[str, Any], message: str) -> None:
    given = {"tokenizer": full("WordPiece"), **arguments}
    with pytest.raises(cd.errors.CapdistillError, match=message):
        cd.tokenizers.HuggingFace(**given)


def test_a_tokenizer_of_words_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "a"))
    with pytest.raises(cd.errors.ConfigError, match="is a WordLevel model; expected one of BPE"):
        cd.tokenizers.HuggingFace(words)


@pytest.mark.parametrize("index", [-1, 10**9, 1.5, "a", None])
def test_ids_that_do_not_exist_are_refused(index: Any) -> None:
    with pytest.raises(cd.errors.DataError, match="is not an id of this vocabulary"):
        trimmed("Unigram").decode([index])


def test_a_tokenizer_json_of_the_library_is_named_as_such(tmp_path: Path) -> None:
    full("Unigram").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(cd.errors.CheckpointError, match=r"HuggingFace\(path, keep=captions\)"):
        cd.tokenizers.load(tmp_path / "tokenizer.json")
    trimmed("Unigram").save(tmp_path / "ours.json")
    with pytest.raises(cd.errors.ConfigError, match=r"capdistill.tokenizers.load\(path\)"):
        cd.tokenizers.HuggingFace(tmp_path / "ours.json")


def test_pieces_that_llama_takes_whole_are_kept_whole() -> None:
    """With `ignore_merges`, a word that is an entry needs no merges."""
    content = json.loads(full("byte-level BPE").to_str())
    content["model"]["ignore_merges"] = True
    merges, size = content["model"]["merges"], len(content["model"]["vocab"])
    content["model"]["vocab"]["Ġzebra"] = size
    content["model"]["merges"] = merges[::2]  # many entries are reached by no merge
    produced = {left + right for left, right in merges[::2]}
    content["model"]["merges"] = [m for m in merges[::2] if {*m} <= produced or len("".join(m)) < 3]
    theirs = Tokenizer.from_str(json.dumps(content))
    keep = [*captions()[::3], "a zebra"]
    small = cd.tokenizers.HuggingFace(theirs, keep=keep, max_length=1000)
    for caption in keep:
        ids = [small.full_ids[i] for i in small.encode(caption)[1:-1]]
        assert ids == theirs.encode(" ".join(caption.split()), add_special_tokens=False).ids
    for caption in captions():
        assert small.decode(small.encode(caption)) == " ".join(caption.split())


def _of_transformers() -> dict[str, Any]:
    """Tokenizers as the classes of the supported families make them, with small vocabularies."""
    import transformers

    def model(kind: str) -> dict[str, Any]:
        content = json.loads(full(kind).to_str())["model"]
        merges = [tuple(merge) for merge in content.get("merges", ())]
        vocabulary = content["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = [tuple(entry) for entry in vocabulary]
        return {"vocab": vocabulary, **({"merges": merges} if merges else {})}

    byte_level, pieces = model("byte-level BPE"), model("SentencePiece BPE")
    ends = model("BPE with ends of words")
    ends["vocab"] = {**ends["vocab"], "<|startoftext|>": 700, "<|endoftext|>": 701}
    return {
        "GPT-2": transformers.GPT2Tokenizer(**byte_level),
        "BART": transformers.BartTokenizer(**byte_level),
        "Qwen2": transformers.Qwen2Tokenizer(**byte_level),
        "BERT": transformers.BertTokenizer(**model("WordPiece")),
        "T5": transformers.T5Tokenizer(**model("Unigram")),
        "Llama": transformers.LlamaTokenizer(**pieces),
        "Gemma": transformers.GemmaTokenizer(**pieces),
        "CLIP": transformers.CLIPTokenizer(**ends),
    }


ROLES = {
    "GPT-2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "BART": ("<s>", "</s>", "<pad>"),
    "Qwen2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "BERT": ("[CLS]", "[SEP]", "[PAD]"),
    "T5": ("</s>", "</s>", "<pad>"),
    "Llama": ("<s>", "</s>", "</s>"),
    "Gemma": ("<bos>", "<eos>", "<pad>"),
    "CLIP": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
}


def test_captions_are_those_of_every_family_of_transformers() -> None:
    families = _of_transformers()
    assert families.keys() == ROLES.keys()
    keep, others = captions()[:150:3], captions()[1:150:9]
    for name, theirs in families.items():
        small = cd.tokenizers.HuggingFace(theirs, keep, max_length=1000)
        whole = cd.tokenizers.HuggingFace(theirs, max_length=1000)
        roles = (small.start_id, small.end_id, small.pad_id)
        assert tuple(small.vocabulary[role] for role in roles) == ROLES[name]
        for caption in (*keep, *others):
            ids = theirs(" ".join(caption.split()), add_special_tokens=False)["input_ids"]
            assert whole.encode(caption)[1:-1] == ids, name
            if caption in keep:
                assert [small.full_ids[i] for i in small.encode(caption)[1:-1]] == ids, name
            text = theirs.backend_tokenizer.decode(ids).strip()
            assert whole.decode(whole.encode(caption)) == text, name
            assert small.decode(small.encode(caption)) == text, name
