"""README and docs are tried: code runs, links lead somewhere, commands parse, tables are true."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from capdistill import data, decoders, encoders, errors, losses, presets
from capdistill.cli import COMMANDS, make_parser
from capdistill.cli.runfile import DistillRun, RunConfig, TrainRun, parse_run
from capdistill.cli.tune import TuneRun
from capdistill.evaluation import measure
from capdistill.evaluation.evaluation import Evaluation
from capdistill.metrics import DIRECTIONS
from capdistill.teachers import huggingface
from capdistill.training.config import DistillConfig, TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "examples" / "plugin" / "README.md",
    *DOCS,
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
KINDS = {"", "python", "python no-run", "console", "json", "toml", "text", "csv"}


class Block(NamedTuple):
    info: str
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the line on which each body begins."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            found["info"].strip(),
            textwrap.dedent(found["body"]),
            text.count("\n", 0, found.start("body")),
        )
        for found in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def compiled(page: Path, block: Block) -> Any:
    """A block as code whose errors name the page and its line."""
    return compile("\n" * block.line + block.body, str(page), "exec")


def commands(page: Path) -> Iterator[tuple[int, list[str]]]:
    """The `capdistill` command lines in console blocks, as the shell would give their words."""
    for block in blocks(page):
        if block.info != "console":
            continue
        for line in block.body.replace("\\\n", " ").splitlines():
            line = re.sub(r"^\$ ", "", line.strip())
            words = shlex.split(line.partition(" > ")[0], comments=True)
            if words and words[0] == "capdistill":
                yield block.line, words[1:]


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head left out."""
    below = page.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", below, re.M | re.S)
    assert found, f"{page.name}: no table below {heading!r}"
    rows = [re.split(r"(?<!\\)\|", row.strip("|")) for row in found[0].strip().splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.fixture
def fresh_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page registers is gone afterwards, so that another may use the name."""
    for kind in (encoders, decoders, losses, huggingface):
        monkeypatch.setattr(kind.registry, "_decorated", {**kind.registry._decorated})


@pytest.fixture
def few_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is its first photos, and no process is started to measure memory."""
    whole = data.sample()
    few = data.Splits({"train": whole.train.subset(10), "val": whole.val.subset(4)}, name="sample")
    monkeypatch.setattr(data, "sample", lambda: few)
    monkeypatch.setattr(measure, "cpu_memory", lambda *_, **__: None)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_code_of_a_page_runs_in_its_order(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_registries: None,
    few_photos: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem}"}
    for block in blocks(page):
        assert block.info in KINDS, f"{page}:{block.line}: a block of the kind {block.info!r}"
        if block.info == "python":
            exec(compiled(page, block), namespace)
        elif block.info == "python no-run":
            compiled(page, block)
        elif block.info == "json":
            json.loads(block.body)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: nothing at {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: no heading for {target}"


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_command_lines_of_a_page_parse(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = [
        f"line {line}: capdistill {shlex.join(words)}\n{capsys.readouterr().err}"
        for line, words in commands(page)
        if not parses(words)
    ]
    assert refused == []


def parses(words: list[str]) -> bool:
    try:
        make_parser().parse_args(words)
    except SystemExit as end:
        return end.code == 0  # --help and --version end so too
    return True


def test_every_page_is_in_the_index_and_the_readme() -> None:
    index = ROOT / "docs" / "index.md"
    links = {(index.parent / target).resolve() for target in LINK.findall(prose(index))}
    assert [page.name for page in DOCS if page not in (index, *links)] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS if f"`docs/{page.name}`" not in readme] == []


def test_the_readme_reads_the_same_outside_the_repository() -> None:
    """It is the description of the package, too: no relative link, and paths that exist."""
    page = ROOT / "README.md"
    assert [link for link in LINK.findall(prose(page)) if not re.match(r"https?:|#", link)] == []
    paths = re.findall(r"`((?:docs|examples|src|tests)/[^` ]*|[A-Z]+\.md)`", prose(page))
    assert len(paths) > len(DOCS)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_table_of_presets_has_their_true_sizes() -> None:
    written = [row[:-1] for row in table(ROOT / "docs" / "models.md", "## Presets")]
    assert written == [
        [
            f"`{row.name}`",
            *(f"{n:,}" for n in (row.parameters, row.encoder, row.decoder, row.trainable)),
            f"{row.tokens} x {row.dim}",
            str(row.image_size),
        ]
        for row in presets.table()
    ]


def test_the_table_of_options_has_every_option_with_its_default() -> None:
    rows = table(ROOT / "docs" / "training.md", "## Options")
    written = {row[0].strip("`"): row[1].strip("`") for row in rows}
    assert written == {key: repr(f.default) for key, f in TrainConfig.model_fields.items()}
    own = {key: f.default for key, f in DistillConfig.model_fields.items()}
    common = {key: own.pop(key) for key in TrainConfig.model_fields}
    assert common == {k: f.default for k, f in TrainConfig.model_fields.items()}  # as the page says
    rows = table(ROOT / "docs" / "training.md", "## On-policy distillation")
    assert {row[0].strip("`"): row[1].strip("`") for row in rows} == {
        key: repr(default) for key, default in own.items()
    }


@pytest.mark.parametrize("block", [b for b in blocks(ROOT / "docs" / "cli.md") if b.info == "json"])
def test_run_files_of_the_docs_are_valid(block: Block) -> None:
    values = json.loads(block.body)
    kinds: dict[str, type[RunConfig]] = {"reward": TuneRun, "teacher": DistillRun}
    kind = next((kinds[key] for key in kinds if key in values), TrainRun)
    assert parse_run(kind, values).out is not None


def test_the_table_of_the_run_file_has_every_section() -> None:
    rows = table(ROOT / "docs" / "cli.md", "## The run file")
    sections = {name.strip("` ") for row in rows for name in row[0].split(",")}
    fields = {key for run in (TrainRun, DistillRun, TuneRun) for key in run.model_fields}
    assert sections == fields - {"command"}


def is_an_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, errors.CapdistillError)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("errors.md", [n for n, c in vars(errors).items() if is_an_error(c)]),
        ("cli.md", list(COMMANDS)),
        ("evaluation.md", [f.name for f in dataclasses.fields(Evaluation)][:11]),
        ("evaluation.md", list(DIRECTIONS)),
    ],
)
def test_a_page_leaves_no_name_out(page: str, names: list[str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in text] == []


def test_an_example_that_breaks_is_an_error_on_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nx = 1\nx.no_such\n```\n", encoding="utf-8")
    [block] = blocks(page)
    with pytest.raises(AttributeError) as caught:
        exec(compiled(page, block), {})
    assert caught.traceback[-1].lineno + 1 == 5


def test_links_and_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    command = "$ capdistill caption runs/a \\\n    x.jpg > y.json   # why\n$ pip list\n"
    page.write_text(f"[a](b.md) ![c](d.png) [e](f.md#g)\n\n```console\n{command}```\n")
    assert LINK.findall(prose(page)) == ["b.md", "f.md#g"]
    assert list(commands(page)) == [(3, ["caption", "runs/a", "x.jpg"])]
    assert not parses(["caption", "--no-such-option"])


def test_the_page_of_losses_lists_every_built_in_loss() -> None:
    listed = [row[0].split("`")[1] for row in table(ROOT / "docs" / "losses.md", "## The terms")]
    assert sorted(listed) == sorted(losses.registry._builtins)
