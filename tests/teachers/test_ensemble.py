"""Several captioners as one: the mixture in probabilities, generation from it, its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from capdistill import Captioner, WordTokenizer, decoders, encoders
from capdistill.decoders.base import Decoder, DecoderState
from capdistill.errors import CheckpointError, ConfigError, IncompatibleModels
from capdistill.generation import GenerationConfig, GenerationSpec, generate
from capdistill.outputs import CaptionerOutput, DecoderOutput, part, select_images
from capdistill.teachers import Ensemble, load, wrap
from capdistill.teachers.mixing import EnsembleDecoder, EnsembleFeatures, mixture
from capdistill.testing import step_logits
from tests.generation.decoding_cases import (
    END,
    FORMS,
    PAD,
    START,
    VOCABULARY,
    all_same,
    every_hypothesis,
    plain_beams,
    real,
    same,
)
from tests.generation.decoding_cases import pictures as features_of
from tests.toy_captioner import WORDS, Patches, batch_of, pictures, tokenizer, toy

TEXTS = ("a dog runs", "a red cat", "cat", "a dog sits", "red", "dog runs")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.registry._decorated, "toy-patches", [Patches])


def reader(seed: int = 5, side: int = 8) -> Captioner:
    """A captioner with a Transformer, which may read images of another size."""
    torch.manual_seed(seed)
    encoder = encoders.create("toy-patches", dim=6)
    encoder.image_size, encoder.grid, encoder.tokens = side, (side // 4,) * 2, (side // 4) ** 2
    decoder = decoders.create("transformer", dim=6, width=8, layers=1, heads=2, ffn=8)
    captioner = Captioner(encoder, decoder, tokenizer(), name="reader")
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(2.0)
    return captioner.eval()


def mixed(seed: int = 0, **how: Any) -> Ensemble:
    return Ensemble({"toy": toy(seed=seed), "reader": reader(seed + 5)}, **how).eval()


def examples(images: int = 3) -> Any:
    return batch_of(tokenizer(), TEXTS[: 2 * images], pictures(images))


def plain(logits: Sequence[Tensor], weights: Sequence[float], confident: bool = False) -> Tensor:
    """The mixture in float64, by plain softmax: the oracle."""
    probabilities = [each.double().softmax(-1) for each in logits]
    shares = [torch.full_like(p[..., :1], w) for p, w in zip(probabilities, weights, strict=True)]
    if confident:
        entropies = [-(p * p.log()).sum(-1, keepdim=True) for p in probabilities]
        shares = [s * (-h).exp() for s, h in zip(shares, entropies, strict=True)]
    total = sum(shares)
    return sum(s / total * p for s, p in zip(shares, probabilities, strict=True)).log()


class PlainMixture(Decoder):
    """The oracle of generation: the members read the whole caption again, in float64."""

    hidden_dims, has_attention = (), False

    def __init__(self, members: Sequence[Decoder], weights: Sequence[float], confident: bool):
        super().__init__()
        self.members, self.weights, self.confident = tuple(members), weights, confident
        self.vocabulary = members[0].vocabulary

    def forward(self, input_ids, features, need=frozenset()) -> DecoderOutput:
        logits = [member(input_ids, features).logits for member in self.members]
        return DecoderOutput(plain(logits, self.weights, self.confident))

    def start(self, features: Tensor) -> DecoderState:
        return DecoderState({"it": features}, {"ids": torch.zeros(len(features), 0).long()})

    def step(self, tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        ids = torch.cat([state.row["ids"], tokens[:, None]], 1)
        after = DecoderState(state.image, {"ids": ids}, state.beams)
        return self(ids, state.image["it"]).logits[:, -1], after


def pair(seed: int, vocabulary: int, weights: Sequence[float], confident: bool = False):
    """An ensemble's decoder, and the same by the oracle."""
    members = [
        real(form, seed + n, vocabulary) for n, form in enumerate(sorted(FORMS)[: len(weights)])
    ]

    def mix(logits: Sequence[Tensor]) -> Tensor:
        return mixture(logits, weights, confident)

    return EnsembleDecoder(members, mix, vocabulary), PlainMixture(members, weights, confident)


def twice(features: Tensor, members: int = 2) -> EnsembleFeatures:
    return EnsembleFeatures((features,) * members)


# -- the mixture ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 999),
    confident=st.booleans(),
)
def test_the_mixture_is_the_weighted_mean_of_the_probabilities(weights, scale, seed, confident):
    generator = torch.Generator().manual_seed(seed)
    weights = [w / sum(weights) for w in weights]
    logits = [
        scale * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64) for _ in weights
    ]
    found = mixture(logits, weights, confident)
    assert_close(found, plain(logits, weights, confident))
    assert_close(found.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("confident", [False, True])
def test_extreme_and_excluded_words_stay_finite_or_impossible(confident):
    certain = torch.tensor([[1e4, -1e4, -torch.inf]])
    other = torch.tensor([[0.0, 0.0, -torch.inf]])
    found = mixture([certain, other], [0.5, 0.5], confident)
    assert bool(found[0, :2].isfinite().all())
    assert float(found[0, 2]) == -math.inf


def test_half_precision_is_mixed_in_full_precision():
    logits = [torch.randn(2, 50, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    half = [each.bfloat16() for each in logits]
    found = mixture(half, [0.3, 0.7])
    assert found.dtype == torch.float32
    assert_close(found.double(), plain(half, [0.3, 0.7]), rtol=1e-6, atol=1e-6)


def test_confidence_lets_the_certain_member_lead():
    certain, uncertain = torch.tensor([4.0, 0.0, 0.0]), torch.zeros(3)
    fixed, confident = (mixture([certain, uncertain], [0.5, 0.5], by) for by in (False, True))
    assert confident[0] > fixed[0]


@pytest.mark.parametrize("mixing", ["fixed", "confidence", "draw"])
def test_logits_are_those_of_the_mixture(mixing):
    ensemble, batch = mixed(weights=[1, 3], mixing=mixing), examples()
    logits = [member(batch).logits for member in ensemble.members.values()]
    expected = plain(logits, [0.25, 0.75], mixing == "confidence")
    assert_close(ensemble(batch).logits.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mixing", ["fixed", "confidence"])
def test_one_member_is_itself_bit_for_bit(mixing):
    member, batch = toy(), examples()
    ensemble = Ensemble([member], mixing=mixing)
    need = frozenset({"logits", "features", "hidden", "attention"})
    found, expected = ensemble(batch, need=need), member(batch, need=need)
    for name in need:
        assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert ensemble.spec().hidden_dims == member.spec().hidden_dims
    assert ensemble.caption(pictures()) == member.caption(pictures())


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.01, 0.99), confident=st.booleans())
def test_equal_members_are_one_whatever_the_weights(share, confident):
    member, batch = toy(), examples(2)
    mixing = "confidence" if confident else "fixed"
    ensemble = Ensemble([member, toy()], weights=[share, 1 - share], mixing=mixing)
    assert list(ensemble.members) == ["toy", "toy-2"]
    expected = member(batch).logits.log_softmax(-1)
    assert_close(ensemble(batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_ensemble_of_ensembles_multiplies_the_weights():
    batch, members = examples(), [toy(seed=1), toy(seed=2), reader()]
    inner = Ensemble(members[:2], weights=[1, 3])
    nested = Ensemble({"two": inner, "one": members[2]}, weights=[1, 1])
    flat = Ensemble(members, weights=[1, 3, 4])
    assert_close(nested(batch).logits, flat(batch).logits, rtol=1e-5, atol=1e-5)
    assert nested.caption(pictures()) == flat.caption(pictures())


def test_a_member_of_weight_0_is_no_part_of_the_mixture():
    broken, batch = toy(seed=3), examples()
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.fill_(torch.nan)
    ensemble = Ensemble({"good": toy(), "broken": broken}, weights=[1, 0])
    assert_close(ensemble(batch).logits, toy()(batch).logits.log_softmax(-1))
    assert ensemble.caption(pictures()) == toy().caption(pictures())


def test_every_member_runs_once_and_only_if_needed():
    ensemble, batch = mixed(), examples()
    runs: list[tuple[str, frozenset[str]]] = []
    for name, member in ensemble.members.items():
        forward = member.forward
        member.forward = lambda batch, need=frozenset(), n=name, f=forward, **k: (
            runs.append((n, need)) or f(batch, need, **k)
        )
    hidden = frozenset({"hidden"})
    out = ensemble.outputs(batch, {"toy": hidden}, mixed=False)
    assert runs == [("toy", hidden)]
    assert out.logits is None
    runs.clear()
    out = ensemble.outputs(batch, {"toy": hidden})
    assert runs == [("toy", hidden | {"logits"}), ("reader", frozenset({"logits"}))]
    assert out.members["toy"].hidden is not None


# -- generation -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=8)
@given(
    seed=st.integers(0, 99),
    share=st.floats(0.1, 0.9),
    confident=st.booleans(),
    normalisation=st.sampled_from(["none", "average"]),
)
def test_law_8_as_many_beams_as_captions_find_the_best_of_the_mixture(
    seed, share, confident, normalisation
):
    decoder, oracle = pair(seed, 5, [share, 1 - share], confident)
    (picture,) = features_of(1, seed)
    config = GenerationConfig(
        beam_size=80, length_normalisation=normalisation, early_stopping="never"
    )
    spec = GenerationSpec(START, END, 3, config, banned=(PAD, START))
    (found,) = generate(decoder, twice(picture[None]), spec)
    best = max(every_hypothesis(oracle, picture, spec, 5), key=lambda each: each.score)
    assert same(found, best)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 99),
    beams=st.sampled_from([2, 3, 4]),
    groups=st.booleans(),
    confident=st.booleans(),
)
def test_beam_search_is_the_search_in_loops(seed, beams, groups, confident):
    decoder, oracle = pair(seed, VOCABULARY, [0.2, 0.3, 0.5], confident)
    features = features_of(3, seed)
    split = {"beam_groups": 2, "diversity_penalty": 0.7} if groups and beams % 2 == 0 else {}
    config = GenerationConfig(beam_size=beams, num_return=beams, **split)
    spec = GenerationSpec(START, END, 6, config, banned=(PAD, START))
    for found, picture in zip(generate(decoder, twice(features, 3), spec), features, strict=True):
        assert all_same(found.n_best, plain_beams(oracle, picture, spec))


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 99),
    options=st.sampled_from(
        [
            {},
            {"sample": True, "num_return": 3, "temperature": 1.5},
            {"sample": True, "top_k": 4, "top_p": 0.9},
            {"beam_size": 3, "no_repeat_ngram": 2, "min_length": 2},
            {"beam_size": 4, "early_stopping": True},
        ]
    ),
)
def test_every_search_equals_that_of_members_that_read_the_whole_caption_again(seed, options):
    decoder, oracle = pair(seed, VOCABULARY, [0.4, 0.6])
    features, keys = features_of(4, seed), torch.arange(4) + seed
    spec = GenerationSpec(START, END, 6, GenerationConfig(**options), banned=(PAD, START))
    found = generate(decoder, twice(features), spec, keys)
    assert all_same(found, generate(oracle, features, spec, keys))


@pytest.mark.parametrize("mixing", ["fixed", "confidence"])
def test_words_one_by_one_give_the_logits_of_forward(mixing):
    ensemble, batch = mixed(mixing=mixing), examples()
    with torch.no_grad():
        decoder, features = ensemble.decoding(batch)
        steps, whole = step_logits(decoder, batch.inputs, features)
        assert_close(steps, whole, rtol=1e-5, atol=1e-5)
        assert_close(whole, ensemble(batch).logits, rtol=1e-5, atol=1e-5)


def test_an_image_gets_the_same_caption_alone_and_in_a_batch():
    ensemble, images = mixed(), pictures(6)
    for options in ({}, {"beam_size": 3}, {"sample": True, "seed": 3}):
        together = ensemble.caption(images, **options)
        assert together == [ensemble.caption(image, **options) for image in images]
        assert len(set(together)) > 1


def test_one_beam_is_greedy_and_options_of_captions_work():
    ensemble, images = mixed(), pictures()
    assert ensemble.caption(images, beam_size=1) == ensemble.caption(images)
    (first, *_) = ensemble.caption(list(images), beam_size=3, num_return=2, details=True)
    assert len(first.n_best) == 2
    assert first.attention is None
    assert first.grid is None
    for text in ensemble.caption(images, prefix="red", banned_words=["dog"], max_length=4):
        assert text.startswith("red")
        assert "dog" not in text
    assert next(ensemble.caption_stream(iter(images))) == ensemble.caption(images[0])
    assert [each.text for each in ensemble.generate(images)] == ensemble.caption(images)


def test_members_read_images_of_their_own_size():
    ensemble = Ensemble([toy(), reader(side=16)])
    batch = batch_of(tokenizer(), TEXTS[:2], pictures(2, size=16))
    assert ensemble.image_size == 16
    seen = [member.encode(batch) for member in ensemble.members.values()]
    assert [each.shape[1] for each in seen] == [4, 16]
    logits = [member(batch).logits for member in ensemble.members.values()]
    expected = plain(logits, [0.5, 0.5]).float()
    assert_close(ensemble(batch).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(ensemble.caption(list(pictures(2, size=20)))) == 2


def test_training_flags_stay_as_they_were():
    ensemble = mixed().train()
    before = [part.training for part in ensemble.modules()]
    ensemble.caption(pictures(1))
    assert [part.training for part in ensemble.modules()] == before
    assert any(before)


def foreign(member: Captioner) -> Any:
    """A captioner as somebody else's, which can only read whole captions."""

    def adapt(module: Captioner, batch: Any) -> CaptionerOutput:
        return CaptionerOutput(logits=module(batch).logits)

    return wrap(member, adapt, member.tokenizer, name="theirs")


def test_a_wrapped_captioner_is_a_member_like_any_other():
    ensemble = Ensemble({"toy": toy(), "theirs": foreign(reader())}).eval()
    same_models, batch = mixed(), examples()
    assert_close(ensemble(batch).logits, same_models(batch).logits)
    for options in ({}, {"beam_size": 3}, {"sample": True}):
        assert ensemble.caption(pictures(), **options) == same_models.caption(pictures(), **options)
    assert ensemble.rereads_prefix
    assert not same_models.rereads_prefix
    assert ensemble.spec().vocabulary == tokenizer().vocabulary


# -- one member for each image ----------------------------------------------------------------


def drawn_from(ensemble: Ensemble, batch: Any, epoch: int, seed: int = 0) -> list[str]:
    """The member that each image's logits are from."""
    logits = ensemble.outputs(batch, {}, draw=(seed, epoch)).logits
    members = {name: member(batch).logits for name, member in ensemble.members.items()}
    k = batch.captions_per_image
    return [
        name
        for image in range(batch.num_images)
        for name, theirs in members.items()
        if torch.allclose(
            logits[image * k : image * k + k], theirs[image * k : image * k + k], atol=1e-5
        )
    ]


def test_a_draw_depends_on_seed_epoch_and_image_alone():
    ensemble, batch = mixed(mixing="draw"), examples()
    before = torch.random.get_rng_state()
    table = [drawn_from(ensemble, batch, epoch) for epoch in range(8)]
    assert all(len(row) == 3 for row in table)
    assert {name for row in table for name in row} == {"toy", "reader"}
    assert table == [drawn_from(ensemble, batch, epoch) for epoch in range(8)]
    assert table != [drawn_from(ensemble, batch, epoch, seed=1) for epoch in range(8)]
    for epoch in range(8):  # splitting and reordering a batch change nothing
        alone = [drawn_from(ensemble, part(batch, i, i + 1), epoch)[0] for i in range(3)]
        turned = drawn_from(ensemble, select_images(batch, [2, 1, 0]), epoch)
        assert alone == table[epoch] == turned[::-1]
    assert torch.equal(before, torch.random.get_rng_state())


def test_members_are_drawn_as_often_as_their_weights_say():
    ensemble = mixed(weights=[1, 3], mixing="draw")
    drawn = [ensemble._draw(0, 0, f"{number}.jpg") for number in range(4000)]
    assert drawn.count("reader") / 4000 == pytest.approx(0.75, abs=0.03)  # 4 standard deviations
    never = mixed(weights=[0, 1], mixing="draw")
    assert {never._draw(0, 0, f"{number}.jpg") for number in range(50)} == {"reader"}


def test_a_draw_reads_a_member_that_runs_anyway():
    ensemble, batch = mixed(mixing="draw"), examples()
    needs = {"toy": frozenset({"logits", "features"})}
    found = ensemble.outputs(batch, needs, draw=(0, 0))
    assert_close(found.logits, ensemble.outputs(batch, {}, draw=(0, 0)).logits)
    assert set(found.members) == {"toy"}


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 2, 3], [1, -1], [0, 0], [1, math.nan], ["a", 1], "ab", {"toy": 1}, 3, [10**400, 1]],
)
def test_invalid_weights_are_refused(weights):
    with pytest.raises(ConfigError, match=r"weights are .* for 2 members \(toy, reader\)"):
        mixed(weights=weights)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'toy'"):
        mixed(weights={"tow": 1, "reader": 1})
    with pytest.raises(ConfigError, match="Did you mean 'fixed'"):
        mixed(mixing="fixd")
    with pytest.raises(ConfigError, match="Did you mean 'reader'"):
        mixed().outputs(examples(), {"raeder": frozenset({"logits"})})


@pytest.mark.parametrize("members", [[], {}, "toy", 3, [torch.nn.Linear(1, 1)], {"": None}])
def test_something_else_than_captioners_is_refused(members):
    with pytest.raises(ConfigError, match="Ensemble: "):
        Ensemble(members)


def test_another_vocabulary_is_refused_with_its_first_difference():
    other = toy(WordTokenizer([*WORDS[:2], "bird", *WORDS[3:]], max_length=6))
    with pytest.raises(IncompatibleModels, match=r"at entry 6: 'a' has 'cat' .*'b' has 'bir"):
        Ensemble({"a": toy(), "b": other})
    longer = toy(WordTokenizer([*WORDS, "bird"], max_length=6))
    with pytest.raises(IncompatibleModels, match="'a' has no entry"):
        Ensemble({"a": toy(), "b": longer})


def test_features_of_several_members_are_refused_with_the_names():
    with pytest.raises(ConfigError, match=r"has no features, hidden .*members: toy, reader"):
        mixed()(examples(), need=frozenset({"features", "hidden"}))


# -- its directory ----------------------------------------------------------------------------


def test_a_saved_ensemble_is_the_same_again(tmp_path: Path):
    inner = Ensemble([toy(seed=1), toy(seed=2)], weights=[2, 1])
    ensemble = Ensemble({"two": inner, "a/b": toy(seed=3)}, [1, 4], "confidence", name="mine")
    ensemble.eval().save(tmp_path / "all")
    again, batch = load(tmp_path / "all"), examples()
    assert isinstance(again, Ensemble)
    assert (again.name, again.weights, again.mixing) == ("mine", ensemble.weights, "confidence")
    assert_close(again(batch).logits, ensemble(batch).logits, rtol=0, atol=0)
    assert not any(each.training for each in again.modules())
    assert again.caption(pictures()) == ensemble.caption(pictures())


def test_saving_again_replaces_the_members(tmp_path: Path):
    mixed_again = Ensemble([toy(seed=4)])
    Ensemble([toy(), toy(seed=1)]).save(tmp_path)
    Ensemble([toy(), toy(seed=1)]).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    mixed_again.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    batch = examples()
    assert_close(load(tmp_path)(batch).logits, mixed_again.eval()(batch).logits)


def test_a_save_that_fails_leaves_the_old_ensemble(tmp_path: Path):
    old, batch = Ensemble([toy(), toy(seed=1)]), examples()
    old.save(tmp_path)
    unnamed = toy(encoder=Patches())  # no registry made it
    with pytest.raises(ConfigError, match="was not made by a registry"):
        Ensemble([toy(seed=2), unnamed]).save(tmp_path)
    assert_close(load(tmp_path)(batch).logits, old.eval()(batch).logits, rtol=0, atol=0)


def test_a_wrapped_member_is_not_saved(tmp_path: Path):
    with pytest.raises(ConfigError, match="'theirs' is a wrapped captioner"):
        Ensemble({"toy": toy(), "theirs": foreign(reader())}).save(tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_captioner_is_not_overwritten_and_loads_by_the_same_function(tmp_path: Path):
    toy().save(tmp_path)
    with pytest.raises(ConfigError, match="holds a saved captioner"):
        mixed().save(tmp_path)
    assert isinstance(load(tmp_path), Captioner)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "capdistill.ensemble/9"},
        {"members": [{"name": "a", "directory": "../elsewhere"}]},
        {"members": 3},
        {"weights": [1]},
        {"mixing": "sometimes"},
    ],
)
def test_a_damaged_description_is_named(tmp_path: Path, change: dict[str, Any]):
    Ensemble([toy(), toy(seed=1)]).save(tmp_path)
    path = tmp_path / "ensemble.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"does not (describe|hold) an ensemble"):
        load(tmp_path)


def test_parameters_shared_by_members_count_once():
    member = toy()
    assert Ensemble([member, member]).num_parameters() == member.num_parameters()
    assert mixed().num_parameters() == toy().num_parameters() + reader().num_parameters()


@pytest.mark.parametrize("weights", [np.array([3, 1]), torch.tensor([3.0, 1.0]), (3, 1)])
def test_weights_may_be_an_array(weights: Any):
    assert Ensemble([toy(), toy()], weights).weights.values() == pytest.approx([0.75, 0.25])


def test_a_captioner_does_not_hide_behind_a_saved_ensemble(tmp_path: Path):
    Ensemble([toy(), toy()]).save(tmp_path)
    with pytest.raises(ConfigError, match="holds a saved ensemble"):
        toy().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"teachers\.load"):
        Captioner.load(tmp_path)


def test_an_ensemble_is_not_read_from_a_captioner(tmp_path: Path):
    toy().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"captioner, no ensemble.*teachers\.load"):
        Ensemble.load(tmp_path)


@pytest.mark.parametrize("directory", [None, 3, b"runs"])
def test_what_is_no_directory_cannot_be_loaded(directory: Any):
    with pytest.raises(CheckpointError, match="given as a path"):
        load(directory)
