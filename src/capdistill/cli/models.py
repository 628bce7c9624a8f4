"""`capdistill models`: presets with their true sizes, and the names in the registries."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from capdistill.cli.common import DONE, columns, give

_EXAMPLE = """\
  capdistill models
  capdistill models --vocabulary 10000 --json"""


def models_command(add: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Arguments of `models`."""
    parser = add(example=_EXAMPLE)
    parser.add_argument(
        "--vocabulary",
        type=vocabulary_size,
        default=3000,
        metavar="V",
        help="words and special tokens, which size the decoder (default: %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from capdistill import presets

    sizes = [asdict(size) for size in presets.table(options.vocabulary)]
    parts = registered()
    content = {"vocabulary": options.vocabulary, "presets": sizes, **parts}
    give(options, content, lambda: _text(options.vocabulary, sizes, parts))
    return DONE


def registered() -> dict[str, list[dict[str, Any]]]:
    """Every registered encoder, decoder and loss with its provenance; a broken plugin says why.

    Example:
        >>> [part["name"] for part in registered()["decoders"] if part["origin"] == "built-in"]
        ['lstm', 'transformer']
    """
    from capdistill import decoders, encoders, losses

    kinds = {"encoders": encoders, "decoders": decoders, "losses": losses}
    return {
        kind: [_part(registry.describe(name)) for name in registry.names()]
        for kind, registry in kinds.items()
    }


def vocabulary_size(text: str) -> int:
    """A whole number above the four special tokens."""
    size = int(text)
    if size <= 4:
        raise argparse.ArgumentTypeError(f"{size} leaves no word beside the 4 special tokens")
    return size


def _part(description: Any) -> dict[str, Any]:
    keys = ("name", "origin", "signature", "error")
    summary = description.docstring.split("\n", 1)[0]
    shadowed = list(description.shadowed)
    return {**{k: getattr(description, k) for k in keys}, "summary": summary, "shadows": shadowed}


def _text(vocabulary: int, sizes: list[dict[str, Any]], parts: dict[str, Any]) -> str:
    rows = [("preset", "parameters", "encoder", "decoder", "trained", "tokens", "image", "")]
    keys = ("parameters", "encoder", "decoder", "trainable", "tokens", "image_size")
    rows += [(s["name"], *(f"{s[key]:,}" for key in keys), s["description"]) for s in sizes]
    blocks = [
        f"Presets, with a vocabulary of {vocabulary:,} entries:",
        columns(rows, right=range(1, 7)),
    ]
    for kind, found in parts.items():
        lines = [(f"  {p['name']}", p["origin"], _remark(p)) for p in found]
        blocks += ["", f"{kind.capitalize()}:", columns(lines)]
    return "\n".join(blocks)


def _remark(part: dict[str, Any]) -> str:
    shadows = "".join(f" [shadows {claim}]" for claim in part["shadows"])
    return (f"cannot be used: {part['error']}" if part["error"] else part["summary"]) + shadows
