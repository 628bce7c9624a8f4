"""`SelfCritical`: fine-tune a captioner on the score of the captions that it samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from capdistill.captioner import Captioner
from capdistill.errors import ConfigError, UnknownName, require_number, shortened, suggest
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.losses.base import DistillationLoss, given
from capdistill.losses.divergence import cross_entropy, full
from capdistill.metrics import DIRECTIONS, CaptionScorer
from capdistill.metrics.scorer import select
from capdistill.outputs import Batch, CaptionerOutput
from capdistill.runtime import autocast
from capdistill.teachers.cached import cached_parts, no_samples
from capdistill.training.config import SelfCriticalConfig, SelfCriticalOptions
from capdistill.training.distiller import (
    Distiller,
    Teacher,
    as_teacher,
    make_losses,
    require_weights,
)
from capdistill.training.history import Row
from capdistill.training.monitor import Monitor, monitor_key
from capdistill.training.objective import Weight, without_recurrent
from capdistill.training.on_policy import beside, sample_captions, with_frozen_tokens
from capdistill.training.weighting import Weighting

REWARD = "reward"
Reward = Callable[[Sequence[str], Sequence[str]], Any]  # image ids and captions to numbers


class SelfCritical(Distiller):
    """Maximise the score of sampled captions: self-critical sequence training.

    Every image is captioned `samples` times by sampling from the captioner. The reward of a caption
    is its score against the references of its image. Its advantage is the reward minus the mean
    reward of the other samples of the image. The term "reward" is minus the log-probability of
    each sampled word, times the advantage of its caption. Start from a captioner that was trained
    by cross-entropy or distillation: the samples of an untrained one have no reward.

    Example:
        >>> import capdistill as cd
        >>> data = cd.data.sample()
        >>> tokenizer = cd.WordTokenizer.train(data.train.captions, min_count=2)
        >>> captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
        >>> trainer = cd.SelfCritical(captioner, samples=2, progress=False)
        >>> history = trainer.fit(data.train.subset(8), epochs=1, batch_size=8)
        >>> sorted(history.epochs[0]["train"]["terms"])
        ['reward']

    Args:
        captioner: The model; it is trained in place.
        reward: A metric with a score per caption ("cider_d", "bleu_4", "rouge_l", ...), a mapping
            of such names to weights, whose weighted sum is the reward, or a function of
            (image ids, captions) that returns one number per caption.
        teacher: A teacher whose losses are added on the sampled captions, as a regulariser; or
            several, as for `Distiller`.
        losses: As for `Distiller`; they read the sampled captions. By default {"token": "token"}
            with a teacher.
        weights: Weights of "reward" (default 1), of the losses (default 1) and of "ce" (default 0:
            the references are not learned from. If positive, they stand beside the samples).
        references: Image id -> captions. By default those of the training data of `fit`.
        config: A `SelfCriticalConfig` as a whole.
        options: Fields of `SelfCriticalConfig`, instead of those of `config`.

    Raises:
        ConfigError: options that contradict each other; losses without a teacher; an unknown
            metric.

    Source:
        Rennie et al. (2017), Self-critical Sequence Training for Image Captioning, equations 3 to
        8; the baseline of the other samples: Luo (2020), A Better Variant of Self-Critical Sequence
        Training, equation 6.
    """

    config_class = SelfCriticalConfig
    config: SelfCriticalConfig

    def __init__(
        self,
        captioner: Captioner,
        reward: str | Mapping[str, float] | Reward = "cider_d",
        *,
        teacher: Teacher | None = None,
        losses: Mapping[str, DistillationLoss | str | Mapping[str, Any]] | None = None,
        weights: Mapping[str, Weight] | None = None,
        references: Mapping[str, Sequence[str]] | None = None,
        config: SelfCriticalConfig | None = None,
        **options: Unpack[SelfCriticalOptions],
    ) -> None:
        if not callable(reward):
            reward_weights(reward)  # an unknown name is reported before any data are read
        if not (references is None or isinstance(references, Mapping)):
            raise ConfigError(
                f"SelfCritical: references={shortened(references)} was given. Expected a mapping "
                "of image ids to captions, such as {'dog.jpg': ['a dog runs']}."
            )
        self.reward, self.references = reward, references
        self.rewards: Reward | None = None
        self._meter = RewardMeter()
        usual = {} if teacher is None else {"token": "token"}
        built = make_losses(usual if losses is None else losses)
        reading = [name for name, loss in built.items() if loss.from_teacher]
        if teacher is None and reading:
            raise ConfigError(
                f"SelfCritical: the losses {', '.join(reading)} read a teacher, but there is none. "
                "Give teacher=, or leave the losses out."
            )
        if REWARD in built:
            raise ConfigError(f"SelfCritical: '{REWARD}' is its own term. Rename the loss.")
        require_weights(weights)
        if isinstance(weights, Weighting) or isinstance((weights or {}).get("name"), str):
            raise ConfigError(
                "SelfCritical: weights that adapt balance terms by their values, but the value of "
                "the reward's term may be negative and is near 0 on average. Give plain weights."
            )
        module = None if teacher is None else as_teacher(teacher)
        for cached in cached_parts(module):
            raise ConfigError(f"SelfCritical: {no_samples(cached)}")
        self._start(module, captioner, config, options)
        banned = GenerationSpec.of(GenerationConfig(), captioner.tokenizer).banned
        gradient = PolicyGradient(banned, self.config.sample_temperature)
        terms: dict[str, DistillationLoss] = {REWARD: gradient, **built}
        defaults: dict[str, Weight] = dict.fromkeys(terms, 1.0)
        self._set_up(terms, {"ce": 0.0, **defaults, **(weights or {})})
        self.loss_options[REWARD] = _described(reward)
        if callable(reward) or references is not None:
            self.prepare_data(references)

    def prepare_data(self, train: Any) -> None:
        """Take the references of the training images; documents are counted over all of them."""
        if isinstance(self.reward, (str, Mapping)):
            known = references_of(train if self.references is None else self.references)
            self.rewards = reward_function(self.reward, known)
        else:
            self.rewards = self.reward

    def make_monitor(self) -> Monitor:
        """As in `Trainer`; low scores rank epochs too: validation has no loss of the reward."""
        monitor = super().make_monitor()
        monitor.meaningful = 0.0
        return monitor

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch with `samples` captions per image that the captioner sampled.

        The references of the batch stand behind them if the cross-entropy has a weight.

        Raises:
            ConfigError: the references of the training images are not known, or a reward is not a
                number.
        """
        if self.rewards is None:
            raise ConfigError(
                "SelfCritical: the references of the images are not known, so captions cannot be "
                "scored. Give references={image id: captions}, or call fit(train), which takes "
                "those of the training data."
            )
        self.objective.train()  # parts that stay quiet may have been switched since the last step
        config = self.config
        batch = batch.to(self.device)
        with autocast(self.device, self.precision):
            batch = with_frozen_tokens(self.captioner, batch)
            ids, mask, texts = sample_captions(
                self.captioner,
                batch,
                config.samples,
                temperature=config.sample_temperature,
                seed=config.seed,
                epoch=self.epoch,
            )
        images = [image for image in batch.image_ids for _ in range(config.samples)]
        rewards = check_rewards(self.rewards(images, texts), len(texts))  # (I * K,)
        self._meter.add(rewards)
        sampled = replace(
            batch,
            input_ids=ids,
            mask=mask,
            captions=texts,
            sampled=torch.ones(len(texts), dtype=torch.bool, device=self.device),
            caption_weights=None,
            advantages=leave_one_out(rewards, config.samples).to(self.device),
        )
        if "ce" not in self.objective.weights:
            return sampled
        return beside(sampled, batch, self.captioner.tokenizer.pad_id)

    def step(self, *micro_batches: Batch | None) -> Row:
        """As in `Stepper`; the rewards of all ranks are added up."""
        row = super().step(*micro_batches)
        self._meter.end_step(self.ranks.total)
        return row

    def needs_whole_weights(self) -> dict[str, object]:
        """As in `Distiller`; every step samples from the captioner."""
        return {**super().needs_whole_weights(), "SelfCritical": True}

    def describe(self) -> list[str]:
        """As in `Trainer`, and the reward."""
        reward = self.reward
        shown = reward if isinstance(reward, str) else _described(reward)
        if isinstance(reward, Mapping):
            shown = ", ".join(f"{name} {weight:g}" for name, weight in reward.items())
        samples = f"{self.config.samples} samples per image"
        return [*super().describe(), f"  reward  {shown} of {samples}"]

    def _keep_apart(self) -> None:
        """As in `Distiller`; without dropout, what computes in training mode stays quiet."""
        super()._keep_apart()
        if not self.config.dropout:
            shared = [] if self.teacher is None else list(self.objective.kept_in_eval)
            self.objective.kept_in_eval = [*shared, *without_recurrent(self.captioner)]

    def _make_callbacks(
        self, out: Path | None, monitor: Monitor | None, callbacks: Sequence[Any]
    ) -> list[Any]:
        self._meter = RewardMeter()
        return [self._meter, *super()._make_callbacks(out, monitor, callbacks)]


class PolicyGradient(DistillationLoss):
    """Minus the log-probability of each sampled word, times the advantage of its caption.

    The probability is the one the word was sampled with: of tempered logits, among the ids that
    decoding may give. The value tells little about progress: the advantages of an image sum to 0.
    Look at the reward.

    Args:
        banned: Ids that are never sampled.
        temperature: The temperature of the sampling.

    Source:
        Williams (1992), REINFORCE; Rennie et al. (2017), equation 8.
    """

    needs = frozenset({"logits"})
    from_teacher = False

    def __init__(self, banned: Sequence[int] = (), temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.int64), persistent=False)

    def count(self, batch: Batch) -> float:
        """Number of sampled words, end tokens included."""
        return float(batch.sampled_mask.sum())

    def forward(
        self, student: CaptionerOutput, teacher: CaptionerOutput | None, batch: Batch
    ) -> Tensor:
        """Sum over the words of sampled captions; 0 for a batch without any."""
        logits = full(given("The reward", "logits", "captioner", student.logits))  # (B, T, V)
        logits = logits.index_fill(-1, self.get_buffer("banned"), -torch.inf) / self.temperature
        return cross_entropy(logits, batch.targets, batch.sampled_mask, weights=batch.advantages)


class RewardMeter:
    """The mean reward of the samples: of a step in its row, of an epoch in its training part."""

    def __init__(self) -> None:
        self.own = [0.0, 0.0]  # sum and number of this process in the current step
        self.step = [0.0, 0.0]
        self.epoch = [0.0, 0.0]

    def add(self, rewards: Tensor) -> None:
        """Add the rewards of a micro-batch."""
        self.own = [self.own[0] + float(rewards.sum()), self.own[1] + len(rewards)]

    def end_step(self, total: Callable[[Sequence[float]], list[float]]) -> None:
        """Add the rewards of a step, whose sum over all processes `total` gives."""
        self.step, self.own = total(self.own), [0.0, 0.0]
        self.epoch = [a + b for a, b in zip(self.epoch, self.step, strict=True)]

    def on_step(self, trainer: Any, row: Row) -> None:
        """Write the mean of the step."""
        row[REWARD] = self.step[0] / max(self.step[1], 1)

    def on_epoch(self, trainer: Any, row: Row) -> None:
        """Write the mean of the epoch."""
        row["train"][REWARD], self.epoch = self.epoch[0] / max(self.epoch[1], 1), [0.0, 0.0]

    def state_dict(self) -> dict[str, Any]:
        """The epoch so far."""
        return {"epoch": list(self.epoch)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an epoch."""
        self.step, self.epoch = [0.0, 0.0], list(state["epoch"])


def leave_one_out(rewards: Tensor, samples: int) -> Tensor:
    """Each reward minus the mean reward of the other samples of its image.

    Example:
        >>> leave_one_out(torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 5.0]), 3)
        tensor([ 1.5000, -1.5000,  0.0000,  0.0000,  0.0000,  0.0000])

    Args:
        rewards: (I * samples,), the samples of an image side by side.
        samples: Captions per image, at least 2.

    Returns:
        (I * samples,) advantages; those of an image sum to 0.

    Source:
        Luo (2020), equation 6.
    """
    each = rewards.view(-1, samples)  # (I, K)
    others = (each.sum(1, keepdim=True) - each) / (samples - 1)
    return (each - others).flatten()


def references_of(data: Any) -> dict[str, Sequence[str]]:
    """Image id -> captions, of a data set, a mapping, a source around a data set, or batches.

    Raises:
        ConfigError: the data do not tell the captions of their images.
    """
    if isinstance(data, Mapping):
        return {str(image): captions for image, captions in data.items()}
    if isinstance(data, Batch):
        k, captions = data.captions_per_image, data.captions
        own = [captions[i * k : (i + 1) * k] for i in range(data.num_images)]
        return dict(zip(data.image_ids, data.references or own, strict=True))
    if isinstance(data, (list, tuple)) and data and all(isinstance(b, Batch) for b in data):
        return {image: texts for batch in data for image, texts in references_of(batch).items()}
    if isinstance(getattr(data, "references", None), Mapping):
        return dict(data.references)
    if hasattr(data, "data"):  # a curriculum, or a loader
        return references_of(data.data)
    raise ConfigError(
        f"SelfCritical: {type(data).__name__} does not tell the captions of its images. Train on a "
        "capdistill data set or a list of batches, or give references={image id: captions}."
    )


def reward_function(
    reward: str | Mapping[str, float], references: Mapping[str, Sequence[str]]
) -> Reward:
    """The reward of captions by metrics, with prepared references."""
    weights = reward_weights(reward)
    scorer = CaptionScorer(references, metrics=list(weights))
    return lambda ids, captions: scorer.rewards(ids, captions, weights)


def reward_weights(reward: str | Mapping[str, float]) -> dict[str, float]:
    """The scores that a reward consists of, and their weights.

    Example:
        >>> reward_weights("CIDEr"), reward_weights({"cider_d": 1, "bleu_4": 0.5})
        ({'cider_d': 1.0}, {'cider_d': 1.0, 'bleu_4': 0.5})

    Raises:
        UnknownName: no metric gives such a score; the message suggests the nearest name.
        ConfigError: no score at all, or a weight that is not a finite number.
    """
    given = {reward: 1.0} if isinstance(reward, str) else reward
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"reward: {shortened(reward)} was given. Expected the name of a score such as "
            "'cider_d', or names with weights such as {'cider_d': 1.0, 'bleu_4': 0.5}."
        )
    weights = {}
    for name, weight in given.items():
        key = monitor_key(str(name))
        if key not in DIRECTIONS:
            raise UnknownName(f"reward: no score '{name}'. {suggest(str(name), DIRECTIONS)}")
        [[computed]] = select([key]).values()
        if computed != key:
            raise ConfigError(
                f"reward: the table of paraphrases of '{key}' is not installed (extra coco). "
                f"Install it, or use '{computed}'."
            )
        if key in weights:
            raise ConfigError(f"reward: '{key}' was given twice. Give it once.")
        weights[key] = require_number(f"reward: {name}", weight)
    if not any(weights.values()):
        raise ConfigError(
            f"reward: every weight is 0 in {shortened(reward)}. Give one that is not."
        )
    return weights


def _described(reward: str | Mapping[str, float] | Reward) -> str:
    """A reward as text, by which a resumed run knows its own."""
    if isinstance(reward, (str, Mapping)):
        return repr(dict(reward) if isinstance(reward, Mapping) else reward)
    return getattr(reward, "__qualname__", type(reward).__qualname__)


def check_rewards(rewards: Any, captions: int) -> Tensor:
    """Rewards as (B,) float32.

    Raises:
        ConfigError: a reward function returned something else than a finite number per caption.
    """
    try:
        values = torch.as_tensor(rewards, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.shape != (captions,) or not values.isfinite().all():
        raise ConfigError(
            f"SelfCritical: the reward returned {shortened(rewards)} for {captions} captions. "
            "Expected one finite number per caption, in their order."
        )
    return values
