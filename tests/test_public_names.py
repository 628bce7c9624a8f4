"""What a user sees: `dir` of every public module, and nothing that happens to be imported there."""

from __future__ import annotations

import importlib
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

import capdistill as cd
from capdistill.registry import lazy_exports

ROOT = Path(__file__).parents[1]
MODULES = [
    "data",
    "decoders",
    "encoders",
    "errors",
    "evaluation",
    "generation",
    "losses",
    "metrics",
    "plots",
    "presets",
    "teachers",
    "training",
]


def test_the_package_shows_its_public_names_and_no_more_than_a_reader_holds():
    assert dir(cd) == sorted(cd.__all__)
    assert len(cd.__all__) <= 30
    for name in (*cd.__all__, "plots", "DecoderOutput", "__version__"):
        assert getattr(cd, name) is not None


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_shows_its_public_names_and_nothing_else(name):
    module = importlib.import_module(f"capdistill.{name}")
    assert dir(module) == sorted(module.__all__)
    for exported in module.__all__:
        value = getattr(module, exported)
        assert not isinstance(value, ModuleType)
        assert exported not in vars(typing)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (cd, ["DecoderState", "TokenKD", "Captioner", "presets"]),
        (cd.losses, ["TokenKD", "FeatureKD", "HiddenKD", "DistillationLoss", "describe"]),
        (cd.encoders, ["TimmEncoder", "TorchvisionEncoder", "Encoder"]),
        (cd.decoders, ["LSTMDecoder", "TransformerDecoder", "Decoder", "DecoderState"]),
        (cd.training, ["TrainConfig", "DistillConfig", "History", "Trainer", "recipe"]),
        (cd.presets, ["names", "describe", "table", "parts"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_user_looks_for_is_shown(module, names):
    assert set(names) <= set(dir(module))


def test_a_misspelt_name_of_the_package_gets_a_suggestion():
    with pytest.raises(AttributeError, match=r"no attribute 'TokenKd'. Did you mean 'TokenKD'"):
        cd.losses.TokenKd  # noqa: B018


def test_a_lazy_name_is_looked_up_once():
    get, _, _ = lazy_exports("capdistill.losses", {"TokenKD": "token"})
    vars(cd.losses).pop("TokenKD", None)
    assert get("TokenKD") is vars(cd.losses)["TokenKD"]


def test_modules_of_the_command_line_import_no_torch():
    """Packages with lazy exports cost nothing until a name is used."""
    code = (
        "import sys, capdistill, capdistill.data, capdistill.training, capdistill.generation, "
        "capdistill.metrics, capdistill.evaluation, capdistill.teachers, capdistill.errors\n"
        "print('torch' in sys.modules, 'importlib.metadata' in sys.modules)"
    )
    source = str(Path(cd.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "False"]


USER = """
import capdistill as cd

tokenizer = cd.WordTokenizer(["a", "dog"])
captioner = cd.Captioner.create("debug_student", tokenizer=tokenizer)
reveal_type(captioner)
reveal_type(cd.encoders.create("timm", name="test_vit"))
reveal_type(cd.losses.describe("token"))
reveal_type(cd.metrics.CaptionScorer({"1": ["a"]}))
cd.TokenKD(temprature=2)
cd.TokenKD(temperature=2.0)
cd.losses.FeatureKD(match=3)
cd.Captionr
state: cd.DecoderState = 3
"""


def test_a_type_checker_sees_real_types_and_planted_mistakes(tmp_path):
    program = tmp_path / "user.py"
    program.write_text(USER)
    mypy = pytest.importorskip("mypy.api")
    # With the configuration and the cache of `make test`, which has read torch and ourselves.
    settings, cache = str(ROOT / "pyproject.toml"), str(ROOT / ".mypy_cache")
    text, errors, _ = mypy.run(["--config-file", settings, "--cache-dir", cache, str(program)])
    assert not errors
    found = {}
    for line in text.splitlines():
        if "user.py:" in line:
            number = int(line.split("user.py:")[1].split(":")[0])
            found[number] = found.get(number, "") + line
    assert "Captioner" in found[6]
    assert "Encoder" in found[7]
    assert "Description" in found[8]
    assert "CaptionScorer" in found[9]
    assert 'Unexpected keyword argument "temprature"' in found[10]
    assert 11 not in found
    assert "incompatible type" in found[12]
    assert 'no attribute "Captionr"' in found[13]
    assert "Incompatible types in assignment" in found[14]
