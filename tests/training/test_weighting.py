"""Weights that adapt: each method against its published formula, and the laws of a step."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from capdistill import Captioner, Distiller, SelfCritical
from capdistill.data import CaptionData
from capdistill.errors import ConfigError, UnknownName
from capdistill.losses.base import DistillationLoss
from capdistill.training import GradNorm, LossRatio, Uncertainty, Weighting
from tests.training import tiny_models as tiny

Make = Callable[..., Captioner]
BASE = {"ce": 0.3, "token": 0.7, "hidden": 0.5}
BATCHES = [tiny.make_batch([3, 1]), tiny.make_batch([2, 2], first=2), tiny.make_batch([4], first=4)]
LOOP: dict[str, Any] = {
    **tiny.QUIET,
    "schedule": "constant",
    "learning_rate": 0.05,
    "encoder_lr_scale": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "label_smoothing": 0.0,
}
FIT: dict[str, Any] = {**tiny.QUIET, "batch_size": 2, "learning_rate": 0.01, "log_every": 1}
KINDS: dict[str, Callable[..., Weighting]] = {
    "uncertainty": lambda base=BASE: Uncertainty(base, learning_rate=0.1),
    "gradnorm": lambda base=BASE: GradNorm(base, alpha=0.5, every=2, learning_rate=0.1),
    "loss_ratio": lambda base=BASE: LossRatio(base, temperature=0.5, every=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def distiller(weights: Any, student: Captioner | None = None, **options: Any) -> Distiller:
    student = student or tiny.make_student()
    names = [n for n in ("token", "hidden") if n in getattr(weights, "base", weights)]
    losses = {name: name for name in names}
    return Distiller(tiny.make_teacher(), student, losses, weights, **{**LOOP, **options})


def with_sgd(trainer: Distiller) -> Distiller:
    trainer.make_optimizer = lambda groups: torch.optim.SGD(groups)  # type: ignore[method-assign]
    return trainer


def raw(row: dict[str, Any]) -> dict[str, float]:
    return {name: term["raw"] for name, term in row["terms"].items()}


# -- the formulas -----------------------------------------------------------------------------


def test_uncertainty_follows_the_gradient_of_its_loss() -> None:
    trainer = with_sgd(distiller(Uncertainty(BASE, learning_rate=0.1)))
    s = dict.fromkeys(BASE, 0.0)
    for batch in BATCHES * 3:
        row = trainer.step(batch)
        for name, base in BASE.items():
            assert row["weights"][name] == pytest.approx(base * math.exp(-s[name]), rel=1e-6)
            weighted = row["weights"][name] * raw(row)[name]
            assert row["terms"][name]["weighted"] == pytest.approx(weighted, rel=1e-6)
            # d/ds of base * (exp(-s) * L + s)
            s[name] -= 0.1 * base * (1 - math.exp(-s[name]) * raw(row)[name])
    found = dict(zip(BASE, trainer.objective.weighting.log_variance.tolist(), strict=True))
    assert found == pytest.approx(s, rel=1e-5)
    assert len({round(value, 3) for value in s.values()}) == 3


@every_kind
def test_the_model_takes_the_step_of_the_weights_in_force(kind: str) -> None:
    adapted = with_sgd(distiller(KINDS[kind]()))
    for batch in BATCHES * 2:
        before = copy.deepcopy(adapted.objective)
        row = adapted.step(batch)
        plain = with_sgd(distiller(row["weights"]))
        for name in ("student", "losses"):
            values = getattr(before, name).state_dict()
            getattr(plain.objective, name).load_state_dict(values)
        again = plain.step(batch)
        assert again["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert again["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-5)
        assert_close(plain.captioner.state_dict(), adapted.captioner.state_dict())
    assert any(row["weights"][n] != pytest.approx(BASE[n], rel=1e-3) for n in BASE)


@pytest.mark.parametrize("by_epoch", [True, False])
def test_loss_ratio_is_the_softmax_of_the_ratios_of_two_windows(by_epoch: bool) -> None:
    trainer = distiller(LossRatio(BASE, temperature=0.7, every=None if by_epoch else 2))
    windows: list[list[dict[str, Any]]] = []
    for window in range(5):
        if by_epoch:
            trainer.epoch = window
        rows = [trainer.step(BATCHES[n]) for n in (window % 3, (window + 1) % 3)]
        expected = dict(BASE)
        if window >= 2:
            last, before = ({n: mean(rows_, n) for n in BASE} for rows_ in windows[:-3:-1])
            powers = {n: math.exp(last[n] / before[n] / 0.7) for n in BASE}
            total = sum(powers.values())
            expected = {n: BASE[n] * 3 * powers[n] / total for n in BASE}
            assert expected != pytest.approx(BASE, rel=1e-3)
        for row in rows:
            assert row["weights"] == pytest.approx(expected, rel=1e-6)
        windows.append(rows)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    total = sum(raw(row)[name] * row["counts"][name] for row in rows)
    return float(total / sum(row["counts"][name] for row in rows))


def test_gradnorm_follows_equation_2_and_sums_to_the_number_of_terms() -> None:
    alpha, rate, every = 0.5, 0.1, 2
    weighting = GradNorm(BASE, alpha, every, shared="encoder.project", learning_rate=rate)
    trainer = with_sgd(distiller(weighting))
    factors, first = torch.ones(3, dtype=torch.float64), None
    for step, batch in enumerate(BATCHES * 3):
        norms, values = norms_and_means(trainer, batch)
        row = trainer.step(batch)
        expected = {n: BASE[n] * f for n, f in zip(BASE, factors.tolist(), strict=True)}
        assert row["weights"] == pytest.approx(expected, rel=1e-5)
        if step % every:
            continue
        first = values if first is None else first
        rates = (values / first) / (values / first).mean()
        target = (factors * norms).mean() * rates**alpha  # held constant
        moved = factors.clone().requires_grad_()
        (moved * norms - target).abs().sum().backward()
        factors = factors - rate * moved.grad
        factors = factors * 3 / factors.sum()
    assert_close(weighting.factor.detach().double(), factors, rtol=1e-4, atol=1e-6)
    assert weighting.factor.sum().item() == pytest.approx(3)
    assert (factors - 1).abs().max() > 0.05


def norms_and_means(trainer: Distiller, batch: Any) -> tuple[Tensor, Tensor]:
    parameters = [*trainer.captioner.encoder.project.parameters()]
    norms, means = [], []
    trainer.objective.train()
    for term in trainer.terms(batch).values():
        found = torch.autograd.grad(term.mean, parameters, retain_graph=True)
        norms.append(torch.cat([g.flatten() for g in found]).double().norm())
        means.append(term.mean.detach().double())
    return torch.stack(norms), torch.stack(means)


def test_gradnorm_makes_unequal_norms_equal_and_plain_weights_do_not() -> None:
    def spread(weights: Any) -> float:
        trainer = distiller(weights, learning_rate=1e-4)
        for _ in range(60):
            row = trainer.step(BATCHES[0])
        norms, _ = norms_and_means(trainer, BATCHES[0])
        weighted = norms * torch.tensor([*row["weights"].values()])
        return float(weighted.max() / weighted.min())

    ones = dict.fromkeys(BASE, 1.0)
    part = "encoder.project"
    assert spread(ones) > 2
    assert spread(GradNorm(ones, 0, every=1, shared=part, learning_rate=0.05)) < 1.3


def test_uncertainty_takes_weight_from_the_larger_term() -> None:
    trainer = distiller(Uncertainty(dict.fromkeys(BASE, 1.0), learning_rate=0.05))
    for _ in range(60):
        row = trainer.step(BATCHES[0])
    order = sorted(BASE, key=raw(row).__getitem__)
    assert [row["weights"][n] for n in order] == sorted(row["weights"].values(), reverse=True)


def test_the_shared_weights_are_the_last_that_every_term_reaches() -> None:
    last: dict[str, list[str]] = {}
    for terms in (("ce", "token"), ("ce", "token", "hidden"), ("ce", "feature")):
        losses = {name: name for name in terms if name != "ce"}
        models = tiny.make_teacher(), tiny.make_student()
        trainer = Distiller(*models, losses, GradNorm(dict.fromkeys(terms, 1.0)), **LOOP)
        trainer.step(BATCHES[0])
        ids = {id(p) for p in trainer.objective.weighting._parameters_shared}
        names = [n for n, p in trainer.captioner.named_parameters() if id(p) in ids]
        last["+".join(terms)] = names
    output = ["decoder.output.weight", "decoder.output.bias"]
    assert last["ce+token"] == last["ce+token+hidden"] == output
    assert last["ce+feature"] == ["encoder.project.weight", "encoder.project.bias"]


# -- the laws of a step -----------------------------------------------------------------------


@every_kind
def test_splitting_a_step_into_micro_batches_changes_nothing(kind: str) -> None:
    parts = [tiny.make_batch([3, 1]), tiny.make_batch([2], first=2), tiny.make_batch([1], first=3)]
    whole, split = with_sgd(distiller(KINDS[kind]())), with_sgd(distiller(KINDS[kind]()))
    for _ in range(5):
        one, other = whole.step(tiny.merge(parts)), split.step(*parts)
        assert one["weights"] == pytest.approx(other["weights"], rel=1e-5)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_close(whole.objective.state_dict(), split.objective.state_dict(), rtol=1e-4, atol=1e-5)


@every_kind
def test_more_padding_changes_nothing(kind: str) -> None:
    one, other = with_sgd(distiller(KINDS[kind]())), with_sgd(distiller(KINDS[kind]()))
    for batch in BATCHES:
        one.step(batch)
        other.step(tiny.pad(batch, 3))
    assert_close(one.objective.state_dict(), other.objective.state_dict(), rtol=1e-4, atol=1e-5)


@every_kind
def test_loss_scaling_and_clipping_change_nothing_about_the_weights(kind: str) -> None:
    plainly = with_sgd(distiller(KINDS[kind](), max_grad_norm=1e6))
    scaled = with_sgd(distiller(KINDS[kind](), max_grad_norm=1e6))
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for batch in BATCHES:
        rows = [trainer.step(batch) for trainer in (plainly, scaled)]
        assert rows[0]["weights"] == pytest.approx(rows[1]["weights"], rel=1e-4)
    weights = [trainer.objective.state_dict() for trainer in (plainly, scaled)]
    assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm"])
def test_learned_weights_are_a_group_without_decay_and_clipping(kind: str) -> None:
    trainer = with_sgd(distiller(KINDS[kind](), max_grad_norm=1e-9, weight_decay=0.5))
    before = tiny.weights_of(trainer.captioner)
    row = trainer.step(BATCHES[0])
    groups = {g["name"]: g for g in trainer.optimizer.param_groups if g["name"] == "weighting"}
    assert groups["weighting"]["weight_decay"] == 0
    assert row["learning_rates"]["weighting"] == 0.1
    changed = next(trainer.objective.weighting.parameters()).detach()
    assert (changed - changed.round()).abs().max() > 1e-3  # it moved, the model hardly did
    assert_close(before["encoder.project.bias"], trainer.captioner.encoder.project.bias.detach())


@every_kind
def test_bf16_trains(kind: str) -> None:
    trainer = distiller(KINDS[kind](), precision="bf16")
    rows = [trainer.step(batch) for batch in BATCHES * 2]
    assert all(math.isfinite(value) for row in rows for value in row["weights"].values())


@every_kind
def test_one_term_alone_keeps_its_weight_or_learns_it(kind: str) -> None:
    trainer = distiller(KINDS[kind]({"ce": 0.4}))
    weights = [trainer.step(batch)["weights"]["ce"] for batch in BATCHES * 2]
    if kind == "uncertainty":
        assert weights[-1] < 0.4
    else:
        assert weights == pytest.approx([0.4] * 6)


class Sometimes(DistillationLoss):
    """A term of the batches with more than one image only."""

    needs = frozenset({"logits"})

    def count(self, batch: Any) -> float:
        return float(batch.num_images if batch.num_images > 1 else 0)

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        return student.logits.float().square().mean() * self.count(batch)


@every_kind
def test_a_term_that_is_absent_leaves_its_weight_alone(kind: str) -> None:
    weighting = KINDS[kind]({"ce": 1.0, "some": 0.5})
    trainer = Distiller(
        tiny.make_teacher(), tiny.make_student(), {"some": Sometimes()}, weighting, **LOOP
    )
    trainer = with_sgd(trainer)
    rows = [trainer.step(tiny.make_batch([2], first=n)) for n in range(4)]
    assert all(row["counts"]["some"] == 0 for row in rows)
    assert rows[-1]["weights"]["some"] == pytest.approx(0.5, rel=1e-5)
    assert all(math.isfinite(trainer.step(batch)["loss"]) for batch in BATCHES * 3)


def test_loss_ratio_compares_only_windows_that_both_had_the_term() -> None:
    weighting = LossRatio(every=1)
    weighting.build(["ce", "some"], torch.nn.Linear(1, 1))
    for step, some in enumerate([4.0, 3.0, None]):
        weighting.start_step(step, 0, 1.0)
        present = {"ce": 1.0} if some is None else {"ce": 1.0, "some": some}
        weighting.end_step(present, {"ce": 1.0, "some": float(some is not None)})
    for step in (3, 4):
        weighting.start_step(step, 0, 1.0)
        assert weighting.factors()[1] == 1.0
        weighting.end_step({"ce": 1.0, "some": 1.0}, {"ce": 1.0, "some": 1.0})


def test_base_weights_may_be_schedules_and_terms_of_weight_0_are_not_built() -> None:
    fade = {"schedule": "linear", "first": 1.0, "last": 0.0}
    weighting = Uncertainty({"ce": 1.0, "token": fade, "hidden": 0.0})
    trainer = distiller(weighting, epochs=1)
    trainer.steps_per_epoch = 4
    rows = [trainer.step(BATCHES[0]) for _ in range(4)]
    assert rows[0]["weights"].keys() == {"ce", "token"} == set(weighting.names)
    assert weighting.log_variance.shape == (2,)
    s = weighting.log_variance.detach()
    assert rows[0]["weights"]["token"] == pytest.approx(1.0)
    assert rows[2]["weights"]["token"] == pytest.approx(0.5, abs=0.1)
    assert s.abs().min() > 0


# -- runs -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("stop", ["after an epoch", "within an epoch"])
@pytest.mark.filterwarnings("ignore:Interrupted after step:UserWarning")
def test_stop_and_resume_equals_one_run(
    saveable: Make, colours: CaptionData, tmp_path: Path, kind: str, stop: str
) -> None:
    class Stop:
        def on_step(self, trainer: Any, row: Any) -> None:
            trainer.history.interrupted = stop == "within an epoch" and row["step"] == 5

        def on_epoch(self, trainer: Any, row: Any) -> None:
            trainer.stopping = stop == "after an epoch" and row["epoch"] == 1

    def run(name: str, **options: Any) -> Distiller:
        base = {"ce": 0.3, "token": (0.1, 0.7)}
        pair = tiny.make_teacher(), saveable(dropout=0.3)
        weighting = KINDS[kind](base) if kind != "loss_ratio" else LossRatio(base)
        trainer = Distiller(*pair, {"token": "token"}, weighting, **FIT, epochs=4)
        trainer.fit(colours, colours, out=tmp_path / name, **options)
        return trainer

    whole = run("whole")
    run("parts", callbacks=[Stop()])
    rest = run("parts", resume=True)
    assert tiny.same_bits(rest.objective.state_dict(), whole.objective.state_dict())
    rows = [[row.get("weights") for row in each.history.rows] for each in (whole, rest)]
    assert rows[0] == rows[1]
    assert len({row["weights"]["ce"] for row in whole.history.steps}) > 2


@every_kind
def test_every_row_of_the_history_has_the_weights_in_force(
    colours: CaptionData, tmp_path: Path, kind: str, saveable: Make
) -> None:
    trainer = distiller(KINDS[kind](), saveable(), **FIT)
    trainer.fit(colours, colours, epochs=2, out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    for row in rows[:-1]:
        assert row["weights"].keys() == BASE.keys()
    for row in trainer.history.epochs:
        val = row["val"]["terms"]
        shares = {name: term["weighted"] / term["raw"] for name, term in val.items()}
        assert shares == pytest.approx(row["weights"], rel=1e-5)


@every_kind
def test_a_run_describes_its_weighting_so_that_it_can_be_made_again(
    colours: CaptionData, tmp_path: Path, kind: str, saveable: Make
) -> None:
    trainer = distiller(KINDS[kind](), saveable(), **FIT)
    trainer.fit(colours, epochs=1, out=tmp_path)
    written = json.loads((tmp_path / "run.json").read_text())["weights"]
    assert written["name"] == kind
    again = distiller(written, saveable(), **FIT)
    assert again.objective.weighting.as_data() == trainer.objective.weighting.as_data()
    assert again.objective.weights == trainer.objective.weights
    assert type(trainer.objective.weighting).__name__ in "\n".join(trainer.describe())


@pytest.mark.filterwarnings("ignore:The resumed run continues with changes:UserWarning")
def test_another_weighting_is_another_run() -> None:
    first = distiller(LossRatio(BASE))
    first.step(BATCHES[0])
    state = copy.deepcopy(first.state_dict())
    other = distiller(LossRatio(BASE, temperature=3.0))
    with pytest.raises(Exception, match=r"'temperature': 2\.0.*-> .*'temperature': 3\.0"):
        other.load_state_dict(state)
    other.load_state_dict(state, accept_changes=True)


@every_kind
def test_check_finds_nothing_wrong_and_changes_nothing(kind: str) -> None:
    trainer = distiller(KINDS[kind]())
    before = tiny.weights_of(trainer.objective)
    report = trainer.check()
    assert report.ok, str(report)
    assert tiny.same_bits(before, tiny.weights_of(trainer.objective))


@every_kind
def test_averages_of_weights_and_adapted_weights_combine(kind: str) -> None:
    trainer = distiller(KINDS[kind](), ema_decay=0.9)
    for batch in BATCHES:
        trainer.step(batch)
    with trainer.averaged():
        assert math.isfinite(sum(t.weighted.item() for t in terms_without_grad(trainer)))


def terms_without_grad(trainer: Distiller) -> Any:
    with torch.no_grad():
        return trainer.terms(BATCHES[0]).values()


# -- what is refused --------------------------------------------------------------------------


class Alone(DistillationLoss):
    """A term that reaches its own parameter only."""

    needs = frozenset({"logits"})

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(()))

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        return self.own.square() * self.count(batch)


class Negative(DistillationLoss):
    needs = frozenset({"logits"})

    def forward(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        return -student.logits.float().square().mean() * self.count(batch)


def test_terms_that_share_no_weights_are_refused_by_gradnorm_alone() -> None:
    def make(weighting: Weighting) -> Distiller:
        models = tiny.make_teacher(), tiny.make_student()
        return Distiller(*models, {"alone": Alone()}, weighting, **LOOP)

    base = {"ce": 1.0, "alone": 1.0}
    trainer = make(GradNorm(base))
    before = tiny.weights_of(trainer.objective)
    with pytest.raises(ConfigError, match=r"reached by all of ce, alone; alone reach none.*Uncert"):
        trainer.step(BATCHES[0])
    assert tiny.same_bits(before, tiny.weights_of(trainer.objective))
    assert make(Uncertainty(base)).step(BATCHES[0])["loss"] > 0


@every_kind
def test_negative_terms_are_refused(kind: str) -> None:
    pair = tiny.make_teacher(), tiny.make_student()
    weighting = KINDS[kind]({"ce": 1.0, "bad": 1.0})
    trainer = Distiller(*pair, {"bad": Negative()}, weighting, **LOOP)
    with pytest.raises(ConfigError, match=r"'bad' is -.*balances terms >= 0"):
        trainer.step(BATCHES[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradNorm(alpha=-1), "GradNorm: alpha"),
        (lambda: GradNorm(every=0), "GradNorm: every"),
        (lambda: LossRatio(temperature=0), "LossRatio: temperature"),
        (lambda: LossRatio(every=1.5), "LossRatio: every"),
        (lambda: Uncertainty(learning_rate=0), "Uncertainty: learning_rate"),
        (lambda: distiller(Uncertainty({"ce": -1})), "'ce' is -1"),
        (lambda: distiller(Uncertainty({**BASE, "tokn": 1})), "no term 'tokn'.*'token'"),
        (lambda: distiller(GradNorm(BASE, shared="encoder.projet")), "Did you mean 'encoder.proj"),
        (lambda: distiller({**BASE, "name": "gradnrm"}), "no weighting 'gradnrm'.*'gradnorm'"),
        (lambda: distiller({**BASE, "name": "gradnorm", "alhpa": 1}), "no term 'alhpa'"),
    ],
)
def test_mistakes_are_named_before_the_first_step(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_unknown_name_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName, match="Available: gradnorm, loss_ratio, uncertainty"):
        distiller({"name": "nothing", **BASE})


def test_a_weighting_belongs_to_one_trainer() -> None:
    weighting = Uncertainty(BASE)
    distiller(weighting)
    with pytest.raises(ConfigError, match="belongs to another trainer"):
        distiller(weighting)


@pytest.mark.parametrize("weights", [Uncertainty({"reward": 1.0}), {"name": "uncertainty"}])
def test_the_reward_of_self_critical_training_is_not_balanced(weights: Any) -> None:
    with pytest.raises(ConfigError, match="may be negative"):
        SelfCritical(tiny.make_student(), weights=weights)
