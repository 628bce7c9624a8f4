"""Every option of a training run, checked when it is given and written beside the run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from capdistill.errors import ConfigError, as_float, is_count, parse, shortened, suggest
from capdistill.generation.config import GenerationConfig, GenerationOptions, resolve
from capdistill.training.options import Options


class Interval(NamedTuple):
    """How often something happens: after so many steps or so many seconds; never if both are None.

    Args:
        steps: Number of steps.
        seconds: Number of seconds.
    """

    steps: int | None = None
    seconds: float | None = None


NEVER = Interval()
_SECONDS = {"s": 1, "min": 60, "h": 3600}
_TIME = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(s|min|h)")


def parse_interval(value: object) -> Interval:
    """A number of steps, or a time as text, as an interval.

    Example:
        >>> parse_interval(500), parse_interval("1.5h").seconds
        (Interval(steps=500, seconds=None), 5400.0)
        >>> parse_interval("10 minutes")
        Traceback (most recent call last):
        ...
        ValueError: expected a number of steps, such as 500, or a time in s, min or h, such as \
'10min'; or None

    Args:
        value: A whole number of at least 1, text, or None.

    Raises:
        ValueError: it is none of these.
    """
    if value is None:
        return NEVER
    if is_count(value):
        return Interval(steps=int(value))  # type: ignore[call-overload]
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not seconds:
        raise ValueError(
            "expected a number of steps, such as 500, or a time in s, min or h, such as '10min'; "
            "or None"
        )
    return Interval(seconds=seconds)


LOGGERS = ("csv", "tensorboard", "wandb")


class TrainConfig(Options):
    """Options of `Trainer`. Give them to the constructor, or to `fit` for that fit alone.

    Example:
        >>> TrainConfig(epochs=3).batch_size
        16

    Args:
        epochs: Passes over the training images.
        batch_size: Images per micro-batch. A step sees `batch_size * accumulation_steps` images
            with `captions_per_image` captions each.
        captions_per_image: Captions per image in one batch; the image is encoded once for all of
            them. None takes the median number of captions of the training images, at most 5.
        learning_rate: Peak rate of AdamW.
        encoder_lr_scale: Learning rate of the encoder's trunk, as a factor of `learning_rate`.
        weight_decay: Not applied to norms, biases and embeddings.
        schedule: "cosine_restarts", "warmup_cosine" or "constant"; updated after every step.
        restart_epochs: Length of the first period of "cosine_restarts".
        restart_factor: Factor by which each following period is longer.
        warmup: Share of all steps in which "warmup_cosine" rises.
        precision: "auto", "bf16", "fp16" (CUDA only) or "fp32".
        compile: Whether encoders and decoders, of the teacher too, are compiled by `torch.compile`;
            or the name of its backend. The first steps take minutes.
        gradient_checkpointing: Keep the inputs of the student's blocks only and compute the rest
            again in the backward pass: less memory, about a third more time.
        quantize: "int8" rounds the student's weights and activations to 8 bits and back in every
            forward pass, for its export to int8; see `FakeQuantizer`. None does not.
        accumulation_steps: Micro-batches per step. A shorter last group is divided by its own
            count.
        max_grad_norm: Gradients are clipped to this norm; None does not clip.
        ema_decay: Decay of an exponential moving average of the trained weights, for instance
            0.999, or None. Validation scores the average, best/ and final/ hold it; training
            continues on the weights themselves. The first updates decay less; see `WeightAverage`.
        label_smoothing: Label smoothing of the cross-entropy term, never of the teacher's targets.
        word_dropout: Probability that an input word (with subwords, a piece) is replaced by the
            unknown token. Targets and the teacher's input stay as they are.
        scheduled_sampling: Probability, reached at the end of the run, that an input word is
            replaced by one sampled from the model. It grows linearly from 0. The decoder runs
            twice.
        patience: Epochs without improvement after which training stops, or None.
        monitor: The score that decides which epoch is best ("cider", "bleu_4", ...), or "loss".
        metrics: Metrics that validation computes.
        seed: Seed of shuffling, choice of captions, augmentation and dropout.
        num_workers: Processes that read images. None chooses by the data and the processors.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        augment: Random crops of training images. None means yes unless features are cached.
        flip: Mirror half of the training images. Off by default: captions mention left and right.
        cache_images: Keep decoded images in memory.
        cache_features: Encode each image once and train on the cached output of the last frozen
            stage. None does so if a trunk is frozen, no augmentation is set and the cache takes at
            most 4 GB.
        cache_views: Views of a training image that `cache_features` encodes: the centre crop and
            random crops (mirrored with `flip`). The epochs use them in turn.
        cache_dtype: Type of the cached values: "fp16", or "bf16" for an encoder whose values exceed
            65504 (with an eighth of the precision).
        cache_dir: Directory of cached features; by default a folder of the user's cache directory.
        errors: "skip" reports unreadable images and continues; "raise" stops at the first.
        eval_batch_size: Images per batch in validation.
        generation: Decoding in validation: a `GenerationConfig` or its options. None is greedy.
        log_every: Steps between two rows of the history.
        log: Where the rows go besides the history: any of "csv", "tensorboard" and "wandb", or
            {"name": "wandb", "project": ...} with arguments; see `training/loggers.py`.
        profile: Whether each epoch's row tells what the time was spent on; see `Profile`.
        on_spike: What happens at a step whose loss lies far above those before (see `StepGuard`):
            "skip" leaves it out, "stop" ends the run with `LossSpike`. None does not look for any.
        save_every: When the training state is saved within an epoch, besides at its end: after so
            many steps (500), or so much time ("30s", "10min", "2h"). None does not.
        keep: Earlier states kept beside state.pt: state.previous.pt, state.previous.2.pt, ...
        keep_best: Best captioners kept: best/ and, above 1, earlier ones as best-epoch-N/.
        progress: Progress bar and summaries. None shows a bar on a terminal and lines elsewhere.
    """

    epochs: int = Field(15, ge=1)
    batch_size: int = Field(16, ge=1)
    captions_per_image: int | None = Field(None, ge=1, le=10_000)
    learning_rate: float = Field(1e-3, gt=0)
    encoder_lr_scale: float = Field(0.1, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    schedule: Literal["cosine_restarts", "warmup_cosine", "constant"] = "warmup_cosine"
    restart_epochs: int = Field(10, ge=1)
    restart_factor: int = Field(2, ge=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool | str = False
    gradient_checkpointing: bool = False
    quantize: Literal["int8"] | None = None
    accumulation_steps: int = Field(1, ge=1)
    max_grad_norm: float | None = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, ge=0, lt=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    word_dropout: float = Field(0.0, ge=0, lt=1)
    scheduled_sampling: float = Field(0.0, ge=0, le=1)
    patience: int | None = Field(5, ge=1)
    monitor: str = "cider"
    metrics: tuple[str, ...] = ("bleu", "cider_d")
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    num_workers: int | None = Field(None, ge=0, le=10_000)
    device: str = "auto"
    augment: bool | None = None
    flip: bool = False
    cache_images: bool = False
    cache_features: bool | None = None
    cache_views: int = Field(1, ge=1, le=10_000)
    cache_dtype: Literal["fp16", "bf16"] = "fp16"
    cache_dir: str | None = None
    errors: Literal["skip", "raise"] = "skip"
    eval_batch_size: int = Field(64, ge=1)
    generation: GenerationConfig | None = None
    log_every: int = Field(10, ge=1)
    log: tuple[str | dict[str, Any], ...] = ()
    profile: bool = False
    on_spike: Literal["skip", "stop"] | None = None
    save_every: int | str | None = "10min"
    keep: int = Field(1, ge=1, le=10_000)
    keep_best: int = Field(1, ge=1, le=10_000)
    progress: bool | None = None

    @field_validator("save_every", mode="before")
    @classmethod
    def _is_an_interval(cls, value: Any) -> Any:
        parse_interval(value)
        return value

    @field_validator("log", mode="before")
    @classmethod
    def _are_loggers(cls, value: Any) -> Any:
        several = (value,) if isinstance(value, (str, Mapping)) else tuple(value or ())
        for each in several:
            name = each.get("name") if isinstance(each, Mapping) else each
            if name not in LOGGERS:
                raise ValueError(f"there is no logger {name!r}. {suggest(str(name), LOGGERS)}")
        return several

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        """A path object becomes text, so that the configuration stays plain data."""
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="before")
    @classmethod
    def _collect_decoding(cls, values: Any) -> Any:
        """Fields of `GenerationConfig` may stand beside those of training: `fit(beam_size=3)`."""
        own = cls.model_fields.keys()
        loose = {n: v for n, v in values.items() if n in GenerationConfig.types().keys() - own}
        given = values.get("generation") or {}
        if not loose or not isinstance(given, (Mapping, GenerationConfig)):
            return values
        rest = {name: value for name, value in values.items() if name not in loose}
        return {**rest, "generation": resolve(given, loose)}

    @model_validator(mode="before")
    @classmethod
    def _needs_no_teacher(cls, values: Any) -> Any:
        """Options that only a teacher gives a meaning are refused by name."""
        given = [n for n in values if n.startswith("on_policy") and n not in cls.model_fields]
        if given:
            raise ValueError(
                f"{given[0]}={values[given[0]]!r} was given, but there is no teacher to score the "
                "captions that the student samples. Use Distiller(teacher, student, on_policy=...)"
                ", or SelfCritical to learn from a metric."
            )
        return values

    @classmethod
    def resolve(
        cls, config: TrainConfig | None, options: Mapping[str, Any], what: str
    ) -> TrainConfig:
        """A configuration with options replaced; the configuration itself where there are none.

        Example:
            >>> TrainConfig.resolve(TrainConfig(epochs=3), {"batch_size": 2}, "fit").epochs
            3

        Raises:
            ConfigError: an unknown option or an invalid value; the message starts with `what`.
        """
        if config is not None and not isinstance(config, TrainConfig):
            raise ConfigError(
                f"{what}: config={shortened(config)} was given. Expected a {cls.__name__}; give "
                "its fields as keyword arguments (epochs=3), those of a recipe by **recipe(name)."
            )
        other = config is not None and config.model_fields_set - cls.model_fields.keys()
        if config is not None and not options and isinstance(config, cls) and not other:
            return config
        kept = {} if config is None else {n: getattr(config, n) for n in config.model_fields_set}
        return parse(cls, {**kept, **options}, what)


class TrainOptions(GenerationOptions, total=False):
    """The fields of `TrainConfig` as keyword arguments, for type checkers.

    Those of decoding (`beam_size` and others) may stand beside them.
    """

    epochs: int
    batch_size: int
    captions_per_image: int | None
    learning_rate: float
    encoder_lr_scale: float
    weight_decay: float
    schedule: Literal["cosine_restarts", "warmup_cosine", "constant"]
    restart_epochs: int
    restart_factor: int
    warmup: float
    precision: Literal["auto", "bf16", "fp16", "fp32"]
    compile: bool | str
    gradient_checkpointing: bool
    quantize: Literal["int8"] | None
    accumulation_steps: int
    max_grad_norm: float | None
    ema_decay: float | None
    label_smoothing: float
    word_dropout: float
    scheduled_sampling: float
    patience: int | None
    monitor: str
    metrics: Sequence[str]
    num_workers: int | None
    device: str
    augment: bool | None
    flip: bool
    cache_images: bool
    cache_features: bool | None
    cache_views: int
    cache_dtype: Literal["fp16", "bf16"]
    cache_dir: str | os.PathLike[str] | None
    errors: Literal["skip", "raise"]
    eval_batch_size: int
    generation: GenerationConfig | Mapping[str, Any] | None
    log_every: int
    log: str | Sequence[str | Mapping[str, Any]]
    profile: bool
    on_spike: Literal["skip", "stop"] | None
    save_every: int | str | None
    keep: int
    keep_best: int
    progress: bool | None


class DistillConfig(TrainConfig):
    """Options of `Distiller`: those of `Trainer`, and of captions sampled from the student.

    Example:
        >>> DistillConfig(on_policy=(0.0, 0.5)).share_on_policy(progress=0.5)
        0.25

    Args:
        on_policy: Share of the captions of a batch, 0 to 1, that are replaced by captions sampled
            from the student, which the teacher scores word by word; a pair (first, last) is
            interpolated linearly over the run. The cross-entropy skips them.
        on_policy_temperature: The log-probabilities are divided by it before sampling.
        on_policy_top_k: Sample from the k most probable words; 0 from all.
    """

    on_policy: float | tuple[float, float] = 0.0
    on_policy_temperature: float = Field(1.0, gt=0)
    on_policy_top_k: int = Field(0, ge=0)

    @field_validator("on_policy", mode="before")
    @classmethod
    def _is_a_share(cls, value: Any) -> Any:
        ends = list(value) if isinstance(value, (list, tuple)) else [value, value]
        numbers = [as_float(end) for end in ends]
        if len(numbers) != 2 or not all(0 <= each <= 1 for each in numbers):
            raise ValueError("expected a share from 0 to 1, or a pair (first, last) of them")
        return tuple(numbers) if isinstance(value, (list, tuple)) else numbers[0]

    @property
    def samples_on_policy(self) -> bool:
        """Whether any caption is replaced in the run."""
        return any(_ends(self.on_policy))

    def share_on_policy(self, progress: float) -> float:
        """The share of captions that are replaced at `progress` (0 to 1) of the run."""
        first, last = _ends(self.on_policy)
        return first + (last - first) * progress


def _ends(value: float | tuple[float, float]) -> tuple[float, float]:
    """The first and the last value of a constant, or of a pair."""
    return value if isinstance(value, tuple) else (value, value)


class DistillOptions(TrainOptions, total=False):
    """The fields of `DistillConfig` as keyword arguments, for type checkers."""

    on_policy: float | tuple[float, float]
    on_policy_temperature: float
    on_policy_top_k: int


class SelfCriticalConfig(DistillConfig):
    """Options of `SelfCritical`: those of `Distiller` with other defaults, and of the samples.

    Example:
        >>> SelfCriticalConfig(epochs=5).samples
        5

    Args:
        epochs: A few epochs suffice: the score of the training images rises on while that of
            others no longer does.
        learning_rate: Small, because the model is trained already.
        weight_decay: None by default.
        schedule: Constant by default.
        label_smoothing: Of the cross-entropy on references, which has weight 0 by default.
        samples: Captions that are sampled per image, at least 2.
        sample_temperature: The logits are divided by it before sampling.
        dropout: Whether dropout, and batch statistics of normalisation layers, are used while the
            sampled captions are scored. By default the model is as it was when it sampled.
    """

    epochs: int = Field(3, ge=1)
    learning_rate: float = Field(5e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["cosine_restarts", "warmup_cosine", "constant"] = "constant"
    samples: int = Field(5, ge=2, le=1000)
    sample_temperature: float = Field(1.0, gt=0)
    dropout: bool = False

    @model_validator(mode="after")
    def _reads_its_own_words(self) -> SelfCriticalConfig:
        if self.word_dropout or self.scheduled_sampling:
            raise ValueError(
                "word_dropout and scheduled_sampling change the words that the captioner reads, "
                "but its samples are scored as they were sampled: set both to 0"
            )
        if self.samples_on_policy:
            raise ValueError(
                f"on_policy={self.on_policy} replaces captions by samples, but here every caption "
                "is one already, and teacher= scores them: leave on_policy out"
            )
        if self.monitor in ("loss", "val_loss"):
            raise ValueError(
                "monitor='loss' is the loss on references, of which the reward has none. Choose a "
                "score, such as monitor='cider'"
            )
        return self


class SelfCriticalOptions(DistillOptions, total=False):
    """The fields of `SelfCriticalConfig` as keyword arguments, for type checkers."""

    samples: int
    sample_temperature: float
    dropout: bool


# The default weights of the losses: those of the published recipe.
DEFAULT_WEIGHTS = {"ce": 0.3, "token": 0.7, "feature": 0.2, "hidden": 0.1}
