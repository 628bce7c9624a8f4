"""Names to classes: built-in ones, the user's and those of plugins; and names to lazy imports.

`capdistill.encoders`, `.decoders` and `.losses` each hold one `Registry`. Plugins are entry points
of other distributions: listing them imports none, and a broken one fails only when it is used.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from capdistill.errors import ConfigError, PluginError, UnknownName, suggest

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

T = TypeVar("T")
C = TypeVar("C", bound=type)
_NAME = re.compile(r"(?!(?:true|false|null|NaN|Infinity)\Z)[^\W\d][\w.-]*")  # --set reads JSON
_EXPECTED = "command lines and files need letters, digits, '_', '-' and '.', a letter first"


class Registry(Generic[T]):
    """Names to classes. A decorated class comes first, then a built-in one, then a plugin's.

    Example:
        >>> shapes = Registry("shape", "example.shapes", object, {"path": "pathlib:Path"})
        >>> @shapes.register("square")
        ... class Square:
        ...     def __init__(self, side: float = 1.0) -> None:
        ...         self.side = side
        >>> shapes.names()
        ['path', 'square']
        >>> recipe_of(shapes.create("square", side=2.0))
        Recipe(name='square', kwargs={'side': 2.0})
        >>> shapes.create("sqare")
        Traceback (most recent call last):
        ...
        capdistill.errors.UnknownName: There is no shape 'sqare'. Did you mean 'square'? \
Available: path, square.

    Args:
        kind: Name of a member in messages.
        group: Entry-point group that plugins use.
        base: Class that every member subclasses.
        builtins: name -> "module:Class", imported only when used.
    """

    def __init__(self, kind: str, group: str, base: type[T], builtins: Mapping[str, str]) -> None:
        self.kind, self.group, self.base = kind, group, base
        self._builtins = dict(builtins)
        self._decorated: dict[str, list[type[T]]] = {}
        self._warned: set[str] = set()

    def register(self, name: str | None = None, *, override: bool = False) -> Callable[[C], C]:
        """Decorator that gives a class a name (its own by default); defined again, it is replaced.

        Raises:
            ConfigError: the name is taken and `override` is not set, a command line or a file
                could not carry it, or the class does not subclass the base.
        """
        if not (name is None or isinstance(name, str)):
            raise ConfigError(
                f"register() was given {name!r}, not a name. "
                f'Write @register("name") or @register() above the {self.kind}.'
            )

        def decorate(cls: C) -> C:
            self._add(cls.__name__ if name is None else name, cls, override)
            return cls

        return decorate

    def create(self, name: str, /, **kwargs: Any) -> T:
        """Create an instance by name and record name and arguments on it (see `recipe_of`).

        Raises:
            UnknownName: there is no such name.
            PluginError: the plugin that has it is broken.
            ConfigError: the arguments do not fit, or two plugins have the name.
        """
        cls = self.get(name)
        signature = _signature(cls)
        try:
            if signature is not None:
                signature.bind(**kwargs)
        except TypeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise ConfigError(
                f"The {self.kind} '{name}' cannot be created with ({given}): {error}. "
                f"Its signature is {name}{signature}."
            ) from error
        instance = cls(**kwargs)
        setattr(instance, _RECIPE, Recipe(name, kwargs))
        return instance

    def get(self, name: str, /) -> type[T]:
        """The class behind a name; `"distribution:name"` selects one plugin's.

        Raises:
            UnknownName: there is no such name.
            PluginError: the plugin that has it is broken.
            ConfigError: two plugins have the name.
        """
        return self._choose(name).load()

    def names(self) -> list[str]:
        """All names, sorted. Imports nothing."""
        return sorted({*self._builtins, *self._decorated, *(c.name for c in self._plugins())})

    @overload
    def describe(self, name: str, /) -> Description: ...
    @overload
    def describe(self, /) -> str: ...
    def describe(self, name: str | None = None, /) -> Description | str:
        """Origin and signature of a name; without a name, one line per name.

        A broken plugin is described, not raised. The list of all names imports no plugin: for one
        that is not loaded yet, it shows the location of the class.

        Raises:
            UnknownName: there is no such name.
        """
        if name is None:
            return self._listing()
        try:
            chosen = self._choose(name)
            cls = chosen.load()
        except UnknownName:
            raise
        except Exception as error:
            origin = " or ".join(c.origin for c in self._candidates(name)) or "unknown"
            return Description(self.kind, name, origin, error=str(error))
        shadowed = tuple(str(c) for c in self._candidates(name) if c.target != chosen.target)
        signature, doc = f"{name}{_signature(cls) or '(...)'}", inspect.getdoc(cls) or ""
        return Description(self.kind, name, chosen.origin, signature, doc, shadowed)

    def _listing(self) -> str:
        rows = []
        for name in self.names():
            first, *others = candidates = self._candidates(name)
            if first.distribution and (others or first.target.partition(":")[0] not in sys.modules):
                rows.append((name, " or ".join(c.origin for c in candidates), first.target))
                continue
            about = self.describe(name)
            rows.append((name, about.origin, (about.error or about.docstring).partition("\n")[0]))
        names, origins, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [f"{name:<{names}}  {where:<{origins}}  {what}" for name, where, what in rows]
        return _Text("\n".join(map(str.rstrip, lines)))

    def _add(self, name: str, cls: type[T], override: bool) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ConfigError(
                f"{cls!r} cannot be registered as {self.kind} '{name}': it does not subclass "
                f"{self.base.__qualname__}. Derive it from "
                f"{self.base.__module__}.{self.base.__qualname__}."
            )
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a {self.kind}: {_EXPECTED}.")
        taken, own = self._local(name), f"{cls.__module__}:{cls.__qualname__}"
        if taken and taken[0].target != own and not override:  # own: a notebook cell run twice
            raise ConfigError(
                f"The {self.kind} name '{name}' is taken: {taken[0]}. Choose another name, or "
                f'replace it with register("{name}", override=True).'
            )
        self._decorated.setdefault(name, []).append(cls)

    def _choose(self, name: str) -> Candidate[T]:
        if not isinstance(name, str):
            raise ConfigError(f"A {self.kind} is asked for by name (a string), not by {name!r}.")
        local, from_plugins = self._local(name), self._from_plugins(name)
        if local or len(from_plugins) == 1:
            return (local or from_plugins)[0]
        if not from_plugins:
            raise UnknownName(f"There is no {self.kind} '{name}'. {suggest(name, self.names())}")
        raise ConfigError(
            f"The {self.kind} name '{name}' is claimed by "
            f"{' and by '.join(map(str, from_plugins))}. Ask for "
            f"{' or '.join(repr(c.qualified) for c in from_plugins)}, or uninstall all but one."
        )

    def _candidates(self, name: str) -> list[Candidate[T]]:
        return self._local(name) + self._from_plugins(name)

    def _local(self, name: str) -> list[Candidate[T]]:
        """The candidates from decorators, latest first, and built-in ones."""
        candidates = []
        for cls in reversed(self._decorated.get(name, [])):
            origin, target = f"decorator ({cls.__module__})", f"{cls.__module__}:{cls.__qualname__}"
            candidates.append(Candidate(name, origin, target, partial(_same, cls)))
        if name in self._builtins:
            target = self._builtins[name]
            load = partial(pkgutil.resolve_name, target)
            candidates.append(Candidate(name, "built-in", target, load))
        return candidates

    def _from_plugins(self, name: str) -> list[Candidate[T]]:
        asked = {name, _canonical(name)}
        return [c for c in self._plugins() if {c.name, _canonical(c.qualified)} & asked]

    def _plugins(self) -> list[Candidate[T]]:
        """The installed plugins, in the order of `sys.path`; warns once about unused names."""
        unique: dict[str, Candidate[T]] = {}
        for entry, distribution, version in self._entry_points():
            origin = f"{distribution} {version}"
            load = partial(self._load, entry, origin)
            found = Candidate(entry.name, origin, entry.value, load, distribution)
            unique.setdefault(_canonical(found.qualified), found)
        for candidate in unique.values():
            local = self._local(candidate.name)
            if local and candidate.target not in [c.target for c in local]:
                self._warn_once(
                    f"The {self.kind} '{candidate.name}' of {candidate.origin} is not used: the "
                    f"name belongs to {local[0]}. Ask for '{candidate.qualified}' to get it."
                )
        return list(unique.values())

    def _entry_points(self) -> Iterator[tuple[EntryPoint, str, str]]:
        """Each entry point of the group, with the name and version of its distribution."""
        from importlib import metadata

        try:
            entries = list(metadata.entry_points(group=self.group))
        except Exception:  # one distribution with unreadable metadata ends the whole listing
            entries = []
            for distribution in metadata.distributions():
                try:
                    entries += distribution.entry_points.select(group=self.group)
                except Exception as cause:
                    self._warn_once(
                        f"The entry points of {' '.join(_identity(distribution))} cannot be read "
                        f"({type(cause).__name__}: {cause}) and are left out of '{self.group}'. "
                        "Reinstall or uninstall it."
                    )
        for entry in entries:
            owner = _identity(entry.dist)
            if _NAME.fullmatch(entry.name):
                yield entry, *owner
            else:
                self._warn_once(
                    f"The {self.kind} {entry.name!r} of {' '.join(owner)} is left out: {_EXPECTED}."
                )

    def _load(self, entry: EntryPoint, origin: str) -> type[T]:
        """Import a plugin's class; any failure, including `sys.exit`, is an error."""
        before = {name: list(classes) for name, classes in self._decorated.items()}
        try:
            cls = entry.load()
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                base = f"{self.base.__module__}.{self.base.__qualname__}"
                raise TypeError(f"{cls!r} is not a subclass of {base}")
        except BaseException as cause:
            self._decorated = before  # a failed import leaves nothing behind
            if isinstance(cause, KeyboardInterrupt):
                raise
            raise PluginError(
                f"The plugin {origin} cannot be loaded: its entry point "
                f"'{entry.name} = {entry.value}' in '{self.group}' ended with "
                f"{type(cause).__name__}: {cause}. Fix, update or uninstall the plugin; all "
                "other names still work."
            ) from cause
        return cls

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """One class that claims a name: its origin, and how to load it."""

    name: str
    origin: str  # "built-in", "decorator (module)", or distribution and version
    target: str  # "module:Class"
    load: Callable[[], type[T]]
    distribution: str = ""  # of a plugin

    @property
    def qualified(self) -> str:
        """`distribution:name`, which is unique."""
        return f"{self.distribution}:{self.name}"

    def __str__(self) -> str:
        return f"{self.origin} ({self.target})"


@dataclass(frozen=True)
class Recipe:
    """The name and arguments that recreate an object."""

    name: str
    kwargs: dict[str, Any]


_RECIPE = "registered_as"


def recipe_of(obj: object) -> Recipe | None:
    """The recipe that `create` recorded on an object; None if no registry created it."""
    recipe = getattr(obj, _RECIPE, None)
    return recipe if isinstance(recipe, Recipe) else None


@dataclass(frozen=True, repr=False)
class Description:
    """The description of a name; `print` it.

    Example:
        >>> print(Description("loss", "token", "built-in", "token(temperature=4.0)", "Match."))
        loss 'token' (built-in)
        token(temperature=4.0)
        Match.

    Args:
        kind: "encoder", "decoder" or "loss".
        name: The requested name.
        origin: "built-in", "decorator (module)", or distribution and version.
        signature: How to call it.
        docstring: Docstring of the class.
        shadowed: Other claims to the name, which are not used.
        error: Why it cannot be used; empty if it can.
    """

    kind: str
    name: str
    origin: str
    signature: str = ""
    docstring: str = ""
    shadowed: tuple[str, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        lines = [f"{self.kind} '{self.name}' ({self.origin})", self.signature, self.docstring]
        lines += [f"shadows {claim}" for claim in self.shadowed]
        lines += [f"cannot be used: {self.error}"] if self.error else []
        return "\n".join(line for line in lines if line)

    __repr__ = __str__


def lazy_exports(
    package: str, modules: Mapping[str, str], *eager: str, unlisted: Container[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package that imports its exports on first use.

    Example:
        >>> get, dir_, names = lazy_exports("capdistill", {"TokenKD": "losses.token"}, "losses")
        >>> get("TokenKD").__name__, dir_()
        ('TokenKD', ['TokenKD', 'losses'])

    Args:
        package: Its `__name__`.
        modules: Exported name -> module below the package that defines it; "" if the name is itself
            such a module.
        eager: Exported names that the package defines without delay.
        unlisted: Names that work but are not shown.
    """
    exported = sorted(name for name in (*modules, *eager) if name not in unlisted)

    def get(name: str) -> Any:
        if name not in modules:
            hint = suggest(name, exported)
            raise AttributeError(f"module '{package}' has no attribute '{name}'. {hint}")
        module = importlib.import_module(f"{package}.{modules[name] or name}")
        value = getattr(module, name) if modules[name] else module
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: list(exported), exported


class _Text(str):
    """Text whose repr has no quotes."""

    __repr__ = str.__str__


def _signature(cls: type) -> inspect.Signature | None:
    """How to call a class, readable if annotations are strings; None if unknown."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return None
    parameters = [
        each.replace(annotation=_Text(each.annotation))
        if isinstance(each.annotation, str)
        else each
        for each in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


def _same(cls: type[T]) -> type[T]:
    return cls


def _identity(distribution: Distribution | None) -> tuple[str, str]:
    """Name and version, also of a distribution whose metadata cannot be read."""
    try:
        found: Any = distribution.metadata if distribution else {}
        name, version = found["Name"], found["Version"]
    except Exception:
        name = version = None
    return name or "a distribution without a name", version or "(version unknown)"


def _canonical(qualified: str) -> str:
    """`distribution:name`; spellings of a distribution differ in case, dots and dashes."""
    distribution, _, name = qualified.rpartition(":")
    return f"{re.sub(r'[-_.]+', '-', distribution).lower()}:{name}"
