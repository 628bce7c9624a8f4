"""Constraints on the next token in NumPy; see `capdistill.generation.constraints`.

The file of an export that holds them is read here, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capdistill.deploy.choice import Array
from capdistill.deploy.manifest import Manifest
from capdistill.errors import CheckpointError, is_count, shortened
from capdistill.files import from_json
from capdistill.generation.config import GenerationConfig, GenerationSpec
from capdistill.generation.hypotheses import IMPOSSIBLE
from capdistill.generation.words import SubwordRules

_MAX_LENGTH = 2**20  # tokens of a caption
# Options in ids: 1 is a list of ids, 2 a list of sequences.
_DEPTHS = {"banned": 1, "phrases": 2, "not_last": 1, "prefix": 1}
_SUBWORD_DEPTHS = {
    **{"banned_first": 2, "not_last": 2, "not_whole": 2},
    **{"added": 1, "first": 1, "run_on": 1},
}


class Constraints:
    """The constraints of a specification for rows (R, V) of log-probabilities.

    If the constraints ban every token, the end token is allowed, so a row always has a
    continuation.

    Args:
        spec: The options, in token ids.
        vocabulary: V, the number of entries.
    """

    def __init__(self, spec: GenerationSpec, vocabulary: int) -> None:
        self.spec, self.banned, self.not_last = spec, [*spec.banned], [*spec.not_last]
        config, rules = spec.config, spec.subwords
        self.cannot_end = _marked(spec.not_last, vocabulary)
        dynamic = config.no_repeat_ngram or config.min_length or spec.not_last or spec.phrases
        self.dynamic = bool(dynamic) or rules is not None
        if rules is not None:
            self.added, self.first = (_marked(e, vocabulary) for e in (rules.added, rules.first))

    def __call__(self, log_probs: Array, generated: Array, position: int) -> None:
        """Set the banned tokens to -inf, in place.

        Args:
            log_probs: (R, V) log-probabilities of the next token.
            generated: (R, L) token ids; only the first `position` columns are read.
            position: Number of tokens generated so far.
        """
        np.maximum(log_probs, np.float32(IMPOSSIBLE), out=log_probs)
        if position < len(self.spec.prefix):
            token = self.spec.prefix[position]
            kept = log_probs[:, token].copy()
            log_probs[...] = -np.inf
            log_probs[:, token] = kept
            return
        end = log_probs[:, self.spec.end_id].copy()
        log_probs[:, self.banned] = -np.inf
        if self.dynamic:
            self._ban(log_probs, generated[:, :position])
            stuck = log_probs.max(1) == -np.inf  # (R,)
            log_probs[stuck, self.spec.end_id] = end[stuck]

    def _ban(self, log_probs: Array, generated: Array) -> None:
        spec, config, position = self.spec, self.spec.config, generated.shape[1]
        if spec.subwords is not None:
            self._ban_by_words(log_probs, generated, spec.subwords)
        elif position < config.min_length:
            log_probs[:, spec.end_id] = -np.inf
        if config.no_repeat_ngram:
            ban_repeats(log_probs, generated, config.no_repeat_ngram)
        for phrase in spec.phrases:
            log_probs[ends_with(generated, phrase[:-1]), phrase[-1]] = -np.inf
        if spec.not_last:
            if position:
                log_probs[self.cannot_end[generated[:, -1]], spec.end_id] = -np.inf
            if position + 1 == spec.max_length:
                log_probs[:, self.not_last] = -np.inf

    def _ban_by_words(self, log_probs: Array, generated: Array, rules: SubwordRules) -> None:
        """What concerns words that consist of pieces."""
        spec, position = self.spec, generated.shape[1]
        if position and position == len(spec.prefix):
            log_probs[:, [*rules.run_on]] = -np.inf
        if spec.config.min_length:
            words = self.first[generated[:, :1]].sum(1) + self.added[generated[:, 1:]].sum(1)
            log_probs[words < spec.config.min_length, spec.end_id] = -np.inf
        for ids in rules.banned_first:
            if position + 1 == len(ids):
                log_probs[ends_with(generated, ids[:-1]), ids[-1]] = -np.inf
        if position:
            whole = [ids for ids in rules.not_whole if len(ids) == position]
            for ids in (*rules.not_last, *whole):
                log_probs[ends_with(generated, ids), spec.end_id] = -np.inf
        if position + 1 == spec.max_length:
            whole = [ids for ids in rules.not_whole if len(ids) == position + 1]
            for ids in (*rules.not_last, *whole):
                log_probs[ends_with(generated, ids[:-1]), ids[-1]] = -np.inf


def _marked(ids: Sequence[int], vocabulary: int) -> Array:
    marks = np.zeros(vocabulary, bool)
    marks[[*ids]] = True
    return marks


def ends_with(generated: Array, ids: Sequence[int]) -> Array:
    """(R,) whether the last tokens of each row are these ids.

    Example:
        >>> ends_with(np.array([[1, 2, 3], [2, 3, 2]]), (2, 3)).tolist()
        [True, False]

    Args:
        generated: (R, T) token ids.
        ids: Token ids; every row ends with none.
    """
    rows, length = generated.shape
    if len(ids) > length:
        return np.zeros(rows, bool)
    return np.asarray((generated[:, length - len(ids) :] == np.array(ids, np.int64)).all(1))


def ban_repeats(log_probs: Array, generated: Array, n: int) -> None:
    """Ban, in place, every token that would complete a repeated n-gram.

    Example:
        >>> log_probs = np.zeros((1, 4), np.float32)
        >>> ban_repeats(log_probs, np.array([[1, 2, 1]]), n=2)
        >>> log_probs.tolist()
        [[0.0, 0.0, -inf, 0.0]]

    Args:
        log_probs: (R, V) log-probabilities, changed in place.
        generated: (R, T) token ids.
        n: Length of the n-grams that must not occur twice.
    """
    length = generated.shape[1]
    if length < n:
        return
    windows = np.lib.stride_tricks.sliding_window_view(generated, n, 1)  # (R, T - n + 1, n)
    latest = generated[:, None, length - n + 1 :]  # (R, 1, n - 1)
    row, place = np.nonzero((windows[..., :-1] == latest).all(-1))
    log_probs[row, windows[row, place, -1]] = -np.inf


def saved_spec(path: Path, manifest: Manifest) -> GenerationSpec:
    """The options that were exported, in token ids: words need no tokenizer of subwords again.

    Raises:
        CheckpointError: the file does not hold options, or ids beyond the vocabulary.
    """
    try:
        content = from_json(path.read_text(encoding="utf-8"))
        longest, rules = content["max_length"], content["subwords"]
        if longest != manifest.max_length or not is_count(longest) or longest > _MAX_LENGTH:
            raise ValueError(f"max_length is {shortened(longest)}")
        depths = {"start_id": 0, "end_id": 0, **_DEPTHS}
        ids = {key: _ids(content[key], depth, manifest) for key, depth in depths.items()}
        if rules is not None:
            rules = {key: _ids(each, _SUBWORD_DEPTHS[key], manifest) for key, each in rules.items()}
        spec = GenerationSpec(
            **ids,
            max_length=longest,
            subwords=None if rules is None else SubwordRules(**rules),
            config=GenerationConfig(**content["config"]),
        )
        spec.require_a_word(manifest.vocabulary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} does not hold options of generation ({type(error).__name__}: {error}). Export "
            "the captioner again."
        ) from error
    return spec


def _ids(value: Any, depth: int, manifest: Manifest) -> Any:
    """An id, or lists of ids as tuples."""
    if depth == 0 and is_count(value, 0) and value < manifest.vocabulary:
        return value
    if depth == 0 or not isinstance(value, list) or (depth == 2 and [] in value):
        raise ValueError(f"{shortened(value)} is not {'an id' if depth == 0 else 'a list of ids'}")
    return tuple(_ids(each, depth - 1, manifest) for each in value)
