"""BLEU, ROUGE-L and CIDEr-D beside pycocoevalcap (the COCO tool), and METEOR beside NLTK's.

    pip install capdistill[coco]        # and Java, which pycocoevalcap's tokeniser runs on
    python benchmarks/metrics.py                                  # captions made from the sample
    python benchmarks/metrics.py --flickr8k Flickr8k.token.txt
    python benchmarks/metrics.py --coco annotations/captions_val2014.json

Each tool runs in a process of its own, in turn, A B A B ...; a ratio is the median over rounds,
so that a machine that changes speed does not change it. "first" is raw text to scores; "again"
scores other captions of the same images: we keep the references prepared, pycocoevalcap begins
anew. Imports are not timed. Memory is the highest resident size of the process, and of Java
(Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
Corpus = tuple[dict[str, list[str]], dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco", type=Path, help="captions as COCO's JSON has them")
    parser.add_argument("--flickr8k", type=Path, help="Flickr8k.token.txt")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=sorted(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(RUNS[options.run](*json.loads(options.corpus.read_text("utf-8")))))
        return
    if find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        parser.error("pycocoevalcap (pip install capdistill[coco]) or Java is not here")
    references, hypotheses = corpus = make_corpus(read_captions(options), options.images)
    print(f"{len(hypotheses)} images, {sum(map(len, references.values()))} references")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.json")
        path.write_text(json.dumps(corpus), "utf-8")
        report([{run: child(run, path) for run in RUNS} for _ in range(options.rounds)])


def read_captions(options: argparse.Namespace) -> list[list[str]]:
    """The captions of each image."""
    if options.coco:
        found = defaultdict(list)
        for row in json.loads(options.coco.read_text("utf-8"))["annotations"]:
            found[row["image_id"]].append(row["caption"])
        return list(found.values())
    if options.flickr8k:
        found = defaultdict(list)
        for line in options.flickr8k.read_text("utf-8").splitlines():
            name, _, text = line.partition("\t")
            found[name.rpartition("#")[0]].append(text)
        return list(found.values())
    import capdistill as cd

    data = cd.data.sample()
    return [
        list(example.captions) for split in (data.train, data.val) for example in split.examples
    ]


def make_corpus(captions: list[list[str]], images: int) -> Corpus:
    """References by image, changed where images come again, and a caption of each image.

    Line breaks are removed: pycocoevalcap would take a caption for two.
    """
    chance = random.Random(0)
    vocabulary = [word for each in captions for text in each for word in text.split()]
    references, hypotheses = {}, {}
    for n in range(images):
        texts = [" ".join(text.split()) for text in captions[n % len(captions)]]
        if n >= len(captions):
            texts = [changed(text, vocabulary, 0.3, chance) for text in texts]
        references[str(n)] = texts
        hypotheses[str(n)] = changed(chance.choice(texts), vocabulary, 0.4, chance)
    return references, hypotheses


def changed(text: str, vocabulary: list[str], share: float, chance: random.Random) -> str:
    words = text.split()
    return " ".join(chance.choice(vocabulary) if chance.random() < share else w for w in words)


def run_ours(references: dict[str, list[str]], hypotheses: dict[str, str]) -> dict[str, Any]:
    from capdistill.metrics import CaptionScorer

    memory, start = Memory(), time.perf_counter()
    scorer = CaptionScorer(references, metrics=("bleu", "rouge_l", "cider_d"))
    scores = dict(scorer(hypotheses))
    first = time.perf_counter() - start
    again = statistics.median(timed(lambda: scorer(hypotheses)) for _ in range(5))
    ids = [image for image in hypotheses for _ in range(5)]
    texts = [hypotheses[image] for image in ids]
    batches = [slice(n, n + 160) for n in range(0, len(ids), 160)]
    rewards = timed(lambda: [scorer.rewards(ids[b], texts[b]) for b in batches]) / len(ids)
    found = {"scores": scores, "first": first, "again": again, "rewards": rewards}
    return {**found, **memory.found()}


def run_coco(references: dict[str, list[str]], hypotheses: dict[str, str]) -> dict[str, Any]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def score() -> dict[str, float]:
        given = {i: [{"caption": text} for text in each] for i, each in references.items()}
        said = {i: [{"caption": text}] for i, text in hypotheses.items()}
        given, said = PTBTokenizer().tokenize(given), PTBTokenizer().tokenize(said)
        bleu = Bleu(4).compute_score(given, said, verbose=0)[0]
        rouge, cider = (metric.compute_score(given, said)[0] for metric in (Rouge(), Cider()))
        return dict(zip(NAMES, map(float, (*bleu, rouge, cider)), strict=True))

    memory, start = Memory(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        scores = score()
    first = time.perf_counter() - start
    return {"scores": scores, "first": first, "again": first, **memory.found()}


def run_meteor(references: dict[str, list[str]], hypotheses: dict[str, str]) -> dict[str, Any]:
    """Seconds a caption: ours, and NLTK's with its WordNet on the first captions."""
    from nltk.translate.meteor_score import meteor_score

    from capdistill.metrics import MeteorNltk, ptb_tokenize

    images = [[ptb_tokenize(text) for text in each] for each in references.values()]
    captions = [ptb_tokenize(text) for text in hypotheses.values()]
    metric = MeteorNltk(images)
    metric(captions)
    ours = timed(lambda: metric(captions)) / len(captions)
    pairs = list(zip(images, captions, strict=True))[:500]
    try:
        meteor_score(*pairs[0])
    except LookupError:
        return {"ours": ours}
    theirs = timed(lambda: [meteor_score(*pair) for pair in pairs]) / len(pairs)
    found = metric(captions)["meteor_nltk"][1]
    expected = [meteor_score(*pair) for pair in pairs]
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=False))
    return {"ours": ours, "theirs": theirs, "difference": difference}


RUNS = {"ours": run_ours, "coco": run_coco, "meteor": run_meteor}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Memory(threading.Thread):
    """The highest resident bytes of this process and of those it starts, read every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.children = 0
        self.start()

    def run(self) -> None:
        while True:
            pids = [
                pid for each in Path("/proc/self/task").glob("*/children") for pid in words(each)
            ]
            self.children = max(self.children, sum(highest(pid) for pid in pids))
            time.sleep(0.01)

    def found(self) -> dict[str, int]:
        return {"process": highest("self"), "child": self.children}


def highest(process: str) -> int:
    """The peak of a process: Linux tells; 0 where it does not, or where the process is gone."""
    found = words(Path("/proc", process, "status"))
    return int(found[found.index("VmHWM:") + 1]) * 1024 if "VmHWM:" in found else 0


def words(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").split()
    except OSError:
        return []


def child(run: str, corpus: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", run, "--corpus", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"The run '{run}' failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(rounds: list[dict[str, dict[str, Any]]]) -> None:
    def middle(run: str, key: str) -> float:
        return statistics.median(each[run][key] for each in rounds)

    print(f"{'':8}{'pycocoevalcap':>16}{'capdistill':>14}{'ratio':>10}")
    for key in ("first", "again"):
        ratio = statistics.median(each["coco"][key] / each["ours"][key] for each in rounds)
        print(f"{key:8}{middle('coco', key):14.3f} s{middle('ours', key):12.3f} s{ratio:9.1f}x")
    for key, name in (("process", "memory"), ("child", "  Java")):
        print(f"{name:8}{middle('coco', key) / 1e6:13.0f} MB{middle('ours', key) / 1e6:11.0f} MB")
    ours, theirs = rounds[0]["ours"]["scores"], rounds[0]["coco"]["scores"]
    for name in NAMES:
        apart = abs(ours[name] - theirs[name])
        print(f"{name:8}{theirs[name]:16.10f}{ours[name]:14.10f}{apart:10.0e} apart")
    print(f"rewards (CIDEr-D, 160 at a time): {middle('ours', 'rewards') * 1e6:.0f} us a caption")
    meteor = rounds[0]["meteor"]
    print(f"METEOR (NLTK's): {meteor['ours'] * 1e3:.2f} ms a caption", end="")
    if "theirs" in meteor:
        ratio = statistics.median(
            each["meteor"]["theirs"] / each["meteor"]["ours"] for each in rounds
        )
        took = middle("meteor", "theirs") * 1e3
        print(f", NLTK {took:.2f} ms, {ratio:.1f}x, at most {meteor['difference']:.0e} apart")
    else:
        print("; NLTK's own needs `python -m nltk.downloader wordnet` to be compared with")


if __name__ == "__main__":
    main()
