"""`capdistill models`: the presets with their sizes, and the names in the registries."""

from __future__ import annotations

import argparse
import ast
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import capdistill
from capdistill.cli import DONE, columns, print_result

_EXAMPLE = """\
example:
  capdistill models
  capdistill models --vocabulary 10000 --json"""

BUILT_IN = {
    "encoders": {
        "timm": "capdistill.encoders.timm:TimmEncoder",
        "torchvision": "capdistill.encoders.torchvision:TorchvisionEncoder",
    },
    "decoders": {
        "lstm": "capdistill.decoders.lstm:LSTMDecoder",
        "transformer": "capdistill.decoders.transformer:TransformerDecoder",
    },
    "losses": {
        "attention": "capdistill.losses.attention:AttentionKD",
        "contrastive": "capdistill.losses.contrastive:ContrastiveKD",
        "decoupled": "capdistill.losses.decoupled:DecoupledKD",
        "dist": "capdistill.losses.dist:DistKD",
        "feature": "capdistill.losses.feature:FeatureKD",
        "hidden": "capdistill.losses.hidden:HiddenKD",
        "jsd": "capdistill.losses.generalised:JensenShannonKD",
        "relational": "capdistill.losses.relational:RelationalKD",
        "reverse_kl": "capdistill.losses.generalised:ReverseKD",
        "token": "capdistill.losses.token:TokenKD",
        "top_k": "capdistill.losses.top_k:TopKD",
        "universal": "capdistill.losses.across_vocabularies:UniversalKD",
        "word": "capdistill.losses.across_vocabularies:WordKD",
    },
}  # as in the registries, which cannot be asked without importing torch


def models_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `models`."""
    parser.description = _EXAMPLE
    parser.add_argument(
        "--vocabulary",
        type=vocabulary_size,
        default=3000,
        metavar="V",
        help="number of words and special tokens, which sets the decoders' sizes "
        "(default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from capdistill import presets

    sizes = [asdict(size) for size in presets.table(options.vocabulary)]
    installed = any(entry_points(group=f"capdistill.{kind}") for kind in BUILT_IN)
    parts = registered() if options.json or installed else built_in()
    content = {"vocabulary": options.vocabulary, "presets": sizes, **parts}
    print_result(options, content, lambda: _text(options.vocabulary, sizes, parts))
    return DONE


def built_in() -> dict[str, list[dict[str, Any]]]:
    """The parts of this package as in `registered`, read from the source: no model is imported.

    Example:
        >>> [part["name"] for part in built_in()["decoders"]]
        ['lstm', 'transformer']
    """
    return {
        kind: [
            {"name": name, "origin": "built-in", "summary": _summary(target)}
            for name, target in targets.items()
        ]
        for kind, targets in BUILT_IN.items()
    }


def _summary(target: str) -> str:
    """The first line of a class's docstring."""
    module, _, name = target.partition(":")
    path = Path(capdistill.__file__).parent.joinpath(*module.split(".")[1:])
    body = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8")).body
    classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    return (ast.get_docstring(classes[0]) or "").split("\n", 1)[0]


def registered() -> dict[str, list[dict[str, Any]]]:
    """Every registered encoder, decoder and loss with its origin; a broken plugin has an `error`.

    Example:
        >>> [part["name"] for part in registered()["decoders"] if part["origin"] == "built-in"]
        ['lstm', 'transformer']
    """
    from capdistill import decoders, encoders, losses

    kinds = {"encoders": encoders, "decoders": decoders, "losses": losses}
    return {
        kind: [_component(registry.describe(name)) for name in registry.names()]
        for kind, registry in kinds.items()
    }


def vocabulary_size(text: str) -> int:
    """A whole number above the four special tokens."""
    size = int(text)
    if size <= 4:
        raise argparse.ArgumentTypeError(
            f"{size} leaves no word beside the 4 special tokens; give 5 or more"
        )
    return size


def _component(description: Any) -> dict[str, Any]:
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
    for kind, described in parts.items():
        lines = [(f"  {each['name']}", each["origin"], _remark(each)) for each in described]
        blocks += ["", f"{kind.capitalize()}:", columns(lines)]
    return "\n".join(blocks)


def _remark(part: dict[str, Any]) -> str:
    shadows = "".join(f" [shadows {claim}]" for claim in part.get("shadows", ()))
    error = part.get("error")
    return (f"cannot be used: {error}" if error else part["summary"]) + shadows
