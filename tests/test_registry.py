"""Names to classes: what `Registry` promises, with metadata of distributions made by hand."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
import warnings
from pathlib import Path

import pytest

import capdistill as cd
from capdistill.errors import ConfigError, PluginError, UnknownName
from capdistill.registry import Recipe, Registry, recipe_of


class Shape:
    def __init__(self, side: float = 1.0, *, name: str = "") -> None:
        self.side, self.name = side, name


class Square(Shape):
    """Four equal sides."""


class Circle(Shape):
    pass


@pytest.fixture
def shapes() -> Registry[Shape]:
    return Registry("shape", "test.shapes", Shape, {"square": f"{__name__}:Square"})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a distribution with one entry point, and its module, on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(owner: str, name: str, code: str, target: str = "Plugged", version: str = "1.2.3"):
        module = f"{owner.replace('-', '_').lower()}_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{owner.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {owner}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[test.shapes]\n{name} = {module}:{target}\n")
        importlib.invalidate_caches()
        return module

    before = set(sys.modules)
    yield add
    for module in set(sys.modules) - before:
        if module.endswith(tmp_path.name):
            del sys.modules[module]


GOOD = f"from {__name__} import Shape\nclass Plugged(Shape):\n    'From outside.'\n"


def test_a_builtin_is_created_by_name_with_its_recipe(shapes: Registry[Shape]) -> None:
    square = shapes.create("square", side=2.0)
    assert type(square) is Square
    assert square.side == 2.0
    assert recipe_of(square) == Recipe("square", {"side": 2.0})


def test_an_argument_may_be_called_name(shapes: Registry[Shape]) -> None:
    assert shapes.create("square", name="mine").name == "mine"


def test_a_recipe_survives_copy_and_pickle(shapes: Registry[Shape]) -> None:
    square = shapes.create("square", side=2.0)
    assert recipe_of(copy.deepcopy(square)) == recipe_of(square)
    assert recipe_of(pickle.loads(pickle.dumps(square))) == recipe_of(square)


def test_what_no_registry_made_has_no_recipe() -> None:
    assert recipe_of(Square()) is None


def test_a_decorator_adds_a_name(shapes: Registry[Shape]) -> None:
    assert shapes.register("circle")(Circle) is Circle
    assert shapes.names() == ["circle", "square"]
    assert shapes.get("circle") is Circle


def test_a_decorator_without_a_name_uses_the_class_name(shapes: Registry[Shape]) -> None:
    shapes.register()(Circle)
    assert shapes.get("Circle") is Circle


def test_a_decorator_without_parentheses_says_how_to_write_it(shapes: Registry[Shape]) -> None:
    with pytest.raises(ConfigError, match=r'@register\("name"\)'):
        shapes.register(Circle)  # type: ignore[arg-type]


def test_a_taken_name_is_an_error_that_names_the_owner(shapes: Registry[Shape]) -> None:
    with pytest.raises(ConfigError, match=r"'square' is taken: built-in .*override=True"):
        shapes.register("square")(Circle)
    assert shapes.get("square") is Square


def test_a_name_taken_by_a_decorator_is_an_error(shapes: Registry[Shape]) -> None:
    shapes.register("round")(Circle)
    with pytest.raises(ConfigError, match=r"'round' is taken: decorator \(.*test_registry\)"):
        shapes.register("round")(Square)


def test_override_replaces_a_builtin_and_describe_shows_it(shapes: Registry[Shape]) -> None:
    shapes.register("square", override=True)(Circle)
    assert shapes.get("square") is Circle
    description = shapes.describe("square")
    assert description.origin == f"decorator ({__name__})"
    assert description.shadowed == (f"built-in ({__name__}:Square)",)
    assert f"shadows built-in ({__name__}:Square)" in str(description)


def test_only_subclasses_of_the_base_are_registered(shapes: Registry[Shape]) -> None:
    with pytest.raises(ConfigError, match=r"does not subclass Shape.*Derive it from"):
        shapes.register("text")(str)


@pytest.mark.parametrize(
    "name",
    ["", " ", "a:b", "a b", " a", "a\n", "a/b", "a\\b", "a=b", "a,b", "-a", ".a", "3d", "true"],
)
def test_a_name_that_no_command_line_or_file_could_carry_is_refused(
    shapes: Registry[Shape], name: str
) -> None:
    with pytest.raises(ConfigError, match=r"cannot name a shape: .*a letter first"):
        shapes.register(name)(Circle)
    assert shapes.names() == ["square"]


@pytest.mark.parametrize("name", ["Circle", "round-1", "my.shape", "_own", "größe"])
def test_words_with_digits_dashes_and_dots_are_names(shapes: Registry[Shape], name: str) -> None:
    shapes.register(name)(Circle)
    assert shapes.get(name) is Circle


def test_an_unknown_name_lists_the_names_and_the_nearest(shapes: Registry[Shape]) -> None:
    for ask in (shapes.get, shapes.create, shapes.describe):
        with pytest.raises(UnknownName, match=r"no shape 'sqare'.*'square'\? Available: square"):
            ask("sqare")


def test_a_class_instead_of_a_name_is_an_error(shapes: Registry[Shape]) -> None:
    with pytest.raises(ConfigError, match=r"by name \(a string\)"):
        shapes.create(Square)  # type: ignore[arg-type]


def test_wrong_arguments_name_the_thing_what_was_given_and_the_signature(
    shapes: Registry[Shape],
) -> None:
    with pytest.raises(ConfigError) as caught:
        shapes.create("square", sides=3)
    assert "shape 'square'" in str(caught.value)
    assert "(sides=3)" in str(caught.value)
    assert "square(side: float = 1.0, *, name: str = '')" in str(caught.value)


def test_a_type_error_inside_the_constructor_is_left_alone(shapes: Registry[Shape]) -> None:
    @shapes.register("picky")
    class Picky(Shape):
        def __init__(self) -> None:
            raise TypeError("inside")

    with pytest.raises(TypeError, match=r"^inside$"):
        shapes.create("picky")


def test_a_class_that_hides_its_signature_is_still_created(shapes: Registry[Shape]) -> None:
    @shapes.register("shy")
    class Shy(Shape):
        __signature__ = "unknown"

    assert shapes.create("shy", side=3.0).side == 3.0
    assert "shy(...)" in str(shapes.describe("shy"))


def test_describe_says_origin_signature_and_docstring(shapes: Registry[Shape]) -> None:
    assert str(shapes.describe("square")) == (
        "shape 'square' (built-in)\nsquare(side: float = 1.0, *, name: str = '')\nFour equal sides."
    )


def test_describe_without_a_name_lists_every_name_with_origin_and_first_line(
    shapes: Registry[Shape], install
) -> None:
    shapes.register("round")(Circle)
    module = install("later", "star", GOOD)
    install("rotten", "bad", "import sys; sys.exit(3)")
    listing = shapes.describe()
    assert repr(listing) == str(listing)
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in listing.splitlines()}
    assert list(rows) == ["bad", "round", "square", "star"]
    assert rows["round"].startswith(f"decorator ({__name__})")
    assert rows["square"].split("  ")[0] == "built-in"
    assert rows["square"].endswith("Four equal sides.")
    assert rows["star"].endswith(f"{module}:Plugged")  # a listing imports no plugin
    assert rows["bad"].startswith("rotten 1.2.3")
    assert module not in sys.modules
    shapes.get("star")
    assert "From outside." in shapes.describe()


def test_the_losses_are_listed() -> None:
    listing = cd.losses.describe()
    for name in cd.losses.names():
        assert f"\n{name} " in f"\n{listing}"
    assert "Match the student's next-token distribution to the teacher's." in listing


def test_a_plugin_is_found_where_it_appears_later(shapes: Registry[Shape], install) -> None:
    assert shapes.names() == ["square"]
    module = install("later", "star", GOOD)
    assert shapes.names() == ["square", "star"]
    assert module not in sys.modules
    assert type(shapes.create("star")).__name__ == "Plugged"
    assert shapes.describe("star").origin == "later 1.2.3"


def test_a_plugin_shadowed_by_a_builtin_is_one_warning(shapes: Registry[Shape], install) -> None:
    install("Shady-Plug", "square", GOOD)
    with pytest.warns(UserWarning, match=r"'square' of Shady-Plug 1\.2\.3 is not used") as caught:
        assert shapes.get("square") is Square
    shapes.names()  # a second warning would be an error
    shadowed = shapes.describe("square").shadowed
    assert len(caught) == 1
    assert len(shadowed) == 1
    assert shadowed[0].startswith("Shady-Plug 1.2.3 (")
    assert shapes.get("shady.plug:square").__name__ == "Plugged"


def test_a_plugin_shadowed_by_a_decorator_is_one_warning(shapes: Registry[Shape], install) -> None:
    install("shady", "round", GOOD)
    shapes.register("round")(Circle)
    with pytest.warns(UserWarning, match="belongs to decorator") as caught:
        assert shapes.get("round") is Circle
    assert shapes.get("round") is Circle  # a second warning would be an error
    assert len(caught) == 1


def test_a_plugin_that_decorates_its_own_class_shadows_nobody(
    shapes: Registry[Shape], install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "registry", shapes, raising=False)
    install(
        "both",
        "star",
        GOOD.replace("class", f"import {__name__} as t\n@t.registry.register('star')\nclass"),
    )
    shapes.create("star")
    assert shapes.create("star") is not None  # no warning, no clash
    assert shapes.describe("star").shadowed == ()


def test_a_plugin_whose_name_nothing_could_carry_is_left_out_with_one_warning(
    shapes: Registry[Shape], install
) -> None:
    install("spaced", "my star", GOOD)
    with pytest.warns(UserWarning, match=r"'my star' of spaced 1\.2\.3 is left out") as caught:
        assert shapes.names() == ["square"]
    with pytest.raises(UnknownName):
        shapes.get("my star")
    assert len(caught) == 1


def test_two_distributions_with_one_name_are_an_error_only_when_asked_for(
    shapes: Registry[Shape], install
) -> None:
    install("first", "star", GOOD)
    install("second", "star", GOOD)
    assert shapes.names() == ["square", "star"]
    assert shapes.get("square") is Square
    with pytest.raises(
        ConfigError, match=r"Ask for '(first|second):star' or '(first|second):star'"
    ):
        shapes.get("star")
    assert shapes.get("first:star") is not shapes.get("second:star")
    assert "cannot be used" in str(shapes.describe("star"))
    assert shapes.describe("second:star").origin == "second 1.2.3"


BROKEN = {
    "ImportError": "import no_such_module_at_all",
    "RuntimeError": "raise RuntimeError('boom')",
    "SystemExit": "import sys; sys.exit(3)",
    "AttributeError": "x = 1",
    "TypeError": "class Plugged: pass",
    "SyntaxError": "def",
    "BaseException": "raise BaseException('odd')",
}


@pytest.mark.parametrize("cause", BROKEN)
def test_a_broken_plugin_names_its_distribution_and_cause_every_time(
    shapes: Registry[Shape], install, cause: str
) -> None:
    module = install("rotten", "bad", BROKEN[cause])
    messages = []
    for _ in range(2):
        with pytest.raises(PluginError, match=r"rotten 1\.2\.3") as caught:
            shapes.create("bad")
        messages.append(str(caught.value))
        assert cause in [each.__name__ for each in type(caught.value.__cause__).__mro__]
    assert messages[0] == messages[1]
    assert f"bad = {module}:Plugged" in messages[0]
    assert shapes.describe("bad").error == messages[0]
    assert shapes.describe("bad").origin == "rotten 1.2.3"


def test_what_is_no_class_is_refused_when_loaded(shapes: Registry[Shape], install) -> None:
    install("rotten", "bad", "Plugged = 3")
    with pytest.raises(PluginError, match=r"3 is not a subclass of .*test_registry\.Shape"):
        shapes.get("bad")


def test_a_plugin_that_fails_half_way_leaves_nothing_behind(
    shapes: Registry[Shape], install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "registry", shapes, raising=False)
    code = f"import {__name__} as t\nt.registry.register('square', override=True)(t.Circle)\n1 / 0"
    install("rotten", "bad", code)
    with pytest.raises(PluginError, match="ZeroDivisionError"):
        shapes.get("bad")
    assert shapes.get("square") is Square


def test_ctrl_c_while_a_plugin_loads_is_still_ctrl_c(shapes: Registry[Shape], install) -> None:
    install("slow", "bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        shapes.get("bad")


@pytest.mark.parametrize("content", [b"[test.shapes]\nno equals sign\n", b"\xff\xfe\xff"])
def test_unreadable_metadata_is_one_warning_and_hurts_nobody_else(
    shapes: Registry[Shape], install, tmp_path: Path, content: bytes
) -> None:
    install("garbled", "gone", "")
    (tmp_path / "garbled-1.2.3.dist-info" / "entry_points.txt").write_bytes(content)
    install("fine", "star", GOOD)
    with pytest.warns(UserWarning, match=r"entry points of garbled 1\.2\.3 cannot be read") as seen:
        assert shapes.names() == ["square", "star"]
    assert shapes.get("star").__name__ == "Plugged"  # a second warning would be an error
    assert len(seen) == 1


def test_a_distribution_without_metadata_still_gives_its_names(
    shapes: Registry[Shape], install, tmp_path: Path
) -> None:
    install("bare", "star", GOOD)
    (tmp_path / "bare-1.2.3.dist-info" / "METADATA").unlink()
    assert shapes.get("star").__name__ == "Plugged"
    assert "without a name" in shapes.describe("star").origin


@pytest.mark.parametrize("beside_an_unreadable_one", [False, True])
@pytest.mark.filterwarnings("ignore:The entry points of garbled")
def test_of_one_distribution_twice_on_the_path_the_first_counts(
    shapes: Registry[Shape], install, tmp_path: Path, beside_an_unreadable_one: bool
) -> None:
    install("twice", "star", GOOD)
    if beside_an_unreadable_one:
        install("garbled", "gone", "")
        (tmp_path / "garbled-1.2.3.dist-info" / "entry_points.txt").write_bytes(b"\xff")
    info = tmp_path / "later" / "twice-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: twice\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[test.shapes]\nstar = nowhere:Nothing\n")
    sys.path.append(str(info.parent))
    try:
        assert shapes.describe("star").origin == "twice 1.2.3"
    finally:
        sys.path.remove(str(info.parent))


def test_a_registry_without_plugins_warns_of_nothing(shapes: Registry[Shape]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes.names()


@pytest.mark.parametrize(
    ("package", "base", "expected"),
    [
        ("encoders", "Encoder", {"timm", "torchvision"}),
        ("decoders", "Decoder", {"lstm", "transformer"}),
        ("losses", "DistillationLoss", {"feature", "hidden", "token"}),
    ],
)
def test_each_kind_has_one_registry_however_it_is_imported(
    package: str, base: str, expected: set[str]
) -> None:
    module = importlib.import_module(f"capdistill.{package}")
    assert getattr(cd, package) is module
    assert expected <= set(module.names())
    assert module.registry.base is getattr(cd, base)
    assert module.registry.group == f"capdistill.{package}"
    assert module.create.__self__ is module.registry


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (package, name)
        for package in ("encoders", "decoders", "losses")
        for name in importlib.import_module(f"capdistill.{package}").registry._builtins
    ],
)
def test_every_builtin_can_be_loaded_and_is_documented(package: str, name: str) -> None:
    registry = importlib.import_module(f"capdistill.{package}").registry
    assert issubclass(registry.get(name), registry.base)
    assert registry.describe(name).origin == "built-in"
    assert registry.describe(name).docstring


def test_a_class_that_is_defined_again_replaces_itself(
    shapes: Registry[Shape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cell.py").write_text(
        "def define(shapes, Shape):\n    class A(Shape): pass\n    return shapes.register('a')(A)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    define = importlib.import_module("cell").define
    define(shapes, Shape)
    second = define(shapes, Shape)
    assert shapes.get("a") is second
    assert shapes.describe("a").shadowed == ()
