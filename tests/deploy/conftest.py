"""Toy captioners and what they were exported to, once a session: torch.onnx takes seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import capdistill as cd
from capdistill import decoders
from tests.toy_captioner import Patches, tokenizer

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@dataclass(frozen=True)
class Exported:
    """A captioner and its directory."""

    captioner: cd.Captioner
    directory: Path


def toy(decoder: str, **options: object) -> cd.Captioner:
    """Patches with a small decoder."""
    torch.manual_seed(0)
    part = decoders.create(decoder, dim=8, heads=2, layers=2, **options)
    captioner = cd.Captioner(Patches(dim=8), part, tokenizer(), name=f"toy-{decoder}").eval()
    if decoder == "lstm":
        with torch.no_grad():
            for parameter in captioner.parameters():
                parameter.mul_(2.0)  # so that captions depend on the picture
    return captioner


@pytest.fixture(scope="session")
def exported_lstm(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An LSTM decoder, with greedy.onnx."""
    captioner, directory = toy("lstm", embed=6, hidden=8), tmp_path_factory.mktemp("lstm")
    cd.deploy.export(captioner, directory, greedy=True, progress=False)
    return Exported(captioner, directory)


@pytest.fixture(scope="session")
def exported_transformer(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A Transformer decoder with its cache, with greedy.onnx."""
    captioner, directory = toy("transformer", width=12, ffn=20), tmp_path_factory.mktemp("tf")
    cd.deploy.export(captioner, directory, greedy=True, progress=False)
    return Exported(captioner, directory)


@pytest.fixture(scope="session", params=["lstm", "transformer"])
def exported(request: pytest.FixtureRequest) -> Exported:
    """Each of the two."""
    made: Exported = request.getfixturevalue(f"exported_{request.param}")
    return made
