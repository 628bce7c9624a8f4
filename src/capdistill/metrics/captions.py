"""References and captions as users give them: dicts or lists, strings or tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from capdistill.errors import DataError
from capdistill.metrics.ngrams import Tokens
from capdistill.metrics.ptb import ptb_tokenize

Caption = str | Sequence[str]
Captions = Mapping[Any, Caption] | Sequence[Caption]
References = Mapping[Any, Sequence[Caption]] | Sequence[Sequence[Caption]]
_SHOWN = 5


def prepare(references: References) -> dict[Any, list[Caption]]:
    """References by image (0, 1, ... where a list was given), each image with at least one."""
    items = dict(references if isinstance(references, Mapping) else enumerate(references))
    if not items:
        raise DataError("No references: give at least one image with one reference caption.")
    for image, captions in items.items():
        if isinstance(captions, str):
            raise DataError(
                f"References of image {image!r} are the string {captions!r}; expected a list of "
                "captions. Put it into a list."
            )
    without = [image for image, captions in items.items() if not len(captions)]
    if without:
        raise DataError(
            f"{len(without)} images have no reference caption: {first(without)}. Give each "
            "image at least one, or leave it out."
        )
    return {image: list(captions) for image, captions in items.items()}


def align(captions: Captions, images: Collection[Any]) -> list[Caption]:
    """The captions in the order of `images`; every image has one and there are no others."""
    items = dict(captions if isinstance(captions, Mapping) else enumerate(captions))
    missing = [image for image in images if image not in items]
    foreign = [image for image in items if image not in images]
    if missing or foreign:
        raise DataError(
            f"Captions and references are not of the same images: {len(items)} captions, "
            f"{len(images)} images with references. Without a caption: {first(missing)}. "
            f"Without references: {first(foreign)}. Give one caption for each image, by the same "
            "ids as the references (or both as lists in one order); '' is a caption."
        )
    return [items[image] for image in images]


def tokens_of(caption: Caption) -> Tokens:
    """Tokens of a string by the PTB rules; tokens as they are."""
    if isinstance(caption, str):
        return ptb_tokenize(caption)
    tokens = list(_strings(caption))
    spaced = [token for token in tokens if " " in token]
    if spaced:
        raise DataError(
            f"The token {spaced[0]!r} has a space in it. Give a caption as one string, or as a "
            "list of tokens; one image takes one caption."
        )
    return tokens


def as_text(caption: Caption) -> str:
    """A string as it is; tokens joined by spaces."""
    return caption if isinstance(caption, str) else " ".join(_strings(caption))


def _strings(caption: Sequence[str]) -> Sequence[str]:
    if isinstance(caption, Sequence) and all(isinstance(token, str) for token in caption):
        return caption
    raise DataError(f"A caption is {caption!r}; expected a string or a list of tokens.")


def first(images: Sequence[Any]) -> str:
    """The first few ids, for a message."""
    shown = ", ".join(repr(image) for image in images[:_SHOWN])
    return f"{shown}, ... ({len(images)})" if len(images) > _SHOWN else shown or "none"
