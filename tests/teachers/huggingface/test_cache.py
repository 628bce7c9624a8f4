"""A cache that gives other logits is noticed and not used; captions stay right."""

import copy
import warnings

import pytest
import torch
import transformers
from torch.testing import assert_close

import capdistill as cd
from capdistill.teachers.huggingface.base import answering
from tests.teachers.huggingface import tiny
from tests.teachers.huggingface.conftest import batch_of, made

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def test_the_models_cache_is_used_unless_this_version_broke_it(family, teacher):
    if family != "git" or VERSION >= (5, 20):
        assert teacher.use_cache
    elif VERSION <= (5, 12):
        assert not teacher.use_cache
    assert teacher.rereads_prefix == (not teacher.use_cache)  # its time is compared otherwise


def wrong(adapter, monkeypatch, fails):
    """Let the model's forward forget something once there are words in its cache."""
    read = adapter.read

    def changed(ids, encoded, keep, **options):
        cache = options.get(adapter.cache_name)
        used = cache is not None and cache.get_seq_length() > 0
        if used and fails:
            raise TypeError("no cache")
        return read(ids + 1 if used else ids, encoded, keep, **options)

    monkeypatch.setattr(adapter, "read", changed)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("family", ["blip", "smolvlm"])
def test_a_broken_cache_is_reported_and_not_used(family, teacher, batch, fails, monkeypatch):
    module, processor, tokenizer = tiny.make(family)
    other = cd.teachers.from_pretrained(module, tokenizer, processor)
    wrong(other.adapter, monkeypatch, fails)
    reason = "it fails with TypeError: no cache" if fails else "they differ by"
    with pytest.warns(UserWarning, match=f"the cache of .* does not give .*{reason}"):
        found = other.generate(batch, beam_size=2, max_length=5)
    assert other.use_cache is False
    expected = teacher.generate(batch, beam_size=2, max_length=5)
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")  # it is said once
        assert_close(other(batch).logits, teacher(batch).logits, rtol=1e-4, atol=1e-4)


def test_the_check_changes_no_flag_and_no_random_state():
    module, processor, tokenizer = tiny.make("vision_encoder_decoder")
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor).train()
    state = torch.get_rng_state()
    teacher.spec()
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in teacher.modules())
    assert teacher.spec() is teacher.spec()


def test_captions_of_a_teacher_are_training_data(tmp_path):
    module, processor, tokenizer = tiny.make("blip")
    with torch.no_grad():
        module.text_decoder.get_output_embeddings().bias[3] = 9.0  # captions end soon
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor)
    train = cd.data.sample().train.subset(2)
    search = {"beam_size": 2, "max_length": 9, "min_length": 1}
    options = {**search, "device": "cpu", "precision": "fp32"}
    data = cd.teachers.caption(teacher, train, tmp_path / "c.jsonl", progress=False, **options)
    again = teacher.caption([each.path for each in train.examples], **search)
    assert all(again)
    assert [list(each.captions) for each in data.examples] == [[text] for text in again]


def test_a_teacher_is_part_of_an_ensemble():
    teacher = made("git")[0]
    both = cd.teachers.Ensemble({"one": teacher, "other": teacher})
    batch = batch_of(teacher)
    with torch.no_grad():
        assert_close(both(batch).logits.softmax(-1), teacher(batch).logits.softmax(-1))
    alone = teacher.generate(batch, max_length=4)
    assert [e.text for e in both.generate(batch, max_length=4)] == [e.text for e in alone]


def test_a_copied_teacher_reads_its_own_weights():
    teacher = made("blip")[0]
    copied = copy.deepcopy(teacher)
    assert copied.adapter.module is copied.module
    assert copied.module is not teacher.module


def test_what_a_method_answers_is_given_back_with_its_hook():
    module = torch.nn.Linear(2, 2)
    with answering(module, "forward", "known"):
        assert module(torch.zeros(1, 2)) == "known"
    assert module(torch.zeros(1, 2)).shape == (1, 2)
    module.forward = lambda _: "hooked"  # as accelerate does
    with pytest.raises(KeyError), answering(module, "forward", "known"):
        raise KeyError
    assert module(torch.zeros(1, 2)) == "hooked"


def test_targets_of_a_teacher_are_kept_on_disk(tmp_path):
    teacher = made("git")[0]
    train = cd.data.sample().train.subset(2)
    kept = {"top_k": len(teacher.tokenizer.vocabulary) - 1, "device": "cpu", "precision": "fp32"}
    cached = cd.teachers.cache(teacher, train, tmp_path, progress=False, **kept)
    loader = cd.data.Loader(
        train, teacher.tokenizer, image_size=16, batch_size=2, captions_per_image=1
    )
    batch = next(iter(loader.epoch(0)))
    words = cached(batch).words
    with torch.no_grad():
        logits = teacher(batch).logits.log_softmax(-1)
    real = batch.target_mask
    found = words.log_probs(1.0)[..., :-1]
    assert_close(found[real], logits.gather(-1, words.ids)[real], rtol=0, atol=0.02)
