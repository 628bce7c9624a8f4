"""The rows of the table: what each trains, from which other rows, with which options.

A row is a function of a `Run`; it returns the captioner or the ensemble to evaluate. Rows of
students have three seeds. Teachers have one: theirs is the seed in their row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import capdistill as cd
from capdistill.averaging import average_weights
from capdistill.teachers import Ensemble, cache, caption
from capdistill.training import recipe

SEEDS = (0, 1, 2)
ENCODERS = {
    "lite0": "tf_efficientnet_lite0.safetensors",
    "lite1": "tf_efficientnet_lite1.fp16.safetensors",
    "lite2": "tf_efficientnet_lite2.fp16.safetensors",
}
LSTM = ("lstm", {"dim": 512, "hidden": 512, "layers": 2, "dropout": 0.4})
TRANSFORMER = (
    "transformer",
    {"dim": 512, "width": 512, "layers": 2, "ffn": 1024, "dropout": 0.4},
)
STUDENT = ("lstm", {"dim": 256, "hidden": 512, "layers": 1, "dropout": 0.4})

# The last stage of each encoder is trained, on cached maps of four views of each image.
VIEWS: dict[str, Any] = {"cache_features": True, "cache_views": 4, "flip": True}
TRAINING: dict[str, Any] = {
    **VIEWS,
    "batch_size": 16,
    "captions_per_image": 5,
    "encoder_lr_scale": 1.0,
    "weight_decay": 0.05,
    "schedule": "warmup_cosine",
    "label_smoothing": 0.1,
    "word_dropout": 0.1,
    "patience": None,
}
FROM_SCRATCH = {**TRAINING, "epochs": 12, "learning_rate": 1.5e-3}
AVERAGED: dict[str, Any] = {"ema_decay": 0.998}  # over about 500 steps: 1.3 epochs
FURTHER = {**TRAINING, **AVERAGED, "epochs": 6, "learning_rate": 1e-3}  # from `student-ce`
REWARD: dict[str, Any] = {
    **VIEWS,
    **AVERAGED,
    "batch_size": 16,
    "encoder_lr_scale": 1.0,
    "epochs": 5,
    "patience": None,
}
MEMBERS = ("lite2-lstm", "lite1-lstm", "lite2-transformer")


@dataclass
class Run:
    """What a row may use: data, weights, its directory, the results of other rows.

    Args:
        data: The splits.
        weights: Directory of the encoders' weights; None takes them from the hub.
        out: Directory of all rows.
        name: The row.
        seed: Its seed.
        options: Training options that replace those of the row (for a quick try).
    """

    data: Any
    weights: Path | None
    out: Path
    name: str
    seed: int
    options: dict[str, Any]

    @property
    def directory(self) -> Path:
        """The directory of this row and seed."""
        return self.out / self.name / f"seed{self.seed}"

    def captioner(self, encoder: str, decoder: tuple[str, dict[str, Any]]) -> cd.Captioner:
        """A new captioner with ImageNet weights in its encoder."""
        tokenizer = cd.WordTokenizer.train(self.data.train.captions, min_count=5)
        torch.manual_seed(self.seed)
        made = cd.encoders.create(
            "timm",
            name=f"tf_efficientnet_{encoder}",
            dim=decoder[1]["dim"],
            weights=True if self.weights is None else self.weights / ENCODERS[encoder],
            trainable=1,
            dropout=0.1,
        )
        parts = made, cd.decoders.create(decoder[0], **decoder[1])
        return cd.Captioner(*parts, tokenizer, name=self.name)

    def load(self, row: str) -> cd.Captioner:
        """The best epoch of another row: of this seed if that row has it, else of its only one."""
        return cd.Captioner.load(self.out / row / f"seed{seed_of(row, self.seed)}" / "best")

    def teacher(self, rows: tuple[str, ...]) -> Any:
        """The best epoch of a row, or the mixture of those of several."""
        if len(rows) == 1:
            return self.load(rows[0])
        return Ensemble({row: self.load(row) for row in rows})

    def targets(self, rows: tuple[str, ...], train: Any) -> Any:
        """What that teacher says of every view and caption, computed once for all seeds."""
        made = {
            row: cache(
                self.load(row),
                train,
                self.out / "targets" / row,
                val=self.data.val,
                cache_views=VIEWS["cache_views"],
                flip=VIEWS["flip"],
                keep=["features"] if row == TUNED[0] else [],
                cache_features=True,
                cache_dir=self.out / "cache",
            )
            for row in rows
        }
        return Ensemble(made) if len(made) > 1 else made[rows[0]]

    def fit(self, trainer: cd.Trainer, train: Any = None, **options: Any) -> cd.Captioner:
        """Train, or go on where an earlier run was stopped; the best epoch by CIDEr-D on dev."""
        chosen = {**options, "seed": self.seed, "cache_dir": self.out / "cache", **self.options}
        trainer.fit(
            self.data.train if train is None else train,
            self.data.val,
            out=self.directory,
            resume="auto",
            **chosen,
        )
        stop_if(trainer.history.interrupted)
        return trainer.captioner

    def sequences(self, teacher: Any, name: str, **options: Any) -> Any:
        """The training data with a teacher's captions, decoded once for all seeds."""
        return caption(
            teacher,
            self.data.train,
            self.out / "captions" / f"{name}.jsonl",
            **{"beam_size": 5, "cache_features": True, "cache_dir": self.out / "cache", **options},
        )


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        title: How the table names it.
        make: Trains what is missing and returns the model to evaluate.
        needs: Rows that must be there.
        seeds: The seeds that the table shows.
    """

    title: str
    make: Callable[[Run], Any]
    needs: tuple[str, ...] = ()
    seeds: tuple[int, ...] = SEEDS


def seed_of(row: str, seed: int) -> int:
    """The seed of a row that goes with a seed of another: the same if it has it, else its first."""
    seeds = ROWS[row].seeds
    return seed if seed in seeds else seeds[0]


def stop_if(interrupted: bool) -> None:
    """End here: an interrupted run has no result yet."""
    if interrupted:
        raise SystemExit("Interrupted. The same command continues.")


def member(encoder: str, decoder: tuple[str, dict[str, Any]], **options: Any) -> Callable[..., Any]:
    """A member of the ensemble, by cross-entropy."""

    def make(run: Run) -> cd.Captioner:
        captioner = run.captioner(encoder, decoder)
        return run.fit(cd.Trainer(captioner), **{**FROM_SCRATCH, **options})

    return make


def mean_of_both(run: Run) -> cd.Captioner:
    """Self-critical training of the best student; then the mean of its weights before and after."""
    before = run.load("student-best")
    after = run.fit(cd.SelfCritical(run.load("student-best")), **{**REWARD, "epochs": 3})
    before.load_state_dict(average_weights([before.state_dict(), after.state_dict()]))
    return before


def self_critical(start: str) -> Callable[[Run], cd.Captioner]:
    """Self-critical training from another row."""
    return lambda run: run.fit(cd.SelfCritical(run.load(start)), **REWARD)


def ensemble(rows: tuple[str, ...]) -> Callable[[Run], Ensemble]:
    """The mixture of other rows; nothing is trained."""
    return lambda run: run.teacher(rows)


def further(run: Run) -> cd.Captioner:
    """As many more epochs of cross-entropy as the distilled students get."""
    return run.fit(cd.Trainer(run.load("student-ce")), **FURTHER)


def distilled(
    losses: dict[str, Any],
    weights: dict[str, Any],
    sequences: dict[str, Any] | None = None,
    teacher: tuple[str, ...] = (),
    **options: Any,
) -> Callable[[Run], cd.Captioner]:
    """From the student by cross-entropy: distillation from the ensemble.

    Args:
        losses, weights: As for `Distiller`.
        sequences: The teacher captions the images, with these arguments of `caption`.
        teacher: Rows of another teacher.
        options: Training options.
    """
    rows = teacher or TUNED

    def make(run: Run) -> cd.Captioner:
        train, live = run.data.train, run.teacher(rows)
        if sequences is not None:
            train = run.sequences(live, "+".join(rows), **sequences)
        # The student's own captions are new in every step, so the teacher must run beside it.
        taught = live if "on_policy" in options else run.targets(rows, train)
        trainer = cd.Distiller(taught, run.load("student-ce"), losses=losses, weights=weights)
        return run.fit(trainer, train, **{**FURTHER, **options})

    return make


def best(teacher: tuple[str, ...]) -> Callable[[Run], cd.Captioner]:
    """The stage of `recipe("best_small")` after cross-entropy, from targets that are kept."""
    _, stage = recipe("best_small")["stages"]
    return distilled(stage["losses"], stage["weights"], SEQUENCES, teacher, epochs=stage["epochs"])


def sequence(run: Run) -> cd.Captioner:
    """Cross-entropy on the captions of the ensemble, from the student by cross-entropy."""
    train = run.sequences(run.teacher(TUNED), "+".join(TUNED), **SEQUENCES)
    return run.fit(cd.Trainer(run.load("student-ce")), train, **FURTHER)


def sweep(
    temperature: float = 1.0, ce: float = 0.3, num_return: int = 3, mix: int = 2, **options: Any
) -> Callable[[Run], cd.Captioner]:
    """A short run of tokens and sequences that differs from the others in one thing."""
    token = {"token": {"name": "token", "temperature": temperature}}
    captions = {"num_return": num_return, "mix": mix}
    shares = {"ce": ce, "token": 1 - ce}
    return distilled(token, shares, captions, **{"epochs": 4, **options})


TUNED = tuple(f"{name}-sc" for name in MEMBERS)
TOKEN = {"token": {"name": "token", "temperature": 1.0}}
SHARES = {"ce": 0.3, "token": 0.7}
SEQUENCES: dict[str, Any] = {"num_return": 3, "mix": 2}
ROWS: dict[str, Row] = {
    "lite2-lstm": Row("lite2 + LSTM, cross-entropy", member("lite2", LSTM), seeds=(0,)),
    "lite1-lstm": Row("lite1 + LSTM, cross-entropy", member("lite1", LSTM), seeds=(1,)),
    "lite2-transformer": Row(
        "lite2 + Transformer, cross-entropy",
        member("lite2", TRANSFORMER, learning_rate=5e-4),
        seeds=(2,),
    ),
    "ensemble": Row("ensemble of the three, cross-entropy", ensemble(MEMBERS), MEMBERS, (0,)),
    **{
        f"{name}-sc": Row(f"{name}, then self-critical", self_critical(name), (name,), (seed,))
        for seed, name in enumerate(MEMBERS)
    },
    "ensemble-sc": Row("ensemble of the three, self-critical", ensemble(TUNED), TUNED, (0,)),
    "student-ce": Row(
        "student, cross-entropy",
        lambda run: run.fit(cd.Trainer(run.captioner("lite0", STUDENT)), **FROM_SCRATCH),
    ),
    "student-ce-further": Row("+ 6 epochs of cross-entropy", further, ("student-ce",)),
    "student-sc": Row("+ self-critical", self_critical("student-ce"), ("student-ce",)),
    "student-token": Row(
        "+ token KD",
        distilled(TOKEN, SHARES),
        ("student-ce", "ensemble-sc"),
    ),
    "student-features": Row(
        "+ token, feature, hidden KD",
        distilled(
            {
                **TOKEN,
                "feature": {"name": "feature", "match": "pooled", "teacher": TUNED[0]},
                "hidden": {"name": "hidden", "teacher": TUNED[0]},
            },
            {**SHARES, "feature": 0.2, "hidden": 0.1},
        ),
        ("student-ce", "ensemble-sc"),
    ),
    "student-on-policy": Row(
        "+ on-policy token KD",
        distilled(TOKEN, SHARES, on_policy=0.4),
        ("student-ce", "ensemble-sc"),
    ),
    "student-sequence": Row("+ sequence-level KD", sequence, ("student-ce", "ensemble-sc")),
    "student-token-sequence": Row(
        "+ token and sequence-level KD",
        distilled(TOKEN, SHARES, SEQUENCES),
        ("student-ce", "ensemble-sc"),
    ),
    "student-best": Row("the best recipe", best(TUNED), ("student-ce", "ensemble-sc")),
    "student-best-mean": Row(
        "+ self-critical, mean of before and after", mean_of_both, ("student-best",)
    ),
    "student-varied": Row(
        "token KD from the cross-entropy ensemble",
        distilled(TOKEN, SHARES, teacher=MEMBERS, epochs=12),
        ("student-ce", *MEMBERS),
    ),
    "student-best-single": Row(
        "the best recipe, from the best single teacher",
        best(TUNED[:1]),
        ("student-ce", TUNED[0]),
    ),
}
SWEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "sweep": ("T = 1, cross-entropy .3, three captions and two references", {}),
    "sweep-temperature-2": ("T = 2", {"temperature": 2.0}),
    "sweep-temperature-4": ("T = 4", {"temperature": 4.0}),
    "sweep-ce-0": ("no cross-entropy", {"ce": 0.0}),
    "sweep-ce-7": ("cross-entropy .7", {"ce": 0.7}),
    "sweep-one-caption": ("one caption and two references", {"num_return": 1}),
    "sweep-no-reference": ("three captions alone", {"mix": 0}),
    "sweep-all-references": ("three captions and five references", {"mix": 5}),
    "sweep-on-policy-2": ("a fifth on-policy", {"on_policy": 0.2}),
    "sweep-on-policy-5": ("half on-policy", {"on_policy": 0.5}),
}
ROWS.update(
    (name, Row(title, sweep(**what), ("student-ce", "ensemble-sc"), seeds=(0,)))
    for name, (title, what) in SWEEPS.items()
)
