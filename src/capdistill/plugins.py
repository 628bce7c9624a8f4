"""Entry points of other distributions: found without importing any, loaded one at a time.

Only `registry` enters here. A plugin that is broken hurts whoever asks for it and nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TypeVar

from capdistill.errors import PluginError

T = TypeVar("T")

_NOBODY = ("a distribution without a name", "(version unknown)")


@dataclass(frozen=True)
class Plugin:
    """One entry point and the distribution that it belongs to.

    Example:
        >>> entry = metadata.EntryPoint("pairs", "mine.losses:Pairs", "capdistill.losses")
        >>> plugin = Plugin(entry, distribution="Mine_Losses", version="1.2.3")
        >>> plugin.origin, plugin.text
        ('Mine_Losses 1.2.3', 'pairs = mine.losses:Pairs')
        >>> plugin.answers_to("pairs"), plugin.answers_to("mine-losses:pairs")
        (True, True)
    """

    entry: metadata.EntryPoint
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}"

    @property
    def text(self) -> str:
        """The line as it stands in the distribution's metadata."""
        return f"{self.entry.name} = {self.entry.value}"

    @property
    def qualified(self) -> str:
        """`distribution:name`, which is unique."""
        return f"{self.distribution}:{self.entry.name}"

    def answers_to(self, name: str) -> bool:
        """Whether `name` is its name, alone or behind its distribution's."""
        if name == self.entry.name:
            return True
        owner, _, short = name.partition(":")
        return short == self.entry.name and _canonical(owner) == _canonical(self.distribution)

    def load(self, base: type[T]) -> type[T]:
        """Import what the entry point names and check that it is a subclass of `base`.

        Raises:
            PluginError: it is not, or the import ended in any way but well.
        """
        try:
            return _subclass(self.entry.load(), base)
        except KeyboardInterrupt:
            raise
        except BaseException as cause:  # a plugin may even call sys.exit
            raise PluginError(
                f"The plugin {self.origin} cannot be loaded: its entry point '{self.text}' in "
                f"'{self.entry.group}' ended with {type(cause).__name__}: {cause}. "
                f"Repair, update or uninstall {self.distribution}; all other names still work."
            ) from cause


def find(group: str) -> tuple[list[Plugin], list[str]]:
    """The plugins of a group, in the order of `sys.path`, and what could not be read.

    Example:
        >>> find("capdistill.example")
        ([], [])
    """
    unreadable: list[str] = []
    try:
        entries = list(metadata.entry_points(group=group))
    except Exception:  # one distribution with unreadable metadata ends the whole listing
        entries = list(_one_by_one(group, unreadable))
    unique: dict[tuple[str, str], Plugin] = {}
    for entry in entries:
        plugin = Plugin(entry, *_owner(entry.dist))
        unique.setdefault((_canonical(plugin.distribution), entry.name), plugin)
    return list(unique.values()), unreadable


def _one_by_one(group: str, unreadable: list[str]) -> Iterator[metadata.EntryPoint]:
    for distribution in metadata.distributions():
        try:
            yield from distribution.entry_points.select(group=group)
        except Exception as cause:
            owner = " ".join(_owner(distribution))
            unreadable.append(
                f"The entry points of {owner} cannot be read ({type(cause).__name__}: {cause}) "
                f"and are left out of '{group}'. Reinstall or uninstall it."
            )


def _owner(distribution: metadata.Distribution | None) -> tuple[str, str]:
    if distribution is None:
        return _NOBODY
    try:
        found = distribution.metadata
        return found["Name"] or _NOBODY[0], found["Version"] or _NOBODY[1]
    except Exception:  # no METADATA, or one that cannot be read
        return _NOBODY


def _subclass(loaded: object, base: type[T]) -> type[T]:
    if isinstance(loaded, type) and issubclass(loaded, base):
        return loaded
    raise TypeError(f"{loaded!r} is not a subclass of {base.__module__}.{base.__qualname__}")


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
