import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from capdistill.errors import DataError
from capdistill.metrics import CaptionScorer, DocumentFrequencies, cider_d

REFERENCES = {"1": ["A brown dog runs.", "a dog"], "2": ["a red car"], "3": ["two cars"]}


def test_frequencies_are_counted_by_image_on_tokens() -> None:
    frequencies = DocumentFrequencies.count(REFERENCES)
    assert [frequencies[g] for g in ("a", "dog", "a dog", "dog runs", "cat", "a b c d")] == [
        *(2.0, 1.0, 1.0, 1.0, 0.0, 0.0),
    ]
    assert frequencies.documents == 3
    assert frequencies["brown", "dog", "runs"] == 1.0


def test_saved_frequencies_score_as_those_counted_in_the_references(tmp_path: Path) -> None:
    captions = {"1": "a dog", "2": "a blue car", "3": "two cars"}
    DocumentFrequencies.count(REFERENCES).save(tmp_path / "new" / "frequencies.npz")
    loaded = DocumentFrequencies.load(tmp_path / "new" / "frequencies.npz")
    expected = CaptionScorer(REFERENCES, metrics=["cider_d"])(captions)
    scorer = CaptionScorer(REFERENCES, metrics=["cider_d"], document_frequencies=loaded)
    assert scorer(captions).per_image == expected.per_image
    some = {"1": REFERENCES["1"]}
    alone = cider_d(some, {"1": "a dog"}, document_frequencies=loaded)
    assert alone["cider_d"] == pytest.approx(expected.per_image["cider_d"]["1"], abs=1e-12)
    assert alone.notes == ()


def test_counts_from_elsewhere_are_taken_and_saved(tmp_path: Path) -> None:
    counts = {("a",): 900.0, ("a", "dog"): 30.5, ("b", "c", "d", "e"): 2}
    DocumentFrequencies.from_counts(counts, documents=1000).save(tmp_path / "f.npz")
    loaded = DocumentFrequencies.load(tmp_path / "f.npz")
    assert {ngram: loaded[ngram] for ngram in counts} == counts
    assert (loaded["c d"], loaded["dog"], loaded.documents) == (0.0, 0.0, 1000)


@pytest.mark.parametrize("ngram", ["", "a b c d e", (1, 2)])
def test_an_ngram_of_another_length_or_kind_is_refused(ngram: object) -> None:
    with pytest.raises(DataError, match="one to 4 tokens"):
        DocumentFrequencies.from_counts({ngram: 1.0}, documents=2)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_refused_unread_with_the_way_to_convert_it(
    tmp_path: Path, protocol: int
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("the pickle was read",))

    for content in (Bomb(), {"document_frequency": {("a",): 3}, "ref_len": 10}):
        path = tmp_path / f"coco-val-df.{'p' if isinstance(content, Bomb) else 'bin'}"
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(DataError, match=r"(?s)can run any code.*from_counts") as caught:
            DocumentFrequencies.load(path)
    # What the message says to do, done.
    plan = "\n".join(line[4:] for line in str(caught.value).splitlines() if line[:4] == "    ")
    exec(plan.replace('save("', f'save("{tmp_path}/'), {})
    assert DocumentFrequencies.load(tmp_path / "coco-val-df.npz")["a"] == 3.0


@pytest.mark.parametrize(
    ("count", "documents"),
    [(11, 10), (-1, 10), (math.nan, 10), (0, 0), (1, math.inf), (1, math.nan)],
)
def test_frequencies_above_the_number_of_documents_are_refused(
    count: float, documents: float
) -> None:
    with pytest.raises(DataError, match="not its logarithm"):
        DocumentFrequencies.from_counts({"a": count}, documents=documents)


def _arrays(path: Path) -> dict:
    DocumentFrequencies.count(REFERENCES).save(path)
    with np.load(path) as stored:
        return dict(stored)


def _text(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    "damage",
    [
        {"counts_2": np.zeros(1)},
        {"counts_1": np.zeros(8, np.float32)},
        {"ids_2": np.array([0, 0])},
        {"keys_3": np.arange(9.0)},
        {"text": _text(["other/1", 3, []])},
        {"text": _text({"a": 1})},
        {"text": _text(["capdistill.document_frequencies/1", 1, []])},
        {"counts_1": np.full(8, np.nan)},
        {"text": np.zeros(3, np.uint8)},
        {"text": np.array([{}], object)},
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: dict) -> None:
    arrays = {**_arrays(tmp_path / "good.npz"), **damage}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=r"bad\.npz cannot be read.*count\(references\)"):
        DocumentFrequencies.load(tmp_path / "bad.npz")


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 cut"])
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "f.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"f\.npz cannot be read"):
        DocumentFrequencies.load(tmp_path / "f.npz")
    with pytest.raises(DataError, match=r"none\.npz cannot be read.*No such file"):
        DocumentFrequencies.load(tmp_path / "none.npz")
