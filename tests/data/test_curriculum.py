"""Easy images first: ranking, competence, the images of an epoch, and resuming (law 7)."""

from __future__ import annotations

import json
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from capdistill import Captioner, SelfCritical, Trainer
from capdistill.cli.data import parse_data
from capdistill.data import CaptionData, Curriculum, Example, Loader, difficulty, sample
from capdistill.data.images import view_of
from capdistill.errors import CheckpointError, ConfigError, DataError, UnknownName
from capdistill.tokenizer import WordTokenizer
from capdistill.training import model_difficulty
from tests.training import tiny_models as tiny
from tests.training.conftest import saveable  # noqa: F401

PACINGS = ("linear", "root", "step")


def numbered(count: int) -> CaptionData:
    """Image n has difficulty n: its captions have n words on average."""
    return CaptionData(
        Example(f"{n}", Path(f"{n}.jpg"), ("a " * n, "a " * (n + 1), "a " * (n + 2)))
        for n in range(1, count + 1)
    )


def texts_only(count: int, **options: Any) -> Loader:
    options = {"image_size": 8, "with_images": False, "train": True, **options}
    return Loader(Curriculum(numbered(count), start=0.2), WordTokenizer(["a"]), **options)


# -- difficulty ---------------------------------------------------------------------------------


def test_length_is_the_mean_number_of_words() -> None:
    found = difficulty([("x", ["a dog", "A dog, running fast."]), ("y", "one")], "length")
    assert found == {"0": 3.0, "1": 1.0}


def test_rarity_is_minus_the_log_probability_of_the_words() -> None:
    """By hand: frequencies a 3/6, dog 2/6, cat 1/6."""
    found = difficulty([("x", ["a dog", "a dog"]), ("y", ["a cat"])], "rarity")
    assert found == pytest.approx({"0": -math.log(1 / 6), "1": -math.log(1 / 12)})


def test_a_function_of_a_caption_is_averaged_over_the_captions() -> None:
    assert difficulty([("x", ["aa", "aaaa"])], len) == {"0": 3.0}


@pytest.mark.parametrize("kind", ["loss", "entropy"])
def test_the_difficulty_for_a_model_equals_a_loop_over_images(
    colours: CaptionData, kind: Any
) -> None:
    model = tiny.make_teacher(dropout=0.5)
    found = model_difficulty(model, colours, kind, batch_size=4, device="cpu", precision="fp32")
    assert model.training
    model.eval()
    (batch,) = Loader(colours, model.tokenizer, image_size=tiny.SIDE, batch_size=6)
    logits = model(batch).logits.detach().double()
    for i, name in enumerate(batch.image_ids):
        mask = batch.target_mask[i]
        rows, goals = logits[i][mask], batch.targets[i][mask]
        p = rows.softmax(-1)
        wanted = cross_entropy(rows, goals) if kind == "loss" else -(p * p.log()).sum(-1).mean()
        assert found[name] == pytest.approx(float(wanted), rel=1e-5)


def test_an_unreadable_image_gets_the_mean_difficulty(colours: CaptionData) -> None:
    colours.examples[2].path.write_bytes(b"no picture")
    values = model_difficulty(tiny.make_teacher(), colours, device="cpu", precision="fp32")
    others = [value for name, value in values.items() if name != "g2.png"]
    assert values["g2.png"] == pytest.approx(sum(others) / 5)
    assert len(Curriculum(colours, values)) == 6


def test_an_image_without_captions_gets_the_mean_difficulty(colours: CaptionData) -> None:
    bare = [Example.unlabelled("x.png", colours.examples[0].path), *colours.examples]
    data, model = CaptionData(bare), tiny.make_teacher()
    for values in (difficulty(data), model_difficulty(model, data, device="cpu")):
        others = [value for name, value in values.items() if name != "x.png"]
        assert len(others) == 6
        assert values["x.png"] == pytest.approx(sum(others) / 6)
    with pytest.raises(DataError, match="no image has a caption"):
        difficulty(CaptionData(bare[:1]))


def test_difficulty_is_that_of_the_captions_trained_on_not_of_other_references() -> None:
    data = CaptionData([Example("x", "x.jpg", ["a dog runs"], references=["a"])])
    assert difficulty(data) == {"x": 3.0}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_the_ranking_is_a_stable_sort_that_does_not_follow_the_order_of_the_data(
    values: list[int],
) -> None:
    data = numbered(len(values))
    table = dict(zip(data.image_ids, values, strict=True))
    ranked = [values[i] for i in Curriculum(data, table).ranking]
    assert ranked == sorted(values)
    mirrored = CaptionData(reversed(data.examples))
    names = [data.image_ids[i] for i in Curriculum(data, table).ranking]
    assert names == [mirrored.image_ids[i] for i in Curriculum(mirrored, table).ranking]


def test_equal_images_are_not_ranked_in_the_order_of_the_data() -> None:
    ranking = Curriculum(numbered(30), lambda caption: 1.0).ranking
    assert sorted(ranking) == list(range(30)) != list(ranking)


# -- competence ---------------------------------------------------------------------------------


def test_competence_follows_the_published_functions() -> None:
    data = numbered(4)
    for t in (0.0, 0.1, 0.3):
        share = t / 0.4  # t / T
        linear = Curriculum(data, pacing="linear", start=0.2, until=0.4).competence(t)
        root = Curriculum(data, pacing="root", start=0.2, until=0.4).competence(t)
        step = Curriculum(data, pacing="step", start=0.2, until=0.4).competence(t)
        assert linear == pytest.approx(min(1, share * (1 - 0.2) + 0.2))
        assert root == pytest.approx(min(1, math.sqrt(share * (1 - 0.2**2) + 0.2**2)))
        assert step == 0.2


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(PACINGS),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
)
def test_competence_grows_from_the_start_to_one(
    pacing: Any, start: float, until: float, times: list[float]
) -> None:
    curriculum = Curriculum(numbered(3), pacing=pacing, start=start, until=until)
    found = [curriculum.competence(time) for time in sorted(times)]
    assert found == sorted(found)
    assert all(start - 1e-9 <= share <= 1 for share in found)
    assert curriculum.competence(0) == pytest.approx(start)
    assert curriculum.competence(until) == curriculum.competence(1) == 1


# -- the images of an epoch ---------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 40),
    epochs=st.integers(1, 12),
    epoch=st.integers(0, 12),
    seed=st.integers(0, 3),
    start=st.floats(0.01, 1),
    pacing=st.sampled_from(PACINGS),
)
def test_an_epoch_draws_evenly_from_exactly_the_easiest_images(
    images: int, epochs: int, epoch: int, seed: int, start: float, pacing: Any
) -> None:
    curriculum = Curriculum(numbered(images), start=start, pacing=pacing, until=0.6)
    order = curriculum.order(seed, epoch, epochs)
    counts = Counter(number % images for number in order)
    share = curriculum.competence(epoch / epochs)
    wanted = max(1, math.ceil(share * images - 1e-9))  # image n is the n-th easiest
    assert sorted(counts) == list(range(wanted))
    assert sum(counts.values()) == images
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({*order}) == images  # every repetition has a number of its own
    assert order == curriculum.order(seed, epoch, epochs)


def test_none_is_repeated_before_all_were_drawn() -> None:
    order = Curriculum(numbered(10), start=0.3, pacing="step").order(0, 0, 4)
    first, second, third, rest = order[:3], order[3:6], order[6:9], order[9:]
    assert [sorted(part) for part in (first, second, third)] == [
        [0, 1, 2],
        [10, 11, 12],
        [20, 21, 22],
    ]
    assert rest[0] - 30 in (0, 1, 2)


def test_at_competence_one_the_epochs_are_those_without_a_curriculum() -> None:
    loader = texts_only(10, batch_size=4, epochs=4)
    plain = Loader(numbered(10), WordTokenizer(["a"]), image_size=8, with_images=False, train=True)
    plain.batch_size = 4
    for epoch in (2, 3):
        batches = [(b.image_ids, b.captions) for b in loader.epoch(epoch)]
        assert batches == [(b.image_ids, b.captions) for b in plain.epoch(epoch)]
    early = {name for batch in loader.epoch(0) for name in batch.image_ids}
    assert early == {"1", "2"}
    assert len(list(loader.epoch(0))) == len(loader) == len(plain)


def test_a_repetition_has_its_own_captions_and_view(tmp_path: Path) -> None:
    loader = texts_only(10, batch_size=1, captions_per_image=1, epochs=4)
    captions: dict[str, list[str]] = {}
    for batch in loader.epoch(0):
        captions.setdefault(batch.image_ids[0], []).append(batch.captions[0])
    assert all(len(texts) == 5 and len({*texts}) > 1 for texts in captions.values())

    views = [{f"{n}": torch.full((1, 1), float(view)) for n in range(1, 11)} for view in range(4)]
    loader = texts_only(10, batch_size=1, epochs=4, views=4, caches={"key": views})
    seen: dict[str, list[int]] = {}
    for batch in loader.epoch(0):
        seen.setdefault(batch.image_ids[0], []).append(int(batch.cached["key"]))
    for name, found in seen.items():
        assert found == [view_of(again, name, 4) for again in range(5)]


def test_workers_and_a_start_within_the_epoch_change_nothing(colours: CaptionData) -> None:
    def batches(start: int = 0, **options: Any) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        curriculum = Curriculum(colours, lambda caption: len(caption), start=0.5)
        loader = Loader(
            curriculum, tiny.TOKENIZER, image_size=8, batch_size=2, train=True, epochs=3, **options
        )
        return [(batch.image_ids, batch.images) for batch in loader.epoch(0, start)]

    whole = batches()
    for again, wanted in ((batches(num_workers=2), whole), (batches(1), whole[1:])):
        for (ids, images), (other, pixels) in zip(again, wanted, strict=True):
            assert ids == other
            assert torch.equal(images, pixels)


def test_evaluation_reads_the_data_as_they_are(colours: CaptionData) -> None:
    loader = Loader(Curriculum(colours), tiny.TOKENIZER, image_size=8, batch_size=6)
    (batch,) = loader
    assert batch.image_ids == colours.image_ids
    assert batch.references is not None


# -- in a run -----------------------------------------------------------------------------------


def seen_in(trainer: Trainer, data: Any, **options: Any) -> list[list[str]]:
    epochs: list[list[str]] = [[] for _ in range(trainer.config.epochs)]
    trainer.prepare_batch = lambda batch: (  # type: ignore[method-assign]
        epochs[trainer.epoch].extend(batch.image_ids) or batch
    )
    trainer.fit(data, **options)
    return epochs


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_sees_the_easiest_images_first(
    colours: CaptionData, tmp_path: Path, cached: bool
) -> None:
    values = {name: float(n % 3) for n, name in enumerate(colours.image_ids)}
    curriculum = Curriculum(colours, values, pacing="linear", start=1 / 3, until=0.5)
    trainer = Trainer(tiny.make_student(trainable=not cached), **tiny.QUIET, epochs=4, batch_size=2)
    options = {"cache_features": True, "cache_views": 2, "cache_dir": tmp_path} if cached else {}
    epochs = seen_in(trainer, curriculum, **options)
    assert trainer.steps_per_epoch == 3
    assert trainer.cached is cached
    assert "worker processes, easy ones first (by given numbers)" in trainer.describe()[1]
    easiest = [{"g0.png", "g3.png"}, {*values} - {"g2.png", "g5.png"}, {*values}, {*values}]
    assert [{*names} for names in epochs] == easiest
    assert [len(names) for names in epochs] == [6] * 4


class CtrlC:
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, row: Any) -> None:
        if row["step"] == self.step:
            signal.raise_signal(signal.SIGINT)


OPTIONS: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "epochs": 3, "learning_rate": 0.01}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_interrupted_within_an_epoch_and_resumed_equals_one_run(
    saveable: Callable[..., Captioner],  # noqa: F811
    colours: CaptionData,
    tmp_path: Path,
    step: int,
) -> None:
    def run(out: str, seed: int = 1, **more: Any) -> Trainer:
        trainer = Trainer(saveable(seed=seed, dropout=0.3), **OPTIONS)
        trainer.fit(Curriculum(colours, "rarity", start=0.4), out=tmp_path / out, **more)
        return trainer

    whole = run("whole")
    with pytest.warns(UserWarning, match=f"Interrupted after step {step}"):
        run("parts", callbacks=[CtrlC(step)])
    rest = run("parts", seed=8, resume=True, num_workers=2)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())


def test_another_curriculum_cannot_continue_a_run(
    saveable: Callable[..., Captioner],  # noqa: F811
    colours: CaptionData,
    tmp_path: Path,
) -> None:
    def run(curriculum: Any, **more: Any) -> None:
        Trainer(saveable(), **OPTIONS).fit(curriculum, out=tmp_path, **more)

    with pytest.warns(UserWarning, match="Interrupted"):
        run(Curriculum(colours, "rarity", start=0.4), callbacks=[CtrlC(2)])
    with pytest.raises(CheckpointError, match=r"training data: .*root from 0.4.*root from 0.6"):
        run(Curriculum(colours, "rarity", start=0.6), resume=True)
    for other in (Curriculum(colours, "rarity", start=0.6), colours):
        divided = pytest.raises(CheckpointError, match=r"divide the epoch differently \(curriculum")
        with pytest.warns(UserWarning, match="continues with changes: training data"), divided:
            run(other, resume=True, accept_changes=True)


def test_rewards_find_the_references_behind_a_curriculum(colours: CaptionData) -> None:
    trainer = SelfCritical(tiny.make_student(), samples=2, **tiny.QUIET, epochs=2)
    history = trainer.fit(Curriculum(colours))
    assert len(history.epochs) == 2


def test_check_reads_a_curriculum(colours: CaptionData) -> None:
    trainer = Trainer(tiny.make_student(), **tiny.QUIET, epochs=2, batch_size=2)
    report = trainer.check(Curriculum(colours))
    assert report.ok, report.select("fail")


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"difficulty": "lenght"}, UnknownName, "Did you mean 'length'"),
        ({"difficulty": 3}, ConfigError, "difficulty: 3 was given; expected 'length', 'rarity'"),
        ({"difficulty": {"1": 1.0}}, ConfigError, "image '2' has no difficulty"),
        ({"difficulty": lambda c: math.nan}, ConfigError, "image '1' is nan; expected a finite"),
        ({"pacing": "sqrt"}, UnknownName, "no pacing 'sqrt'.*linear, root, step"),
        ({"start": 0.0}, ConfigError, "start=0.0 was given; expected a number"),
        ({"until": 1.5}, ConfigError, "until=1.5 was given"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Curriculum(numbered(2), **arguments)


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (sample(), ConfigError, "Splits was given as data.*data.train"),
        (Curriculum(numbered(2)), ConfigError, "Curriculum was given as data"),
        (texts_only(2, epochs=3), ConfigError, "Loader was given as data"),
        ([], DataError, "holds no image"),
        ([("x", [3])], DataError, "the captions of item 0 are"),
        ([("x", 3)], DataError, "item 0 cannot be read .TypeError"),
        ([("x",)], DataError, "item 0 cannot be read .IndexError"),
    ],
)
def test_data_that_cannot_be_ranked_are_refused(
    data: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Curriculum(data)


@pytest.mark.parametrize(("epochs", "until"), [(1, 0.5), (5, 1.0), (3, 0.9)])
def test_a_run_that_never_reads_the_hardest_images_is_warned_of(epochs: int, until: float) -> None:
    curriculum = Curriculum(numbered(10), start=0.2, until=until)
    last = curriculum.available(epochs - 1, epochs)
    assert last < 10
    with pytest.warns(UserWarning, match=rf"ends with the {last} easiest .* other {10 - last}:"):
        Loader(curriculum, WordTokenizer(["a"]), image_size=8, train=True, epochs=epochs)


def test_a_loader_of_a_curriculum_needs_the_number_of_epochs() -> None:
    with pytest.raises(ConfigError, match=r"needs the number of epochs.*epochs="):
        texts_only(2)


def test_a_data_set_with_ids_of_its_own_is_ranked_by_them() -> None:
    class Mine(Dataset[Any]):
        image_ids = ("x", "y")

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Any:
            return "none.jpg", ["a dog runs", "a"][index]

    assert Curriculum(Mine(), {"x": 2.0, "y": 1.0}).ranking == (1, 0)
    assert difficulty(Mine()) == {"x": 3.0, "y": 1.0}


def test_a_run_file_has_a_curriculum(tmp_path: Path) -> None:
    values = {name: float(len(name)) for name in sample().train.image_ids}
    (tmp_path / "hard.json").write_text(json.dumps(values))
    for kind in ("rarity", str(tmp_path / "hard.json")):
        chosen = {"difficulty": kind, "pacing": "linear", "start": 0.2, "until": 0.8}
        section = parse_data({"path": "sample", "curriculum": chosen})
        found = section.training_data(section.load())
        wanted = Curriculum(sample().train, values if kind != "rarity" else kind)
        assert found.ranking == wanted.ranking
        assert (found.pacing, found.start, found.until) == ("linear", 0.2, 0.8)
    plain = parse_data({"path": "sample"})
    assert isinstance(plain.training_data(plain.load()), CaptionData)
    with pytest.raises(ConfigError, match=r"curriculum.pace"):
        parse_data({"path": "sample", "curriculum": {"pace": "linear"}})
