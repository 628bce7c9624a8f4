"""The source keeps its structure: no cycles, imports lead downwards, files stay few and short."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import structure


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return structure.find_modules()


@pytest.fixture(scope="module")
def graph(modules: dict[str, Path]) -> structure.Graph:
    return structure.import_graph(modules)


@pytest.fixture(scope="module")
def fresh_interpreter(modules: dict[str, Path]) -> tuple[list[str], list[str]]:
    return structure.probe(modules)


def test_no_import_cycles(graph: structure.Graph) -> None:
    assert structure.find_cycles(graph) == []


def test_the_architecture_page_lists_every_component(graph: structure.Graph) -> None:
    assert structure.unlisted_components(graph, structure.read_layers()) == []


def test_files_that_the_architecture_page_names_exist(modules: dict[str, Path]) -> None:
    page = (structure.ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.py)`", page))
    package = structure.ROOT / "src" / "capdistill"
    assert len(named) > 20
    assert sorted(name for name in named if not (package / name).exists()) == []


def test_imports_lead_to_lower_layers_only(graph: structure.Graph) -> None:
    assert structure.upward_imports(graph, structure.read_layers()) == []


def test_the_number_of_files_stays_within_its_limit(modules: dict[str, Path]) -> None:
    assert structure.too_many_files(modules) == []


def test_no_file_is_too_long(modules: dict[str, Path]) -> None:
    assert structure.long_files(modules) == []


def test_few_names_are_public(fresh_interpreter: tuple[list[str], list[str]]) -> None:
    assert fresh_interpreter[0] == []


def test_the_command_line_and_the_metrics_do_not_load_torch(
    modules: dict[str, Path], fresh_interpreter: tuple[list[str], list[str]]
) -> None:
    assert structure.missing_torch_free(modules) == []
    assert fresh_interpreter[1] == []


# -- the checks find what they are for -------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path) -> Callable[..., dict[str, Path]]:
    """A package made of the given sources; keys are paths without suffix."""

    def make(**sources: str) -> dict[str, Path]:
        for name, text in {"__init__": "", **sources}.items():
            path = tmp_path / "src" / "capdistill" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return structure.find_modules(tmp_path)

    return make


@pytest.mark.parametrize(
    "back",
    [
        "import capdistill.a",
        "from capdistill import a",
        "from . import a",
        "from .a import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from capdistill.a import name",
        "def function():\n    from capdistill.a import name",
        "import importlib\nimportlib.import_module('capdistill.a')",
        "from capdistill import Name",
        "import capdistill as cd",
    ],
)
def test_a_cycle_is_found_however_it_is_imported(
    package: Callable[..., dict[str, Path]], back: str
) -> None:
    lazy = "_PUBLIC = {'Name': 'a'}"
    modules = package(__init__=lazy, a="from capdistill import b", b=back)
    graph = structure.import_graph(modules)
    cycle = ["capdistill.a", "capdistill.b", "capdistill.a"]
    assert structure.find_cycles(graph) == [cycle]


def test_a_table_of_lazy_names_is_no_import(package: Callable[..., dict[str, Path]]) -> None:
    sources = {
        "part/__init__": "_PUBLIC = {'Name': 'inner'}",
        "part/inner": "import capdistill.part",
    }
    graph = structure.import_graph(package(**sources))
    assert graph["capdistill.part"] == {}
    assert structure.find_cycles(graph) == []


def test_the_same_table_for_a_type_checker_is_no_import(
    package: Callable[..., dict[str, Path]],
) -> None:
    table = "if TYPE_CHECKING:\n    from capdistill.{} import Name as {}"
    again, other = table.format("inner", "Name"), table.format("inner", "Other")
    modules = package(__init__=again, inner="import capdistill")
    assert structure.import_graph(modules)["capdistill"] == {}
    graph = structure.import_graph(package(__init__=other))
    assert graph["capdistill"] == {"capdistill.inner": 2}


def test_an_import_from_above_is_found_with_its_line(
    package: Callable[..., dict[str, Path]],
) -> None:
    graph = structure.import_graph(
        package(low="\nfrom capdistill.high.x import y", **{"high/x": ""})
    )
    found = structure.upward_imports(graph, [["low"], ["high"]])
    assert found == ["capdistill.low:2 imports capdistill.high.x, which is not below it"]
    assert structure.upward_imports(graph, [["low", "high"]]) == found
    assert structure.upward_imports(graph, [["high"], ["low"]]) == []


def test_a_component_that_is_not_listed_is_found(package: Callable[..., dict[str, Path]]) -> None:
    graph = structure.import_graph(package(new=""))
    assert structure.unlisted_components(graph, [["__init__"], ["old"]]) == [
        "new is not in docs/architecture.md",
        "old is listed but does not exist",
    ]


def test_too_many_and_too_long_files_are_found(
    package: Callable[..., dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = package(a="x = 1\n" * 3)
    monkeypatch.setattr(structure, "MAX_LINES", 2)
    monkeypatch.setattr(structure, "MAX_FILES", 1)
    assert structure.long_files(modules) == ["capdistill.a has 3 lines; at most 2"]
    assert structure.too_many_files(modules) == ["2 files; at most 1"]


def test_a_module_that_loads_torch_is_found(
    package: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    quiet = "try:\n    import torch\nexcept ImportError:\n    pass"
    sources = {"errors": quiet, "files": "import capdistill.tensors", "tensors": "import torch"}
    _, loaders = structure.probe(package(**sources), tmp_path)
    assert loaders == ["capdistill.errors loads torch", "capdistill.files loads torch"]
