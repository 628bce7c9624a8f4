import json
import re

import pytest
import torch

import capdistill as cd
from capdistill.errors import ConfigError, DataError
from capdistill.evaluation import compare, evaluate, evaluation
from capdistill.metrics import CaptionScorer, diversity
from tests.evaluation.tiny_captioner import SAYINGS, TinyCaptioner, batch_of

PLAIN = {"metrics": ("bleu", "cider_d"), "measure": False, "device": "cpu"}


def test_scores_are_those_of_the_scorer_on_the_captions_and_all_references() -> None:
    batches = [batch_of([0, 1]), batch_of([2, 3], first=2)]
    found = evaluate(TinyCaptioner(), batches, **PLAIN)
    assert found.captions == {f"{i}.jpg": text for i, text in enumerate(SAYINGS)}
    assert all(len(each) == 2 for each in found.references.values())
    scorer = CaptionScorer(found.references, metrics=PLAIN["metrics"])
    assert dict(found.scores) == dict(scorer(found.captions))


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
    with pytest.raises(DataError, match=r"'0\.jpg' comes twice"):
        evaluate(TinyCaptioner(), [batch_of([0]), batch_of([1])], **PLAIN)


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_image_is_an_error(data: object) -> None:
    with pytest.raises(DataError):
        evaluate(TinyCaptioner(), data, **PLAIN)


def test_a_model_that_can_not_generate_is_refused() -> None:
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


def test_what_can_not_be_measured_is_a_note_and_the_rest_is_there() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0, 1])], metrics=["bleu"], device="cpu")
    assert found.disk_bytes == len("[0, 0, 0]")
    assert found.latency_ms is not None
    assert found.latency_ms.n == 2
    assert found.peak_memory_bytes is None
    assert any("does not describe a captioner" in note for note in found.notes)


def test_time_is_taken_one_image_at_a_time_after_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "cpu_memory", lambda *_, **__: None)  # a process a model
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
    assert re.search(r"Captions not in the training data +50.0 %", str(found))


def test_without_training_captions_nothing_is_said_of_novelty() -> None:
    found = evaluate(TinyCaptioner(), [batch_of([0])], **PLAIN)
    assert found.health.novel is None
    assert "training data" not in str(found)


def test_compare_gives_every_model_the_same_training_captions() -> None:
    seen = iter(["a dog runs"])
    batches = [batch_of([0, 1])]
    found = compare(TinyCaptioner(), TinyCaptioner(), batches, training_captions=seen, **PLAIN)
    row = next(row for row in found.rows if row.key == "novel")
    assert row.values == {"teacher": 0.5, "student": 0.5}
