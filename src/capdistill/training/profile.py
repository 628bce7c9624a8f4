"""What the time of a run is spent on: `fit(profile=True)`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from capdistill.training.callbacks import Callback, Run
from capdistill.training.history import Row
from capdistill.training.step import Stepper


class Profile(Callback):
    """Add `profile` to the row of each epoch: part of the run -> its share of the wall time.

    - `data`: batches made in this process, and moved to the device.
    - `waiting`: for batches of the worker processes.
    - `prepare_batch`: the trainer's own change of a batch, such as captions that are sampled.
    - `teacher`, `student`: their forward passes; `losses`: the terms, cross-entropy included.
    - `backward`: with the clipping of gradients; `optimizer`: its step.
    - `validation`: everything in it.
    - `other`: callbacks, saving and the rest.

    It wraps methods of the trainer while the run goes on, and adds nothing to one without it. On a
    GPU it waits for the device at the end of each part, which makes steps somewhat slower: compare
    shares, not speeds. Of several processes it measures the first.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> trainer = cd.Trainer(captioner, epochs=1, device="cpu", progress=False)
        >>> history = trainer.fit(data.train.subset(8), profile=True)
        >>> round(sum(history.epochs[0]["profile"].values()), 6)
        1.0
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = "other", time.perf_counter()
        self._wait: Callable[[], None] | None = None  # for the device
        self._undo: list[Callable[[], object]] = []

    def on_fit_start(self, trainer: Run) -> None:
        """Watch the trainer."""
        assert isinstance(trainer, Stepper)
        device = trainer.device
        waits = {"cuda": lambda: torch.cuda.synchronize(device), "mps": torch.mps.synchronize}
        self._wait = waits.get(device.type)
        workers = getattr(trainer.train_source, "num_workers", 0)
        self.loading = "waiting" if workers else "data"
        self._wrap(trainer, "step", "data", "other")
        self._wrap(trainer, "prepare_batch", "prepare_batch", "data")
        self._wrap(trainer, "teacher_output", "teacher", "losses")
        self._wrap(trainer, "validate", "validation", "other")
        self._hook(trainer.objective, "losses", "backward")
        self._hook(trainer.objective.student, "student", "losses")
        assert trainer.optimizer is not None
        before = trainer.optimizer.register_step_pre_hook(lambda *_: self.begin("optimizer"))
        after_step = trainer.optimizer.register_step_post_hook(lambda *_: self.begin("other"))
        self._undo += [before.remove, after_step.remove]

    def on_epoch(self, trainer: Run, row: Row) -> None:
        """Add the shares to the row, and begin anew."""
        self.begin("other")
        whole = sum(self.seconds.values())
        shares = {name: seconds / whole for name, seconds in self.seconds.items() if seconds}
        row["profile"] = dict(sorted(shares.items(), key=lambda pair: -pair[1]))
        self.seconds.clear()

    def close(self) -> None:
        """Leave the trainer as it was."""
        for undo in self._undo:
            undo()
        self._undo.clear()

    def begin(self, part: str) -> None:
        """End the part that goes on and begin another."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def _within(self, part: str) -> None:
        """Begin a part of a step; all of validation is one part."""
        if self._part != "validation":
            self.begin(part)

    def _wrap(self, trainer: Stepper, name: str, inside: str, after: str) -> None:
        method = getattr(trainer, name)
        ends = self.begin if name == "validate" else self._within

        def timed(*args: Any) -> Any:
            self._within(inside)
            try:
                return method(*args)
            finally:
                ends(after)

        own = name in vars(trainer)  # a user assigned it
        setattr(trainer, name, timed)
        self._undo.append(lambda: setattr(trainer, name, method) if own else delattr(trainer, name))

    def _hook(self, module: torch.nn.Module, inside: str, after: str) -> None:
        first = module.register_forward_pre_hook(lambda *_: self._within(inside))
        last = module.register_forward_hook(lambda *_: self._within(after), always_call=True)
        self._undo += [first.remove, last.remove]


class _Loading(Callback):
    """The last of the callbacks: from here to the next step batches are loaded."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def on_fit_start(self, trainer: Run) -> None:
        self.profile.begin(self.profile.loading)
        self.profile.seconds.clear()

    def on_step(self, trainer: Run, row: Row) -> None:
        self.profile.begin(self.profile.loading)

    def on_epoch(self, trainer: Run, row: Row) -> None:
        self.profile.begin(self.profile.loading)


def profiled(callbacks: Iterable[Any]) -> list[Any]:
    """The callbacks that write rows, behind a `Profile` that adds the shares to the rows."""
    profile = Profile()
    return [profile, *callbacks, _Loading(profile)]
