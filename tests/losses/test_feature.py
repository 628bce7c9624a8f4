"""FeatureKD against an oracle that goes image by image, as the definition reads."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from capdistill.errors import ConfigError, IncompatibleModels
from capdistill.losses.feature import FeatureKD
from tests.losses.toy_pair import STUDENT, TEACHER, make_batch, make_output


def built(match="auto", student=STUDENT, teacher=TEACHER):
    torch.manual_seed(7)
    loss = FeatureKD(match=match)
    loss.build(student, teacher)
    return loss.double()


def example(lengths=(3, 1, 2, 3), teacher=TEACHER):
    batch = make_batch(list(lengths))
    return make_output(batch, STUDENT, 1), make_output(batch, teacher, 2), batch


def distance(loss, mine, theirs):
    projected = F.linear(mine, loss.projector.weight, loss.projector.bias)
    width = theirs.shape[-1:]
    mine, target = (F.layer_norm(each, width, eps=0.0) for each in (projected, theirs))
    return F.mse_loss(mine, target)


def pooled_oracle(loss, student, teacher, batch):
    pairs = zip(student.features, teacher.features, strict=True)
    return sum(distance(loss, mine.mean(0), theirs.mean(0)) for mine, theirs in pairs)


def attention_oracle(loss, student, teacher, batch):
    def seen(output, image):
        k = batch.captions_per_image
        rows = [
            output.attention[row, step]
            for row in range(image * k, image * k + k)
            for step in range(batch.targets.shape[1])
            if batch.target_mask[row, step]
        ]
        return torch.stack(rows).mean(0).detach() @ output.features[image]

    images = range(batch.num_images)
    return sum(distance(loss, seen(student, i), seen(teacher, i)) for i in images)


def grid_oracle(loss, student, teacher, batch, size=(2, 3)):
    def cells(output, spec):
        tokens = output.features[:, spec.prefix_tokens :].transpose(1, 2)
        return F.interpolate(tokens.unflatten(2, spec.grid), size, mode="area")

    mine, theirs = cells(student, STUDENT), cells(teacher, TEACHER)
    total = 0.0
    for image in range(batch.num_images):
        for place in itertools.product(range(size[0]), range(size[1])):
            here = (image, slice(None), *place)
            total = total + distance(loss, mine[here], theirs[here]) / 6
    return total


def test_pooled_is_one_vector_an_image():
    loss, outputs = built("pooled"), example()
    assert_close(loss(*outputs), pooled_oracle(loss, *outputs))


def test_attention_weights_are_averaged_over_the_valid_tokens_of_all_captions():
    loss, outputs = built("attention"), example()
    assert_close(loss(*outputs), attention_oracle(loss, *outputs))


def test_auto_is_the_sum_of_both_where_both_attend():
    loss, outputs = built("auto"), example()
    both = pooled_oracle(loss, *outputs) + attention_oracle(loss, *outputs)
    assert_close(loss(*outputs), both)


def test_grid_is_the_mean_over_the_cells_of_the_smaller_height_and_width():
    loss, outputs = built("grid"), example()
    assert_close(loss(*outputs), grid_oracle(loss, *outputs))


@pytest.mark.parametrize("match", ["auto", "pooled", "attention", "grid"])
def test_nothing_is_lost_where_the_projected_student_is_the_teacher(match):
    loss = built(match, student=TEACHER)
    with torch.no_grad():
        loss.projector.weight.copy_(torch.eye(4))
        loss.projector.bias.zero_()
    batch = make_batch([3, 1, 2, 3])
    teacher = make_output(batch, TEACHER, 2)
    assert loss(teacher, teacher, batch) == 0


def test_an_image_whose_captions_are_all_padding_adds_nothing_by_attention():
    loss = built("attention")
    student, teacher, batch = example(lengths=(3, 1, 0, 0))
    alone = distance(
        loss,
        student.attention[0:2][batch.target_mask[0:2]].mean(0) @ student.features[0],
        teacher.attention[0:2][batch.target_mask[0:2]].mean(0) @ teacher.features[0],
    )
    total = loss(student, teacher, batch)
    total.backward()
    assert_close(total, alone)
    assert student.features.grad[1].eq(0).all()


@pytest.mark.parametrize(
    ("match", "needs"),
    [
        ("auto", {"features", "attention"}),
        ("pooled", {"features"}),
        ("attention", {"features", "attention"}),
        ("grid", {"features"}),
    ],
)
def test_needs_follow_what_is_matched(match, needs):
    assert built(match).needs == needs


@pytest.mark.parametrize("blind", ["student", "teacher"])
def test_auto_without_attention_is_pooled_alone_and_says_so_once(caplog, blind):
    models = {"student": STUDENT, "teacher": TEACHER}
    models[blind] = replace(models[blind], has_attention=False)
    with caplog.at_level(logging.WARNING):
        loss = built("auto", **models)
        loss.build(**models)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("capdistill")]
    assert len(said) == 1
    assert f"the {blind} '{models[blind].name}'" in said[0]
    assert loss.needs == {"features"}
    outputs = example()
    assert_close(loss(*outputs), pooled_oracle(loss, *outputs))


def test_a_loss_with_attention_in_both_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        built("auto")
    assert caplog.records == []


def test_grid_without_a_grid_is_refused_with_the_tokens_and_the_fix():
    flat = replace(TEACHER, grid=None, name="vit_small", tokens=197, feature_dim=384)
    with pytest.raises(IncompatibleModels) as error:
        built("grid", teacher=flat)
    assert str(error.value) == (
        "FeatureKD: the teacher 'vit_small' gives no grid (197 tokens x 384) but grid matching "
        'was asked for.\nUse FeatureKD(match="pooled"), or an encoder with a grid.'
    )


def test_a_grid_that_does_not_fit_the_tokens_is_refused():
    with pytest.raises(IncompatibleModels, match=r"grid of \(4, 3\) after 1 tokens \(12 tokens"):
        built("grid", teacher=replace(TEACHER, prefix_tokens=1))


def test_attention_without_attention_is_refused_by_name():
    with pytest.raises(IncompatibleModels, match="the student 'small' returns no attention"):
        built("attention", student=replace(STUDENT, has_attention=False))


def test_a_teacher_without_features_is_refused_by_name():
    with pytest.raises(IncompatibleModels, match="the teacher 'large' returns no features"):
        built("pooled", teacher=replace(TEACHER, feature_dim=None))


@pytest.mark.parametrize("lacking", ["features", "attention"])
def test_an_output_that_lacks_what_the_spec_promised_is_named(lacking):
    student, teacher, batch = example()
    with pytest.raises(IncompatibleModels, match=f"needs {lacking} from the teacher"):
        built("attention")(student, replace(teacher, **{lacking: None}), batch)


def test_an_unknown_match_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean 'pooled'\? Available: attention, auto"):
        FeatureKD(match="pool")
