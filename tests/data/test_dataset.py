from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capdistill.data import CaptionData, DataReport, Example, Problem, Splits
from capdistill.errors import ConfigError, DataError
from tests.data.data_pictures import broken_files


def many(n: int) -> CaptionData:
    return CaptionData(Example(f"{i}.jpg", Path(f"{i}.jpg"), ("a", "b")) for i in range(n))


def test_import_brings_no_image_library() -> None:
    program = (
        "import sys, capdistill as cd; cd.data\n"
        "print([m for m in ('PIL', 'torchvision', 'timm', 'nltk') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    assert out.strip() == b"[]"


def test_a_split_depends_on_the_seed_and_ids_alone() -> None:
    data = many(40)
    back = data.subset(reversed(range(40)))
    for part in ("train", "val", "test"):
        one = data.split(val=0.2, test=0.1, seed=1).get(part).image_ids
        assert one == back.split(val=0.2, test=0.1, seed=1).get(part).image_ids
    assert data.split(seed=1).val.image_ids != data.split(seed=2).val.image_ids


def test_a_split_holds_every_image_once() -> None:
    parts = many(40).split(val=0.2, test=0.1)
    assert sorted(parts.all.image_ids) == sorted(many(40).image_ids)
    assert (len(parts.train), len(parts.val), len(parts.test)) == (28, 8, 4)


def test_a_split_of_too_few_images_is_refused() -> None:
    with pytest.raises(DataError, match="1 images cannot be split"):
        many(1).split(val=0.1)


def test_an_id_that_occurs_twice_is_refused() -> None:
    example = Example("a.jpg", Path("a.jpg"), ("a",))
    with pytest.raises(DataError, match=r"'a\.jpg' occurs twice"):
        CaptionData([example, example])


def test_an_image_without_caption_is_refused() -> None:
    with pytest.raises(DataError, match=r"'a\.jpg' has no caption"):
        CaptionData([Example("a.jpg", Path("a.jpg"), ())])


@pytest.mark.parametrize("examples", [None, "photos", 3])
def test_examples_are_objects_with_an_id_a_path_and_captions(examples: Any) -> None:
    with pytest.raises(DataError, match=r"was given; expected Example\(image_id, path"):
        CaptionData(examples)


@pytest.mark.parametrize("which", ["3", None, 2.5, [0.5], ["0"], [None], [True]])
def test_a_subset_is_a_count_or_positions(which: Any) -> None:
    with pytest.raises(ConfigError, match=r"subset.*expected a whole number"):
        many(3).subset(which)


@pytest.mark.parametrize("parts", ["train", None, [("train", 1)], {3: "data"}])
def test_splits_are_a_mapping_by_name(parts: Any) -> None:
    with pytest.raises(ConfigError, match="expected a mapping of names to data"):
        Splits(parts)


@pytest.mark.parametrize("name", [None, [], 3])
def test_what_cannot_name_a_split_is_refused(name: Any) -> None:
    with pytest.raises(DataError, match="has no split"):
        Splits({"train": many(1)}).get(name)


def test_an_absent_split_lists_those_there_are() -> None:
    with pytest.raises(DataError, match=r"mine has no split 'val': .* Available splits: train"):
        Splits({"train": many(2)}, name="mine").val  # noqa: B018


def test_verify_names_every_broken_image(tmp_path: Path) -> None:
    paths = broken_files(tmp_path)
    data = CaptionData(Example(path.name, path, ("noise",)) for path in paths)
    found = [problem.file for problem in data.verify()]
    assert found == [str(path) for path in paths]


def test_a_report_counts_each_problem_once_and_shows_the_first() -> None:
    report = DataReport()
    for n in (*range(30), 0):
        report.add(Problem("empty caption", "c.csv", f"row {n}"))
    assert len(report) == 30
    assert str(report).endswith("... and 10 more (see .problems)")


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="errors='skip' or 'raise'"):
        DataReport("ignore")  # type: ignore[arg-type]
