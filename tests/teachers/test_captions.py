"""Captions of a teacher as training data: the file, the choice among candidates, the data."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import capdistill as cd
from capdistill.data import CaptionData, Example
from capdistill.errors import ConfigError, DataError
from capdistill.files import write_text
from capdistill.generation import GenerationConfig, Hypothesis
from capdistill.metrics import CaptionScorer
from capdistill.outputs import Batch
from capdistill.teachers import TeacherCaptions, caption_file, read_captions
from capdistill.teachers.caption_file import Choice, Row
from tests.training import tiny_models as tiny

QUIET: dict[str, Any] = {"device": "cpu", "precision": "fp32", "progress": False}
COLOURS = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}


def hypothesis(text: str, log_prob: float = -1.0, *, finished: bool = True) -> Hypothesis:
    tokens = tuple(range(len(text.split())))
    return Hypothesis(tokens, log_prob, finished, text=text, score=log_prob)


class Scripted(nn.Module):
    """A teacher that says what it is told; `seen` lists the images of each call."""

    tokenizer = tiny.TOKENIZER
    image_size = 8

    def __init__(self, n_best: dict[str, list[Hypothesis]], stop_after: float = math.inf) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.n_best, self.stop_after = n_best, stop_after
        self.seen: list[tuple[str, ...]] = []
        self.config: GenerationConfig | None = None

    def generate(self, batch: Batch, generation: GenerationConfig) -> list[Hypothesis]:
        if len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.seen.append(batch.image_ids)
        self.config = generation
        each = [self.n_best[image] for image in batch.image_ids]
        return [replace(found[0], n_best=tuple(found)) for found in each]


@pytest.fixture
def pictures(tmp_path: Path) -> CaptionData:
    """Seven pictures of three colours with two references each."""
    examples = []
    (tmp_path / "pictures" / "more").mkdir(parents=True)
    for n in range(7):
        colour = list(COLOURS)[n % 3]
        path = tmp_path / "pictures" / ("more" if n % 2 else ".") / f"{n}.png"
        Image.new("RGB", (12, 12), COLOURS[colour]).save(path)
        examples.append(Example(f"id{n}", path, (f"a {colour} dog", f"one {colour} cat")))
    return CaptionData(examples, name="pictures")


def script(data: CaptionData) -> dict[str, list[Hypothesis]]:
    """Four candidates of every image, of which two are usable."""
    return {
        image: [
            hypothesis(f"a dog {n}", -3.0),
            hypothesis("cut", -0.5, finished=False),
            hypothesis(f"a {references[0].split()[1]} dog", -3.5),
            hypothesis(f"a dog {n}", -4.0),
            hypothesis(" ", -5.0),
        ]
        for n, (image, references) in enumerate(data.references.items())
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# -- the file -------------------------------------------------------------------------------------


def test_a_row_holds_the_usable_candidates_in_their_order(
    pictures: CaptionData, tmp_path: Path
) -> None:
    teacher = Scripted(script(pictures))
    file, options = tmp_path / "c.jsonl", {"num_return": 9, "beam_size": 9}
    made = cd.teachers.caption(teacher, pictures, file, **options, **QUIET)
    row = lines(file)[1]
    assert (row["image_id"], row["image"]) == ("id1", "more/1.png")
    assert row["captions"] == ["a dog 1", "a lime dog"]
    assert row["log_probs"] == [-3.0, -3.5]
    assert row["lengths"] == [4, 4]  # with the end token
    assert (row["duplicates"], row["empty"], row["unfinished"]) == (1, 1, 1)
    assert made.counts == {
        **{"captions": 14, "mixed": 0, "duplicates": 7, "empty": 7, "unfinished": 7},
        **{"without": 0, "unreadable": 0},
    }
    assert "7 duplicates" in str(made)
    expected = CaptionScorer(pictures.references, metrics=["cider_d"])
    captions = dict.fromkeys(pictures.image_ids, "a lime dog")
    assert row["cider_d"][1] == pytest.approx(
        expected(captions).per_image["cider_d"]["id1"], abs=1e-12
    )


def test_several_processes_do_not_write_one_file(
    pictures: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, file = Scripted(script(pictures)), tmp_path / "c.jsonl"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes would write .*in one process before"):
        cd.teachers.caption(teacher, pictures, file, beam_size=9, **QUIET)
    monkeypatch.delenv("WORLD_SIZE")
    made = cd.teachers.caption(teacher, pictures, file, beam_size=9, **QUIET)
    monkeypatch.setenv("WORLD_SIZE", "2")  # a complete file is read
    again = cd.teachers.caption(teacher, pictures, file, beam_size=9, **QUIET)
    assert again.captions == made.captions


def test_one_process_at_a_time_writes_a_file(
    pictures: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, file, refused = Scripted(script(pictures)), tmp_path / "c.jsonl", []
    generate = Scripted.generate

    def beside_others(*arguments: Any) -> list[Hypothesis]:
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"c\.jsonl is in use: another process"):
                cd.teachers.caption(teacher, pictures, file, overwrite=overwrite, **QUIET)
            refused.append(overwrite)
        return generate(*arguments)

    monkeypatch.setattr(Scripted, "generate", beside_others)
    made = cd.teachers.caption(teacher, pictures, file, batch_size=8, **QUIET)
    assert refused == [False, True]
    assert cd.teachers.caption(teacher, pictures, file, batch_size=8, **QUIET).references == (
        made.references
    )


def test_a_full_disk_is_named_and_the_same_call_continues(
    pictures: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, file = Scripted(script(pictures)), tmp_path / "c.jsonl"

    def full(row: Row) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def captioned() -> TeacherCaptions:
        return cd.teachers.caption(teacher, pictures, file, batch_size=2, **QUIET)

    with monkeypatch.context() as patch:
        patch.setattr(Row, "line", full)
        with pytest.raises(ConfigError, match=r"c\.jsonl: No space left .*same call continues"):
            captioned()
    assert captioned().references == pictures.references


def test_captions_are_those_that_the_teacher_generates(
    pictures: CaptionData, tmp_path: Path
) -> None:
    teacher = tiny.make_teacher(seed=5)
    options = {"beam_size": 4, "max_length": 4, "min_length": 1}
    made = cd.teachers.caption(
        teacher, pictures, tmp_path / "c.jsonl", num_return=4, batch_size=3, **options, **QUIET
    )
    loader = cd.data.Loader(pictures, teacher.tokenizer, image_size=8, batch_size=7)
    (batch,) = loader
    expected = teacher.generate(batch, num_return=4, **options)
    for example, one in zip(made.examples, expected, strict=True):
        texts = [h.text for h in one.n_best if h.finished and h.text]
        assert example.captions == (*dict.fromkeys(texts),)
    assert made.counts["captions"] > 7


def test_samples_are_candidates_too(pictures: CaptionData, tmp_path: Path) -> None:
    teacher, file = tiny.make_teacher(seed=5), tmp_path / "c.jsonl"
    options: dict[str, Any] = {"sample": True, "seed": 3, "max_length": 6, "min_length": 1}
    first = cd.teachers.caption(
        teacher, pictures, file, num_return=2, candidates=6, batch_size=3, **options, **QUIET
    )
    assert max(len(row["captions"]) for row in lines(file)) > 2
    again = cd.teachers.caption(
        teacher, pictures, tmp_path / "d.jsonl", num_return=2, candidates=6, **options, **QUIET
    )
    assert [e.captions for e in first.examples] == [e.captions for e in again.examples]
    with pytest.raises(ConfigError, match=r"seed was 3 and is 4"):
        cd.teachers.caption(
            teacher, pictures, file, num_return=2, candidates=6, **{**options, "seed": 4}, **QUIET
        )


@pytest.mark.parametrize("whole_batches", [0, 1, 3])
def test_a_killed_run_continues_and_writes_the_same_file(
    pictures: CaptionData, tmp_path: Path, whole_batches: int
) -> None:
    told, options = script(pictures), {"batch_size": 2, **QUIET}
    cd.teachers.caption(Scripted(told), pictures, tmp_path / "whole.jsonl", **options)
    file = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        cd.teachers.caption(Scripted(told, stop_after=whole_batches), pictures, file, **options)
    assert len(lines(file)) == 2 * whole_batches
    content = (tmp_path / "whole.jsonl").read_bytes()
    half = content.splitlines(keepends=True)[2 * whole_batches][:-7]  # killed while writing a row
    file.write_bytes(file.read_bytes() + half)

    teacher = Scripted(told)
    cd.teachers.caption(teacher, pictures, file, **options)
    assert file.read_bytes() == content
    batches = [("id0", "id1"), ("id2", "id3"), ("id4", "id5"), ("id6",)]
    assert teacher.seen == batches[whole_batches:]


def test_a_batch_that_is_written_in_part_is_decoded_as_one(
    pictures: CaptionData, tmp_path: Path
) -> None:
    file, told = tmp_path / "c.jsonl", script(pictures)
    cd.teachers.caption(Scripted(told), pictures, file, batch_size=4, **QUIET)
    content = file.read_bytes()
    file.write_bytes(b"".join(content.splitlines(keepends=True)[:5]))
    teacher = Scripted(told)
    cd.teachers.caption(teacher, pictures, file, batch_size=4, **QUIET)
    assert teacher.seen == [("id4", "id5", "id6")]
    assert file.read_bytes() == content


def test_a_complete_file_is_read_without_decoding(pictures: CaptionData, tmp_path: Path) -> None:
    file, told = tmp_path / "c.jsonl", script(pictures)
    cd.teachers.caption(Scripted(told), pictures, file, **QUIET)
    teacher = Scripted(told, stop_after=0)
    both = cd.teachers.caption(teacher, pictures, file, num_return=2, **QUIET)
    assert both.examples[1].captions == ("a dog 1", "a lime dog")
    assert read_captions(file, pictures, num_return=2).examples == both.examples
    some = read_captions(file, pictures.subset([3, 1]), keep="cider")
    assert [e.captions for e in some.examples] == [("a red dog",), ("a lime dog",)]


def test_other_weights_options_or_data_are_refused_by_name(
    pictures: CaptionData, tmp_path: Path
) -> None:
    file, told = tmp_path / "c.jsonl", script(pictures)
    cd.teachers.caption(Scripted(told), pictures, file, **QUIET)
    other = Scripted(told)
    other.weight.data += 1
    last = Example("id6", pictures.examples[6].path, ["a dog"])
    changed = CaptionData([*pictures.examples[:6], last])
    for teacher, data, options, says in (
        (other, pictures, {}, "other weights of the teacher"),
        (Scripted(told), pictures, {"beam_size": 6}, "beam_size was 5 and is 6"),
        (Scripted(told), pictures, {"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        (Scripted(told), changed, {}, "other data"),
    ):
        before = file.read_bytes()
        with pytest.raises(ConfigError, match=rf"(?s){says}.*overwrite=True"):
            cd.teachers.caption(teacher, data, file, **{**QUIET, **options})
        assert file.read_bytes() == before
    teacher = Scripted(told)
    cd.teachers.caption(teacher, changed, file, beam_size=6, overwrite=True, **QUIET)
    assert len(teacher.seen) == 1
    assert len(lines(file)) == 7


def test_another_file_is_not_overwritten(pictures: CaptionData, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"(?s)c\.run\.json beside it.*overwrite=True"):
        cd.teachers.caption(Scripted({}), pictures, tmp_path / "c.jsonl", **QUIET)
    assert (tmp_path / "c.jsonl").read_text() == "mine\n"


def test_a_damaged_row_is_named(pictures: CaptionData, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    cd.teachers.caption(Scripted(script(pictures)), pictures, file, **QUIET)
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*rows[:3], '{"image": 3}\n', *rows[3:]]))
    with pytest.raises(DataError, match=r"c\.jsonl, row 4 .*overwrite=True"):
        read_captions(file, pictures)


def test_images_that_the_file_does_not_have_are_named(
    pictures: CaptionData, tmp_path: Path
) -> None:
    file = tmp_path / "c.jsonl"
    with pytest.raises(DataError, match="No such file"):
        read_captions(file, pictures)
    cd.teachers.caption(Scripted(script(pictures)), pictures.subset(5), file, **QUIET)
    with pytest.raises(DataError, match=r"no captions of 2 of 7 images, such as 'id5'"):
        read_captions(file, pictures)


def test_unreadable_images_are_named_keep_their_captions_and_are_tried_again(
    pictures: CaptionData, tmp_path: Path
) -> None:
    broken, file, told = pictures.examples[6].path, tmp_path / "c.jsonl", script(pictures)
    content = broken.read_bytes()
    broken.write_bytes(b"x" * len(content))
    options = {"batch_size": 2, **QUIET}
    made = cd.teachers.caption(Scripted(told), pictures, file, **options)
    assert made.counts["unreadable"] == 1
    assert made.examples[6].captions == pictures.examples[6].captions
    assert [(p.kind, p.file) for p in made.report] == [("corrupt image", str(broken))]
    for _ in range(2):
        teacher = Scripted(told)
        cd.teachers.caption(teacher, pictures, file, **options)
        assert (teacher.seen, len(lines(file))) == ([], 7)
    broken.write_bytes(content)
    made = cd.teachers.caption(Scripted(told), pictures, file, **options)
    assert (made.counts["unreadable"], made.examples[6].captions) == (0, ("a dog 6",))


def test_data_without_any_readable_image_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    data = CaptionData([Example("a", tmp_path / "a.jpg", ["a dog"])])
    with pytest.raises(DataError, match="None of the 1 images can be used"):
        cd.teachers.caption(Scripted({}), data, tmp_path / "c.jsonl", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_folder_reads_the_file(pictures: CaptionData, tmp_path: Path) -> None:
    cd.teachers.caption(Scripted(script(pictures)), pictures, tmp_path / "c.jsonl", **QUIET)
    data = cd.data.Folder(tmp_path / "pictures", captions=tmp_path / "c.jsonl")
    assert data.image_ids[:2] == ("0.png", "more/1.png")
    assert data.examples[1].captions == ("a dog 1", "a lime dog")
    assert not data.report.problems


# -- the choice -----------------------------------------------------------------------------------


def row(captions: Sequence[str], log_probs: Sequence[float], **values: Any) -> Row:
    lengths = [len(text.split()) + 1 for text in captions]
    return Row("i.png", "i", list(captions), list(log_probs), lengths, **values)


def chosen(found: Row, references: Sequence[str] = ("a human text",), **choice: Any) -> Example:
    return Choice(**choice).example(Example("i", "i.png", references), found, Counter())


def test_candidates_are_kept_by_their_order_score_or_cider() -> None:
    found = row(["one", "two three four", "five six"], [-1.0, -1.5, -0.9], cider_d=[0.1, 2.0, 2.0])
    # By hand: the means are -1/2, -1.5/4 and -0.9/3.
    for keep, expected in {
        None: ("one", "two three four"),
        "score": ("five six", "two three four"),
        "cider": ("two three four", "five six"),
    }.items():
        assert chosen(found, num_return=2, keep=keep).captions == expected


@pytest.mark.parametrize("keep", ["cider", "score"])
def test_what_is_kept_is_the_best_by_an_oracle(
    pictures: CaptionData, tmp_path: Path, keep: Any
) -> None:
    teacher = tiny.make_teacher(seed=5)
    made = cd.teachers.caption(
        teacher, pictures, tmp_path / "c.jsonl", keep=keep, beam_size=6, max_length=4, **QUIET
    )
    for example, found in zip(made.examples, lines(tmp_path / "c.jsonl"), strict=True):
        scorer = CaptionScorer(pictures.references, metrics=["cider_d"])
        values = []
        for text, log_prob in zip(found["captions"], found["log_probs"], strict=True):
            everywhere = dict.fromkeys(pictures.image_ids, text)
            cider = scorer(everywhere).per_image["cider_d"][example.image_id]
            values.append(cider if keep == "cider" else log_prob / (len(text.split()) + 1))
        assert example.captions == (found["captions"][values.index(max(values))],)


def test_references_stay_the_human_captions(pictures: CaptionData, tmp_path: Path) -> None:
    made = cd.teachers.caption(Scripted(script(pictures)), pictures, tmp_path / "c.jsonl", **QUIET)
    assert isinstance(made, TeacherCaptions)
    assert made.references == pictures.references
    assert set(made.captions) == {f"a dog {n}" for n in range(7)}
    again = cd.teachers.caption(
        Scripted(script(pictures)), made, tmp_path / "d.jsonl", keep="cider", **QUIET
    )
    assert again.references == pictures.references


@settings(deadline=None)
@given(st.integers(1, 4), st.one_of(st.integers(0, 4), st.floats(0, 0.9)), st.integers(1, 5))
def test_mixed_references_are_as_many_as_asked_for(n: int, mix: float, references: int) -> None:
    found = row([f"t{i}" for i in range(n)], [-1.0] * n)
    human = [f"h{i}" for i in range(references)]
    captions = chosen(found, human, num_return=n, mix=mix).captions
    assert captions[:n] == tuple(found.captions)
    mixed = captions[n:]
    assert len(set(mixed)) == len(mixed)
    assert set(mixed) <= set(human)
    if isinstance(mix, int):
        assert len(mixed) == min(mix, references)
    else:
        share = n * mix / (1 - mix)
        assert len(mixed) in {min(math.floor(share), references), min(math.ceil(share), references)}
    assert chosen(found, human, num_return=n, mix=mix).captions == captions


def test_a_share_holds_on_average_and_every_reference_is_used_alike() -> None:
    human, counts = ["h0", "h1", "h2"], dict.fromkeys(["h0", "h1", "h2"], 0)
    for i in range(3000):
        example, found = Example(f"{i}", "i.png", human), row(["t"], [-1.0])
        for text in Choice(mix=0.2).mixed(example, len(found.captions)):
            counts[text] += 1
    # 0.25 references beside one caption are a share of 0.2; four standard deviations.
    assert sum(counts.values()) == pytest.approx(750, abs=4 * math.sqrt(3000 * 0.25 * 0.75))
    assert all(count == pytest.approx(250, abs=60) for count in counts.values())


def test_weights_are_the_renormalised_probabilities_of_the_candidates() -> None:
    found = row(["one", "two", "three"], [-1.0, -2.0, -4.0])
    example = chosen(found, ["h"], num_return=2, mix=1, reweight=0.5)
    # Oracle: p ** (1 / T) over the two kept captions, times 2; the human caption has 1.
    first, second = math.exp(-1.0) ** 2, math.exp(-2.0) ** 2
    expected = [2 * first / (first + second), 2 * second / (first + second), 1.0]
    assert example.weights == pytest.approx(expected, abs=1e-12)
    assert chosen(found).weights is None


def test_an_image_without_a_usable_caption_keeps_its_own() -> None:
    found = row([], [], unfinished=5)
    example = chosen(found, ["h0", "h1"], keep="cider", mix=1, reweight=1.0)
    assert (example.captions, example.weights) == (("h0", "h1"), None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": "cider_d"}, "keep='cider_d' is unknown.*'cider'"),
        ({"num_return": 0}, "num_return=0"),
        ({"num_return": 6}, "cannot be chosen among 5 candidates"),
        ({"candidates": 6}, "num_return=6 needs as many beams"),
        ({"mix": -1}, "mix=-1"),
        ({"mix": 1.0}, "as a share"),
        ({"mix": True}, "mix=True"),
        ({"reweight": 0.0}, "reweight=0.0"),
        ({"beem_size": 3}, "beem_size"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"overwrite": 1}, "overwrite=1"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(
    pictures: CaptionData, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        cd.teachers.caption(Scripted({}), pictures, tmp_path / "c.jsonl", **{**QUIET, **options})
    assert not (tmp_path / "c.jsonl").exists()


def test_a_model_that_does_not_generate_and_other_data_are_refused(
    pictures: CaptionData, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"Linear is no module with generate\(batch\)"):
        cd.teachers.caption(nn.Linear(1, 1), pictures, tmp_path / "c.jsonl")
    with pytest.raises(DataError, match=r"list was given as data"):
        cd.teachers.caption(Scripted({}), [("a.jpg", "a dog")], tmp_path / "c.jsonl")  # type: ignore[arg-type]


# -- with the rest --------------------------------------------------------------------------------


def test_images_without_captions_get_those_of_the_teacher(
    pictures: CaptionData, tmp_path: Path
) -> None:
    told = {f"more/{n}.png" if n % 2 else f"{n}.png": [hypothesis(f"a {n}")] for n in range(7)}
    data, file = cd.data.Images(tmp_path / "pictures"), tmp_path / "c.jsonl"
    made = cd.teachers.caption(Scripted(told), data, file, mix=0.5, **QUIET)
    assert sorted(made.captions) == [f"a {n}" for n in range(7)]
    with pytest.raises(ConfigError, match=r"keep='cider' scores captions against references"):
        read_captions(file, data, keep="cider")


def test_features_cached_by_training_are_used(pictures: CaptionData, tmp_path: Path) -> None:
    teacher, student = tiny.make_teacher(trainable=False), tiny.make_student()
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    trainer = cd.Distiller(teacher, student, {"feature": "feature"}, **tiny.QUIET, **cache)
    trainer.fit(pictures, epochs=1)
    encoder = teacher.encoder
    assert isinstance(encoder, tiny.Patches)
    encoder.seen = 0
    options = {"beam_size": 2, "max_length": 4, "batch_size": 4, **QUIET}
    cached = cd.teachers.caption(teacher, pictures, tmp_path / "c.jsonl", **cache, **options)
    assert encoder.seen == 0
    plain = cd.teachers.caption(teacher, pictures, tmp_path / "d.jsonl", **options)
    assert encoder.seen == 7
    assert cached.captions == plain.captions


def test_flags_and_device_of_the_teacher_are_restored(
    pictures: CaptionData, tmp_path: Path
) -> None:
    teacher = tiny.make_teacher(dropout=0.5).train()
    before = tiny.weights_of(teacher)
    made = [
        cd.teachers.caption(teacher, pictures, tmp_path / name, max_length=5, **QUIET)
        for name in ("c.jsonl", "d.jsonl")
    ]
    assert all(module.training for module in teacher.modules())
    assert tiny.same_bits(before, tiny.weights_of(teacher))
    assert made[0].captions == made[1].captions


def test_a_wrapped_teacher_captions_too(pictures: CaptionData, tmp_path: Path) -> None:
    inner = tiny.make_teacher(seed=5)
    wrapped = cd.teachers.wrap(
        inner, lambda module, batch: module(batch), inner.tokenizer, image_size=8
    )
    options = {"beam_size": 3, "max_length": 4, "num_return": 3, **QUIET}
    one = cd.teachers.caption(wrapped, pictures, tmp_path / "c.jsonl", **options)
    other = cd.teachers.caption(inner, pictures, tmp_path / "d.jsonl", **options)
    assert [e.captions for e in one.examples] == [e.captions for e in other.examples]


def test_an_ensemble_captions_from_cached_features(pictures: CaptionData, tmp_path: Path) -> None:
    members = [tiny.make_teacher(seed, trainable=False) for seed in (5, 6)]
    ensemble = cd.teachers.Ensemble({"one": members[0], "two": members[1]})
    options = {"beam_size": 3, "max_length": 4, "num_return": 3, "batch_size": 4, **QUIET}
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    plain = cd.teachers.caption(ensemble, pictures, tmp_path / "c.jsonl", **options)
    for name in ("d.jsonl", "e.jsonl"):
        for member in members:
            member.encoder.seen = 0  # type: ignore[assignment]
        cached = cd.teachers.caption(ensemble, pictures, tmp_path / name, **cache, **options)
        assert [e.captions for e in cached.examples] == [e.captions for e in plain.examples]
    assert [member.encoder.seen for member in members] == [0, 0]
    assert plain.counts["captions"] > 7
    for changed in ({"weights": [3, 1]}, {"mixing": "confidence"}):
        other = cd.teachers.Ensemble({"one": members[0], "two": members[1]}, **changed)
        with pytest.raises(ConfigError, match="mixture"):
            cd.teachers.caption(other, pictures, tmp_path / "c.jsonl", **options)


def test_a_member_that_cannot_be_cached_reads_the_images(
    pictures: CaptionData, tmp_path: Path
) -> None:
    own, inner = tiny.make_teacher(5, trainable=False), tiny.make_teacher(6)
    wrapped = cd.teachers.wrap(inner, lambda m, batch: m(batch), inner.tokenizer, image_size=8)
    ensemble = cd.teachers.Ensemble({"own": own, "wrapped": wrapped})
    options = {"beam_size": 2, "max_length": 4, **QUIET}
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    cached = cd.teachers.caption(ensemble, pictures, tmp_path / "c.jsonl", **cache, **options)
    plain = cd.teachers.caption(ensemble, pictures, tmp_path / "d.jsonl", **options)
    assert cached.captions == plain.captions
    assert cached.counts["captions"] > 0


def test_a_teacher_without_a_captioner_has_nothing_to_cache(
    pictures: CaptionData, tmp_path: Path
) -> None:
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ConfigError, match=r"no encoder that can be cached.*cache_features=False"):
        cd.teachers.caption(Scripted({}), pictures, tmp_path / "c.jsonl", **cache, **QUIET)


def test_a_student_learns_what_the_teacher_says(pictures: CaptionData, tmp_path: Path) -> None:
    says = {"red": "blue cat", "lime": "a dog", "blue": "red red"}
    told = {
        image: [hypothesis(says[references[0].split()[1]])]
        for image, references in pictures.references.items()
    }
    train = cd.teachers.caption(Scripted(told), pictures, tmp_path / "c.jsonl", **QUIET)
    student = tiny.make_student()
    trainer = cd.Trainer(
        student, learning_rate=0.05, batch_size=7, schedule="constant", **tiny.QUIET
    )
    trainer.fit(train, epochs=30)
    found = student.caption([example.path for example in pictures.examples])
    assert found == [told[image][0].text for image in pictures.image_ids]


def test_rewards_and_curricula_read_the_right_captions(
    pictures: CaptionData, tmp_path: Path
) -> None:
    train = cd.teachers.caption(Scripted(script(pictures)), pictures, tmp_path / "c.jsonl", **QUIET)
    trainer = cd.SelfCritical(tiny.make_student(), samples=2, **tiny.QUIET)
    trainer.prepare_data(train)
    assert trainer.rewards is not None
    found = trainer.rewards(["id0", "id0"], ["a red dog", "a dog 0"])
    expected = CaptionScorer(pictures.references, metrics=["cider_d"])
    assert list(found) == list(expected.rewards(["id0", "id0"], ["a red dog", "a dog 0"]))
    assert cd.data.difficulty(train) == dict.fromkeys(pictures.image_ids, 3.0)  # "a dog 0"


def test_half_precision_and_cached_features_go_together(
    pictures: CaptionData, tmp_path: Path
) -> None:
    teacher = tiny.make_teacher(trainable=False)
    options = {"beam_size": 2, "max_length": 4, **QUIET, "precision": "bf16"}
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    cached = cd.teachers.caption(teacher, pictures, tmp_path / "c.jsonl", **cache, **options)
    assert len(cached) == len(pictures)


def test_the_output_of_frozen_stages_cached_by_training_is_used(
    pictures: CaptionData, tmp_path: Path
) -> None:
    tokenizer = cd.WordTokenizer.train(pictures.captions, min_count=1)
    encoder = cd.encoders.create(
        "timm", name="test_efficientnet", dim=8, trainable=1, weights=False
    )
    decoder = cd.decoders.create("lstm", dim=8, embed=8, hidden=8, layers=1, heads=2)
    teacher = cd.Captioner(encoder, decoder, tokenizer)
    cache = {"cache_features": True, "cache_dir": tmp_path / "cache"}
    cd.Trainer(teacher, **tiny.QUIET, **cache).fit(pictures, epochs=1)
    written = sorted((tmp_path / "cache").iterdir())
    options = {"beam_size": 2, "max_length": 4, **QUIET}
    cached = cd.teachers.caption(teacher, pictures, tmp_path / "c.jsonl", **cache, **options)
    assert sorted((tmp_path / "cache").iterdir()) == written
    plain = cd.teachers.caption(teacher, pictures, tmp_path / "d.jsonl", **options)
    assert [e.captions for e in cached.examples] == [e.captions for e in plain.examples]


def test_a_file_of_any_suffix_can_be_read_again(pictures: CaptionData, tmp_path: Path) -> None:
    for name in ("c.json", "c.txt", "c"):
        made = cd.teachers.caption(Scripted(script(pictures)), pictures, tmp_path / name, **QUIET)
        assert read_captions(tmp_path / name, pictures).captions == made.captions


def test_files_of_one_stem_are_described_apart(pictures: CaptionData, tmp_path: Path) -> None:
    teacher = Scripted(script(pictures))
    for name, beams in (("c.jsonl", 5), ("c.txt", 4)):
        cd.teachers.caption(teacher, pictures, tmp_path / name, beam_size=beams, **QUIET)
    read = cd.teachers.caption(teacher, pictures, tmp_path / "c.jsonl", beam_size=5, **QUIET)
    assert len(read) == 7
    with pytest.raises(ConfigError, match="beam_size was 4 and is 5"):
        cd.teachers.caption(teacher, pictures, tmp_path / "c.txt", beam_size=5, **QUIET)


def test_old_rows_never_stand_beside_a_new_description(
    pictures: CaptionData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, file = Scripted(script(pictures)), tmp_path / "c.jsonl"
    cd.teachers.caption(teacher, pictures, file, **QUIET)

    def killed(path: Path, text: str) -> None:
        write_text(path, text)
        raise KeyboardInterrupt

    monkeypatch.setattr(caption_file, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        cd.teachers.caption(teacher, pictures, file, beam_size=4, overwrite=True, **QUIET)
    monkeypatch.undo()
    teacher.seen.clear()
    cd.teachers.caption(teacher, pictures, file, beam_size=4, **QUIET)
    assert teacher.seen


def test_a_directory_is_no_file_of_captions(pictures: CaptionData, tmp_path: Path) -> None:
    place = tmp_path / "captions"
    place.mkdir()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is a directory"):
            cd.teachers.caption(
                Scripted(script(pictures)), pictures, place, overwrite=overwrite, **QUIET
            )
    assert list(tmp_path.glob("*.json")) == []
    with pytest.raises(ConfigError, match="is a directory"):
        cd.teachers.caption(Scripted(script(pictures)), pictures, ".", **QUIET)


@pytest.mark.parametrize(
    "change",
    [
        {"captions": "a dog"},
        {"captions": [3, 4]},
        {"log_probs": []},
        {"lengths": ["4", "4"]},
        {"cider_d": {}},
        {"empty": "none"},
        {"image_id": ["id1"]},
    ],
)
def test_a_row_with_other_types_is_named(
    pictures: CaptionData, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "c.jsonl"
    cd.teachers.caption(Scripted(script(pictures)), pictures, file, **QUIET)
    rows = [json.dumps({**row, **(change if n == 1 else {})}) for n, row in enumerate(lines(file))]
    file.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="row 2 is not a row"):
        read_captions(file, pictures)


@pytest.mark.parametrize("data", [None, [("dog.jpg", ["a dog"])], "photos"])
def test_captions_are_read_for_data_sets_alone(tmp_path: Path, data: Any) -> None:
    with pytest.raises(DataError, match=r"read_captions: .* was given as data"):
        read_captions(tmp_path / "c.jsonl", data)


def test_a_share_may_be_a_number_of_numpy() -> None:
    assert Choice(mix=np.float32(0.5)) == Choice(mix=0.5)
    with pytest.raises(ConfigError, match="without a decimal point"):
        Choice(mix=1.0)
