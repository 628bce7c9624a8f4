"""Every family teaches what its own forward says, and keeps the laws of teachers."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import capdistill as cd
from capdistill.compatibility import require_output
from capdistill.errors import IncompatibleModels
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.outputs import OUTPUTS, select_images
from capdistill.teachers.huggingface.image_text_to_text import ImageTextToText
from tests.teachers.huggingface import by_hand, tiny
from tests.teachers.huggingface.conftest import batch_of

# A processor converts tensors as older versions of numpy did.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LARGER = 25  # pixels; the processor makes them smaller


@torch.no_grad()
def outputs(teacher, batch, *names):
    return teacher(batch, frozenset(names))


def beginnings(batch):
    """(row, position, image, words read) at each real target of the batch."""
    for row, real in enumerate(batch.target_mask.tolist()):
        image = batch.images[row // batch.captions_per_image]
        for position in range(sum(real)):
            yield row, position, image, batch.input_ids[row, 1 : position + 1].tolist()


@pytest.mark.parametrize("side", [16, LARGER])
def test_logits_are_those_of_the_models_own_forward(family, teacher, processor, side):
    batch = batch_of(teacher, ("a dog", "the cat sits", "red", "man"), side=side)
    found = outputs(teacher, batch, "logits").logits
    for row, position, image, words in beginnings(batch):
        expected = by_hand.logits(family, teacher.module, processor, image, words)
        assert_close(found[row, position], expected, **CLOSE)


def test_hidden_states_are_those_of_the_words(family, teacher, processor):
    batch = batch_of(teacher, ("a dog", "the cat"))
    found = outputs(teacher, batch, "hidden", "logits").hidden
    assert len(found) == 2
    for row, position, image, words in beginnings(batch):
        expected = by_hand.hidden(family, teacher.module, processor, image, words)
        for layer, state in zip(found, expected, strict=True):
            assert_close(layer[row, position], state, **CLOSE)


def test_the_last_hidden_state_gives_the_logits(family, teacher, batch):
    output = outputs(teacher, batch, "hidden", "logits")
    reader = teacher.adapter.reader
    head = reader.cls if family == "blip" else reader.get_output_embeddings()
    states = output.hidden[-1]
    if family == "blip2_t5" and reader.config.tie_word_embeddings:
        states = states * reader.model_dim**-0.5
    expected = head(states)
    if family == "florence2" and hasattr(teacher.module, "final_logits_bias"):
        expected = expected + teacher.module.final_logits_bias
    behind = int(family in by_hand.SPACED)  # first words have the logits of those with a space
    assert_close(output.logits[:, behind:], expected[:, behind:], **CLOSE)


def test_outputs_fit_the_specification(teacher, batch):
    need = teacher.knowledge & OUTPUTS
    spec, output = teacher.spec(), outputs(teacher, batch, *need)
    require_output("teacher", output, batch, need, len(spec.vocabulary), spec)
    assert spec.grid is None or spec.tokens == spec.prefix_tokens + spec.grid[0] * spec.grid[1]


def test_padding_changes_nothing(teacher, batch):
    more = nn.functional.pad(batch.input_ids, (0, 3), value=teacher.tokenizer.pad_id)
    longer = replace(batch, input_ids=more, mask=nn.functional.pad(batch.mask, (0, 3)))
    need = teacher.knowledge & OUTPUTS
    one, other = outputs(teacher, batch, *need), outputs(teacher, longer, *need)
    real = batch.target_mask
    assert_close(one.logits[real], other.logits[:, :-3][real], **CLOSE)
    assert_close(one.features, other.features, **CLOSE)
    for layer, same in zip(one.hidden, other.hidden, strict=True):
        assert_close(layer[real], same[:, :-3][real], **CLOSE)
    if "attention" in need:
        assert_close(one.attention[real], other.attention[:, :-3][real], **CLOSE)


def test_an_image_alone_has_the_outputs_that_it_has_in_a_batch(teacher, batch):
    need = teacher.knowledge & OUTPUTS
    together, alone = outputs(teacher, batch, *need), []
    for image in range(2):
        part = select_images(batch, [image])
        rows = slice(2 * image, 2 * image + 2)
        alone = outputs(teacher, part, *need)
        assert_close(alone.logits, together.logits[rows], **CLOSE)
        assert_close(alone.hidden, tuple(h[rows] for h in together.hidden), **CLOSE)
        assert_close(alone.features, together.features[image : image + 1], **CLOSE)
        if "attention" in need:
            assert_close(alone.attention, together.attention[rows], **CLOSE)


def test_attention_is_a_distribution_over_the_visual_tokens(teacher, batch):
    if "attention" not in teacher.knowledge:
        with pytest.raises(IncompatibleModels, match=r"gives no attention; it gives captions, fea"):
            teacher(batch, frozenset({"attention"}))
        return
    output = outputs(teacher, batch, "attention", "features")
    assert output.attention.shape[2] == output.features.shape[1]
    assert_close(output.attention.sum(-1), torch.ones_like(output.attention[..., 0]))
    assert float(output.attention.std()) > 1e-4


def test_a_caption_in_detail_has_the_texts_and_the_attention_of_its_tokens(family):
    module, processor, tokenizer = tiny.make(family)
    teacher = cd.teachers.from_pretrained(module, tokenizer, processor)  # no attention so far
    with warnings.catch_warnings():  # a cache that transformers broke; see test_cache
        warnings.simplefilter("ignore")
        image = batch_of(teacher).images[0]
        found = teacher.caption(image, details=True, max_length=4)
    assert "".join(found.tokens).strip() == found.text
    if "attention" not in teacher.knowledge:
        assert found.attention is None
        return
    ids = torch.tensor([[teacher.tokenizer.start_id, *found.n_best[0].tokens, 0]])
    one = replace(batch_of(teacher, ("a",), 1), images=image[None], input_ids=ids, mask=ids >= 0)
    expected = outputs(teacher, one, "attention").attention[0]
    assert_close(found.attention, expected[: len(found.tokens)], **CLOSE)


def test_an_image_is_encoded_once_for_its_captions(teacher, batch):
    convolutions = [m for m in teacher.module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    read = []
    first = convolutions[0]
    handle = first.register_forward_pre_hook(lambda _, inputs: read.append(len(inputs[0])))
    try:
        outputs(teacher, select_images(batch, [0]), "features")
        once = sum(read)
        read.clear()
        outputs(teacher, batch, *(teacher.knowledge & OUTPUTS))
    finally:
        handle.remove()
    assert sum(read) == 2 * once


def test_features_alone_do_not_run_the_language_model(teacher, batch):
    calls = []
    handle = teacher.adapter.reader.get_output_embeddings().register_forward_pre_hook(
        lambda *_: calls.append(1)
    )
    try:
        output = outputs(teacher, batch, "features")
    finally:
        handle.remove()
    assert calls == []
    assert output.logits is None
    assert_close(output.features, outputs(teacher, batch, "features", "logits").features)


def test_gradients_reach_the_student_alone(teacher, batch):
    student = cd.Captioner.create("debug_student", tokenizer=teacher.tokenizer)
    names = {"logits": "token", "hidden": "hidden", "features": "feature"}
    losses = {loss: loss for output, loss in names.items() if output in teacher.knowledge}
    before = [parameter.clone() for parameter in teacher.parameters()]
    options = {"precision": "fp32", "device": "cpu", "schedule": "constant"}
    distiller = cd.Distiller(teacher, student, losses=losses, **options)
    start = [parameter.clone() for parameter in student.parameters() if parameter.requires_grad]
    terms = distiller.terms(batch)
    assert set(terms) == {"ce", *losses}
    assert all(term.sum.requires_grad and term.sum.detach() > 0 for term in terms.values())
    distiller.step(batch)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert_close(before, list(teacher.parameters()), rtol=0, atol=0)
    after = [parameter for parameter in student.parameters() if parameter.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))


def generated_by_the_model(family, teacher, processor, image, length):
    """Their own `generate`, greedily, with the ids banned that captions never hold."""
    spec = GenerationSpec.of(GenerationConfig(), teacher.tokenizer)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": length, "max_length": None}
    forced = teacher.adapter.forced_start()
    options["suppress_tokens"] = [each for each in spec.banned if each != forced] or None
    text = {}
    if family == "florence2":
        text = processor(images=by_hand.picture(image), text="<CAPTION>", return_tensors="pt")
    elif isinstance(teacher.adapter, ImageTextToText):
        adapter = teacher.adapter
        text = processor(images=[by_hand.picture(image)], text=[adapter.text], return_tensors="pt")
    text = {name: value for name, value in text.items() if name != "labels"}
    pixels = {"pixel_values": by_hand.seen(processor, image)} | text
    return teacher.module.generate(**pixels, **options)[0].tolist()


def test_greedy_captions_are_those_of_the_models_own_generate(family, teacher, processor, batch):
    if not teacher.use_cache:
        pytest.skip("the cache of this version is wrong, so its own captions are")
    found, ends = teacher.generate(batch, max_length=5), set(teacher.adapter.end_ids())
    for image, hypothesis in zip(batch.images, found, strict=True):
        theirs = generated_by_the_model(family, teacher, processor, image, 6)
        images = [3] * 3 if family == "blip2_opt" else []
        prompt = [*images, *teacher.adapter.prompt_ids.tolist()]
        if theirs[: len(prompt)] == prompt:
            theirs = theirs[len(prompt) :]
        ended = [place for place, token in enumerate(theirs) if token in ends]
        theirs = theirs[: min([5, *ended])]
        table = by_hand.spaced(family, processor)
        theirs = [*(table.get(first, first) for first in theirs[:1]), *theirs[1:]]
        assert theirs == list(hypothesis.tokens)[: len(theirs)]
        assert ended or len(theirs) == 5


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"sample": True, "num_return": 2}])
def test_generated_captions_have_the_log_probabilities_of_teacher_forcing(teacher, batch, options):
    """Cached, and however beams and images were reordered, repeated or dropped."""
    tokenizer, ends = teacher.tokenizer, teacher.adapter.end_ids()
    three = batch_of(teacher, ("a", "a", "a"), images=3, seed=5)
    for image, best in enumerate(teacher.generate(three, max_length=5, **options)):
        for hypothesis in best.n_best or (best,):
            ids = torch.tensor([[tokenizer.start_id, *hypothesis.tokens, tokenizer.end_id]])
            one = replace(
                select_images(three, [image]), input_ids=ids, mask=torch.ones_like(ids).bool()
            )
            logits = outputs(teacher, one, "logits").logits[0].float()
            merged = logits[:, ends].logsumexp(-1)
            logits[:, ends] = -torch.inf
            logits[:, tokenizer.end_id] = merged
            count = len(hypothesis.token_log_probs)
            expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:count, 0]
            assert_close(torch.tensor(hypothesis.token_log_probs), expected, **CLOSE)


def test_an_image_gets_the_same_caption_alone_and_in_a_batch(teacher, batch):
    together = [each.text for each in teacher.generate(batch, beam_size=2, max_length=5)]
    alone = [
        teacher.generate(batch.images[i : i + 1], beam_size=2, max_length=5)[0].text
        for i in range(2)
    ]
    assert together == alone


def test_pixel_values_are_those_of_the_processor(teacher, processor):
    image = torch.randint(256, (3, LARGER, LARGER), dtype=torch.uint8)
    found = teacher.adapter.pixels(image[None])["pixel_values"]
    assert_close(found, by_hand.seen(processor, image))
