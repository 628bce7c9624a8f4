"""One registry a kind of part: names to classes, ours, the user's and those of plugins.

`capdistill.encoders`, `.decoders` and `.losses` each hold one; users meet its bound methods.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from capdistill import plugins
from capdistill.errors import ConfigError, UnknownName, suggest

T = TypeVar("T")
C = TypeVar("C", bound=type)

_STAMP = "registered_as"


@dataclass(frozen=True)
class Stamp:
    """How an object was made: enough to make it again.

    Example:
        >>> Stamp("token", {"temperature": 2.0}).name
        'token'
    """

    name: str
    kwargs: dict[str, Any]


def stamp_of(obj: object) -> Stamp | None:
    """The stamp that `create` left on an object; None where no registry made it.

    Example:
        >>> stamp_of(object()) is None
        True
    """
    stamp = getattr(obj, _STAMP, None)
    return stamp if isinstance(stamp, Stamp) else None


@dataclass(frozen=True)
class Description:
    """What is known of a name; `print` it.

    Example:
        >>> print(Description("loss", "token", "built-in", "token(temperature=4.0)", "Match."))
        loss 'token' (built-in)
        token(temperature=4.0)
        Match.

    Args:
        kind: "encoder", "decoder" or "loss".
        name: The name that was asked for.
        origin: "built-in", "decorator (module)", or distribution and version.
        signature: How to call it.
        docstring: What it says of itself.
        shadowed: Who else claims the name and is not used.
        error: Why it cannot be used; empty where it can.
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


@dataclass(frozen=True)
class _Claim(Generic[T]):
    """One class that wants a name: where it comes from, and how to get it."""

    origin: str
    target: str
    load: Callable[[], type[T]]

    def __str__(self) -> str:
        return f"{self.origin} ({self.target})"


class Registry(Generic[T]):
    """Names to classes: a decorator's come first, then ours, then those of plugins.

    Example:
        >>> shapes = Registry("shape", "example.shapes", object, {"path": "pathlib:Path"})
        >>> @shapes.register("square")
        ... class Square:
        ...     def __init__(self, side: float = 1.0) -> None:
        ...         self.side = side
        >>> shapes.names()
        ['path', 'square']
        >>> stamp_of(shapes.create("square", side=2.0))
        Stamp(name='square', kwargs={'side': 2.0})
        >>> shapes.create("sqare")
        Traceback (most recent call last):
        ...
        capdistill.errors.UnknownName: There is no shape 'sqare'. Did you mean 'square'? \
Available: path, square.

    Args:
        kind: What messages call a member.
        group: Entry-point group that plugins use.
        base: Class that every member subclasses.
        builtins: name -> "module:Class", imported only when asked for.
    """

    def __init__(self, kind: str, group: str, base: type[T], builtins: Mapping[str, str]) -> None:
        self.kind, self.group, self.base = kind, group, base
        self._builtins = dict(builtins)
        self._decorated: dict[str, list[type[T]]] = {}
        self._said: set[str] = set()

    def register(self, name: str | None = None, *, override: bool = False) -> Callable[[C], C]:
        """Decorator that gives a class a name (its own by default).

        Raises:
            ConfigError: the name is taken and `override` is not set, or the class does not
                subclass the base.
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
        """Make one by name, and leave name and arguments on it (see `stamp_of`).

        Raises:
            UnknownName: nobody has the name.
            PluginError: the plugin that has it is broken.
            ConfigError: the arguments do not fit, or two plugins have the name.
        """
        cls = self.get(name)
        self._check_arguments(name, cls, kwargs)
        instance = cls(**kwargs)
        setattr(instance, _STAMP, Stamp(name, kwargs))
        return instance

    def get(self, name: str, /) -> type[T]:
        """The class behind a name; `"distribution:name"` selects one plugin's.

        Raises:
            UnknownName: nobody has the name.
            PluginError: the plugin that has it is broken.
            ConfigError: two plugins have the name.
        """
        return self._choose(name).load()

    def names(self) -> list[str]:
        """All names, sorted. Imports nothing."""
        found = {plugin.entry.name for plugin in self._plugins()}
        return sorted({*self._builtins, *self._decorated, *found})

    def describe(self, name: str, /) -> Description:
        """Where a name comes from and how to call it; a broken plugin is described, not raised.

        Raises:
            UnknownName: nobody has the name.
        """
        try:
            chosen = self._choose(name)
            cls = chosen.load()
        except UnknownName:
            raise
        except Exception as error:
            origin = " or ".join(claim.origin for claim in self._claims(name)) or "unknown"
            return Description(self.kind, name, origin, error=str(error))
        shadowed = [str(claim) for claim in self._claims(name) if claim.target != chosen.target]
        signature, doc = f"{name}{_signature(cls) or '(...)'}", inspect.getdoc(cls) or ""
        return Description(self.kind, name, chosen.origin, signature, doc, tuple(shadowed))

    def _add(self, name: str, cls: type[T], override: bool) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ConfigError(
                f"{cls!r} cannot be registered as {self.kind} '{name}': it does not subclass "
                f"{self.base.__qualname__}. Derive it from "
                f"{self.base.__module__}.{self.base.__qualname__}."
            )
        if not name or ":" in name:
            raise ConfigError(f"'{name}' cannot name a {self.kind}: use a word without ':'.")
        taken = self._own(name)
        if taken and not override:
            raise ConfigError(
                f"The {self.kind} name '{name}' is taken: {taken[0]}. Choose another name, or "
                f'replace it with register("{name}", override=True).'
            )
        self._decorated.setdefault(name, []).append(cls)

    def _choose(self, name: str) -> _Claim[T]:
        if not isinstance(name, str):
            raise ConfigError(f"A {self.kind} is asked for by name (a string), not by {name!r}.")
        own, foreign = self._own(name), self._foreign(name)
        if own or len(foreign) == 1:
            return (own or foreign)[0]
        if not foreign:
            raise UnknownName(f"There is no {self.kind} '{name}'. {suggest(name, self.names())}")
        ways = " or ".join(f"'{p.qualified}'" for p in self._plugins() if p.answers_to(name))
        raise ConfigError(
            f"The {self.kind} name '{name}' is claimed by {' and by '.join(map(str, foreign))}. "
            f"Ask for {ways}, or uninstall all but one."
        )

    def _claims(self, name: str) -> list[_Claim[T]]:
        return self._own(name) + self._foreign(name)

    def _own(self, name: str) -> list[_Claim[T]]:
        """Claims of decorators, the latest first, and of ours."""
        claims = [_decorator(cls) for cls in reversed(self._decorated.get(name, []))]
        if name in self._builtins:
            target = self._builtins[name]
            claims.append(_Claim("built-in", target, partial(_import, target)))
        return claims

    def _foreign(self, name: str) -> list[_Claim[T]]:
        """Claims of plugins."""
        found = [plugin for plugin in self._plugins() if plugin.answers_to(name)]
        return [_Claim(each.origin, each.entry.value, partial(self._load, each)) for each in found]

    def _load(self, plugin: plugins.Plugin) -> type[T]:
        before = {name: list(classes) for name, classes in self._decorated.items()}
        try:
            return plugin.load(self.base)
        except BaseException:
            self._decorated = before  # what fails half way leaves nothing behind
            raise

    def _plugins(self) -> list[plugins.Plugin]:
        """What is installed now; the names that are not used are said once."""
        found, unreadable = plugins.find(self.group)
        for message in unreadable:
            self._say(message)
        for plugin in found:
            own = self._own(plugin.entry.name)
            if own and plugin.entry.value not in [claim.target for claim in own]:
                self._say(
                    f"The {self.kind} '{plugin.entry.name}' of {plugin.origin} is not used: the "
                    f"name belongs to {own[0]}. Ask for '{plugin.qualified}' to get it."
                )
        return found

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, UserWarning, stacklevel=2)

    def _check_arguments(self, name: str, cls: type[T], kwargs: Mapping[str, Any]) -> None:
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


class _Bare(str):
    """An annotation that prints without quotes."""

    __repr__ = str.__str__


def _signature(cls: type) -> inspect.Signature | None:
    """How to call a class, readable where annotations are strings; None where nobody knows."""
    try:
        signature = inspect.signature(cls)
    except (TypeError, ValueError):
        return None
    parameters = [
        each.replace(annotation=_Bare(each.annotation))
        if isinstance(each.annotation, str)
        else each
        for each in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)


def _decorator(cls: type[T]) -> _Claim[T]:
    target = f"{cls.__module__}:{cls.__qualname__}"
    return _Claim(f"decorator ({cls.__module__})", target, lambda: cls)


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
