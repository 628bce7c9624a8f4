"""A configuration made concrete for one vocabulary: ids in place of words."""

from __future__ import annotations

from dataclasses import dataclass, field

from capdistill.errors import ConfigError
from capdistill.generation.config import GenerationConfig
from capdistill.generation.words import function_words, prefix_ids, sayable, single
from capdistill.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """What `generate` does, in ids.

    Example:
        >>> from capdistill import WordTokenizer
        >>> tokenizer = WordTokenizer(["a", "dog", "runs"])
        >>> plan = Plan.of(GenerationConfig(banned_words=["runs"], prefix="a"), tokenizer)
        >>> plan.max_length, plan.banned, plan.prefix
        (41, (0, 1, 3, 6), (4,))

    Args:
        start_id: Fed first.
        end_id: Ends a caption.
        max_length: Tokens at most, the end token among them.
        config: Everything that is no id.
        banned: Ids that are never said. The probability of the other words stays what it is.
        phrases: Sequences of two and more ids that are never said.
        not_last: Ids that no caption ends on.
        prefix: Ids that every caption begins with.

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

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(
                f"generation: max_length must be at least 1 token, got {self.max_length}."
            )
        if len(self.prefix) >= self.max_length:
            raise ConfigError(
                f"generation: the prefix has {len(self.prefix)} tokens and max_length is "
                f"{self.max_length}; use max_length={len(self.prefix) + 1} or more."
            )

    @classmethod
    def of(cls, config: GenerationConfig, tokenizer: Tokenizer) -> Plan:
        """The configuration in a tokenizer's ids.

        Raises:
            ConfigError: words that can not be meant; see `GenerationConfig`.
        """
        longest = getattr(tokenizer, "max_length", 40) + 1
        banned = sayable(tokenizer, "banned_words", config.banned_words)
        words = {ids[0] for ids in banned if len(ids) == 1}
        return cls(
            tokenizer.start_id,
            tokenizer.end_id,
            longest if config.max_length is None else config.max_length,
            config,
            banned=tuple(sorted(words | _never_said(tokenizer, config.allow_unknown))),
            phrases=tuple(ids for ids in banned if len(ids) > 1),
            not_last=(
                function_words(tokenizer)
                if config.not_last == "function_words"
                else single(tokenizer, "not_last", config.not_last)
            ),
            prefix=prefix_ids(tokenizer, config.prefix),
        )


def _never_said(tokenizer: Tokenizer, allow_unknown: bool) -> set[int]:
    """Unknown, padding and start tokens are no words; the end token must stay possible."""
    keys = ("pad_id", "start_id") if allow_unknown else ("unk_id", "pad_id", "start_id")
    ids = {getattr(tokenizer, key, None) for key in keys}
    return {i for i in ids if i is not None and i != tokenizer.end_id}
