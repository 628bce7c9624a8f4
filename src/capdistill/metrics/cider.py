"""CIDEr-D on the COCO tool's scale, 0 to 10; people score about 0.8 on Flickr8k."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capdistill.errors import DataError
from capdistill.files import from_json, user_path, write_atomically
from capdistill.metrics.base import (
    ORDER,
    Ngram,
    References,
    Result,
    Tokens,
    prepare,
    tokens_of,
    words,
)
from capdistill.metrics.ngram_counts import (
    Counted,
    Floats,
    HypothesisNgrams,
    Ints,
    NgramIds,
    Pairs,
    ReferenceNgrams,
    reference_ngrams,
)

_SIGMA = 6.0  # the COCO tool's tolerance of a difference in length


class _Weighted(NamedTuple):
    """The tf-idf weights of the n-grams of one n, and their norm in each caption."""

    weights: Floats
    norms: Floats


class CiderD:
    """CIDEr-D; document frequencies come from the references unless they are given.

    Example:
        >>> cider = CiderD([[["a", "dog", "runs"]], [["a", "red", "car"]]])
        >>> round(cider([["a", "dog", "runs"], ["a", "red"]])["cider_d"][0], 3)
        5.493

    Args:
        references: One list of tokenised references per image, or these counted.
        document_frequencies: For references that are too few to count; None counts them in
            `references`.

    Source:
        Vedantam, Zitnick, Parikh (2015), the D form; as in pycocoevalcap, where the length
        of a caption is its number of bigrams.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]] | ReferenceNgrams,
        *,
        document_frequencies: DocumentFrequencies | None = None,
    ) -> None:
        given = document_frequencies
        self._references = references = reference_ngrams(references, given.ids if given else None)
        counts = given.counts if given else [t.frequencies for t in references.tables]
        documents = given.documents if given else references.images
        self._rarest = math.log(max(documents, 1))
        self._idf = [self._rarest - _log(np.maximum(1.0, count)) for count in counts]
        self._weighted = [
            self._weigh(n, Counted(table.rows, table.ids, table.counts), len(references.image))
            for n, table in enumerate(references.tables)
        ]

    def __call__(self, hypotheses: Sequence[Tokens] | HypothesisNgrams) -> dict[str, Result]:
        """Corpus and single scores of one tokenised caption per image, or of counted ones."""
        references = self._references
        if not isinstance(hypotheses, HypothesisNgrams):
            hypotheses = references.count(hypotheses)
        cosines = sum(self._cosines(n, hypotheses) for n in range(ORDER))
        ours, theirs = (np.maximum(0, n - 1) for n in (hypotheses.lengths, references.lengths))
        difference = ours[hypotheses.caption] - theirs[hypotheses.reference]
        damped = cosines * np.exp(-(difference**2) / (2 * _SIGMA**2))
        totals = np.bincount(hypotheses.caption, damped, len(hypotheses.lengths))
        per_image = references.per_image[hypotheses.images]
        scores: list[float] = (10.0 * totals / ORDER / per_image).tolist()
        return {"cider_d": (sum(scores) / max(len(scores), 1), scores)}

    def _cosines(self, n: int, hypotheses: HypothesisNgrams) -> Floats:
        """The clipped cosine of each caption and each reference of its image."""
        table, counted = self._references.tables[n], hypotheses.counted[n]
        ours, theirs = self._weigh(n, counted, len(hypotheses.lengths)), self._weighted[n]
        mine, other = table.join(counted, hypotheses.images)
        products = np.minimum(ours.weights[mine], theirs.weights[other]) * theirs.weights[other]
        caption, first = counted.rows[mine], self._references.first[hypotheses.images]
        pair = (hypotheses.first - first)[caption] + table.rows[other]
        dots = np.bincount(pair, products, len(hypotheses.reference))
        norms = ours.norms[hypotheses.caption] * theirs.norms[hypotheses.reference]
        return np.divide(dots, norms, out=np.zeros_like(norms), where=norms != 0)

    def _weigh(self, n: int, counted: Counted, captions: int) -> _Weighted:
        weights = counted.counts * _take(self._idf[n], counted.ids, self._rarest)
        squares = np.bincount(counted.rows, weights * weights, captions)
        return _Weighted(weights, np.sqrt(squares))


def _log(values: Floats) -> Floats:
    """Logarithms that are equal for equal values, wherever they are in an array."""
    distinct, inverse = np.unique(values, return_inverse=True)
    return np.array([math.log(value) for value in distinct], np.float64)[inverse]


def _take(values: Floats, places: Ints, otherwise: float) -> Floats:
    """The values at the places; for places beyond the end `otherwise`."""
    return np.append(values, otherwise)[np.minimum(places, len(values))]


_FORMAT = "capdistill.document_frequencies/1"
_MAX_BYTES = 2**32  # of the arrays in a file
_PICKLE = """\
{path} is a pickle, and a pickle can run any code when it is read. If you trust the file (such as
coco-val-df.p), turn it into data once:

    import pickle
    from capdistill.metrics import DocumentFrequencies
    with open("{path}", "rb") as file:
        found = pickle.load(file, encoding="utf-8")
    frequencies = DocumentFrequencies.from_counts(
        found["document_frequency"], documents=found["ref_len"]
    )
    frequencies.save("{stem}.npz")"""


@dataclass(frozen=True, eq=False)
class DocumentFrequencies:
    """The number of documents (images) in which each n-gram of up to four tokens occurs.

    Example:
        >>> frequencies = DocumentFrequencies.count({"1": ["A dog.", "a big dog"], "2": ["a car"]})
        >>> frequencies["a"], frequencies["a dog"], frequencies["a bus"], frequencies.documents
        (2.0, 1.0, 0.0, 2)

    Args:
        ids: The numbers of the n-grams.
        counts: For n = 1 to 4 the frequency of each n-gram, by its number.
        documents: How many documents were counted.
    """

    ids: NgramIds
    counts: list[Floats]
    documents: float

    def __post_init__(self) -> None:
        most = max((float(count.max()) for count in self.counts if len(count)), default=0.0)
        least = min((float(count.min()) for count in self.counts if len(count)), default=0.0)
        if not 0 <= least <= most <= self.documents < math.inf or self.documents == 0:
            raise DataError(
                f"Document frequencies from {least} to {most} in {self.documents} documents; "
                "expected from 0 up to the number of documents (itself, not its logarithm)."
            )

    @classmethod
    def count(cls, references: References) -> DocumentFrequencies:
        """Count references as `CaptionScorer` takes them; each image is one document."""
        images = prepare(references).values()
        counted = ReferenceNgrams([[tokens_of(caption) for caption in image] for image in images])
        counts = [table.frequencies.astype(np.float64) for table in counted.tables]
        return cls(counted.ids, counts, counted.images)

    @classmethod
    def from_counts(
        cls, counts: Mapping[Ngram | str, float], documents: float
    ) -> DocumentFrequencies:
        """Frequencies that were counted elsewhere.

        Example:
            >>> DocumentFrequencies.from_counts({("a", "dog"): 3, "a": 9}, documents=10)["a dog"]
            3.0

        Args:
            counts: n-gram (tokens, or a string with spaces between them) -> frequency.
            documents: How many documents they were counted in.

        Raises:
            DataError: An n-gram of another length or given twice, or a frequency above the number
                of documents.
        """
        known: dict[Ngram, float] = {}
        for given, count in counts.items():
            ngram = _ngram(given)
            if ngram in known:
                raise DataError(f"The counts have the n-gram {' '.join(ngram)!r} twice.")
            known[ngram] = float(count)
        ids = NgramIds()
        ids.count(list(known), keep=True)
        arrays = [np.zeros(size) for size in ids.sizes]
        for n, array in enumerate(arrays, 1):
            of_n = {each: count for each, count in known.items() if len(each) == n}
            array[ids.count(list(of_n), keep=False)[n - 1].ids] = list(of_n.values())
        return cls(ids, arrays, documents)

    def __getitem__(self, ngram: Ngram | str) -> float:
        tokens = _ngram(ngram)
        place = int(self.ids.count([tokens], keep=False)[len(tokens) - 1].ids[0])
        counts = self.counts[len(tokens) - 1]
        return float(counts[place]) if place < len(counts) else 0.0

    def save(self, path: str | Path) -> None:
        """Write arrays without pickle (`.npz`).

        Raises:
            ConfigError: The file cannot be written.
        """
        text = json.dumps([_FORMAT, self.documents, list(self.ids.words)])
        arrays = {"text": np.frombuffer(text.encode("utf-8"), np.uint8), "counts_1": self.counts[0]}
        for n, pairs in enumerate(self.ids.pairs, 2):
            arrays |= {f"keys_{n}": pairs.keys, f"ids_{n}": pairs.ids}
            arrays[f"counts_{n}"] = self.counts[n - 1]
        write_atomically(path, lambda temporary: _write(temporary, arrays))

    @classmethod
    def load(cls, path: str | Path) -> DocumentFrequencies:
        """Read what `save` wrote.

        Raises:
            DataError: No such file, a pickle, or another kind of file.
        """
        path = user_path(path, DataError)
        try:
            found = None if _is_pickle(path) else cls._from_arrays(_read(path))
        except Exception as error:  # NumPy and zipfile raise a dozen classes
            raise DataError(
                f"{path} cannot be read as document frequencies ({error}). Expected a file that "
                "DocumentFrequencies.save wrote; count(references).save(path) makes one."
            ) from error
        if found is None:
            raise DataError(_PICKLE.format(path=path, stem=path.stem))
        return found

    @classmethod
    def _from_arrays(cls, arrays: Mapping[str, Any]) -> DocumentFrequencies:
        form, documents, words = from_json(arrays["text"].tobytes().decode("utf-8"))
        if form != _FORMAT:
            raise ValueError(f"its format is {form!r}, not {_FORMAT!r}")
        numbers = {str(word): n for n, word in enumerate(words)}
        pairs = [Pairs(arrays[f"keys_{n}"], arrays[f"ids_{n}"]) for n in range(2, ORDER + 1)]
        counts = [arrays[f"counts_{n}"] for n in range(1, ORDER + 1)]
        _check(len(words) == len(numbers), "a word comes twice")
        ids = NgramIds(numbers, pairs)
        for pair, count, size in zip([None, *pairs], counts, ids.sizes, strict=True):
            _check(count.shape == (size,) and count.dtype == np.float64, "counts do not fit")
            if pair:
                _check(pair.keys.dtype == pair.ids.dtype == np.int64, "numbers are not integers")
                _check(bool((np.diff(pair.keys) > 0).all()), "n-grams are not in order")
                distinct = np.array_equal(np.sort(pair.ids), np.arange(size))
                _check(distinct, "numbers are not 0, 1, ...")
        return cls(ids, counts, float(documents))


def _ngram(ngram: Ngram | str) -> Ngram:
    given = ngram.split() if isinstance(ngram, str) else ngram
    strings = all(isinstance(token, str) for token in given)
    tokens = tuple(words(given)) if strings else ()
    if not 0 < len(tokens) <= ORDER:
        raise DataError(f"The n-gram is {ngram!r}; expected one to {ORDER} tokens.")
    return tokens


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    return start[:1] == b"\x80" or start in (b"(d", b"(l") or path.suffix in (".p", ".pkl")


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    _check(size <= _MAX_BYTES, f"it holds {size:,} bytes; at most {_MAX_BYTES:,} are read")
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
