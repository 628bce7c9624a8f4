"""Build METEOR 1.5's table of synonyms from WordNet 3.0 in NLTK's layout.

    python tools/build_meteor15_synonyms.py nltk_data/corpora/wordnet.zip \
        src/capdistill/metrics/meteor15/synonyms.txt.gz

METEOR knows a meaning by its place in Princeton's files alone, so that a noun and a verb at one
place pass for synonyms: the table keeps that, for equal scores. In two stretches of NLTK's files
the places differ from Princeton's by a few bytes; `_SHIFTS` takes the difference out.
"""

import gzip
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
_SHIFTS = {"verb": (613036, 2422967, 18), "adj": (1681478, sys.maxsize, 1)}  # from, to, bytes


def main(source: str, target: str) -> None:
    """Write the single words: groups of synonyms, words without any, irregular forms."""
    places: dict[str, set[int]] = defaultdict(set)
    bases: dict[str, set[str]] = defaultdict(set)
    with zipfile.ZipFile(source) as archive:
        for part in PARTS:
            for line in _lines(archive, f"wordnet/index.{part}"):
                word, _, count, *fields = line.split()
                places[word].update(_place(int(f), part) for f in fields[-int(count) :])
            for line in _lines(archive, f"wordnet/{part}.exc"):
                form, *words = line.split()
                if "_" not in form:
                    bases[form].update(words)
    reached = {word for words in bases.values() for word in words}  # comics -> comic_strip
    kept = {word: places[word] for word in places if "_" not in word or word in reached}
    irregular = [" ".join([form, *sorted(bases[form])]) for form in sorted(bases)]
    sections = [*_groups(kept), irregular]
    text = "\n\n".join("\n".join(section) for section in sections)
    Path(target).write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))


def _lines(archive: zipfile.ZipFile, name: str) -> list[str]:
    text = archive.read(name).decode("ascii")
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def _place(place: int, part: str) -> int:
    start, end, shift = _SHIFTS.get(part, (0, 0, 0))
    return place - shift if start <= place < end else place


def _groups(places: dict[str, set[int]]) -> tuple[list[str], list[str]]:
    """Words that share a meaning, a line a meaning; and the words that share none."""
    groups: dict[int, list[str]] = defaultdict(list)
    for word in sorted(places):
        for place in places[word]:
            groups[place].append(word)
    shared = sorted({" ".join(group) for group in groups.values() if len(group) > 1})
    grouped = {word for line in shared for word in line.split()}
    return shared, sorted(places.keys() - grouped)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
