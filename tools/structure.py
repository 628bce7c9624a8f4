"""Check the structure of src/capdistill: import cycles, order of its components, sizes, torch.

    python tools/structure.py        # a report; exit code 1 where a rule is broken

A component is a package or a module directly below `capdistill`. Their order is read from
docs/architecture.md, so that the page and this check cannot differ.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "capdistill"
MAX_FILES, MAX_LINES, MAX_PUBLIC = 203, 420, 30
TORCH_FREE = (
    "errors",
    "files",
    "generation.config",
    "generation.hypotheses",
    "generation.options",
    "generation.words",
    "training.config",
    "training.recipes",
    "cli",
    "cli.*",
    "data.caption_files",
    "data.depths",
    "data.pixels",
    "deploy",
    "deploy.choice",
    "deploy.constraints",
    "deploy.manifest",
    "deploy.onnx_captioner",
    "deploy.search",
    "deploy.web",
    "evaluation.bench_table",
    "evaluation.benchmark",
    "evaluation.resources",
    "evaluation.table",
    "evaluation.timed_models",
    "tokenizer",
    "tokenizers",
    "tokenizers.*",
    "metrics",
    "metrics.*",
)

Graph = dict[str, dict[str, int]]  # module -> imported module -> line of the import


def find_modules(root: Path = ROOT) -> dict[str, Path]:
    """The modules of the package by name; a package is named by its folder."""
    source = root / "src"
    modules = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def import_graph(modules: Mapping[str, Path]) -> Graph:
    """Who imports whom, wherever the import stands: also in functions and under TYPE_CHECKING.

    The table of names in a package's `__init__`, which `__getattr__` imports when asked, is a
    re-export and no dependency of the package: neither the table nor the `import x as x` that tell
    a type checker the same count as imports. A name imported through such a table counts as an
    import of the module that the table gives.
    """
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in modules.items()}
    tables = {
        name: _lazy_table(name, trees[name], modules)
        for name, path in modules.items()
        if path.name == "__init__.py"
    }
    graph: Graph = {}
    for name, tree in trees.items():
        package = name if name in tables else name.rpartition(".")[0]
        graph[name] = {}
        if name in tables:
            tree.body = [node for node in tree.body if not _is_typing_table(node)]
        for target, line in _imports(tree, package, modules, tables):
            if target != name:
                graph[name].setdefault(target, line)
    return graph


def _lazy_table(package: str, tree: ast.Module, modules: Mapping[str, Path]) -> dict[str, str]:
    """Exported name -> module, from the dicts of strings in an `__init__`."""
    table = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                named = str(value.value)
                targets = [name for name in (f"{package}.{named}", named) if name in modules]
                table.update({str(key.value): target for target in targets[:1]})
    return table


def _is_typing_table(node: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:` with nothing but re-exports (`import x as x`)."""
    return (
        isinstance(node, ast.If)
        and ast.unparse(node.test) == "TYPE_CHECKING"
        and all(
            isinstance(each, ast.ImportFrom) and all(a.asname == a.name for a in each.names)
            for each in node.body
        )
    )


def _imports(
    tree: ast.Module,
    package: str,
    modules: Mapping[str, Path],
    tables: Mapping[str, Mapping[str, str]],
) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != PACKAGE]
            if len(names) < len(node.names):  # `import capdistill` reaches all that it exports
                names += tables[PACKAGE].values()
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [_source(base, alias.name, modules, tables) for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name in modules)


def _source(
    base: str, name: str, modules: Mapping[str, Path], tables: Mapping[str, Mapping[str, str]]
) -> str:
    """The module that `from base import name` reads."""
    whole = f"{base}.{name}"
    return whole if whole in modules else tables.get(base, {}).get(name, base)


def find_cycles(graph: Graph) -> list[list[str]]:
    """Import cycles, each as the shortest way from a module back to itself."""
    cycles: list[list[str]] = []
    for start in sorted(graph):
        if not any(start in cycle for cycle in cycles) and (cycle := _way_back(graph, start)):
            cycles.append(cycle)
    return cycles


def _way_back(graph: Graph, start: str) -> list[str]:
    paths, seen = deque([[start]]), set()
    while paths:
        path = paths.popleft()
        for target in graph[path[-1]]:
            if target == start:
                return [*path, start]
            if target not in seen:
                seen.add(target)
                paths.append([*path, target])
    return []


def read_layers(root: Path = ROOT) -> list[list[str]]:
    """The layers of components, bottom first, from the marked block of docs/architecture.md."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"^<!-- layers\b.*?-->\n+```text\n(.*?)^```$", text, re.M | re.S)
    if block is None:
        raise SystemExit("docs/architecture.md: no ```text block below a <!-- layers --> comment.")
    return [re.split(r",\s*", line.strip()) for line in block[1].splitlines() if line.strip()]


def component(module: str) -> str:
    """The component that a module belongs to; `__init__` for the package itself.

    Example:
        >>> component("capdistill.losses.token"), component("capdistill")
        ('losses', '__init__')
    """
    return [*module.split("."), "__init__"][1]


def unlisted_components(graph: Graph, layers: Sequence[Sequence[str]]) -> list[str]:
    """Components that the page leaves out, and those that it lists although there are none."""
    listed = [name for layer in layers for name in layer]
    existing = {component(module) for module in graph}
    return [
        *(f"{name} is not in docs/architecture.md" for name in sorted(existing - {*listed})),
        *(f"{name} is listed but does not exist" for name in listed if name not in existing),
        *(f"{name} is listed twice" for name in sorted({*listed}) if listed.count(name) > 1),
    ]


def upward_imports(graph: Graph, layers: Sequence[Sequence[str]]) -> list[str]:
    """Imports from a component of the same layer or of one above; unlisted ones are left out."""
    level = {name: number for number, layer in enumerate(layers) for name in layer}
    wrong = []
    for module, targets in graph.items():
        for target, line in targets.items():
            ours, theirs = component(module), component(target)
            if ours != theirs and {ours, theirs} <= level.keys() and level[theirs] >= level[ours]:
                wrong.append(f"{module}:{line} imports {target}, which is not below it")
    return wrong


def too_many_files(modules: Mapping[str, Path]) -> list[str]:
    """The number of files where it is over the limit."""
    return [f"{len(modules)} files; at most {MAX_FILES}"] * (len(modules) > MAX_FILES)


def long_files(modules: Mapping[str, Path]) -> list[str]:
    """Files over the limit of lines."""
    counts = {name: _count_lines(path) for name, path in modules.items()}
    return [
        f"{name} has {count} lines; at most {MAX_LINES}"
        for name, count in counts.items()
        if count > MAX_LINES
    ]


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def torch_free_modules(modules: Mapping[str, Path]) -> list[str]:
    """The modules that must not load torch, so that `capdistill --help` is quick."""
    return [n for n in modules if any(fnmatch(n, f"{PACKAGE}.{p}") for p in TORCH_FREE)]


def missing_torch_free(modules: Mapping[str, Path]) -> list[str]:
    """Patterns of torch-free modules that no module matches: the list above is out of date."""
    patterns = [p for p in TORCH_FREE if not any(fnmatch(n, f"{PACKAGE}.{p}") for n in modules)]
    return [f"no module {pattern}, which is to be free of torch" for pattern in patterns]


# Run in a fresh interpreter. The finder notes who asks for torch and refuses it, so that one
# process can try all modules.
_PROBE = """
import importlib, json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            loaders.add(current)
            raise ModuleNotFoundError("torch is refused", name="torch")

loaders = set()
sys.meta_path.insert(0, Refuse())
for current in ["capdistill", *json.loads(sys.argv[1])]:
    try:
        importlib.import_module(current)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
public = len(getattr(sys.modules.get("capdistill"), "__all__", ()))
print(json.dumps({"public": public, "torch": sorted(loaders)}))
"""


def probe(modules: Mapping[str, Path], root: Path = ROOT) -> tuple[list[str], list[str]]:
    """What a fresh interpreter finds: too many public names, and modules that load torch."""
    command = [sys.executable, "-c", _PROBE, json.dumps(torch_free_modules(modules))]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    seen = json.loads(done.stdout)
    public = [f"{seen['public']} names in {PACKAGE}.__all__; at most {MAX_PUBLIC}"]
    loaders = [f"{name} loads torch" for name in seen["torch"]]
    return public * (seen["public"] > MAX_PUBLIC), loaders


def report(root: Path = ROOT) -> dict[str, list[str]]:
    """Rule -> what breaks it."""
    modules, layers = find_modules(root), read_layers(root)
    graph = import_graph(modules)
    public, torch = probe(modules, root)
    return {
        "no import cycles": [" -> ".join(cycle) for cycle in find_cycles(graph)],
        "every component is in docs/architecture.md": unlisted_components(graph, layers),
        "imports lead to lower layers only": upward_imports(graph, layers),
        f"at most {MAX_FILES} files": too_many_files(modules),
        f"at most {MAX_LINES} lines a file": long_files(modules),
        f"at most {MAX_PUBLIC} public names": public,
        "modules of the command line and of metrics do not load torch": [
            *missing_torch_free(modules),
            *torch,
        ],
    }


def main() -> int:
    """Print the report; 1 where a rule is broken."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    rules = report()
    for rule, broken in rules.items():
        print(f"{'BROKEN' if broken else 'ok':6}  {rule}")
        for each in broken:
            print(f"        {each}")
    modules = find_modules()
    print(f"{len(modules)} files, {sum(map(_count_lines, modules.values())):,} lines")
    return int(any(rules.values()))


if __name__ == "__main__":
    sys.exit(main())
