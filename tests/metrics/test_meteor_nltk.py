"""The synonym table against WordNet 3.0 as NLTK reads it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capdistill.metrics import MeteorNltk
from capdistill.metrics.bleu_rouge_meteor import synonyms

TABLE = Path(synonyms.__wrapped__.__code__.co_filename).with_name("wordnet")
RANDOM = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))

# Read off NLTK's reader of WordNet 3.0.
KNOWN = {
    "sofas": {"sofas", "sofa", "couch", "lounge"},  # a regular plural
    "mice": {"mice", "mouse", "shiner"},  # an exception
    "hot_dog": {
        *("hot_dog", "dog", "frank", "frankfurter", "hotdog"),
        *("weenie", "wiener", "wienerwurst"),
    },
    "paris": {"paris"},  # names alone
    "the": {"the"},
    "": {""},
}


@pytest.mark.parametrize("word", KNOWN)
def test_synonyms_are_those_of_wordnet(word: str) -> None:
    assert synonyms(word) == KNOWN[word]


def test_the_table_is_small_and_its_licence_lies_beside_it() -> None:
    assert (TABLE / "synonyms.txt.gz").stat().st_size < 1.5e6
    assert "Princeton" in (TABLE / "LICENSE").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wordnet(shared: Callable[[str], Path]) -> Iterator[Any]:
    import nltk
    from nltk.corpus import wordnet

    before = list(nltk.data.path)
    nltk.data.path.append(str(shared("nltk_data")))
    wordnet.ensure_loaded()
    yield wordnet
    nltk.data.path[:] = before


@pytest.fixture(scope="module")
def vocabulary(wordnet: Any, shared: Callable[[str], Path]) -> list[str]:
    """Words of captions, WordNet's lemmas, and forms that its rules and exceptions undo."""
    lemmas = sorted(wordnet.all_lemma_names())[::37]
    odd = sorted({form for each in wordnet._exception_map.values() for form in each})[::7]
    endings = ("s", "es", "ed", "ing", "er", "est")
    forms = [lemma + end for lemma in lemmas[::5] for end in endings]
    golden = json.loads(shared("golden/flickr8k_dev_ptb.json").read_text(encoding="utf-8"))
    said = {word for each in golden.values() for text in each["ptb"] for word in text.split()}
    return [*lemmas, *odd, *forms, *sorted(said)]


@pytest.mark.shared
@pytest.mark.slow
def test_synonyms_of_thousands_of_words_are_nltks(wordnet: Any, vocabulary: list[str]) -> None:
    differing = [
        word for word in vocabulary if synonyms(word.lower()) != _full(wordnet, word.lower())
    ]
    assert len(vocabulary) > 10_000
    assert differing == []


def _full(wordnet: Any, word: str) -> set[str]:
    names = {lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()}
    return {name for name in names if "_" not in name and name == name.lower()} | {word}


@pytest.mark.shared
@RANDOM
@given(data=st.data())
def test_meteor_of_random_words_is_nltks_with_all_of_wordnet(
    data: st.DataObject, wordnet: Any, vocabulary: list[str]
) -> None:
    from nltk.translate.meteor_score import meteor_score

    word = st.sampled_from(vocabulary)
    known = data.draw(st.lists(word, min_size=1, max_size=5))
    related = sorted({other for each in known for other in synonyms(each.lower())})
    texts = st.lists(st.sampled_from([*known, *related]), max_size=12)
    references = data.draw(st.lists(texts, min_size=1, max_size=3))
    hypothesis = data.draw(texts)
    expected = meteor_score(references, hypothesis, wordnet=wordnet) if hypothesis else 0.0
    found, _ = MeteorNltk([references])([hypothesis])["meteor_nltk"]
    assert found == pytest.approx(expected, abs=1e-12)
