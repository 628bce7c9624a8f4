"""`check` finds the usual troubles, says the fix of each, and leaves no trace."""

from __future__ import annotations

import copy
import json
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import capdistill as cd
from capdistill.training.check import CheckReport, CheckRow, check_training, costs

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "the", "grass"]
CROPS_BESIDE_CACHE = {"cache_features": True, "flip": True}
CAPTIONS = ("a dog runs on the grass", "the cat sits")


class Patches(cd.Encoder):
    """Four tokens, the mean colours of the quarters, and a batch norm that keeps statistics."""

    dim, token_dim, tokens, grid, image_size = 8, 3, 4, (2, 2), 16

    def __init__(self, dead: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.project = nn.Linear(3, 8)
        self.dropout = nn.Dropout(dropout)
        if dead:
            self.never_used = nn.Linear(3, 8)

    def trunk(self, images):
        pixels = nn.functional.adaptive_avg_pool2d(self.normalise(images), (2, 2))
        return self.norm(pixels).flatten(2).transpose(1, 2)  # (I, 4, 3)

    def head(self, tokens):
        return self.dropout(self.project(tokens))


class Pictures(Dataset):
    """Noise of a given side, after a pause."""

    def __init__(self, n=8, side=32, pause=0.0, captions=CAPTIONS, broken=()):
        self.n, self.side, self.pause, self.broken = n, side, pause, broken
        self.pairs = captions

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        time.sleep(self.pause)
        if index in self.broken:
            return b"no image", self.pairs
        generator = torch.Generator().manual_seed(index)
        size = (3, self.side, self.side)
        return torch.randint(256, size, generator=generator, dtype=torch.uint8), self.pairs


class Squared(cd.DistillationLoss):
    """Squared logits, times a factor that may be NaN, detached on request."""

    per = "image"

    def __init__(self, factor=1.0, detach=False):
        super().__init__()
        self.factor, self.detach = factor, detach

    def forward(self, student, teacher, batch):
        logits = student.logits.detach() if self.detach else student.logits
        return self.factor * logits.float().square().mean((1, 2)).sum()


def captioner(words=WORDS, name="student", encoder=None):
    tokenizer = cd.WordTokenizer(words, max_length=12)
    decoder = cd.decoders.create("lstm", dim=8, embed=8, hidden=8, layers=1)
    return cd.Captioner(encoder or Patches(), decoder, tokenizer, name=name)


def trainer(model=None, **options):
    options = {"batch_size": 4, "precision": "fp32", "device": "cpu", "progress": False} | options
    return cd.Trainer(model or captioner(), **options)


def distiller(teacher=None, student=None, losses=None, weights=None, **options):
    options = {"batch_size": 4, "precision": "fp32", "device": "cpu", "progress": False} | options
    teacher, student = teacher or captioner(name="teacher"), student or captioner()
    return cd.Distiller(teacher, student, losses, weights, **options)


def foreign_teacher(words=WORDS):
    model = captioner(words, name="theirs")
    need = frozenset({"hidden", "attention"})
    return cd.teachers.wrap(model, lambda m, batch: m(batch, need=need), model.tokenizer)


def rows(report, topic, status=None):
    return [r for r in report.rows if r.topic == topic and status in (None, r.status)]


def only(report, topic, status):
    """The one row of a topic and status, which must say a fix."""
    (row,) = rows(report, topic, status)
    assert row.fix
    return row


def everything_of(one):
    """All that a check might change, by value."""
    modules = {id(m): m for model in one.models for m in model.modules()}.values()
    tensors = [t.clone() for m in one.models for t in m.state_dict().values()]
    tensors += [t.clone() for t in one.objective.state_dict().values()]
    flags = [m.training for m in modules]
    grads = [None if p.grad is None else p.grad.clone() for p in one.objective.parameters()]
    chance = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))]
    return [*tensors, *chance], flags, grads, (random.getstate(), {**vars(one)})


def same(before, after):
    tensors = all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    grads = [
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(before[2], after[2], strict=True)
    ]
    return tensors and all(grads) and before[1] == after[1] and before[3] == after[3]


def test_a_healthy_pair_is_ready_and_every_topic_is_covered():
    report = check_training(distiller(), Pictures(), Pictures())
    topics = {row.topic for row in report.rows}
    assert report.ok, str(report)
    assert topics >= {"options", "data", "images", "captions", "models", "shapes", "vocabulary"}
    assert topics >= {"losses", "trained", "terms", "gradients", "memory", "time", "loading"}


def test_models_are_described_by_tokens_widths_and_parameters():
    student = captioner()
    report = check_training(distiller(student=student))
    shapes = rows(report, "shapes")[0].finding
    assert "4 tokens x 8, grid 2 x 2; hidden 8 8" in shapes
    assert "vocabulary 12" in shapes
    assert f"'student': {student.num_parameters()} parameters" in rows(report, "models")[0].finding
    assert "feature.projector 8 x 8" in rows(report, "losses")[0].finding


def test_a_student_as_large_as_its_teacher_is_a_note():
    assert "100%" in only(check_training(distiller()), "models", "note").finding


def test_a_trainable_parameter_without_gradient_fails_by_name():
    report = check_training(trainer(captioner(encoder=Patches(dead=True))))
    row = only(report, "gradients", "fail")
    assert not report.ok
    assert "student.encoder.never_used.weight, student.encoder.never_used.bias" in row.finding
    assert "requires_grad_(False)" in row.fix


def test_a_frozen_parameter_without_gradient_is_no_trouble():
    encoder = Patches(dead=True)
    encoder.never_used.requires_grad_(False)
    assert check_training(trainer(captioner(encoder=encoder))).ok


def test_a_wholly_frozen_model_fails_with_the_fix():
    report = check_training(trainer(captioner().requires_grad_(False)))
    assert "Nothing to train" in only(report, "trained", "fail").finding


def test_a_nan_loss_fails_and_names_the_term():
    one = distiller(losses={"mine": Squared(float("nan"))}, weights={"mine": 1.0})
    row = only(check_training(one), "terms", "fail")
    assert row.finding.startswith("mine: the term is nan")
    assert "'mine'" in row.fix


def test_a_term_too_weak_to_matter_is_a_note():
    weights = {"ce": 1.0, "mine": 1e-7}
    report = check_training(distiller(losses={"mine": Squared()}, weights=weights))
    row = only(report, "terms", "note")
    assert report.ok
    assert row.finding.startswith("mine:")
    assert "weights['mine']" in row.fix


def test_a_term_that_gives_no_gradient_is_a_note():
    one = distiller(losses={"mine": Squared(detach=True)}, weights={"mine": 1.0})
    assert "no gradient" in only(check_training(one), "terms", "note").finding


def test_a_term_whose_weight_starts_at_zero_is_not_called_useless():
    weights = {"ce": 1.0, "mine": (0.0, 1.0)}
    report = check_training(distiller(losses={"mine": Squared()}, weights=weights))
    assert not rows(report, "terms", "note")


def test_the_words_of_a_foreign_teacher_that_differ_fail():
    row = only(check_training(distiller(foreign_teacher(["snow", *WORDS]))), "vocabulary", "fail")
    assert "entry 4 (12 and 13 entries)" in row.finding
    assert "one tokenizer" in row.fix


def test_vocabularies_that_differ_are_a_note_where_only_features_are_compared():
    teacher = captioner([*WORDS[:-1], "snow"], name="teacher")
    losses = {"feature": cd.FeatureKD(match="pooled")}
    report = check_training(distiller(teacher, losses=losses))
    assert report.ok
    assert only(report, "vocabulary", "note")


def test_a_model_that_breaks_its_promise_of_shape_fails():
    encoder = Patches()
    encoder.tokens, encoder.grid = 9, None
    row = only(check_training(trainer(captioner(encoder=encoder))), "shapes", "fail")
    assert "(2, 4, 8)" in row.finding


def test_what_a_model_raises_is_a_row():
    model = captioner()
    model.decoder.forward = None  # calling it is a TypeError
    row = only(check_training(trainer(model)), "shapes", "fail")
    assert row.finding.startswith("TypeError")


def debug_student(**encoder):
    tokenizer = cd.WordTokenizer(WORDS)
    return cd.Captioner.create("debug_student", tokenizer=tokenizer, encoder=encoder)


def test_random_encoder_weights_are_a_note():
    report = check_training(trainer(debug_student()))
    row = only(report, "weights", "note")
    assert "random weights and is frozen" in row.finding
    assert "weights=True" in row.fix


def test_trained_encoder_weights_are_no_note_though_the_recipe_has_weights_false():
    model = debug_student()
    for part in model.encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean += 0.5
    assert not rows(check_training(trainer(model)), "weights", "note")


def test_a_teacher_no_better_than_chance_is_a_note():
    row = only(check_training(distiller(), Pictures()), "weights", "note")
    assert "chance is 2.48" in row.finding  # log 12
    assert "Train it first" in row.fix


def test_a_teacher_that_knows_the_captions_is_no_note():
    teacher = captioner(name="teacher")
    options = {"learning_rate": 0.05, "epochs": 20, "schedule": "constant"}
    trainer(teacher, **options).fit(Pictures())
    assert not rows(check_training(distiller(teacher), Pictures()), "weights", "note")


def test_slow_data_are_a_note_with_ways_out():
    row = only(check_training(trainer(), Pictures(pause=0.1)), "loading", "note")
    assert "num_workers=0" in row.finding
    assert "num_workers=" in row.fix
    assert "cache_images=True" in row.fix


def test_ready_batches_need_no_wait():
    batch = next(iter(cd.data.Loader(Pictures(), captioner().tokenizer, image_size=16)))
    report = check_training(trainer(), [batch] * 3)
    assert report.ok
    assert not rows(report, "loading", "note")


def test_small_images_are_a_note():
    row = only(check_training(trainer(), Pictures(side=12)), "images", "note")
    assert "smallest side 12" in row.finding
    assert "image_size=12" in row.fix


def test_unreadable_images_are_counted_and_named():
    report = check_training(trainer(), Pictures(broken={3}))
    row = only(report, "images", "note")
    assert report.ok
    assert "1 of the images" in row.finding
    assert "item 3" in row.finding


@pytest.mark.parametrize(("errors", "status"), [("skip", "note"), ("raise", "fail")])
def test_missing_files_are_counted_over_the_whole_data_set(tmp_path, errors, status):
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for path in paths[:-1]:
        Image.new("RGB", (16, 16)).save(path)
    data = cd.data.CaptionData(cd.data.Example(path.name, path, CAPTIONS) for path in paths)
    report = check_training(trainer(batch_size=1, errors=errors), data)
    assert f"1 of 20 image files are missing, first {paths[-1]}" in (
        only(report, "images", status).finding
    )


def test_cut_captions_and_unknown_words_are_notes():
    long = (" ".join(["dog"] * 13), "a zebra runs")
    fix = only(check_training(trainer(), Pictures(captions=long)), "captions", "note").fix
    assert "max_length" in fix
    row = only(check_training(trainer(), Pictures(captions=("zebra",))), "captions", "note")
    assert "100.0% of the words" in row.finding
    assert "min_count" in row.fix


def test_an_empty_data_set_is_a_row_and_the_models_are_checked_all_the_same():
    report = check_training(trainer(), Pictures(n=0))
    assert "at least one readable image" in only(report, "data", "fail").fix
    assert rows(report, "time", "ok")


def test_validation_batches_without_references_fail():
    batch = next(iter(cd.data.Loader(Pictures(), captioner().tokenizer, image_size=16)))
    report = check_training(trainer(), Pictures(), [replace(batch, references=None)])
    assert "references" in only(report, "data", "fail").finding


@pytest.mark.parametrize(
    "options", [{"monitor": "spice"}, {"metrics": ["bleu", "spice"]}, CROPS_BESIDE_CACHE]
)
def test_options_that_cannot_work_fail_with_the_fix(options):
    assert only(check_training(trainer(**options)), "options", "fail")


def test_a_device_that_does_not_exist_is_refused_when_the_trainer_is_made():
    with pytest.raises(
        cd.errors.ConfigError, match=r"'toaster' is not a device\. Use 'auto', 'cpu'"
    ):
        trainer(device="toaster")


def test_memory_that_does_not_suffice_fails_with_the_fix(monkeypatch):
    monkeypatch.setattr("capdistill.training.check.costs._memory_of", lambda device: 1000)
    row = only(check_training(trainer()), "memory", "fail")
    assert "batch_size=2 (now 4)" in row.fix
    assert "accumulation_steps=2" in row.fix


def test_running_out_of_memory_is_a_row(monkeypatch):
    def exhausted(self, student, teacher, batch):
        raise torch.OutOfMemoryError("tried to allocate 2 GB")

    one = distiller(losses={"mine": Squared()})
    monkeypatch.setattr(Squared, "forward", exhausted)
    report = check_training(one)
    assert "batch_size=2" in only(report, "memory", "fail").fix


def test_activations_kept_for_backward_grow_with_the_batch():
    def kept(size):
        finding = rows(check_training(trainer(batch_size=size)), "memory")[0].finding
        return float(finding.rsplit("backward ", 1)[1].removesuffix(" MB"))

    assert kept(512) == pytest.approx(2 * kept(256), rel=0.1)


@pytest.mark.parametrize("make", [trainer, distiller])
@pytest.mark.parametrize("data", [None, Pictures()])
def test_nothing_is_changed(make, data):
    one = make()
    random.seed(11), np.random.seed(11), torch.manual_seed(11)  # not the seed of a run
    one.captioner.eval()
    one.captioner.encoder.norm.train()  # flags that no train() or eval() would bring back
    next(one.captioner.parameters()).grad = torch.ones_like(next(one.captioner.parameters()))
    before = everything_of(one)
    check_training(one, data, data)
    assert same(before, everything_of(one))


def test_nothing_is_changed_by_a_check_that_fails():
    one = distiller(losses={"mine": Squared(float("nan"))})
    before = everything_of(one)
    assert not one.check(Pictures(broken=set(range(8)))).ok
    assert same(before, everything_of(one))


@pytest.mark.parametrize("make", [captioner, foreign_teacher])
def test_check_then_fit_equals_fit_alone(make):
    def weights(checked):
        torch.manual_seed(0)
        losses = {"token": "token", "hidden": "hidden"}
        one = distiller(make(), losses=losses, epochs=2, encoder_lr_scale=1.0)
        if checked:
            assert check_training(one, Pictures(), Pictures()).ok
        one.fit(Pictures())
        return one.objective.state_dict()

    alone, after = weights(False), weights(True)
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[key], after[key]) for key in alone)


def test_a_foreign_teacher_is_checked_with_projectors_that_are_not_kept():
    one = distiller(foreign_teacher(), losses={"hidden": "hidden"})
    report = check_training(one)
    assert report.ok, str(report)
    assert "hidden.projectors.0 8 x 8" in rows(report, "losses")[0].finding
    assert not list(one.objective.losses.parameters())


class Mean(cd.TokenKD):
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch) / self.count(batch)


class AcrossImages(cd.DistillationLoss):
    """Looks at the mean over the images of the batch."""

    needs = frozenset({"features"})
    per = "image"

    def forward(self, student, teacher, batch):
        gap = student.features.mean(1) - teacher.features.detach().mean(1)
        return gap.square().mean(1).sum() * student.features.shape[0]


def test_a_loss_that_returns_a_mean_fails():
    row = only(check_training(distiller(losses={"mean": Mean()})), "losses", "fail")
    assert row.finding.startswith("mean: the loss is ")
    assert "it is a mean" in row.finding
    assert "Return the sum" in row.fix


def test_a_loss_that_looks_across_images_without_saying_so_is_a_note():
    row = only(check_training(distiller(losses={"all": AcrossImages()})), "losses", "note")
    assert "couples_batch = True" in row.fix


def test_a_loss_that_looks_across_images_sees_one_batch_of_an_accumulation_and_a_note_says_so():
    coupled = type("Coupled", (AcrossImages,), {"couples_batch": True})
    one = distiller(losses={"all": coupled()}, accumulation_steps=3)
    row = only(check_training(one), "losses", "note")
    assert "sees 4 at a time with accumulation_steps=3" in row.finding
    alone = check_training(distiller(losses={"all": coupled()}))
    assert not rows(alone, "losses", "note")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_decoder_whose_step_disagrees_with_its_forward_fails(role):
    models = {"student": captioner(), "teacher": captioner(name="teacher")}
    decoder = models[role].decoder
    step = decoder.step
    decoder.step = lambda tokens, state: (2 * step(tokens, state)[0], step(tokens, state)[1])
    row = only(check_training(distiller(models["teacher"], models["student"])), "shapes", "fail")
    assert row.finding.startswith(f"{role}: step and forward of LSTMDecoder disagree")
    assert "check_decoder" in row.fix


def unattended_teacher(words=WORDS):
    """A foreign teacher that shows no attention: FeatureKD("auto") compares pooled features."""
    model = captioner(words, name="theirs")
    need = frozenset({"hidden"})
    return cd.teachers.wrap(model, lambda m, batch: m(batch, need=need), model.tokenizer)


@pytest.mark.parametrize("data", [None, Pictures()], ids=["made up", "data"])
def test_a_foreign_teacher_without_attention_passes_the_check_and_the_fit(data):
    one = distiller(unattended_teacher())
    report = check_training(one, data)
    assert report.ok, str(report)
    assert one.fit(Pictures(), epochs=1).epochs
    assert check_training(one, data).ok


def fewer_words_cases():
    fewer = WORDS[:4]
    pooled = {"feature": cd.FeatureKD(match="pooled")}
    yield "captioner", lambda: captioner(fewer, name="theirs"), pooled
    yield "wrapped", lambda: foreign_teacher(fewer), pooled
    yield "wrapped, auto", lambda: unattended_teacher(fewer), {"feature": cd.FeatureKD()}


@pytest.mark.parametrize(
    ("make", "losses"),
    [pytest.param(make, losses, id=name) for name, make, losses in fewer_words_cases()],
)
def test_features_alone_are_compared_with_a_teacher_that_knows_fewer_words(make, losses):
    one = distiller(make(), losses=copy.deepcopy(losses))
    report = check_training(one, Pictures())
    assert report.ok, str(report)
    assert only(report, "vocabulary", "note")
    history = one.fit(Pictures(), Pictures(), epochs=1)
    assert history.epochs[0]["train"]["terms"]["feature"]["raw"] > 0


def test_the_teachers_decoder_does_not_run_for_features_alone():
    teacher = captioner(name="teacher")
    one = distiller(teacher, losses={"feature": cd.FeatureKD(match="pooled")})
    teacher.decoder.forward = None  # calling it is a TypeError
    assert one.fit(Pictures(), epochs=1).epochs


def test_attention_wanted_from_a_teacher_with_other_words_fails_in_check_and_in_fit():
    losses = {"feature": cd.FeatureKD(match="attention")}
    one = distiller(foreign_teacher(WORDS[:4]), losses=losses)
    assert "vocabularies differ" in only(check_training(one, Pictures()), "losses", "fail").finding
    with pytest.raises(cd.errors.IncompatibleModels, match="vocabularies differ"):
        one.fit(Pictures(), epochs=1)


def test_a_report_reads_as_an_aligned_table_and_as_json():
    fine = CheckRow("options", "ok", "cpu")
    bad = CheckRow("memory", "fail", "word " * 30, "Lower batch_size.")
    report = CheckReport((fine, bad))
    lines = str(report).splitlines()
    assert lines[0] == "ok    options  cpu"
    assert lines[1].startswith("fail  memory   word")
    assert lines[2].startswith(" " * 15 + "word")
    assert lines[3].strip() == "-> Lower batch_size."
    assert lines[-1] == "not ready: 1 failure, 0 notes"
    assert max(map(len, lines)) <= 100
    assert json.loads(json.dumps(report.to_json())) == report.to_json()
    assert report.to_json()["rows"][1]["fix"] == "Lower batch_size."


@pytest.mark.parametrize(("workers", "ok"), [(2, False), (None, True), (0, True)])
def test_data_that_spawned_workers_cannot_get_are_named(monkeypatch, workers, ok) -> None:
    monkeypatch.setattr(costs, "worker_start_method", lambda given: "spawn")
    data = Pictures()
    data.transform = lambda image: image
    tested = trainer(num_workers=workers)
    report = check_training(tested, data)
    assert all("cannot be pickled" not in row.finding for row in report.rows) == ok
    if not ok:
        row = only(report, "data", "fail")
        assert row.finding.startswith("train.transform cannot be pickled")
        assert "num_workers=0" in row.fix


def test_items_that_raise_are_a_note_and_not_the_end() -> None:
    class Odd(Pictures):
        def __getitem__(self, index):
            if index == 1:
                raise KeyError("caption")
            return super().__getitem__(index)

    report = check_training(trainer(), Odd())
    assert "item 1: corrupt image (KeyError: 'caption')" in only(report, "images", "note").finding
