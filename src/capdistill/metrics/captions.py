"""References and captions as users give them: dicts or lists, strings or tokens."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

from capdistill.errors import DataError
from capdistill.metrics.ngrams import Tokens
from capdistill.metrics.ptb import ptb_tokenize

Caption = str | Sequence[str]
Captions = Mapping[Hashable, Caption] | Sequence[Caption]
References = Mapping[Hashable, Sequence[Caption]] | Sequence[Sequence[Caption]]
_SHOWN = 5


def by_image(captions: Mapping[Hashable, Caption] | Sequence[Caption]) -> dict[Hashable, Caption]:
    ...
