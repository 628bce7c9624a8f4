"""METEOR's table of paraphrases: where it is, and the part of it that given references need."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from capdistill.errors import DataError

LONGEST = 7  # words in the longest phrase of the table
VARIABLE = "CAPDISTILL_METEOR_PARAPHRASES"
_CHUNK = 1 << 18  # bytes read at once: the table is 270 MB, and is never held whole

Rewrites = dict[str, dict[str, int]]  # phrase -> its paraphrases, each with its place in the table


def find_paraphrases() -> Path | None:
    """The English table: named by CAPDISTILL_METEOR_PARAPHRASES, or an installed pycocoevalcap's.

    pycocoevalcap is looked for, never imported; the extra `coco` installs it.

    Raises:
        DataError: The variable names a file that does not exist.
    """
    if named := os.environ.get(VARIABLE):
        return _existing(Path(named), f"{VARIABLE} names")
    package = find_spec("pycocoevalcap")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder, "meteor", "data", "paraphrase-en.gz")
        if path.is_file():
            return path
    return None


def read_paraphrases(path: Path, phrases: set[str]) -> Rewrites:
    """The rows of the table that have one of the phrases on either side.

    Args:
        path: The table: gzip, three lines per row (probability, phrase, paraphrase).
        phrases: Every run of up to `LONGEST` words in the references.

    Raises:
        DataError: The file does not exist or is not such a table.
    """
    stamp = _existing(path, "the table of paraphrases is").stat().st_mtime_ns
    return _rows(path, stamp, frozenset(phrases))


@lru_cache(maxsize=1)  # several models are scored against the same references
def _rows(path: Path, stamp: int, phrases: frozenset[str]) -> Rewrites:
    wanted = {phrase.encode() for phrase in phrases}
    rewrites: Rewrites = {}
    count = 0
    try:
        for rows in _read(path):
            for left, right in rows:
                if left in wanted or right in wanted:
                    rewrites.setdefault(left.decode(), {})[right.decode()] = count
                    count += 1
    except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"METEOR 1.5: {path} is not a table of paraphrases ({error}). Expected "
            "paraphrase-en.gz as in pycocoevalcap/meteor/data."
        ) from error
    return rewrites


def _read(path: Path) -> Iterator[Iterable[tuple[bytes, bytes]]]:
    """The rows of one chunk after the other; a last line without its end counts."""
    rest = b""
    with gzip.open(path, "rb") as table:
        for chunk in chain(iter(lambda: table.read(_CHUNK), b""), [b"\n"]):
            lines = (rest + chunk).split(b"\n")
            whole = (len(lines) - 1) // 3 * 3
            rest = b"\n".join(lines[whole:])
            if whole:
                float(lines[0])  # ValueError: this is another kind of file
            yield zip(lines[1:whole:3], lines[2:whole:3], strict=True)


def _existing(path: Path, wanted: str) -> Path:
    if not path.is_file():
        raise DataError(
            f"METEOR 1.5: {wanted} '{path}', which does not exist. "
            "Give the path of paraphrase-en.gz, or paraphrases=None for three stages."
        )
    return path


Senses = frozenset[int]

# The first ending that leads to a word of WordNet counts.
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
    ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


class _WordNet(NamedTuple):
    senses: dict[str, Senses]
    bases: dict[str, list[str]]  # irregular forms: men -> man


@lru_cache(maxsize=1 << 16)
def senses(word: str) -> Senses:
    """The meanings of a lower-case word and of its base; two words that share one are synonyms.

    Example:
        >>> senses("sofas").isdisjoint(senses("couch"))
        False
        >>> senses("dog").isdisjoint(senses("cat"))
        True
    """
    wordnet = _wordnet()
    own = wordnet.senses.get(word, Senses())
    bases = wordnet.bases.get(word)
    if bases is None:
        bases = [_base(word, wordnet)]
    return own.union(*(wordnet.senses.get(base, Senses()) for base in bases))


def _base(word: str, wordnet: _WordNet) -> str:
    """The regular base of a word; the word itself if it is too short or ends in -ss."""
    if len(word) < 3 or word.endswith("ss"):
        return word
    for ending, replacement in _ENDINGS:
        if word.endswith(ending):
            base = word[: -len(ending)] + replacement
            if base in wordnet.senses:
                return base
    return ""


@cache
def _wordnet() -> _WordNet:
    """Read the table: groups of synonyms, then words without any, then irregular forms."""
    packed = (files(__package__) / "synonyms.txt.gz").read_bytes()
    groups, lonely, irregular = gzip.decompress(packed).decode("ascii").split("\n\n")
    numbers: dict[str, list[int]] = {}
    for number, group in enumerate(groups.split("\n")):
        for word in group.split():
            numbers.setdefault(word, []).append(number)
    for number, word in enumerate(lonely.split(), len(numbers)):
        numbers[word] = [number]
    forms = (line.split() for line in irregular.splitlines())
    return _WordNet(
        senses={word: Senses(each) for word, each in numbers.items()},
        bases={form: bases for form, *bases in forms},
    )
