"""Image files: those that a name in a caption file may mean, those below a folder, other places."""

from __future__ import annotations

import os
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Finder = Callable[[str], list[Path]]

_PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES = {*_PHOTOS, ".avif", ".heic", ".heif", ".jp2", ".pgm", ".ppm"}


class StoredImage(ABC):
    """An image that is no file of its own, but lies in a larger file or in another data set.

    It stands where a path does: in `Example.path`, and as an argument of `read_image`. `str` gives
    its name in messages.
    """

    @abstractmethod
    def load(self) -> Any:
        """The image in a form that `read_image` takes: its bytes, an image of Pillow, ..."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of the content. It is the same wherever the image is stored."""

    def stat(self) -> Any:
        """As `Path.stat`, where the size is known.

        Raises:
            OSError: it is not.
        """
        raise FileNotFoundError(f"{self} is no file of its own.")

    def stamp(self) -> Sequence[int] | None:
        """Numbers that change when the image may have changed; None if nothing tells."""
        return None


def image_finder(*roots: Path) -> Finder:
    """A function from a name in a caption file to the image files that it may mean.

    The file of that very name comes first, then that with `/` for `\\`. Otherwise the name may lack
    its suffix (`dog` for `dog.jpg`), be in another case (`DOG.JPG`), or be a number without its
    zeros (`12` for `00012.png`); it is then found if just one file matches.

    Args:
        roots: The directories that names are relative to. No name leads out of them.
    """
    listings: dict[Path, list[Path]] = {}

    def images_in(folder: Path) -> list[Path]:
        if folder not in listings:
            listings[folder] = _images(folder)
        return listings[folder]

    def find(name: str) -> list[Path]:
        return matches(name) or (matches(name.replace("\\", "/")) if "\\" in name else [])

    def matches(name: str) -> list[Path]:
        inside = [root / _file_name(name) for root in roots if _stays_inside(root, name)]
        exact = next((path for path in inside if os.path.isfile(path)), None)
        if exact is not None:
            return [exact]
        stem = _normal(Path(name).name)
        near = [file for path in inside for file in images_in(path.parent)]
        same = [file for file in near if stem in (_normal(file.stem), _normal(file.name))]
        if not same:
            stem = stem.casefold()
            names = [
                (_normal(file.stem).casefold(), _normal(file.name).casefold()) for file in near
            ]
            same = [file for file, each in zip(near, names, strict=True) if stem in each]
        number = _number(stem)
        if not same and number is not None:
            same = [file for file in near if _number(file.stem) == number]
        return list({os.path.realpath(file): file for file in same}.values())

    return find


def images_below(folder: Path) -> list[Path]:
    """The images in a folder and in its folders, sorted; hidden ones are left out.

    Links to folders are followed, each folder once: a link may lead to a folder that holds it.
    """
    found = []
    entered = {os.path.realpath(folder)}
    for directory, inner, names in os.walk(folder, followlinks=True):
        visible = sorted(name for name in inner if not name.startswith("."))
        places = {name: os.path.realpath(os.path.join(directory, name)) for name in visible}
        inner[:] = [name for name in visible if places[name] not in entered]
        entered.update(places.values())
        paths = [Path(directory, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if _is_image(path)]
    return sorted(found)


def _images(folder: Path) -> list[Path]:
    try:
        return [file for file in sorted(folder.iterdir()) if _is_image(file)]
    except OSError:
        return []


def _is_image(path: Path) -> bool:
    """Whether this may be an image file: a pipe would be waited for, a folder cannot be read."""
    if path.suffix.lower() not in SUFFIXES:
        return False
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # whoever reads it reports what is wrong


def _file_name(name: str) -> str:
    """The name as the operating system has it, also where the locale cannot encode it."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return os.fsdecode(name.encode("utf-8", "surrogatepass"))
    return name


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS stores accents as separate characters


def _number(name: str) -> int | None:
    digits = name.removesuffix(".0")  # an id of a column that pandas turned into floats
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 40 else None


def _stays_inside(root: Path, name: str) -> bool:
    if not name or "\0" in name or ".." in Path(name).parts:
        return False
    return not Path(name).is_absolute() or Path(name).is_relative_to(root)
