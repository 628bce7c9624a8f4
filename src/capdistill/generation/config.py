"""The decoding options, checked when given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from capdistill.errors import ConfigError, as_float, is_count, shortened, suggest
from capdistill.generation import words
from capdistill.generation.options import GenerationOptions as GenerationOptions
from capdistill.generation.options import IdOptions
from capdistill.generation.options import SearchOptions as SearchOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from capdistill.tokenizer import Tokenizer


def _option(default: Any, **limits: float) -> Any:
    """A field with a default, and with limits of its value: ge, gt, le."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True, init=False)
class GenerationConfig:
    """Options of caption generation.

    Example:
        >>> GenerationConfig(beam_size=3, no_repeat_ngram=3).max_length is None
        True
        >>> GenerationConfig(beam_size=0)
        Traceback (most recent call last):
        ...
        capdistill.errors.ConfigError: generation: beam_size must be at least 1, got 0.

    Args:
        beam_size: Hypotheses kept per image; 1 is greedy.
        max_length: Maximum number of tokens, including the end token; None is the tokenizer's limit
            plus the end token. A caption that reaches it without an end token stays a candidate,
            marked unfinished; the end token is never forced.
        min_length: Minimum number of words.
        length_normalisation: Divisor of a hypothesis' log-probability for ranking, with n tokens
            (including the end token) and a the `length_penalty`: "none" by 1, "average" by n ** a,
            "gnmt" by ((5 + n) / 6) ** a.
        length_penalty: The exponent a, from -5 to 5; larger prefers longer captions. 0.7 scored
            best on Flickr8k's validation images; 1 is the plain mean of the log-probabilities.
        early_stopping: When the search of an image stops, once `beam_size` hypotheses are kept:
            True at once; False when the best open beam, as long as it is now, scores less than the
            worst kept; "never" when no open beam could do better at any length (exact).
        num_return: Hypotheses returned per image, as `Hypothesis.n_best`.
        no_repeat_ngram: No n tokens in a row occur twice in a caption; 0 allows it. With subwords,
            tokens are pieces.
        banned_words: Words (or phrases) that are never generated.
        allow_unknown: Whether the unknown token may be generated.
        not_last: Words that no caption ends with; "function_words" are the English articles,
            prepositions, conjunctions and the like.
        prefix: Words that every caption begins with.
        sample: Sample words at random instead of searching; `num_return` captions per image.
        temperature: Divides the log-probabilities before sampling; below 1 is more deterministic.
        top_k: Draw from the k most probable words; 0 from all.
        top_p: Draw from the smallest set of words with this share of the probability.
        seed: Seed of the sampling. With one seed, an image gets the same caption in any batch.
        beam_groups: Groups of beams that avoid each other's words; must divide `beam_size`.
        diversity_penalty: Subtracted from a word's log-probability (nats) for every beam of an
            earlier group that uses it at the same position.

    Raises:
        ConfigError: an unknown option, or values that are invalid, alone or together.

    Source:
        "average" as in Hugging Face transformers, "gnmt" Wu et al. (2016), equation 14 without
        coverage; groups Vijayakumar et al. (2018); top-p Holtzman et al. (2020).
    """

    beam_size: int = _option(1, ge=1, le=10_000)
    max_length: int | None = _option(None, ge=1, le=10_000)
    min_length: int = _option(0, ge=0, le=10_000)
    length_normalisation: Literal["none", "average", "gnmt"] = "average"
    length_penalty: float = _option(0.7, ge=-5.0, le=5.0)
    early_stopping: bool | Literal["never"] = False
    num_return: int = _option(1, ge=1, le=10_000)
    no_repeat_ngram: int = _option(0, ge=0)
    banned_words: tuple[str, ...] = ()
    allow_unknown: bool = False
    not_last: tuple[str, ...] | Literal["function_words"] = ()
    prefix: str = ""
    sample: bool = False
    temperature: float = _option(1.0, gt=0.0, ge=1e-6, le=1e6)
    top_k: int = _option(0, ge=0)
    top_p: float = _option(1.0, gt=0.0, le=1.0)
    seed: int = 0
    beam_groups: int = _option(1, ge=1)
    diversity_penalty: float = _option(0.0, ge=0.0, le=1e6)

    def __init__(self, **values: Any) -> None:
        types = self.types()
        for name, value in values.items():
            if name not in types:
                raise ConfigError(
                    f"generation: there is no option '{name}' (given: {shortened(value)}). "
                    f"{suggest(name, types)}"
                )
        for each in fields(self):
            value = each.default
            if each.name in values:
                value = _exact(each.name, types[each.name], values[each.name])
                _require_limits(each.name, value, each.metadata)
            object.__setattr__(self, each.name, value)
        for wrong, message in self._conflicts():
            if wrong:
                raise ConfigError(f"generation: {message}")

    @classmethod
    @cache
    def types(cls) -> Mapping[str, Any]:
        """The names of the options, and the types that they take."""
        return MappingProxyType(get_type_hints(cls))

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """The options by name, as pydantic gives them; with `mode="json"` lists for tuples."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        if mode != "json":
            return values
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """How configurations of pydantic hold one; pydantic itself is not needed here."""
        from pydantic_core import core_schema

        def read(value: Any) -> GenerationConfig:
            try:
                return value if isinstance(value, cls) else resolve(value, {})
            except ConfigError as error:
                raise ValueError(str(error).removeprefix("generation: ")) from error

        dump = core_schema.plain_serializer_function_ser_schema(
            lambda value, info: value.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(read, serialization=dump)

    def _conflicts(self) -> list[tuple[bool, str]]:
        beams, groups, wanted = self.beam_size, self.beam_groups, self.num_return
        limit = self.max_length or self.min_length + 1
        return [
            (
                self.sample and beams > 1,
                f"sample=True draws num_return captions one by one and has no beams, but "
                f"beam_size={beams}. Leave beam_size at 1.",
            ),
            (
                not self.sample and wanted > beams,
                f"num_return={wanted} needs as many beams, but beam_size={beams}. "
                f"Use beam_size={wanted}, or sample=True.",
            ),
            (
                beams % groups > 0,
                f"beam_size={beams} cannot be shared by beam_groups={groups}. "
                f"Use a multiple, such as beam_size={groups * -(-beams // groups)}.",
            ),
            (
                self.diversity_penalty > 0 and groups == 1,
                f"diversity_penalty={self.diversity_penalty:g} acts between groups, but "
                "beam_groups=1. Use beam_groups=2 or more.",
            ),
            (
                self.min_length > limit,
                f"min_length={self.min_length} words do not fit max_length={limit} tokens.",
            ),
        ]


class DecodingOptions(GenerationOptions, total=False):
    """A whole configuration as `generation=`, or its fields, as keyword arguments."""

    generation: GenerationConfig | Mapping[str, Any] | None


class CaptionOptions(DecodingOptions, total=False):
    """The other keyword arguments of `Captioner.caption`."""

    batch_size: int
    progress: bool


_LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most"}


def _exact(name: str, annotation: Any, value: Any) -> Any:
    """The value in its option's type: no True, text or NaN for a number, no number for a bool."""
    kinds, given = _kinds(annotation), value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's, too
        value, right = bool(value), bool in kinds
    elif isinstance(value, Integral) and float in kinds:
        value, right = as_float(value), True
    elif isinstance(value, Integral):
        value, right = int(value), int in kinds
    elif isinstance(value, Real):
        value, right = float(value), float in kinds
    elif isinstance(value, str) and tuple in kinds and value not in kinds:
        raise _wrong(name, given, f"{name}={value!r} is one string; give [{value!r}]")
    elif isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        value = tuple(value)
        right = tuple in kinds and all(isinstance(word, str) for word in value)
        sets = [kind for kind in kinds if isinstance(kind, str)]  # named sets of words
        if right and len(value) == 1 and difflib.get_close_matches(value[0], sets, 1, 0.85):
            value, right = value[0], value[0] in sets
    elif isinstance(value, str):
        right = str in kinds or value in kinds
    else:
        right = type(value) in kinds
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(name, given, _expected(kinds))
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, and the values of a `Literal`."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) is tuple:
        return (tuple,)
    inner = get_args(annotation)
    return tuple(kind for each in inner for kind in _kinds(each)) if inner else (annotation,)


def _expected(kinds: Sequence[Any]) -> str:
    words_of = {float: "a finite number", int: "a whole number", bool: "true or false"}
    words_of |= {str: "text", tuple: "a list of words", NoneType: "None"}
    *first, last = [text for kind, text in words_of.items() if kind in kinds] + [
        repr(kind) for kind in kinds if isinstance(kind, str)
    ]
    return f"expected {', '.join(first)} or {last}" if first else f"expected {last}"


def _wrong(name: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"generation: option '{name}' was given {shortened(value)}: {reason}.")


def _require_limits(name: str, value: Any, limits: Mapping[str, float]) -> None:
    for key, limit in limits.items() if value is not None else ():
        if {"ge": value < limit, "gt": value <= limit, "le": value > limit}[key]:
            unit = " token" if name == "max_length" else ""
            raise ConfigError(
                f"generation: {name} must be {_LIMITS[key]} {limit}{unit}, got {value}."
            )


def resolve(
    generation: GenerationConfig | Mapping[str, Any] | None, keywords: Mapping[str, Any]
) -> GenerationConfig:
    """A configuration given whole, its options given as keywords, or both: keywords win.

    Example:
        >>> resolve(GenerationConfig(beam_size=3), {"min_length": 2}).beam_size
        3

    Raises:
        ConfigError: something else was given, invalid options, or one that does nothing.
    """
    if isinstance(generation, GenerationConfig):
        whole: Mapping[str, Any] = generation.model_dump()
    elif generation is None or isinstance(generation, Mapping):
        whole = generation or {}
    else:
        raise ConfigError(
            f"generation: {generation!r} was given; expected a GenerationConfig or its options, "
            "such as generate(batch, beam_size=3)."
        )
    config = GenerationConfig(**{**whole, **keywords})
    for given in (whole, keywords):
        require_effect(config, given)
    return config


_NEEDS: dict[str, tuple[str, Any, str]] = {  # option -> another, with which value it does nothing
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), ("sample", False, "sample=True")),
    "early_stopping": ("beam_size", 1, "beam_size=2 or more"),
    "length_penalty": ("length_normalisation", "none", "length_normalisation='average'"),
}


def require_effect(config: GenerationConfig, given: Collection[str]) -> None:
    """Refuse, of the options given together, one that does nothing because another was forgotten.

    Beside sample=False or beam_size=1 that was given, as in a saved configuration, it may stand.

    Raises:
        ConfigError: such an option has another value than by default.
    """
    for name, (other, idle, fix) in _NEEDS.items():
        value, state = getattr(config, name), getattr(config, other)
        forgotten = name in given and other not in given
        if forgotten and state == idle and value != getattr(GenerationConfig, name):
            raise ConfigError(
                f"generation: {name}={value!r} does nothing, because {other} is {state!r}. Give "
                f"{fix} too, or leave {name} out."
            )


@dataclass(frozen=True)
class GenerationSpec:
    """The options of decoding, in token ids.

    Example:
        >>> from capdistill import WordTokenizer
        >>> tokenizer = WordTokenizer(["a", "dog", "runs"])
        >>> spec = GenerationSpec.of(GenerationConfig(banned_words=["runs"], prefix="a"), tokenizer)
        >>> spec.max_length, spec.banned, spec.prefix
        (41, (0, 1, 3, 6), (4,))

    Args:
        start_id: The first token.
        end_id: The token that ends a caption.
        max_length: Maximum number of tokens, including the end token.
        config: The other options.
        banned: Ids that are never generated. The probability of the other words stays what it is.
        phrases: Sequences of two and more ids that are never generated.
        not_last: Ids that no caption ends with.
        prefix: Ids that every caption begins with.
        subwords: What words that consist of pieces need beside that.

    Raises:
        ConfigError: max_length < 1, or a prefix that leaves no room for more.
    """

    start_id: int
    end_id: int
    max_length: int
    config: GenerationConfig = field(default_factory=GenerationConfig)
    banned: tuple[int, ...] = ()
    phrases: tuple[tuple[int, ...], ...] = ()
    not_last: tuple[int, ...] = ()
    prefix: tuple[int, ...] = ()
    subwords: words.SubwordRules | None = None

    def __post_init__(self) -> None:
        if not is_count(self.max_length):
            raise ConfigError(
                f"generation: max_length must be at least 1 token, got {self.max_length!r}."
            )
        if len(self.prefix) >= self.max_length:
            raise ConfigError(
                f"generation: the prefix has {len(self.prefix)} tokens and max_length is "
                f"{self.max_length}; use max_length={len(self.prefix) + 1} or more."
            )

    @classmethod
    def from_ids(
        cls,
        start_id: int,
        end_id: int,
        max_length: int,
        *,
        banned: Sequence[int] = (),
        beam_size: int = 1,
        num_return: int = 1,
        **options: Unpack[IdOptions],
    ) -> GenerationSpec:
        """The specification without a tokenizer.

        Args:
            start_id, end_id, max_length, banned: As above.
            beam_size, num_return, options: Fields of `GenerationConfig`, except those that take
                words.
        """
        for name in sorted(options.keys() & {"banned_words", "not_last", "prefix"}):
            raise ConfigError(
                f"generation: '{name}' takes words, which ids alone do not have. Give ids, by "
                "banned=, or use GenerationSpec.of(config, tokenizer)."
            )
        config = resolve(None, {"beam_size": beam_size, "num_return": num_return, **options})
        return cls(start_id, end_id, max_length, config, banned=tuple(banned))

    def require_a_word(self, vocabulary: int) -> None:
        """Check that not all `vocabulary` ids are banned.

        Raises:
            ConfigError: all of them are.
        """
        if vocabulary and set(self.banned).issuperset(range(vocabulary)):
            raise ConfigError(
                f"All {vocabulary} ids are banned; leave at least one that can be generated."
            )

    @classmethod
    def of(cls, config: GenerationConfig, tokenizer: Tokenizer) -> GenerationSpec:
        """The configuration in a tokenizer's ids.

        Raises:
            ConfigError: words that the vocabulary does not have; see `GenerationConfig`.
        """
        longest = getattr(tokenizer, "max_length", 40) + 1
        ids: dict[str, Any] = {}
        if config.banned_words or config.not_last or config.prefix or config.min_length:
            options = config.banned_words, config.not_last, config.prefix
            ids = words.find(tokenizer, *options, counts=bool(config.min_length))
        never = _never_generated(tokenizer, config.allow_unknown)
        return cls(
            tokenizer.start_id,
            tokenizer.end_id,
            longest if config.max_length is None else config.max_length,
            config,
            **{**ids, "banned": tuple(sorted({*ids.get("banned", ()), *never}))},
        )


def _never_generated(tokenizer: Tokenizer, allow_unknown: bool) -> set[int]:
    """Banned special tokens: unknown, padding, start and others, but never the end token."""
    unknown = getattr(tokenizer, "unk_id", None)
    ids = {tokenizer.pad_id, tokenizer.start_id, *getattr(tokenizer, "special_ids", ())}
    ids = ids - {unknown} if allow_unknown else ids | {unknown}
    return {i for i in ids if i is not None and i != tokenizer.end_id}
