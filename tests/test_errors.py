import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import capdistill as cd
from capdistill import testing
from capdistill.errors import (
    ConfigError,
    DataError,
    as_float,
    require_int,
    require_number,
    require_text,
    suggest,
)
from capdistill.evaluation import bench
from capdistill.generation import GenerationSpec, greedy

NAN = float("nan")
NO_TEXT = [
    None,
    NAN,
    3,
    True,
    ["a dog", "a cat"],
    ("a dog",),
    {"raw": "a dog"},
    b"a dog",
    pytest.param(object(), id="object()"),
]
PRINTED = [
    "['a dog', 'a cat']",
    '["a dog"]',
    "('a dog', 'a cat')",
    "{'raw': 'a dog'}",
    "[{'raw': 'a dog'}]",
    "b'a dog'",
    "['a dog', nan]",
    '{"raw": "a dog", "id": null}',
    "[None]",
    "array(['a dog'], dtype='<U5')",
    "deque(['a dog'])",
    pytest.param("<object object at 0x7f10f96dbe70>", id="an object"),
    str(np.array(["a dog", "a cat"])),
]


@pytest.mark.parametrize("value", NO_TEXT, ids=lambda value: type(value).__name__)
def test_a_caption_that_is_not_text_is_refused_with_its_place_and_type(value) -> None:
    with pytest.raises(DataError, match=rf"^row 3 is .*\({type(value).__name__}\)"):
        require_text(value, "row 3")


@pytest.mark.parametrize("value", PRINTED)
def test_a_container_printed_into_a_string_is_no_caption(value: str) -> None:
    with pytest.raises(DataError, match="printed into a string"):
        require_text(value, "row 3")


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a dog",
        "[a dog]",
        "(a man)",
        "[UNK]",
        "<unk> a dog",
        "array (of dogs)",
        "[1]",
        "(3)",
        "{}",
        "b'",
        "[",
        "('",
        "1",
    ],
)
def test_text_with_brackets_is_a_caption(value: str) -> None:
    assert require_text(value, "row 3") == value


@pytest.mark.parametrize("value", [True, "8", 8.0, NAN, None, [8], 0, -1, 9])
def test_what_is_no_whole_number_within_the_limits_is_refused(value) -> None:
    with pytest.raises(ConfigError, match=r"^evaluate: limit=.* was given; expected a whole"):
        require_int("evaluate: limit", value, 1, 8)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    found = require_int("evaluate: limit", np.int64(8), 1, 8)
    assert (found, type(found)) == (8, int)


@pytest.mark.parametrize("value", [True, "0.5", NAN, float("inf"), None, 0, 1.0, 1j])
def test_what_is_no_finite_number_within_the_limits_is_refused(value) -> None:
    with pytest.raises(ConfigError, match="expected a number above 0 and below 1"):
        require_number("confidence", value, above=0, below=1)


def test_errors_do_not_import_pydantic() -> None:
    code = "import sys, capdistill.errors; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


HUGE = 10**400  # as JSON can hold it; float() raises OverflowError
PHOTO = cd.data.sample().train.subset(1)


def test_a_whole_number_beyond_all_floats_is_infinite() -> None:
    assert (as_float(HUGE), as_float(-HUGE)) == (math.inf, -math.inf)
    assert as_float(Fraction(HUGE, 3)) == math.inf
    assert all(math.isnan(as_float(each)) for each in (True, "1", None, 1j, [1]))


@pytest.mark.parametrize(
    "use",
    [
        lambda: require_number("share", HUGE),
        lambda: cd.TokenKD(temperature=HUGE),
        lambda: cd.TokenKD(temperature=(1, HUGE)),
        lambda: cd.TokenKD(temperature={"schedule": "cosine", "first": 1, "last": HUGE}),
        lambda: cd.GenerationConfig(length_penalty=HUGE),
        lambda: cd.training.DistillConfig(on_policy=HUGE),
        lambda: cd.training.TrainConfig(learning_rate=HUGE),
        lambda: cd.data.Curriculum(PHOTO, dict.fromkeys(PHOTO.image_ids, HUGE)),
    ],
)
def test_a_whole_number_beyond_all_floats_is_refused_as_any_wrong_number(use: Any) -> None:
    with pytest.raises(ValueError, match="1000000"):
        use()


def student() -> cd.Captioner:
    return cd.Captioner.create("debug_student", tokenizer=cd.WordTokenizer(["a", "dog"]))


def batch(**changed: Any) -> cd.Batch:
    ids = torch.tensor([[1, 4, 2]])
    given = {"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "input_ids": ids}
    return cd.Batch(
        **{**given, "mask": ids > 0, "captions": ("a",), "image_ids": ("1",), **changed}
    )


STUDENT, SPEC = student(), student().spec()
USES = {
    "check_loss": testing.check_loss,
    "check_decoder": testing.check_decoder,
    "check_encoder": testing.check_encoder,
    "RetokenizingTeacher": cd.teachers.RetokenizingTeacher,
    "TrimmedTeacher": lambda value: cd.teachers.TrimmedTeacher(value, STUDENT.tokenizer),
    "normalised": lambda value: cd.teachers.normalised(value, (0, 0, 0), (1, 1, 1)),
    "normalised, mean": lambda value: cd.teachers.normalised(batch(), value, (1, 1, 1)),
    "forward": STUDENT,
    "forward, need": lambda value: STUDENT(batch(), need=value),
    "encode": STUDENT.encode,
    "create, encoder": lambda value: cd.Captioner.create(
        "debug_student", tokenizer=STUDENT.tokenizer, encoder=value
    ),
    **{
        f"Batch, {name}": lambda value, name=name: batch(**{name: value})
        for name in ("images", "input_ids", "mask", "captions", "image_ids")
    },
    **{
        f"build {name}": lambda value, name=name: cd.losses.create(name).build(SPEC, value)
        for name in cd.losses.names()
    },
    "cache_features": lambda value: cd.training.cache_features(value, PHOTO),
    "recipe": cd.training.recipe,
    "HiddenKD, distance": lambda value: cd.HiddenKD(distance=value),
    "Curriculum, pacing": lambda value: cd.data.Curriculum(PHOTO, pacing=value),
    "Shards": cd.data.Shards,
    "write_shards": lambda value: cd.data.write_shards(value, "/no/such/folder"),
    "read_coco_results": lambda value: cd.metrics.read_coco_results(value, value),
    "DocumentFrequencies": cd.metrics.DocumentFrequencies.load,
    "bench": lambda value: bench(value, "/no/such/folder"),
    "bench, images": lambda value: bench("debug_student", value),
    "compare, histories": lambda value: cd.compare(
        None, {"a": STUDENT, "b": STUDENT}, PHOTO, histories=value
    ),
    "greedy": lambda value: greedy(value, torch.zeros(1, 2, 3), start_id=1, end_id=2, max_length=3),
    "max_length": lambda value: GenerationSpec.from_ids(1, 2, value),
}


ACCEPTED = {
    "create, encoder": (None, {"a": 1}),  # unknown arguments are refused elsewhere
    "compare, histories": (None, {"a": 1}),
    "Batch, captions": ({"a": 1},),
    "Batch, image_ids": ({"a": 1},),
}


@pytest.mark.parametrize(
    "value", [None, 1.5, object(), [1], {"a": 1}, dict], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("use", USES)
def test_a_value_of_another_kind_is_refused_by_name(use: str, value: Any) -> None:
    if value in ACCEPTED.get(use, ()):
        return
    with pytest.raises((ConfigError, DataError)):
        USES[use](value)


def test_the_message_says_what_was_given_and_what_is_expected() -> None:
    for use, message in {
        "check_encoder": "'runs/x' was given; expected an object of Encoder, or its class",
        "RetokenizingTeacher": r"'runs/x' was given as the teacher. Give .*load\(directory\)",
        "create, encoder": "encoder='runs/x' was given; expected its arguments by name",
        "Batch, mask": "Batch: mask is 'runs/x', not a Tensor",
        "build token": "TokenKD.build: str was given as the teacher; expected a ModelSpec",
    }.items():
        with pytest.raises((ConfigError, DataError), match=message):
            USES[use]("runs/x")


@pytest.mark.parametrize(("name", "near"), [("CIDEr", "cider_d"), ("BLEU-4", "bleu_4")])
def test_a_name_in_capitals_has_a_nearest_match(name: str, near: str) -> None:
    assert suggest(name, ["bleu_4", "cider_d", "rouge_l"]).startswith(f"Did you mean '{near}'?")
