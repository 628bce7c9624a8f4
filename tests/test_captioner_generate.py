"""The same options through `Captioner.generate`, `evaluate`, `compare` and training."""

from __future__ import annotations

import pytest
import torch

import capdistill as cd
from capdistill import encoders
from capdistill.errors import ConfigError, DataError, NotFiniteLogits
from capdistill.generation import GenerationConfig
from tests.toy_captioner import Patches, batch_of, pictures, toy


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


def captioner(seed: int = 0):
    return toy(seed=seed)


def test_options_are_taken_whole_as_a_mapping_or_as_keywords():
    model, images = captioner(), pictures()
    whole = model.generate(images, GenerationConfig(beam_size=3, min_length=2))
    assert model.generate(images, {"beam_size": 3, "min_length": 2}) == whole
    assert model.generate(images, beam_size=3, min_length=2) == whole
    assert model.generate(images, GenerationConfig(beam_size=5), beam_size=3, min_length=2) == whole
    assert all(len(hypothesis.tokens) >= 2 for hypothesis in whole)


def test_every_hypothesis_has_its_text_and_the_first_is_the_caption():
    model = captioner()
    for found in model.generate(pictures(), beam_size=4, num_return=4):
        assert len(found.n_best) == 4
        assert [h.text for h in found.n_best] == [
            model.tokenizer.decode(h.tokens) for h in found.n_best
        ]
        assert (found.text, found.tokens) == (found.n_best[0].text, found.n_best[0].tokens)


def test_special_tokens_never_appear():
    model = captioner()
    for mode in ({"beam_size": 4, "num_return": 4}, {"sample": True, "num_return": 8}):
        for found in model.generate(pictures(), **mode):
            assert not any("<" in h.text for h in found.n_best)


def test_a_batch_is_known_by_its_image_ids_and_pixels_by_themselves():
    model, images = captioner(), pictures(3)
    options = {"sample": True, "temperature": 3.0, "seed": 4}
    batch = batch_of(model.tokenizer, ["a dog"] * 3, images)
    (first, *_) = model.generate(batch, **options)
    alone = batch_of(model.tokenizer, ["a dog"], images[:1])
    assert model.generate(alone, **options)[0].tokens == first.tokens
    forward = [h.tokens for h in model.generate(images, **options)]
    assert [h.tokens for h in model.generate(images.flip(0), **options)] == forward[::-1]


@pytest.mark.parametrize("wrong", [{"beam_sizes": 3}, {"beam_size": 0}])
def test_wrong_options_are_refused_before_anything_runs(wrong):
    model = captioner()
    model.encoder = None
    with pytest.raises(ConfigError, match="beam_size"):
        model.generate(pictures(), **wrong)


def batches(model):
    images = pictures(4)
    batch = batch_of(model.tokenizer, ["a dog runs"] * 4, images)
    return [cd.Batch(**{**vars(batch), "references": (("a dog runs", "a cat"),) * 4})]


def test_evaluate_captions_as_it_is_told_and_says_so():
    model = captioner()
    data = batches(model)
    found = cd.evaluate(
        model, data, metrics=["bleu"], measure=False, generation={"beam_size": 3}, min_length=4
    )
    expected = model.generate(data[0], beam_size=3, min_length=4)
    assert list(found.captions.values()) == [h.text for h in expected]
    assert found.to_json()["generation"]["beam_size"] == 3
    assert cd.evaluate(model, data, metrics=["bleu"], measure=False).to_json()["generation"] is None


def test_compare_captions_with_both_models_as_it_is_told():
    teacher, student = captioner(0), captioner(1)
    data = batches(teacher)
    found = cd.compare(teacher, student, data, metrics=["bleu"], measure=False, min_length=5)
    for role in ("teacher", "student"):
        captions = found.models[role]["captions"].values()
        assert all(len(caption.split()) >= 5 for caption in captions)


def test_a_mistyped_option_of_evaluate_is_refused():
    with pytest.raises(ConfigError, match=r"no option 'beam_sise'.*Did you mean 'beam_size'"):
        cd.evaluate(captioner(), [], beam_sise=3)


@pytest.mark.parametrize("how", [{"min_length": 5}, GenerationConfig(min_length=5)])
def test_validation_in_training_captions_as_it_is_told(how, tmp_path):
    model = captioner()
    said: list[str] = []
    generate = model.generate

    def listening(*arguments, **options):
        found = generate(*arguments, **options)
        said.extend(h.text for h in found)
        return found

    model.generate = listening
    data = batches(model)
    options = {"device": "cpu", "precision": "fp32", "progress": False, "epochs": 1}
    trainer = cd.Trainer(model, monitor="bleu_4", **options)
    trainer.metrics = ("bleu",)
    trainer.fit(data, data, out=tmp_path, generation=how)
    assert said
    assert all(len(text.split()) >= 5 for text in said)


HOW = [{}, {"sample": True, "num_return": 2}, {"sample": True, "top_k": 3, "top_p": 0.9}]
HOW += [{"beam_size": 3}, {"beam_size": 4, "beam_groups": 2}]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_an_image_whose_logits_are_nan_is_named(how):
    def poisoned(module, given, features):
        return features.clone().index_fill_(0, torch.tensor([1]), torch.nan)

    model, images = captioner(), pictures()
    model.encoder.register_forward_hook(poisoned)
    batch = batch_of(model.tokenizer, ["a dog"] * len(images), images)
    with pytest.raises(NotFiniteLogits, match=rf"Image '{batch.image_ids[1]}': .* NaN"):
        model.generate(batch, **how)
    with pytest.raises(NotFiniteLogits, match=f"Image 2 of {len(images)}: .*"):
        model.caption(images, **how)


@pytest.mark.parametrize("images", [None, "dog.jpg", [], pictures().numpy()], ids=type)
def test_what_is_no_batch_is_refused(images):
    with pytest.raises(DataError, match=r"generate was given .*; expected a Batch or a tensor"):
        captioner().generate(images)


def test_training_flags_are_restored_and_no_graph_is_kept():
    model = captioner().train()
    with torch.enable_grad():
        model.generate(pictures(), beam_size=2)
    assert model.training
    assert model.decoder.training
