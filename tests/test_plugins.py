"""Law 10 with real wheels: built, installed into a folder, and used by another process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import capdistill

SOURCE = Path(capdistill.__file__).parents[1]
PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"

LOSS = """
from capdistill.losses.base import DistillationLoss
class Loss(DistillationLoss):
    "A loss from outside."
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
    def forward(self, student, teacher, batch):
        return self.factor * student.logits.sum()
"""


def run(code: str, *paths: Path) -> Any:
    """Run code in a new process with folders on its path; what it prints last is JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, *paths)))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def make_wheel(folder: Path, owner: str, entry: str, code: str) -> Path:
    """A wheel is a zip archive with its metadata inside."""
    info = f"{owner}-2.5.dist-info"
    files = {
        f"{owner}/__init__.py": "",
        f"{owner}/losses.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {owner}\nVersion: 2.5\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[capdistill.losses]\n{entry}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"{owner}-2.5-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example plugin, built from source, and five other plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PLUGIN, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ("--no-deps", "--no-index")
    pip("wheel", *options, "--no-build-isolation", "-w", folder, folder / "source")
    make_wheel(folder, "goodplug", "good = goodplug.losses:Loss", LOSS)
    make_wheel(folder, "brokenplug", "broken = brokenplug.losses:Loss", "raise OSError('boom')")
    make_wheel(folder, "shadowplug", "token = shadowplug.losses:Loss", LOSS)
    make_wheel(folder, "twin_a", "twin = twin_a.losses:Loss", LOSS)
    make_wheel(folder, "twin_b", "twin = twin_b.losses:Loss", LOSS)
    pip("install", *options, "--target", folder / "site", *folder.glob("*.whl"))
    return folder / "site"


@pytest.fixture(scope="module")
def seen(site: Path) -> dict[str, Any]:
    """What one process sees that uses the plugins as a user would."""
    return run(
        """
        import json, sys, warnings
        plugs = ("capdistill_similarity", "goodplug", "brokenplug", "shadowplug", "twin_")
        def loaded():
            return sorted(m for m in sys.modules if m.startswith(plugs))
        def attempt(act):
            try:
                return str(act())
            except Exception as error:
                cause = type(error.__cause__).__name__
                return f"{type(error).__name__} from {cause}: {error}"
        import capdistill as cd
        from capdistill.registry import recipe_of
        seen = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen["names"] = cd.losses.names()
            seen["loaded after names"] = loaded()
            made = cd.losses.create("similarity", tau=0.2)
            seen["made"] = [type(made).__module__, made.tau, recipe_of(made).name]
            seen["loaded after create"] = loaded()
            seen["origin"] = cd.losses.describe("similarity").origin
            seen["signature"] = cd.losses.describe("similarity").signature
            seen["broken"] = [attempt(lambda: cd.losses.create("broken")) for _ in range(2)]
            seen["described"] = str(cd.losses.describe("broken"))
            seen["token"] = cd.losses.get("token").__module__
            seen["shadowed"] = cd.losses.describe("token").shadowed
            seen["selected"] = cd.losses.get("shadowplug:token").__module__
            seen["twin"] = attempt(lambda: cd.losses.create("twin"))
            seen["twin_a"] = cd.losses.get("twin-a:twin").__module__
            seen["taken"] = attempt(lambda: cd.losses.register("token")(type(made)))
            seen["warnings"] = [str(w.message) for w in caught]
            cd.losses.register("token", override=True)(type(made))
            seen["overridden"] = str(cd.losses.describe("token"))
            seen["wrong"] = attempt(lambda: cd.losses.create("similarity", tua=0.2))
        print(json.dumps(seen))
        """,
        site,
    )


def test_an_installed_plugin_is_found_by_name(seen: dict[str, Any]) -> None:
    assert {"similarity", "good", "broken", "twin", "token"} <= set(seen["names"])
    assert seen["made"] == ["capdistill_similarity.losses", 0.2, "similarity"]


def test_listing_imports_no_plugin_and_creating_only_its_own(seen: dict[str, Any]) -> None:
    assert seen["loaded after names"] == []
    assert seen["loaded after create"] == [
        "capdistill_similarity",
        "capdistill_similarity.losses",
    ]


def test_describe_names_distribution_version_and_signature(seen: dict[str, Any]) -> None:
    assert seen["origin"] == "capdistill-similarity 0.1.0"
    assert seen["signature"] == "similarity(tau: float = 0.1)"


def test_a_broken_plugin_is_an_error_that_names_it_twice_the_same(seen: dict[str, Any]) -> None:
    first, second = seen["broken"]
    assert first == second
    assert first.startswith("PluginError from OSError: The plugin brokenplug 2.5 cannot")
    assert "'broken = brokenplug.losses:Loss'" in first
    assert "boom" in seen["described"]


def test_a_builtin_wins_over_a_plugin_with_one_warning(seen: dict[str, Any]) -> None:
    assert seen["token"] == "capdistill.losses.token"
    assert seen["shadowed"] == ["shadowplug 2.5 (shadowplug.losses:Loss)"]
    assert seen["selected"] == "shadowplug.losses"
    assert [text for text in seen["warnings"] if "shadowplug" in text] == seen["warnings"]
    assert len(seen["warnings"]) == 1


def test_two_distributions_with_one_name_say_how_to_choose(seen: dict[str, Any]) -> None:
    assert seen["twin"].startswith("ConfigError")
    assert "twin_a:twin" in seen["twin"]
    assert "twin_b:twin" in seen["twin"]
    assert seen["twin_a"] == "twin_a.losses"


def test_a_name_is_replaced_only_on_purpose(seen: dict[str, Any]) -> None:
    assert "'token' is taken: built-in" in seen["taken"]
    assert "decorator (capdistill_similarity.losses)" in seen["overridden"]
    assert "shadows built-in (capdistill.losses.token:TokenKD)" in seen["overridden"]


def test_wrong_arguments_for_a_plugin_show_its_signature(seen: dict[str, Any]) -> None:
    assert seen["wrong"].startswith("ConfigError")
    assert "similarity(tau: float = 0.1)" in seen["wrong"]


def test_the_example_loss_equals_a_hand_written_one(site: Path) -> None:
    """Oracle: the definition, term by term, in float64."""
    result = run(
        """
        import json, torch, capdistill as cd
        torch.manual_seed(0)
        def output(width):
            features = torch.randn(3, 5, width, requires_grad=True)
            mask = torch.ones(3, 1, dtype=torch.bool)
            return cd.CaptionerOutput(torch.zeros(3, 1, 4), None, features, None, mask)
        def spec(width):
            return cd.ModelSpec(width, 5, 0, None, (), ("a",), False)
        student, teacher = output(6), output(8)
        batch = cd.Batch(
            torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.ones(3, 2, dtype=torch.int64),
            torch.ones(3, 2, dtype=torch.bool), ("x",) * 3, ("1", "2", "3"),
        )
        loss = cd.losses.create("similarity", tau=0.5)
        loss.build(spec(6), spec(8))
        total = loss(student, teacher, batch)
        total.backward()
        ours, theirs = (each.features.detach().mean(1).double() for each in (student, teacher))
        def among_others(x, i):
            cosine = [torch.cosine_similarity(x[i], x[j], 0) / 0.5 for j in range(3) if j != i]
            return torch.stack(cosine).softmax(0)
        expected = 0.0
        for i in range(3):
            mine, target = among_others(ours, i), among_others(theirs, i)
            expected += float((target * (target / mine).log()).sum())
        print(json.dumps([
            float(total), expected, loss.count(batch), teacher.features.grad is None,
            bool(student.features.grad.abs().sum() > 0),
        ]))
        """,
        site,
    )
    assert result[0] == pytest.approx(result[1], rel=1e-5)
    assert result[2:] == [3.0, True, True]


def readme_class(name: str) -> Any:
    """The class of that name from the code blocks of the plugin's README."""
    blocks = re.findall(r"```python\n(.*?)```", (PLUGIN / "README.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if f"class {name}(" in block)
    found: dict[str, Any] = {"__name__": "readme"}
    exec(block, found)
    return found[name]


def test_the_encoder_of_the_readme_honours_the_contract() -> None:
    encoder = readme_class("Patches")(dim=8)
    trunk = encoder.trunk(torch.zeros(2, 3, 100, 80, dtype=torch.uint8))
    assert trunk.shape == (2, encoder.tokens, encoder.token_dim)
    assert encoder.head(trunk).shape == (2, encoder.tokens, encoder.dim)
    assert encoder.grid[0] * encoder.grid[1] == encoder.tokens


def test_the_decoder_of_the_readme_gives_one_answer_at_once_and_by_steps() -> None:
    decoder = readme_class("Bag")(dim=8)
    decoder.build(vocabulary=11)
    features, ids = torch.randn(2, 5, 8), torch.randint(11, (4, 3))
    at_once = decoder(ids, features).logits
    state = decoder.start(features).expand(2)
    for position in range(3):
        logits, state = decoder.step(ids[:, position], state)
        torch.testing.assert_close(logits, at_once[:, position])


def fake(root: Path, name: str, entry: str) -> None:
    folder = Path(root, f"{name}-1.0.dist-info")
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[capdistill.losses]\n{entry}\n")


def test_case_14_one_broken_plugin_does_not_take_the_library_down(tmp_path: Path) -> None:
    modules = {
        "goodplug": LOSS,
        "noisyplug": "raise RuntimeError('boom')",
        "exitplug": "import sys\nsys.exit(3)",
        "oddplug": "",
        "badplug": None,
    }
    for name, code in modules.items():
        fake(tmp_path, name, f"{name[:-4]} = {name}.losses:Loss")
        if code is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").touch()
            (tmp_path / name / "losses.py").write_text(code)
    result = run(
        """
        import json, sys
        import capdistill as cd
        names = cd.losses.names()
        builtin = type(cd.losses.create("token")).__name__
        before = [m for m in sys.modules if m.partition(".")[0].endswith("plug")]
        good = type(cd.losses.create("good", factor=2.0)).__module__
        broken = {}
        for name in ("bad", "noisy", "exit", "odd"):
            tries = []
            for _ in range(2):
                try:
                    cd.losses.create(name)
                except Exception as error:
                    cause = error.__cause__
                    tries.append([type(error).__name__, type(cause).__name__, str(error)])
            broken[name] = [tries, str(cd.losses.describe(name))]
        print(json.dumps([names, builtin, before, good, broken]))
        """,
        tmp_path,
    )
    names, builtin, before, good, broken = result
    assert {"good", "bad", "noisy", "exit", "odd", "token", "feature", "hidden"} <= set(names)
    assert builtin == "TokenKD"
    assert before == []
    assert good == "goodplug.losses"
    causes = {
        "bad": "ModuleNotFoundError",
        "noisy": "RuntimeError",
        "exit": "SystemExit",
        "odd": "AttributeError",
    }
    for name, cause in causes.items():
        (first, second), described = broken[name]
        assert first == second
        assert first[:2] == ["PluginError", cause]
        assert f"{name}plug 1.0" in first[2]
        assert f"{name} = {name}plug.losses:Loss" in first[2]
        assert first[2] in described


def test_import_loads_no_plugin_and_nothing_heavy(site: Path) -> None:
    heavy = ["PIL", "matplotlib", "nltk", "pydantic", "timm", "torchvision", "transformers"]
    loaded = run(
        f"""
        import json, sys
        import capdistill, capdistill.encoders, capdistill.decoders, capdistill.losses
        for package in (capdistill.encoders, capdistill.decoders, capdistill.losses):
            if package is not capdistill.losses:
                package.names()
        tops = {{name.partition(".")[0] for name in sys.modules}}
        plugs = {{"capdistill_similarity", "goodplug", "brokenplug", "shadowplug", "twin_a"}}
        print(json.dumps(sorted(tops & (plugs | set({heavy!r})))))
        """,
        site,
    )
    assert loaded == []


def test_losses_are_one_object_however_imported() -> None:
    assert run(
        """
        import json
        import capdistill as cd
        import capdistill.losses as by_path
        from capdistill import losses as by_name
        by_name.register("mine")(type("Mine", (by_path.DistillationLoss,), {}))
        print(json.dumps([cd.losses is by_path is by_name, "mine" in cd.losses.names()]))
        """
    ) == [True, True]
