"""Damaged files of every kind give our errors or their content, in bounded time and memory."""

from __future__ import annotations

import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capdistill import encoders
from tests.fuzz_targets import attempt, targets
from tests.toy_captioner import Patches

CASES = 15  # of each kind of file; benchmarks/fuzz.py tries thousands
NAMES = (
    *("training state", "state to resume", "weights", "zipped weights", "captioner.json"),
    *(
        "tokenizer.json",
        "model.safetensors",
        "tokenizer",
        "subword tokenizer",
        "run file",
        "history",
        "flickr8k",
    ),
    *("flickr8k tokens", "csv", "json lines", "coco", "karpathy", "results", "references"),
    *("document frequencies", "image", "ensemble.json", "shard", "index of a shard"),
    *("teacher captions", "captions of an API", "pretrained.json", "exported manifest"),
    *("cached targets.json", "cached index.jsonl"),
)


@pytest.fixture(scope="module")
def every_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.registry._decorated, "toy-patches", [Patches])
        yield targets(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_tried(every_target: Any) -> None:
    assert tuple(every_target) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_read_or_refused(every_target: Any, tmp_path: Path, name: str) -> None:
    target, ways = every_target[name]
    seeds = target.seeds()
    for seed in seeds:
        assert attempt(target, tmp_path, seed) == "read"  # what is damaged was valid
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=CASES, deadline=None, suppress_health_check=quiet)
    @given(st.one_of([way(seeds) for way in ways]))
    def tried(content: bytes) -> None:
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt(target, tmp_path, content)
        assert time.process_time() - began < 10

    tried()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown:,} KB more memory"
