"""Make the synonym table of `capdistill.metrics.bleu_rouge_meteor` from WordNet 3.0's own files.

    python tools/build_wordnet_synonyms.py corpora/wordnet.zip src/capdistill/metrics/wordnet

Reads NLTK's `wordnet.zip` (or a folder with data.noun, index.noun, noun.exc, ...) and writes
`synonyms.txt.gz` and `LICENSE`, byte for byte the same whenever it runs. A line of the table:

    dog N andiron blackguard ... V chase tail ...
    paris -N ...            the word itself is no answer: it is a name, or several words
    geese =N goose          the forms that stand in place of those made by rule

Left out is what cannot change a score: definitions, answers of several words (METEOR compares
single ones), names (it lowers all words), and words that then have no answer.
"""

from __future__ import annotations

import argparse
import gzip
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

POS = {"N": "noun", "V": "verb", "A": "adj", "R": "adv"}
Read = Callable[[str], list[str]]


def main() -> None:
    """Read WordNet, write the table and the licence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wordnet", type=Path, help="wordnet.zip, or the folder in it")
    parser.add_argument("out", type=Path, help="folder to write to")
    options = parser.parse_args()
    read = reader(options.wordnet)
    text = "\n".join(lines(read)).encode("ascii")
    with (options.out / "synonyms.txt.gz").open("wb") as file:
        file.write(gzip.compress(text, 9, mtime=0))
    (options.out / "LICENSE").write_text(licence(read), encoding="utf-8", newline="\n")
    print(f"{text.count(bytes([10])) + 1} words, {len(text)} bytes before compression")


def reader(path: Path) -> Read:
    """A function from a file's name to its lines."""
    if path.is_dir():
        return lambda name: (path / name).read_text(encoding="utf-8").splitlines()
    archive = zipfile.ZipFile(path)
    return lambda name: archive.read(f"wordnet/{name}").decode("utf-8").splitlines()


def lines(read: Read) -> list[str]:
    """The table, in the order of its bytes."""
    words: defaultdict[str, list[str]] = defaultdict(list)
    for letter, pos in POS.items():
        synsets = dict(read_synsets(read(f"data.{pos}")))
        for word, offsets in read_index(read(f"index.{pos}")):
            answers = {lemma for offset in offsets for lemma in synsets[offset]}
            if answers:
                mark = letter if word in answers else f"-{letter}"
                words[word] += [mark, *sorted(answers - {word})]
    for letter, pos in POS.items():
        for word, bases in sorted({w: b for w, *b in map(str.split, read(f"{pos}.exc"))}.items()):
            words[word] += [f"={letter}", *bases]
    return sorted(" ".join([word, *entry]) for word, entry in words.items())


def read_synsets(rows: list[str]) -> Iterator[tuple[str, set[str]]]:
    """Offset -> the members that METEOR can compare: single words without a capital."""
    for row in rows:
        if row.startswith(" "):
            continue
        fields = row.split(" ")
        names = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        members = [re.sub(r"\(.*\)$", "", name) for name in names]  # good(a): marks of use
        yield fields[0], {name for name in members if "_" not in name and name == name.lower()}


def read_index(rows: list[str]) -> Iterator[tuple[str, list[str]]]:
    """A word and the offsets of its synsets."""
    for row in rows:
        if not row.startswith(" "):
            fields = row.split()
            yield fields[0], fields[-int(fields[2]) :]


def licence(read: Read) -> str:
    """The notice at the head of every file of WordNet."""
    head = [row for row in read("data.noun")[:60] if row.startswith("  ")]
    text = "\n".join(re.sub(r"^  \d+ ", "", row).rstrip() for row in head)
    return (
        "The file synonyms.txt.gz is made from the database of WordNet 3.0, which comes with this\n"
        f"notice:\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
