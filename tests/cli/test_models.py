from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from capdistill import decoders, encoders, losses, presets
from capdistill.cli import main, models


def test_models_prints_the_true_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--vocabulary", "100", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["presets"] == [asdict(size) for size in presets.table(100)]
    losses = {part["name"]: part["origin"] for part in content["losses"]}
    assert losses["token"] == "built-in"


def test_a_broken_plugin_is_shown_and_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tmp_path / "badplug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: badplug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[capdistill.losses]\nbad = badplug.losses:Bad\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(presets, "table", lambda vocabulary: [])
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [line] = [line for line in lines if line.startswith("  bad ")]
    assert "badplug 1.0" in line
    assert "cannot be used" in line
    assert any(line.startswith("  token ") for line in lines)


def test_the_built_in_parts_are_those_of_the_registries() -> None:
    for kind, registry in (("encoders", encoders), ("decoders", decoders), ("losses", losses)):
        assert models.BUILT_IN[kind] == registry.registry._builtins
        for part in models.built_in()[kind]:
            about = registry.describe(part["name"])
            assert part["summary"] == about.docstring.split("\n", 1)[0]
            assert part["origin"] == about.origin


def test_the_list_imports_no_model() -> None:
    code = "import sys; from capdistill.cli import main; main(['models']); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'numpy')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in (*presets.names(), *losses.names()))


def test_a_vocabulary_without_words_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["models", "--vocabulary", "4"])
    assert done.value.code == 2
    assert "no word" in capsys.readouterr().err
