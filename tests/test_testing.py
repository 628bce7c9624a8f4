"""The tests for authors pass what is right and name the law that a wrong part breaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import capdistill as cd
from capdistill.decoders.base import DecoderState
from capdistill.losses.base import Projector
from capdistill.losses.distances import cosine_distance, squared_distance
from capdistill.losses.divergence import kl_divergence
from capdistill.outputs import DecoderOutput
from capdistill.testing import check_decoder, check_encoder, check_loss
from tests.decoders.decoder_cases import FORMS, make

LOSSES = {
    "token": cd.TokenKD(),
    "feature": cd.FeatureKD(),
    "grid": cd.FeatureKD(match="grid"),
    "hidden": cd.HiddenKD(),
    "uniform": cd.HiddenKD(layers="uniform"),
    **{name: cd.losses.create(name) for name in cd.losses.names()},
    "top_k-few": cd.losses.create("top_k", k=3),
    "top_k-renormalise": cd.losses.create("top_k", k=3, rest="renormalise"),
    "jsd-forward": cd.losses.create("jsd", beta=0),
    "dist-inter": cd.losses.create("dist", gamma=0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_our_losses_keep_the_laws(name):
    check_loss(LOSSES[name])


@pytest.mark.parametrize("form", FORMS)
def test_our_decoders_keep_the_laws(form):
    check_decoder(make(form, dtype=torch.float32))


def test_our_encoders_keep_the_laws():
    check_encoder(cd.encoders.TimmEncoder("test_efficientnet", dim=8, weights=False))
    check_encoder(cd.encoders.TimmEncoder("test_vit", weights=False))


def test_a_check_leaves_flags_parameters_and_random_state_alone():
    decoder, loss = make("lstm-parallel").train(), cd.FeatureKD()
    state, before = torch.get_rng_state(), [p.clone() for p in decoder.parameters()]
    check_decoder(decoder)
    check_loss(loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in decoder.modules())
    assert all(map(torch.equal, decoder.parameters(), before))
    assert loss.projector is None


class Mean(cd.TokenKD):
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch) / self.count(batch)


class Vector(cd.TokenKD):
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch)[None]


class Unmasked(cd.DistillationLoss):
    def forward(self, student, teacher, batch):
        return (student.logits.float() - teacher.logits.detach().float()).square().mean(-1).sum()


class SeesTheTeacher(cd.DistillationLoss):
    def forward(self, student, teacher, batch):
        mask = batch.target_mask[..., None].float()
        gap = (student.logits.float() - teacher.logits.float()).masked_fill(mask == 0, 0)
        return gap.square().mean(-1).sum()


class Detached(cd.TokenKD):
    def forward(self, student, teacher, batch):
        return super().forward(student, teacher, batch).detach()


class Overflows(cd.DistillationLoss):
    def forward(self, student, teacher, batch):
        mine = student.logits.float().masked_fill(~batch.target_mask[..., None], 0)
        return (mine.exp() - 1).sum()


class CountsPadding(cd.TokenKD):
    def count(self, batch):
        return float(batch.targets.numel())


class Lazy(cd.DistillationLoss):
    needs = frozenset({"features"})
    per = "image"

    def build(self, student, teacher):
        self.project = Projector(student.feature_dim, teacher.feature_dim)
        self.never_used = nn.Linear(2, 2)

    def forward(self, student, teacher, batch):
        mine = self.project(student.features.mean(1))
        return squared_distance(mine, teacher.features.mean(1)).sum()


class Contrastive(cd.DistillationLoss):
    """InfoNCE over the images of a batch, which its flag does not say."""

    needs = frozenset({"features"})
    per = "image"

    def build(self, student, teacher):
        self.project = Projector(student.feature_dim, teacher.feature_dim)

    def forward(self, student, teacher, batch):
        mine = F.normalize(self.project(student.features.mean(1)), dim=-1)
        theirs = F.normalize(teacher.features.detach().float().mean(1), dim=-1)
        return F.cross_entropy(mine @ theirs.T, torch.arange(len(mine)), reduction="sum")


class Undeclared(cd.DistillationLoss):
    needs = frozenset({"logits"})

    def forward(self, student, teacher, batch):
        return cosine_distance(student.hidden[-1], teacher.hidden[-1]).sum()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Mean, "must return the sum over tokens"),
        (Vector, "one floating-point number"),
        (Unmasked, "masked tokens of logits get a gradient|padding changes the value"),
        (SeesTheTeacher, "the teacher's logits gets a gradient"),
        (Detached, "no gradient reaches the student"),
        (Overflows, "not finite for logits of size 1e4"),
        (CountsPadding, r"padding changes count\(batch\)"),
        (Lazy, "requires a gradient and gets none"),
        (Contrastive, "couples_batch = True"),
    ],
)
def test_a_wrong_loss_is_named_with_the_law_it_breaks(loss, message):
    with pytest.raises(AssertionError, match=f"^{loss.__name__}: .*({message})"):
        check_loss(loss)


def test_a_loss_that_says_that_it_couples_images_passes():
    check_loss(type("Coupled", (Contrastive,), {"couples_batch": True}))


def test_a_loss_that_reads_what_it_does_not_need_fails():
    with pytest.raises(TypeError, match="not subscriptable"):
        check_loss(Undeclared)


def test_a_loss_that_holds_the_teacher_is_named():
    teacher = nn.Linear(4, 4)
    loss = cd.TokenKD()
    loss.teacher = teacher
    with pytest.raises(AssertionError, match="holds parameters of the teacher"):
        check_loss(loss, teacher_module=teacher)


class Bag(cd.Decoder):
    """The next word from the last one and the mean of the image's tokens; faults on request."""

    has_attention = False

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.dim, self.hidden_dims, self.fault = 8, (8,), fault

    def build_vocabulary(self, vocabulary: int) -> None:
        self.embed, self.out = nn.Embedding(vocabulary, 8), nn.Linear(8, vocabulary)

    def forward(self, input_ids, features, need=frozenset()):
        k = len(input_ids) // len(features)
        image = features.mean(1).repeat_interleave(k, 0)
        if self.fault == "batch":
            image = image + features.mean()
        hidden = self.embed(input_ids)
        if self.fault == "later":
            hidden = hidden + hidden.mean(1, keepdim=True)
        hidden = torch.tanh(hidden + image[:, None])
        wanted = "hidden" in need or self.fault == "unasked"
        return DecoderOutput(self.out(hidden), (hidden,) if wanted else None)

    def start(self, features):
        return DecoderState(image={}, row={"image": features.mean(1)})

    def step(self, tokens, state):
        scale = 2.0 if self.fault == "step" else 1.0
        hidden = torch.tanh(self.embed(tokens) + scale * state.row["image"])
        return self.out(hidden), state


class BrokenState(DecoderState):
    def keep(self, images):
        return self.reorder(torch.arange(len(images) * self.beams))


class BrokenBag(Bag):
    def start(self, features):
        return BrokenState(image={}, row={"image": features.mean(1)})


def test_a_plain_decoder_keeps_the_laws():
    check_decoder(Bag)
    check_decoder(Bag())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("step", "forward and repeated step disagree"),
        ("later", "forward and repeated step disagree"),
        ("batch", "disagree|depends on the others"),
        ("unasked", "None unless they are in need"),
    ],
)
def test_a_wrong_decoder_is_named_with_the_law_it_breaks(fault, message):
    with pytest.raises(AssertionError, match=f"Bag: .*({message})"):
        check_decoder(Bag(fault))


def test_a_state_that_loses_its_past_is_named():
    with pytest.raises(AssertionError, match=r"State.keep loses the past"):
        check_decoder(BrokenBag())


class Patches(cd.Encoder):
    """Mean colours of the quarters; faults on request."""

    dim, token_dim, tokens, grid, image_size = 8, 3, 4, (2, 2), 16

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.project = nn.Linear(3, 8)
        if fault == "grid":
            self.grid = (3, 2)
        if fault == "dim":
            self.dim = 9
        if fault == "no dim":
            self.dim = None

    def trunk(self, images):
        pixels = images.float() if self.fault == "floats" else self.normalise(images)
        tokens = F.adaptive_avg_pool2d(pixels, (2, 2)).flatten(2).transpose(1, 2)
        return tokens + torch.rand(()) if self.fault == "random" else tokens

    def head(self, tokens):
        mean = tokens.mean() if self.fault == "batch" else 0.0
        return self.project(tokens + mean)


def test_a_plain_encoder_keeps_the_laws():
    check_encoder(Patches)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("grid", "make 6 tokens, but tokens is 4"),
        ("dim", r"forward gives \(2, 4, 8\)"),
        ("no dim", "dim is None"),
        ("floats", "float images are not refused"),
        ("random", "differ|is not head"),
        ("batch", "an image depends on the batch"),
    ],
)
def test_a_wrong_encoder_is_named_with_the_law_it_breaks(fault, message):
    with pytest.raises(AssertionError, match=f"Patches: .*({message})"):
        check_encoder(Patches(fault))


def test_the_divergences_of_the_library_are_what_a_correct_loss_is_made_of():
    class Hand(cd.DistillationLoss):
        def forward(self, student, teacher, batch):
            return kl_divergence(student.logits, teacher.logits, batch.target_mask)

    check_loss(Hand)
