import io
import json
import re
from dataclasses import replace

import pytest
import torch

import capdistill as cd
from capdistill.errors import ConfigError, DataError, UnknownName
from capdistill.evaluation import compare, evaluate, measure
from capdistill.evaluation.table import Progress
from capdistill.metrics import CaptionScorer, diversity
from capdistill.teachers import ForeignTeacher
from tests.evaluation.tiny_captioner import SAYINGS, TinyCaptioner, batch_of

PLAIN = {"metrics": ("bleu", "cider_d"), "measure": False, "device": "cpu"}


def test_scores_are_those_of_the_scorer_on_the_captions_and_all_references() -> None:
    batches = [batch_of([0, 1]), batch_of([2, 3], first=2)]
    found = evaluate(TinyCaptioner(), batches, **PLAIN)
    assert found.captions == {f"{i}.jpg": text for i, text in enumerate(SAYINGS)}
    assert all(len(each) == 2 for each in found.references.values())
    scorer = CaptionScorer(found.references, metrics=PLAIN["metrics"])
    assert dict(found.scores) == dict(scorer(found.captions))


def test_one_metric_is_given_alone() -> None:
    plain = {**PLAIN, "metrics": "rouge_l"}
    batches = [batch_of([0, 1])]
    assert list(evaluate(TinyCaptioner(), batches, **plain).scores) == ["rouge_l"]
    found = compare(TinyCaptioner(), TinyCaptioner(), batches, **plain)
    assert list(found.models["student"]["scores"]) == ["rouge_l"]


def test_success_needs_words_and_an_end() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0, 1, 2, 3])], **PLAIN)
    assert found.success_rate == 0.5
    assert found.unfinished == ("3.jpg",)


def test_training_flags_come_back_as_they_were() -> None:
    captioner = TinyCaptioner()
    captioner.extra = torch.nn.Dropout().eval()
    captioner.train()
    captioner.extra.eval()
    evaluate(captioner, [batch_of([0])], **PLAIN)
    assert captioner.training
    assert not captioner.extra.training


def test_limit_reads_and_captions_only_so_many_images() -> None:
    read = []

    def batches():
        for i in range(5):
            read.append(i)
            yield batch_of([0, 1], first=2 * i)

    found = evaluate(TinyCaptioner(), batches(), limit=3, **PLAIN)
    assert found.covered == ("0.jpg", "1.jpg", "2.jpg")
    assert read == [0, 1]


def test_batches_without_references_are_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"no references.*references=\.\.\."):
        evaluate(TinyCaptioner(), [batch_of([0], references=False)], **PLAIN)


def test_an_id_that_comes_twice_is_refused() -> None:
    with pytest.raises(DataError, match=r"'0\.jpg' occurs twice"):
        evaluate(TinyCaptioner(), [batch_of([0]), batch_of([1])], **PLAIN)


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_image_is_an_error(data: object) -> None:
    with pytest.raises(DataError):
        evaluate(TinyCaptioner(), data, **PLAIN)


def test_a_model_that_cannot_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no generate"):
        evaluate(torch.nn.Linear(1, 1), [batch_of([0])], **PLAIN)


def test_a_limit_of_no_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="limit=0"):
        evaluate(TinyCaptioner(), [batch_of([0])], limit=0, **PLAIN)


def test_json_holds_every_figure_and_is_plain() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0, 1])], **PLAIN)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["schema"] == "capdistill.evaluation/1"
    assert content["captions"]["1.jpg"] == "a red car"
    assert content["scores"]["bleu_1"] == found.scores["bleu_1"]
    assert content["per_image"]["bleu_1"].keys() == content["captions"].keys()


def test_what_cannot_be_measured_is_a_note_and_the_rest_is_there() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0, 1])], metrics=["bleu"], device="cpu")
    assert found.disk_bytes == len("[0, 0, 0]")
    assert found.latency_ms is not None
    assert found.latency_ms.n == 2
    assert found.peak_memory_bytes is None
    assert any("holds no captioner" in note for note in found.notes)


def test_time_is_taken_one_image_at_a_time_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "cpu_memory", lambda *_, **__: None)  # a process a model
    captioner = TinyCaptioner()
    evaluate(captioner, [batch_of([0, 1, 0, 1])], metrics=["bleu"], device="cpu")
    assert captioner.batch_sizes[0] == 4
    assert captioner.batch_sizes[1:] == [1] * (3 + 4)


@pytest.fixture(scope="module")
def student() -> cd.Captioner:
    torch.manual_seed(0)
    data = cd.data.sample()
    tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
    return cd.Captioner.create("debug_student", tokenizer=tokenizer)


def test_a_real_captioner_is_measured_on_the_sample(student: cd.Captioner) -> None:
    found = evaluate(student, cd.data.sample().val, metrics=["bleu"], limit=3, device="cpu")
    assert found.parameters == student.num_parameters()
    assert 4 * found.parameters < found.disk_bytes < 5 * found.parameters
    assert found.memory is not None
    assert 0 < found.memory.peak < 1e9 < 50 * found.memory.baseline
    assert found.latency_ms.median > 0
    assert found.preprocessing_ms.median > 0
    assert found.notes == ()


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        return torch.full((3, 8, 8), index, dtype=torch.uint8), ["a dog", "one dog"]


def test_a_torch_data_set_of_images_and_captions_is_data(student: cd.Captioner) -> None:
    found = evaluate(student, Pairs(), **PLAIN)
    assert list(found.references.values()) == [("a dog", "one dog")] * 2


def test_an_unreadable_image_is_skipped_and_named(student: cd.Captioner, tmp_path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    good = cd.data.sample().val.examples[0]
    data = cd.data.CaptionData([good, cd.data.Example("broken.jpg", broken, ("a dog",))])
    found = evaluate(student, data, **PLAIN)
    assert found.covered == (good.image_id,)
    assert len(found.skipped) == 1
    assert "broken.jpg" in found.skipped[0]


def test_health_is_that_of_the_captions_and_stands_in_json_and_table() -> None:
    batches = [batch_of([0, 1, 2, 3])]
    found = evaluate(TinyCaptioner(), batches, training_captions=["A dog runs ."], **PLAIN)
    ended = {image: image != "3.jpg" for image in found.captions}
    assert found.health == diversity(found.captions, ["a dog runs"], ended)
    assert (found.health.novel, found.health.empty, found.health.unfinished) == (0.5, 0.25, 0.25)
    assert found.to_json()["health"]["vocabulary"] == 8
    assert "Different words" in str(found)
    assert re.search(r"Captions not in training data +50.0 %", str(found))


def test_without_training_captions_novelty_is_unknown() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0])], **PLAIN)
    assert found.health.novel is None
    assert "training data" not in str(found)


def test_compare_gives_every_model_the_same_training_captions() -> None:
    seen = iter(["a dog runs"])
    batches = [batch_of([0, 1])]
    found = compare(TinyCaptioner(), TinyCaptioner(), batches, training_captions=seen, **PLAIN)
    row = next(row for row in found.rows if row.key == "novel")
    assert row.values == {"teacher": 0.5, "student": 0.5}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("batch_size", value) for value in (0, -1, True, 1.5, "8", None, float("nan"))),
        *(("num_workers", value) for value in (-1, True, 0.5, "0", None)),
        *(("limit", value) for value in (0, -1, True, 2.0, "3", float("inf"))),
        *(("measure", value) for value in (0, "no", None)),
        *(("progress", value) for value in (1, "yes", None)),
        *(("precision", value) for value in ("fp8", None, 16)),
    ],
)
def test_an_option_of_another_type_or_out_of_range_is_refused(option: str, value: object) -> None:
    captioner = TinyCaptioner()
    with pytest.raises(ConfigError, match=f"{option}="):
        evaluate(captioner, [batch_of([0])], **{**PLAIN, option: value})
    assert captioner.batch_sizes == []


@pytest.mark.parametrize(
    ("wrong", "near"), [("metric", "metrics"), ("batchsize", "batch_size"), ("beams", "beam_size")]
)
def test_an_unknown_option_is_suggested(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate: .* '{wrong}' .*Did you mean '{near}'"):
        evaluate(TinyCaptioner(), [batch_of([0])], **{wrong: ["bleu"]})


def test_an_unknown_metric_is_suggested_before_the_work() -> None:
    captioner = TinyCaptioner()
    with pytest.raises(UnknownName, match="Did you mean 'cider_d'"):
        evaluate(captioner, [batch_of([0])], metrics=["cider"])
    assert captioner.batch_sizes == []


@pytest.mark.parametrize("value", [None, float("nan"), 3, b"a dog", "['a dog', 'a cat']"], ids=str)
def test_a_reference_or_training_caption_that_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"reference of image '0\.jpg' is .*expected a string"):
        replace(batch_of([0]), references=(("a dog", value),))
    with pytest.raises(DataError, match=r"training caption 2 is .*expected a string"):
        evaluate(TinyCaptioner(), [batch_of([0])], training_captions=["a dog", value], **PLAIN)


def test_a_model_that_generates_plain_text_is_refused_with_what_is_expected() -> None:
    captioner = TinyCaptioner()
    captioner.generate = lambda batch: ["a dog"] * batch.num_images
    with pytest.raises(ConfigError, match=r"generate gave 'a dog' \(str\); expected .*Hypothesis"):
        evaluate(captioner, [batch_of([0])], **PLAIN)
    captioner.generate = lambda batch: []
    with pytest.raises(ConfigError, match="0 captions for a batch of 1 images"):
        evaluate(captioner, [batch_of([0])], **PLAIN)


def test_an_evaluation_has_one_line_for_a_prompt() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0, 1])], **{**PLAIN, "metrics": ["bleu_1"]})
    assert repr(found) == f"Evaluation('tiny': 2 images; bleu_1={found.scores['bleu_1']:.4f})"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_in_images(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    evaluate(TinyCaptioner(), [batch_of([0, 1]), batch_of([3], first=2)], **PLAIN)
    assert "tiny: 3 images" in screen.getvalue()
    assert "scoring 3 captions" in screen.getvalue()


def test_elsewhere_a_long_job_writes_lines_and_a_short_one_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = [batch_of([0, 1]), batch_of([3], first=2)]
    evaluate(TinyCaptioner(), batches, **PLAIN)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    compare(TinyCaptioner("big"), TinyCaptioner("small"), batches, **PLAIN)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == [
        "teacher: captioning",
        "big: 2 images",
        "big: 3 images",
        "big: scoring 3 captions",
    ]
    assert "small: 3 images" in lines


def test_progress_can_be_silenced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Progress, "EVERY", 0.0)
    evaluate(TinyCaptioner(), [batch_of([0, 1])], progress=False, **PLAIN)
    assert capsys.readouterr().err == ""


def test_a_wrapped_model_reads_its_prefix_again_and_its_time_is_not_comparable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "cpu_memory", lambda *_, **__: None)  # a process a model
    assert evaluate(TinyCaptioner(), [batch_of([0])], **PLAIN).time_comparable
    wrapped = TinyCaptioner()
    wrapped.rereads_prefix = ForeignTeacher.rereads_prefix
    found = compare(wrapped, TinyCaptioner(), [batch_of([0, 1])], metrics=["bleu"], device="cpu")
    row = next(row for row in found.rows if row.key == "latency_ms")
    assert (row.relation, row.reached) == ("not comparable", None)


class _OnlyGenerates:
    """A model of someone else's: no module, no tokenizer."""

    generate = staticmethod(lambda batch: TinyCaptioner().eval().generate(batch))
    num_parameters = staticmethod(lambda: 3)


def test_ready_batches_need_no_tokenizer_and_data_sets_name_it() -> None:
    found = evaluate(_OnlyGenerates(), [batch_of([0])], **PLAIN)
    assert found.captions == {"0.jpg": "a dog runs"}
    with pytest.raises(ConfigError, match="_OnlyGenerates has no tokenizer"):
        evaluate(_OnlyGenerates(), cd.data.sample().val, **PLAIN)


def test_a_model_without_a_number_of_parameters_is_refused_before_the_work() -> None:
    class Nameless:
        generate = _OnlyGenerates.generate

    with pytest.raises(ConfigError, match=r"Nameless has no num_parameters\(\)"):
        evaluate(Nameless(), [batch_of([0])], **PLAIN)


def test_a_whole_data_set_is_refused_with_its_splits() -> None:
    with pytest.raises(ConfigError, match=r"expected one of its splits, such as data\.train"):
        evaluate(TinyCaptioner(), cd.data.sample(), **PLAIN)
