"""What is in the sdist and the wheel, and whether their metadata would be accepted."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

LARGEST_WHEEL = 3_000_000
IN_WHEEL = [
    r"capdistill/__init__\.py",
    r"capdistill/py\.typed",
    r"capdistill/data/sample/.*\.jpg",
    r"capdistill/data/sample/.*\.json",
    r"capdistill/data/sample/.*\.(md|txt)",
    r"capdistill/deploy/page/.*\.(js|html|css)",
    r"capdistill/metrics/wordnet/synonyms\.txt\.gz",
    r"capdistill/metrics/wordnet/LICENSE",
    r"capdistill/metrics/meteor15/synonyms\.txt\.gz",
    r"capdistill/metrics/meteor15/LICENSE",
    r"capdistill-[^/]+\.dist-info/licenses/LICENSE",
    r"capdistill-[^/]+\.dist-info/entry_points\.txt",
]
IN_SDIST = [
    r"pyproject\.toml",
    r"README\.md",
    r"LICENSE",
    *(f"src/{each}" for each in IN_WHEEL[:10]),
]


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"check_dist: {message}")


def check_names(archive: Path, names: list[str], wanted: list[str]) -> None:
    for pattern in wanted:
        found = any(re.fullmatch(pattern, name) for name in names)
        require(found, f"{archive.name} holds no file that matches {pattern}")


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        text = next(wheel.read(name) for name in names if name.endswith(".dist-info/METADATA"))
    check_names(path, names, IN_WHEEL)
    stray = [name for name in names if not re.match(r"capdistill(/|-[^/]+\.dist-info/)", name)]
    stray += [name for name in names if re.search(r"(^|/)(tests?|__pycache__)/", name)]
    require(not stray, f"{path.name} holds files that do not belong there: {stray[:5]}")
    size = path.stat().st_size
    require(size < LARGEST_WHEEL, f"{path.name} has {size} bytes; {LARGEST_WHEEL} are allowed")
    check_metadata(text)
    print(f"{path.name}: {len(names)} files, {size / 1e6:.2f} MB")


def check_metadata(text: bytes) -> None:
    found = Metadata.from_email(text, validate=True)
    require(found.license_expression == "Apache-2.0", f"license is {found.license_expression!r}")
    require(found.description_content_type == "text/markdown", "README is not Markdown")
    require(len((found.description or "").strip()) > 100, "README is empty")
    require(not re.search(r"\+\w", str(found.version)), f"{found.version} is a local version")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    check_names(path, names, IN_SDIST)
    print(f"{path.name}: {len(names)} files, {path.stat().st_size / 1e6:.2f} MB")


def main(folder: Path) -> None:
    wheels, sdists = list(folder.glob("*.whl")), list(folder.glob("*.tar.gz"))
    require(len(wheels) == len(sdists) == 1, f"one wheel and one sdist expected in {folder}")
    check_wheel(wheels[0])
    check_sdist(sdists[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
